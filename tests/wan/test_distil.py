"""Routers and gates learn on a downloaded model, and their file serves that model alone."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from freqformer.config import ConfigError
from freqformer.diffusion.sampling import SampleConfig, make_step, sample
from freqformer.evaluate.draw import draw
from freqformer.evaluate.learned import Learned
from freqformer.evaluate.pretrained import Pretrained
from freqformer.grid.layout import TileLayout
from freqformer.methods.registry import METHODS, method_class
from freqformer.model.config import AttentionConfig
from freqformer.model.leaves import flatten
from freqformer.model.wan import WanConfig, WanDiT
from freqformer.train.distil import (
  DistilConfig,
  Keeper,
  Stopped,
  beside_dense,
  make_loss,
  own_leaves,
)
from tests.command.process import ROOT, call
from tests.wan.helpers import WEIGHTS, write_model
from tools import offline
from tools.program_cost import program_cost

# One worker: what the file prepares is then made once.
pytestmark = [
  pytest.mark.filterwarnings("ignore:.*found in sys.modules"),
  pytest.mark.xdist_group("wan_distil"),
]

ROUTED = "freqformer(window=(1, 1, 1), mid_tiles=3, router=dict(noise=0.0, budget=0.4))"
ON_THE_SPOT = "freqformer.methods.distilled._with_gradient"
_LAYOUT = TileLayout.fit((8, 16, 16), 128)
LEARNING = [name for name in METHODS if method_class(name)().has_parameters(_LAYOUT, 6, 64)]
SMALL = dict(frames=5, size=(64, 64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write_model(tmp_path_factory.mktemp("model") / "Wan-tiny")


@pytest.fixture(scope="module")
def pipe(folder):
  return Pretrained(folder, block=4, cache=folder.parent / "prompts")


@pytest.fixture(scope="module")
def learned(pipe):
  config = DistilConfig(passes=3, lr=0.05)
  return pipe.distil(["a cat", "a dog"], ROUTED, steps=3, config=config, progress=False, **SMALL)


# ---- the gradient -----------------------------------------------------------------------------


def evaluation(run, train=True):
  """Returns a function of a model's parameters: its layers' losses, their aux and the velocity."""
  graphdef = nnx.graphdef(run.model)
  x = jax.random.normal(jax.random.key(0), (2, *run.latent_shape))
  text = jax.random.normal(jax.random.key(1), (2, 5, run.model.config.text_width))
  tables = run.model.tables(run.latent_shape)

  def loss(params):
    args = (x, jnp.array([0.3, 0.7]), text, tables)
    velocity, _, (aux,) = nnx.merge(graphdef, params)(*args, train=train)
    return aux.get("loss", jnp.zeros(())).sum(), (aux, velocity)

  return loss


def forward(run):
  """Returns aux and velocity of an evaluation as in sampling."""
  return jax.jit(evaluation(run, train=False))(run.params)[1]


def gradients(run):
  """Returns the gradients of the layers' losses in all parameters, aux and velocity."""
  found, (aux, velocity) = jax.jit(jax.grad(evaluation(run), has_aux=True))(run.params)
  return flatten(found), aux, velocity


@pytest.fixture(scope="module")
def routed(pipe):
  """The gradients of a routed method."""
  return gradients(pipe.beside_dense(ROUTED, **SMALL))


@pytest.fixture(scope="module")
def dense_velocity(pipe):
  return forward(pipe.at("dense", **SMALL))[1]


def test_the_method_beside_itself_has_no_error(pipe):
  aux, _ = forward(pipe.beside_dense("dense", **SMALL))
  assert aux["error"].shape == (2, 2, 3)  # layers, samples, heads
  np.testing.assert_allclose(aux["error"], 0, atol=1e-10)


@pytest.mark.parametrize("method", [ROUTED, "sparse_linear(critical=0.3)"])
def test_a_layer_passes_dense_attention_on_and_learns_as_by_a_backward_pass(
  pipe, routed, dense_velocity, method, monkeypatch
):
  run = pipe.beside_dense(method, **SMALL)
  own = own_leaves(run.params)
  inside, aux, velocity = routed if method == ROUTED else gradients(run)
  np.testing.assert_allclose(velocity, dense_velocity, atol=1e-5)
  assert aux["error"].min() > 0.01
  assert all(not x.any() for name, x in inside.items() if name not in own)
  monkeypatch.setattr(ON_THE_SPOT, lambda loss, module, _: loss(module))
  outside, _, _ = gradients(run)
  assert any(outside[name].any() for name in own)
  for name in own:
    scale = np.abs(outside[name]).max()
    np.testing.assert_allclose(inside[name], outside[name], atol=1e-4 * scale + 1e-9)


def test_a_router_learns_from_each_branch_s_own_error(pipe, routed):
  _, aux, _ = routed
  alone = []
  for allocation in ("(3, 0, 0)", "(0, 3, 0)", "(0, 0, 3)"):
    fixed = f"freqformer(window=(1, 1, 1), mid_tiles=3, allocation={allocation})"
    alone.append(forward(pipe.beside_dense(fixed, **SMALL))[0]["error"])
  wanted = np.sum(aux["probs"] * np.stack(alone, -1), -1)
  np.testing.assert_allclose(aux["error"], wanted, rtol=1e-3)
  assert np.ptp(alone, 0).max() > 0.01


@pytest.mark.parametrize("method", LEARNING)
def test_a_gradient_costs_what_a_forward_does(method, monkeypatch):
  """FLOPs as kernels are launched on Hopper, at a width where attention and MLP both count."""
  attention = AttentionConfig(((method, method_class(method)()),), method=method, block=128)
  config = beside_dense(
    WanConfig(attention, dtype="bfloat16", width=384, depth=2, heads=6, mlp=1024, text_length=128)
  )
  shape = (8, 32, 32, 16)
  model = nnx.eval_shape(lambda: WanDiT(config, shape, nnx.Rngs(0)))
  graphdef, params = nnx.split(model)
  own = own_leaves(params)
  sample = SampleConfig(steps=2, guidance=1.0, batch_size=1)
  state = jax.eval_shape(lambda: model.init_state(1, shape))
  noisy = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
  text = jax.ShapeDtypeStruct((1, 128, config.text_width), jnp.float32)
  weights = jnp.ones((1, 2))
  args = ((noisy,), text, jnp.float32(0.5), weights, model.tables(shape), state)

  loss = make_loss(graphdef, sample)

  def run(fn):
    def program(params, own, key, *args):
      return fn(own, {"progress": 0.5, "rng": key}, params, *args)

    with jax.sharding.use_abstract_mesh(offline.mesh().abstract_mesh):
      return program_cost(program, params, own, jax.random.key(0), *args)

  learning = run(jax.grad(loss, has_aux=True))
  monkeypatch.setattr(ON_THE_SPOT, lambda loss, module, _: loss(module))
  forward = run(loss)
  assert forward.kernels["attention_forward"].flops > 0.1 * forward.flops
  # No kernel of a backward pass: what acts within attention, octaves' gains, does not learn.
  assert learning.kernels.keys() == forward.kernels.keys()
  assert forward.flops <= learning.flops <= 1.05 * forward.flops


# ---- learning ---------------------------------------------------------------------------------


def error(pipe, method, learned=None):
  """Returns the mean error of a method, as it samples, over a trajectory of its own noise."""
  run = pipe.beside_dense(method, **SMALL, learned=learned)
  config = pipe.sampling(3)
  texts = pipe.embed(["cats"])
  step = make_step(nnx.graphdef(run.model), config)
  tables = run.model.tables(run.latent_shape)
  args = (step, run.params, run.model, texts.embeddings, [0], 7, tables, run.latent_shape, config)
  _, auxes = sample(*args, progress=False, null=texts.negative)
  return np.mean([aux["error"] for (aux,) in auxes])


def test_routers_learn_and_the_model_stays(pipe, learned):
  assert learned.facts["steps"] == 2 * 3 * 3
  assert error(pipe, ROUTED, learned) < 0.9 * error(pipe, ROUTED)
  dense = pipe.at("dense", **SMALL)
  student = pipe.at(**SMALL, learned=learned)
  assert student.model.config == pipe.config(ROUTED)
  base, own = flatten(dense.params), flatten(student.params)
  assert all(own[name] is base[name] for name in base)
  assert own.keys() - base.keys() == learned.arrays.keys() == own_leaves(student.params).keys()
  for name, array in learned.arrays.items():
    np.testing.assert_array_equal(own[name], array)


@pytest.mark.parametrize(
  "method, given, words",
  [
    ("dense", {}, "dense has no parameters of its own"),
    ("freqformer(router=dict(budget=0.001))", {}, "budget=0.001 cannot be kept"),
    (ROUTED, dict(frames=6), "5 and 9 are the nearest"),
    (ROUTED, dict(steps=0), "steps=0 must be at least 1"),
  ],
)
def test_what_cannot_learn_is_refused(pipe, method, given, words):
  with pytest.raises(ConfigError, match=words):
    pipe.distil(["s"], method, progress=False, **SMALL | given)


class Impatient(Keeper):
  def should_stop(self):
    return True


def test_a_run_that_is_asked_to_stop_says_so(pipe):
  with pytest.raises(Stopped):
    pipe.distil(["s"], ROUTED, progress=False, keeper=Impatient(), **SMALL)


# ---- the file ---------------------------------------------------------------------------------


def test_a_file_gives_the_same_leaves(pipe, learned, tmp_path):
  path = tmp_path / "routers.safetensors"
  learned.write(path)
  runs = [pipe.at(ROUTED, **SMALL, learned=own) for own in (path, learned)]
  found, wanted = (own_leaves(run.params) for run in runs)
  assert found.keys() == wanted.keys() == learned.arrays.keys()
  assert all((found[name] == wanted[name]).all() for name in wanted)
  facts = Learned.read(path).facts
  assert facts["prompts"] == 2 and facts["learning"]["passes"] == 3


def test_another_method_is_refused(pipe, learned):
  fields = ROUTED.removeprefix("freqformer(").removesuffix(")")
  window, rest = fields.split("), ", 1)
  assert pipe.is_of(learned, f"freqformer({rest}, {window}))")  # in another order
  with pytest.raises(ConfigError, match="was learned for freqformer.*, not for adaspa"):
    pipe.at("adaspa", **SMALL, learned=learned)
  with pytest.raises(ConfigError, match="not for freqformer.mid_tiles=2"):
    pipe.at("freqformer(mid_tiles=2)", **SMALL, learned=learned)


def test_another_base_is_refused(folder, pipe, learned, tmp_path):
  own = shutil.copytree(folder, tmp_path / "model")
  file = own / "transformer" / WEIGHTS
  tensors = load_file(file)
  file.touch()  # another date
  assert Pretrained(own).identity == pipe.identity
  tensors["blocks.1.ffn.net.2.weight"] += 1e-3
  save_file(tensors, file)
  with pytest.raises(ConfigError, match="other weights .*name the folder that it was learned on"):
    Pretrained(own, block=4).at(**SMALL, learned=learned)


def test_what_is_no_file_of_leaves_is_refused(pipe, learned, tmp_path):
  path = tmp_path / "a.safetensors"
  with pytest.raises(ConfigError, match="cannot be read"):
    pipe.at(**SMALL, learned=path)
  save_file({"a": np.zeros(2)}, path)
  with pytest.raises(ConfigError, match="does not say which method"):
    pipe.at(**SMALL, learned=path)
  name = "runs/0/attention/method/router/bias"
  arrays = {**learned.arrays, name: np.zeros((2, 3, 4))}
  with pytest.raises(ConfigError, match=r"router/bias is \(2, 3, 4\) there, \(2, 3, 3\) here"):
    pipe.at(**SMALL, learned=dataclasses.replace(learned, arrays=arrays))
  with pytest.raises(ConfigError, match="must end in .safetensors"):
    learned.write(tmp_path / "a.npz")


# ---- the commands -----------------------------------------------------------------------------


def test_the_commands(folder, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
  told = {"model.pretrained": folder, "model.method": ROUTED, "model.block": 4, "seed": 3}
  told |= {"data.size": (64, 64), "data.frames": 5, "sample.steps": 3, "train.lr": 0.05}
  flags = [f"--config.{name}={value}" for name, value in told.items()]
  flags = (f"--config={ROOT / 'configs/wan.py'}", "--workdir=run", *flags)
  described = call(tmp_path, "train.py", *flags, "--dry_run").stdout
  printed = call(tmp_path, "train.py", *flags)
  assert "learned.safetensors: 7 arrays" in printed.stdout and "6 steps" in printed.stdout
  assert "error by layer after 3 steps: " in printed.stderr
  path = tmp_path / "run" / "learned.safetensors"
  wanted = Learned.read(path).arrays
  assert f"{sum(x.size for x in wanted.values()):,} numbers in 7 arrays of freq" in described

  # ---- goes on from the first of two trajectories, to the same numbers ----
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
  path.unlink()
  printed = call(tmp_path, "train.py", *flags)
  assert "resumed at step 3" in printed.stderr
  for name, array in Learned.read(path).arrays.items():
    np.testing.assert_array_equal(array, wanted[name])
  rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
  assert [row["trajectory"] for row in rows] == [0, 1] and len(rows[1]["error_by_layer"]) == 2
  printed = call(tmp_path, "train.py", *flags, "--config.train.lr=0.01", code=2)
  assert "is of a run with another config.train.lr: 0.05, now 0.01" in printed.stderr
  other = "--config.data.prompts=a cat;a bird"
  printed = call(tmp_path, "train.py", *flags, other, code=2)
  assert "another texts: ['a cat', 'a dog'], now ['a cat', 'a bird']" in printed.stderr
  printed = call(tmp_path, "train.py", *flags, "--profile=1:2", code=2)
  assert "--profile is of training" in printed.stderr

  given = (f"--pretrained={folder}", "--prompts=prompts.txt", "--size=64x64", "--frames=5")
  given += ("--block=4", "--steps=3")
  call(tmp_path, "eval.py", *given, f"--learned={path}", "--out=out")
  result = json.loads((tmp_path / "out" / "comparison.json").read_text())
  assert [row["method"] for row in result["rows"]] == [ROUTED]
  assert result["learned"] == {ROUTED: str(path)}
  other = (f"--learned={path}", "--method=adaspa")
  printed = call(tmp_path, "eval.py", *given, *other, code=2)
  assert "which is not among the methods adaspa" in printed.stderr
  printed = call(tmp_path, "train.py", flags[0], code=2)
  assert "config.model.pretrained is empty" in printed.stderr


# ---- what needs no learning -------------------------------------------------------------------


@pytest.mark.parametrize(
  "method",
  [
    "freqformer(allocation=measured, window=(1, 1, 1), mid_tiles=2)",
    "adaspa(sparsity=0.5)",
    "sliding_tile(window=(1, 3, 3), unit=tiles)",
    "radial(decay=0.2)",
    "block_topk(density=0.3, coarse=none)",
  ],
)
def test_training_free_methods_run_as_they_are(pipe, method):
  run = pipe.at(method, **SMALL)
  assert flatten(run.params).keys() == flatten(pipe.at("dense", **SMALL).params).keys()
  config = pipe.sampling(5, guidance=1.0)
  drawn = draw(run, pipe.embed(["a cat"]).embeddings, np.arange(1), 0, config, progress=False)
  assert np.isfinite(drawn.latents).all()
  assert drawn.density[-1].mean() < 0.9
