"""Runs that start from another run's weights, and runs that train the method's parameters alone."""

import json
import logging
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from freqformer.config import ConfigError
from freqformer.cost import model_cost
from freqformer.model.dit import VideoDiT
from freqformer.model.leaves import flatten
from freqformer.train.checkpoint import Checkpoints
from freqformer.train.experiment import experiment
from freqformer.train.metrics import read
from freqformer.train.origin import Origin
from freqformer.train.run import train
from tests.command.test_fields import small

pytestmark = pytest.mark.xdist_group("origin")


def config_of(steps=2, **train):
  config = small(steps)
  config.model.depth = 2
  config.train.update(val_every=0, lr=0.1, ema=0.5, weight_decay=0.5, **train)
  return config


def begun(workdir, **train):
  """A run of one dense layer and one of top-k, whose gate is new."""
  config = config_of(init_from=str(workdir), **train)
  config.model.attention.layers = ((0, 1, "dense"), (1, None, "block_topk(density=0.5)"))
  return config


def arrays(workdir):
  return Checkpoints(workdir, create=False)._manager.restore(2)["arrays"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("dense")
  train(config_of(), workdir)
  return workdir


@pytest.fixture(scope="module")
def gated(dense, tmp_path_factory):
  """A run that trained a gate on the dense run's weights, by dense attention of each layer."""
  workdir = tmp_path_factory.mktemp("gated")
  train(begun(dense, freeze="backbone", distill=0.5, distill_at="layers"), workdir)
  return workdir


def losses(workdir):
  return [row["distill_loss"] for row in read(workdir / "metrics.jsonl") if row["kind"] == "train"]


@pytest.mark.parametrize("at", ["output", "layers"])
def test_the_teacher_is_dense_attention_of_the_same_weights(dense, gated, tmp_path, at):
  assert len(losses(gated)) == 2 and min(losses(gated)) > 1e-3
  train(config_of(steps=1, init_from=str(dense), distill=0.5, distill_at=at), tmp_path)
  assert losses(tmp_path)[0] < 1e-12
  cheap, whole = (read(place / "metrics.jsonl")[0]["flops"] for place in (dense, tmp_path))
  exp = experiment(config_of())
  forward = model_cost(exp.model, exp.latent_shape)
  more = forward.total if at == "output" else forward.attention_flops
  assert whole - cheap == pytest.approx(exp.train.batch_size * more)


def test_only_the_new_gate_is_trained(dense, gated):
  source = arrays(dense)
  found = arrays(gated)
  gates = [name for name in found if "/method/" in name and name.startswith("params/")]
  assert gates and all(np.abs(found[name]).max() > 0 for name in gates)  # it begins at 0
  moments = [name for name in found if "/mu/" in name]
  assert moments and all("/method/" in name for name in moments)
  kept = 0
  for name, array in found.items():
    kind, _, rest = name.partition("/")
    if kind in ("params", "ema") and "/method/" not in rest:
      wanted = source[f"ema/{rest.replace('runs/1/', 'runs/0/')}"]
      if rest.startswith("runs/"):
        wanted = wanted[int(rest[5])][None]  # the layer
      np.testing.assert_array_equal(array, wanted)  # the average, too
      kept += 1
  assert kept > 50


def test_the_record_says_where_it_began_and_a_resumed_run_does_not_read_it(dense, gated, tmp_path):
  record = Checkpoints(gated, create=False).record()["init_from"]
  assert record == json.loads((gated / "run.json").read_text())["init_from"]
  assert record["path"] == str(dense) and record["step"] == 2
  assert record["matched"] > 20 and not record["left_over"]
  assert record["new"] and all("layer 1/method BlockTopK/" in name for name in record["new"])
  shutil.copytree(gated, tmp_path, dirs_exist_ok=True)
  again = begun(tmp_path / "gone", freeze="backbone", distill=0.5)
  again.train.steps = 3
  train(again, tmp_path)
  assert losses(tmp_path)[2] > 1e-9  # of the output, now
  later = Checkpoints(tmp_path, create=False).record()
  assert later["step"] == 3 and later["init_from"] == record


def test_a_dense_run_leaves_the_gate_over(dense, gated, caplog):
  """From two runs of layers to one, of a step by its number."""
  origin = Origin.read(f"{gated}:2")
  with caplog.at_level(logging.INFO):
    exp, facts = origin.fitted(config_of(init_from="any"))
  assert facts["left_over"] and not facts["new"]
  told = f"from step 2 of {gated}: {facts['matched']} arrays taken; new: none; left over: layer 1/"
  assert told in caplog.text
  model = nnx.state(nnx.eval_shape(lambda: VideoDiT(exp.model, exp.latent_shape, 9, nnx.Rngs(0))))
  fresh = nnx.map_state(lambda _, x: x.replace(jnp.zeros(x.shape)), model)
  found = flatten(origin.into(fresh, exp))
  source = arrays(dense)
  assert {f"ema/{name}" for name in found} == {name for name in source if name[:4] == "ema/"}
  for name, array in found.items():
    np.testing.assert_array_equal(array, source[f"ema/{name}"])


def test_a_file_of_weights_starts_the_same_run(gated, tmp_path):
  path = tmp_path / "new" / "gated.safetensors"
  Origin.read(str(gated)).write(path)
  before, after = (Origin.read(str(place)) for place in (gated, path))
  assert before.arrays.keys() == after.arrays.keys()
  for name, array in before.arrays.items():
    np.testing.assert_array_equal(after.arrays[name], array)
  told = before.record["config"]["train"]["init_from"]
  assert after.record["config"]["train"]["init_from"] == pathlib.Path(told).name
  assert str(pathlib.Path(told).parent) not in json.dumps(after.record)
  (there, facts), (same, own) = (
    each.fitted(begun(gated, freeze="backbone")) for each in (before, after)
  )
  assert there == same and own == facts | {"path": str(path)}
  assert facts["matched"] == len(before.arrays) and not facts["new"] and not facts["left_over"]
  after.check_statistics(before.record["statistics"])
  wider = begun(gated)
  wider.model.width = 48
  with pytest.raises(ConfigError, match=r"step 2 of .*gated.safetensors does not fit: embed/bias"):
    after.fitted(wider)


def test_files_that_are_not_of_a_run_are_refused(gated, tmp_path):
  with pytest.raises(ConfigError, match="must end in .safetensors"):
    Origin.read(str(gated)).write(tmp_path / "weights.npz")
  other = tmp_path / "other.safetensors"
  with pytest.raises(ConfigError, match="other.safetensors cannot be read"):
    Origin.read(str(other))
  save_file({"a": np.zeros(2)}, other)
  with pytest.raises(ConfigError, match="does not say what model its 1 arrays are of"):
    Origin.read(str(other))
  save_file({"a": np.zeros(2)}, other, {"freqformer": '{"schema": 0, "git": "an earlier one"}'})
  with pytest.raises(ConfigError, match=r"schema 0, this code reads 1; .* \(an earlier one\)"):
    Origin.read(str(other))
  other.write_bytes(b"no weights")
  with pytest.raises(ConfigError, match="other.safetensors cannot be read"):
    Origin.read(str(other))


@pytest.mark.parametrize(
  "model, message",
  [
    (dict(width=48), r"embed/bias is \(24,\) there, \(48,\) here.*only what belongs"),
    (dict(depth=1), "layer 1/attention/k_norm/scale is unknown here"),
    (dict(positions=not config_of().model.positions), "position/kernel is"),
    (dict(patch=(2, 1, 1)), r"model.patch is \(1, 1, 1\) there, \(2, 1, 1\) here"),
  ],
)
def test_another_model_is_refused(dense, model, message):
  config = config_of(init_from=str(dense))
  config.model.update(model)
  with pytest.raises(ConfigError, match=message):
    Origin.read(str(dense)).fitted(config)


def test_what_cannot_be_is_refused_in_a_sentence(dense, tmp_path):
  with pytest.raises(ConfigError, match="no checkpoints under .*nothing"):
    train(config_of(init_from=str(tmp_path / "nothing")), tmp_path / "run")
  with pytest.raises(ConfigError, match=r"no checkpoint of step 7 .* there are \[2\]"):
    Origin.read(f"{dense}:7")
  with pytest.raises(ConfigError, match="leaves nothing to train: attention method 'dense'"):
    train(config_of(init_from=str(dense), freeze="backbone"), tmp_path / "run")
  with pytest.raises(ConfigError, match="freeze='backbone' needs trained weights"):
    experiment(config_of(freeze="backbone"))
  origin = Origin.read(str(dense))
  other = config_of(init_from=str(dense))
  other.data.labels = "none"
  with pytest.raises(ConfigError, match="the class map is .* there, .* here"):
    origin.fitted(other)
  statistics = origin.record["statistics"]
  origin.check_statistics(statistics)
  with pytest.raises(ConfigError, match=r"by up to 1\); train.init_from needs the same codec"):
    origin.check_statistics(statistics | {"std": [x + 1 for x in statistics["std"]]})
