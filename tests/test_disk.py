"""A full disk is one sentence that says what is needed, what is free and what is intact."""

import errno
import os
import pathlib
import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from freqformer import disk
from freqformer.command import cli
from freqformer.config import ConfigError
from freqformer.train import metrics
from freqformer.train.checkpoint import Checkpoints

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def caused(error, cause=None, context=None):
  error.__cause__, error.__context__ = cause, context
  return error


LOOP = RuntimeError("a")
LOOP.__context__ = ValueError("b")
LOOP.__context__.__context__ = LOOP


@pytest.mark.parametrize(
  "error, full",
  [
    (FULL, True),
    (OSError(errno.EDQUOT, "x"), True),
    (OSError(errno.EFBIG, "x"), True),
    (OSError(errno.EACCES, "x"), False),
    (RuntimeError("write() failed: No space left on device; at byte 7"), True),
    (ValueError("RESOURCE_EXHAUSTED: out of memory on the device"), False),
    (caused(ValueError("x"), cause=caused(KeyError("y"), context=FULL)), True),
    (ExceptionGroup("x", [ValueError("y"), FULL]), True),
    (LOOP, False),
  ],
)
def test_a_full_disk_is_known_behind_other_errors(error, full):
  assert disk.is_full(error) == full


@pytest.fixture
def free(monkeypatch):
  """Returns a function that says how many bytes are free."""

  def of(count):
    monkeypatch.setattr(
      disk.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=count, path=path)
    )

  return of


def test_other_errors_are_not_called_a_full_disk(tmp_path, free):
  free(100_000)
  with pytest.raises(KeyError), disk.space_for("x", tmp_path):
    raise KeyError("x")
  with pytest.raises(ConfigError, match="^known$"), disk.space_for("x", tmp_path):
    raise ConfigError("known") from FULL
  wanted = "^no space left in '.*/new/er': the table needs 2.5 MB, 100.0 kB are free; x is intact. "
  with pytest.raises(ConfigError, match=wanted):
    with disk.space_for("the table", tmp_path / "new" / "er", 2_500_000, lambda: "x is intact"):
      raise RuntimeError("x") from FULL


def test_commands_end_in_one_sentence(tmp_path, free, capsys):
  free(1_000)
  for error, place in (
    (OSError(errno.ENOSPC, "x", str(tmp_path / "file")), str(tmp_path)),
    (caused(RuntimeError("x"), cause=FULL), os.getcwd()),
  ):

    def fails(error=error):
      raise error

    with pytest.raises(SystemExit) as end:
      cli.guarded(fails)()
    (line,) = capsys.readouterr().err.strip().split("\n")
    assert end.value.code == 2 and f"no space left in {place!r}" in line


def test_a_file_is_written_whole_or_stays(tmp_path, monkeypatch):
  path = tmp_path / "run.json"
  disk.write_whole(path, "old")

  def fill(self, text, **_):
    self.touch()
    raise FULL

  monkeypatch.setattr(pathlib.Path, "write_text", fill)
  with pytest.raises(OSError):
    disk.write_whole(path, "new")
  assert path.read_text() == "old" and os.listdir(tmp_path) == ["run.json"]


def test_records_of_a_run_survive_a_resume_on_a_full_disk(tmp_path, monkeypatch):
  def begin():
    found = metrics.Metrics(tmp_path)
    found.start(1, ConfigDict(), {})
    return found

  begin().write(1, "val", loss=2.0)
  before = {path: path.read_text() for path in tmp_path.iterdir()}
  assert len(before) == 3
  monkeypatch.setattr(pathlib.Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(FULL))
  with pytest.raises(OSError):
    begin()
  assert {path: path.read_text() for path in tmp_path.iterdir()} == before


STATE = {"weights": np.zeros(1000, np.float32), "step": np.int32(3)}  # 4004 bytes


@pytest.mark.parametrize(
  "count, saved, outcome",
  [
    (4_003, (), "a checkpoint needs 4.0 kB, 4.0 kB are free; there is no earlier checkpoint"),
    (4_003, (5,), "step 5 is intact"),
    (4_004, (), None),
    (12_011, (), None),  # keep + 1 of them do not fit
    (12_012, (), ""),
    (4_004, (1, 2), ""),  # in whose place the new ones come
  ],
)
def test_space_is_compared_before_the_first_step(tmp_path, free, count, saved, outcome, caplog):
  """In a refusal, a warning (None), or silence ("")."""
  checkpoints = Checkpoints(tmp_path, keep=2)
  for step in saved:
    checkpoints.save(step, {"x": np.zeros(1)}, {})
  free(count)
  if outcome:
    with pytest.raises(ConfigError, match=outcome):
      checkpoints.check_space(STATE)
  else:
    checkpoints.check_space(STATE)
    assert ("lower train.keep" in caplog.text) == (outcome is None)
  checkpoints.close()


@pytest.mark.parametrize("others_write", [False, True])
def test_a_checkpoint_that_does_not_fit_names_the_one_before(
  tmp_path, free, monkeypatch, others_write
):
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(5, STATE, {"x": 1})
  free(1_500)

  def fill(step, args):
    part = checkpoints.path / f"{step}.orbax-checkpoint-tmp"
    part.mkdir()
    (part / "half").touch()
    raise ValueError("x") from FULL

  monkeypatch.setattr(checkpoints._manager, "save", fill)
  if others_write:  # the space was there when it was looked at
    counts = iter((9_000, 1_500))
    monkeypatch.setattr(disk, "free_bytes", lambda _: next(counts))
  message = "the checkpoint of step 9 needs 4.0 kB, 1.5 kB are free; step 5 is intact. Free some"
  with pytest.raises(ConfigError, match=message):
    checkpoints.save(9, STATE, {"x": 2})
  assert os.listdir(checkpoints.path) == ["5"]
  checkpoints.close()
  again = Checkpoints(tmp_path, create=False)
  assert again.record() == again.record(5) and again.record()["x"] == 1
