"""Checkpoints: exact round trip, refusals that name leaves or damage, changes between runs."""

import dataclasses
import errno
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from freqformer.command.files import read_config
from freqformer.config import ConfigError
from freqformer.evaluate import restore
from freqformer.model.dit import VideoDiT
from freqformer.train.checkpoint import SCHEMA, Checkpoints, Gone
from freqformer.train.experiment import experiment
from freqformer.train.resume import check_same_config, check_same_data, with_seed
from freqformer.train.step import init_state
from tests.command.process import ROOT, TINY
from tests.tiny_config import get_config
from tests.train.test_step import MODEL, SHAPE, TRAIN


def state_of(width=24):
  config = dataclasses.replace(MODEL, width=width)
  model = nnx.jit(lambda: VideoDiT(config, SHAPE, 2, nnx.Rngs(0)))()
  return init_state(nnx.state(model), TRAIN, 3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run")
  state = state_of()
  checkpoints = Checkpoints(workdir)
  checkpoints.save(5, state, {"iterator": "x", "latent_shape": SHAPE})
  checkpoints.save(9, state, {"iterator": "y", "latent_shape": SHAPE})
  return workdir, state, checkpoints


def test_round_trip(saved):
  workdir, state, _ = saved
  again = Checkpoints(workdir, create=False)
  assert again.latest() == 9 and again.steps() == [5, 9]
  restored = again.restore(jax.eval_shape(lambda: state))
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), restored, state)
  part = again.restore({"ema": state.ema}, ignore_extra=True)
  jax.tree.map(np.testing.assert_array_equal, part["ema"], state.ema)
  narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.ema)
  found = again.restore({"ema": narrow}, ignore_extra=True)["ema"]
  jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), found, narrow)
  record = again.record(5)
  assert record["iterator"] == "x" and record["step"] == 5
  assert record["versions"]["jax"] == jax.__version__


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_what_is_read_lies_where_the_template_says(tmp_path, kind):
  """NumPy's arrays are those of earlier versions."""
  leaf = kind(np.arange(6, dtype=np.float32))
  Checkpoints(tmp_path).save(1, {"x": leaf}, {})
  placed = jax.NamedSharding(jax.make_mesh((1,), ("a",)), jax.P("a"))
  template = {"x": jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=placed)}
  found = Checkpoints(tmp_path, create=False).restore(template)["x"]
  assert found.sharding == placed and found.dtype == jnp.bfloat16
  np.testing.assert_array_equal(found, leaf)


def test_another_shape_lists_the_leaves(saved):
  message = r"leaves that differ:\n  ema/embed/bias: \(24,\) in the checkpoint, .*\(48,\)"
  with pytest.raises(ConfigError, match=message):
    saved[2].restore(jax.eval_shape(lambda: state_of(48)))
  with pytest.raises(ConfigError, match="extra: missing in the checkpoint"):
    saved[2].restore({"extra": jnp.zeros(2), "params": saved[1].params})


def test_missing_checkpoints_say_what_to_do(tmp_path, saved):
  with pytest.raises(ConfigError, match="train first"):
    Checkpoints(tmp_path / "nothing", create=False)
  with pytest.raises(ConfigError, match="there are \\[5, 9\\]"):
    saved[2].record(7)


def test_a_later_version_s_checkpoint_is_refused(tmp_path):
  own = Checkpoints(tmp_path)
  own.save(1, {"x": np.zeros(2)}, {"git": "abc1234"})
  own.save(2, {"x": np.zeros(2)}, {"git": "abc1234", "schema": SCHEMA + 1})
  read = Checkpoints(tmp_path, create=False)
  assert read.record(1)["git"] == "abc1234"
  text = f"has schema {SCHEMA + 1}, this code reads {SCHEMA}; use the revision .*abc1234"
  with pytest.raises(ConfigError, match=text):
    read.record()


def test_a_file_in_the_place_of_checkpoints_is_found_out_at_once(tmp_path):
  (tmp_path / "checkpoints").touch()
  with pytest.raises(FileExistsError) as error:
    Checkpoints(tmp_path)
  assert error.value.filename == str(tmp_path / "checkpoints")  # of which commands make a sentence


def _cut(*files):
  for file in files:
    os.truncate(file, file.stat().st_size // 2)


DAMAGE = {
  "record gone": lambda step: shutil.rmtree(step / "record"),
  "record foreign": lambda step: (step / "record" / "metadata").write_text('{"a": 1}'),
  "no metadata": lambda step: (step / "arrays" / "_METADATA").unlink(),
  "record cut": lambda step: _cut(step / "record" / "metadata"),
  "arrays gone": lambda step: shutil.rmtree(step / "arrays"),
  "metadata cut": lambda step: _cut(step / "arrays" / "_METADATA"),
  "no manifest": lambda step: (step / "arrays" / "manifest.ocdbt").unlink(),
  "data cut": lambda step: _cut(*(step / "arrays").glob("**/d/*")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_said_to_be_one(saved, tmp_path, damage):
  """Whatever Orbax makes of it, and what to do: fall back to the step before, or start over."""
  shutil.copytree(saved[0], tmp_path / "run")
  for step, wayout in ((9, "to go on from step 5"), (5, "to start over")):
    DAMAGE[damage](tmp_path / "run" / "checkpoints" / str(step))
    checkpoints = Checkpoints(tmp_path / "run", create=False)
    message = rf"{step} is damaged and cannot be read \((.|\n)*; delete that folder {wayout}"
    with pytest.raises(ConfigError, match=message):
      checkpoints.record(step)
      checkpoints.restore({"ema": saved[1].ema}, step, ignore_extra=True)


def _deleted(step):
  shutil.rmtree(step)


def _half_deleted_for_a_newer_one(step):
  shutil.copytree(step, step.with_name("12"))
  shutil.rmtree(step / "record")
  (step / "arrays" / "_METADATA").unlink()


@pytest.mark.parametrize("read", ["record", "restore"])
@pytest.mark.parametrize("rotate", [_deleted, _half_deleted_for_a_newer_one])
def test_a_checkpoint_that_training_rotates_away_is_not_called_damaged(
  saved, tmp_path, read, rotate
):
  shutil.copytree(saved[0], tmp_path / "run")
  checkpoints = Checkpoints(tmp_path / "run", create=False)
  rotate(checkpoints.path / "9")
  with pytest.raises(Gone, match="9 was deleted while it was read.*there are .*same command again"):
    checkpoints.record() if read == "record" else checkpoints.restore({"ema": saved[1].ema})
  # Those that are there can be read by the same reader.
  assert checkpoints.record()["step"] in (5, 9)


def test_leaves_that_are_deleted_while_they_are_listed_are_no_other_model(
  saved, tmp_path, monkeypatch
):
  shutil.copytree(saved[0], tmp_path / "run")
  checkpoints = Checkpoints(tmp_path / "run", create=False)

  def nothing(step):
    shutil.copytree(checkpoints.path / str(step), checkpoints.path / "12")
    return {"arrays": {}}

  monkeypatch.setattr(checkpoints._manager, "item_metadata", nothing)
  with pytest.raises(Gone, match=r"9 was deleted while it was read.*there are \[5, 9, 12\]"):
    checkpoints.restore({"ema": saved[1].ema})


def test_a_deletion_that_takes_a_while_is_waited_for(saved, tmp_path, monkeypatch):
  shutil.copytree(saved[0], tmp_path / "run")
  checkpoints = Checkpoints(tmp_path / "run", create=False)
  step = checkpoints.path / "5"  # it was asked for: no newer one comes meanwhile
  shutil.rmtree(step / "record")
  monkeypatch.setattr(time, "sleep", lambda seconds: seconds and shutil.rmtree(step))
  with pytest.raises(Gone, match=r"there are \[9\]"):
    checkpoints.record(5)


@pytest.mark.parametrize(
  "rotations, step, loads", [(0, None, 1), (4, None, 5), (5, None, 0), (1, 3, 0)]
)
def test_the_newest_checkpoint_is_tried_again(monkeypatch, rotations, step, loads):
  """The newest one until it is read; one that was asked for once."""
  calls = []

  def load(workdir, step, method, raw, schedule):
    calls.append(step)
    if len(calls) <= rotations:
      raise Gone("x") if len(calls) % 2 else FileNotFoundError("x")
    return "run"

  monkeypatch.setattr(restore, "_load", load)
  if loads:
    assert restore.load_run("x", step=step) == "run" and len(calls) == loads
  else:
    with pytest.raises(Gone):
      restore.load_run("x", step=step)


@pytest.mark.parametrize(
  "losses, keep, stay, best",
  [
    # By step, from 1 on; None: the run did not validate there.
    ([3.0, 1.0, 2.0, 4.0, 5.0], 2, [2, 4, 5], 2),
    ([3.0, 1.0, 2.0, 0.5, 5.0], 2, [4, 5], 4),
    ([3.0, 1.0, 2.0, 4.0, 5.0], 1, [2, 5], 2),
    ([3.0, 1.0, 2.0, 4.0, 1.0], 1, [5], 5),  # of equal ones the newer
    ([None, 2.0, None, None, None], 2, [2, 4, 5], 2),
    ([None] * 5, 2, [4, 5], None),
  ],
)
def test_the_best_checkpoint_stays_beside_the_newest(tmp_path, losses, keep, stay, best):
  for step, loss in enumerate(losses, 1):  # each by a process of its own
    checkpoints = Checkpoints(tmp_path, keep, keep_best=True)
    checkpoints.save(step, {"x": np.full(2, step)}, {"val_loss": loss})
    checkpoints.close()
  found = Checkpoints(tmp_path, create=False)
  assert found.steps() == stay
  want = best and {"step": best, "val_loss": losses[best - 1]}
  assert found.best() == want
  if best:
    assert found.restore({"x": np.zeros(2)}, best)["x"].tolist() == [best] * 2


KILLED = """
import os, signal, sys
import numpy as np
import orbax.checkpoint as ocp
from freqformer.train.checkpoint import Checkpoints

checkpoints = Checkpoints(sys.argv[1])
for step in map(int, sys.argv[2:]):
  checkpoints.save(step, {"x": np.zeros(2)}, {})

async def kill(*_, **__):
  os.kill(os.getpid(), signal.SIGKILL)

ocp.JsonCheckpointHandler.async_save = kill
checkpoints.save(9, {"x": np.zeros(2)}, {})
"""


@pytest.mark.parametrize(
  "whole, goes_on", [(("5",), "going on from step 5"), ((), "starting over")]
)
def test_a_process_killed_while_it_saves_leaves_the_checkpoint_before(
  tmp_path, caplog, whole, goes_on
):
  line = [sys.executable, "-c", KILLED, str(tmp_path), *whole]
  assert subprocess.run(line, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
  folder = tmp_path / "checkpoints"
  (part,) = [path for path in folder.iterdir() if path.name not in whole]
  assert part.name.startswith("9.")
  checkpoints = Checkpoints(tmp_path)
  checkpoints.remove_unfinished()
  assert f"the checkpoint of step 9 was not finished; {goes_on}" in caplog.text
  assert sorted(path.name for path in folder.iterdir()) == list(whole)
  assert checkpoints.latest() == (5 if whole else None)


@pytest.fixture
def background(tmp_path, monkeypatch):
  """Checkpoints with a whole one of step 5, and a function that says what writing another does."""
  checkpoints = Checkpoints(tmp_path, in_background=True)
  checkpoints.save(5, {"x": np.zeros(2)}, {})
  checkpoints.wait()
  write = checkpoints._manager._wait_for_checkpointers

  def writing(action):
    monkeypatch.setattr(
      checkpoints._manager, "_wait_for_checkpointers", lambda: (action(), write())
    )

  return checkpoints, writing


def test_training_goes_on_while_a_checkpoint_is_written(background):
  checkpoints, writing = background
  goes_on = threading.Event()
  writing(goes_on.wait)
  step = jax.jit(lambda x: x + 1, donate_argnums=0)
  state = step(jnp.zeros(5000))
  checkpoints.save(6, {"x": state}, {"loss": 1})
  for _ in range(3):
    state = step(state)
    checkpoints.poll()
  assert checkpoints._writing
  goes_on.set()
  assert checkpoints.latest() == 6  # waits
  assert (checkpoints.restore({"x": np.zeros(5000)})["x"] == 1).all() and state[0] == 4
  assert checkpoints.record()["loss"] == 1


@pytest.mark.parametrize("noticed_by", ["poll", "save", "close"])
def test_a_disk_that_is_full_in_the_background_names_the_checkpoint_before(background, noticed_by):
  checkpoints, writing = background

  def fill():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  writing(fill)
  state = {"x": np.zeros(2)}
  checkpoints.save(6, state, {})
  notice = {
    "poll": lambda: [(checkpoints.poll(), time.sleep(0.01)) for _ in range(500)],
    "save": lambda: checkpoints.save(7, state, {}),
    "close": checkpoints.close,
  }
  with pytest.raises(ConfigError, match="the checkpoint of step 6 needs .* step 5 is intact. Free"):
    notice[noticed_by]()
  assert checkpoints.steps() == [5]


def test_without_the_key_the_newest_stay_alone(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=1)
  for step, loss in enumerate((3.0, 1.0, 2.0), 1):
    checkpoints.save(step, {"x": np.zeros(1)}, {"val_loss": loss})
  assert checkpoints.steps() == [3]


def changed(values):
  config = read_config(TINY)
  config.update_from_flattened_dict(values)
  return experiment(config, get_config().to_dict())


WINDOW = "model.attention.freqformer.window"


@pytest.mark.parametrize(
  "values, refused",
  [
    ({"seed": 9}, "seed 0 -> 9"),
    ({"train.batch_size": 3}, "train.batch_size 2 -> 3"),
    ({"data.views": 3}, "data.views 2 -> 3"),
    ({"model.attention.method": "dense"}, "model.attention.method 'freqformer' -> 'dense'"),
    ({WINDOW: (2, 2, 2)}, f"{WINDOW} [1, 1, 2] -> [2, 2, 2]"),
    ({"train.steps": 41, "train.lr": 0.5}, None),
    ({"data.root": "moved", "data.workers": 3, "sample.steps": 9}, None),
    ({"model.attention.implementation": "xla"}, None),
  ],
)
def test_another_config_is_said_or_refused(values, refused, caplog):
  record = {"step": 7, "config": get_config().to_dict()}
  new = changed(values)
  if refused:
    with pytest.raises(ConfigError, match=f"{re.escape(refused)}.*new --workdir.*--resume_changed"):
      check_same_config(record, new)
  assert len(check_same_config(record, new, allow=refused is not None)) == len(values)
  assert "changed since the checkpoint of step 7" in caplog.text


def test_what_runs_in_no_layer_is_no_change_and_a_new_seed_is_one():
  config = get_config()
  config.model.attention.method = "dense"
  record = {"step": 7, "config": config.to_dict()}
  other = changed({"model.attention.method": "dense", WINDOW: (2, 2, 2)})
  assert check_same_config(record, other) == {}
  old, fresh = state_of(), init_state({}, TRAIN, 4)
  assert with_seed(old, fresh, {"train.lr": [1, 2]}) is old
  np.testing.assert_array_equal(with_seed(old, fresh, {"seed": [3, 4]}).key, fresh.key)
  with pytest.raises(ConfigError, match="checkpoint of step 7 is not one of this code .*revision"):
    check_same_config({"step": 7, "config": {"model": {}}, "git": "abc"}, other)


RECORD = {
  "latent_shape": [2, 4, 4, 3],
  "class_names": ["A", "B"],
  "statistics": {"mean": [0.0, 1.0, 2.0], "std": [1.0, 1.0, 1.0]},
}


@pytest.mark.parametrize(
  "change, message",
  [
    (
      dict(latent_shape=[2, 4, 4, 8]),
      "trained on latents \\(2, 4, 4, 3\\), the cache holds \\(2, 4, 4, 8\\)",
    ),
    (
      dict(statistics={"mean": [0.0, 1.5, 2.0], "std": [1.0, 1.0, 1.0]}),
      "latent statistics differ .*mean: by up to 0.5",
    ),
    (dict(class_names=["B", "A"]), "class map differs .*0: A -> B"),
  ],
)
def test_other_data_are_refused(change, message):
  check_same_data(RECORD, dict(RECORD))
  with pytest.raises(ConfigError, match=message):
    check_same_data(RECORD, {**RECORD, **change})
