"""The kill loop tells results apart by single bits, and names a process that fails by itself."""

import random
import subprocess
import sys
import types

import numpy as np
import pytest

from tools import kill_loop
from tools.kill_loop import Tally, differences, disturbed

ARRAYS = {"a": np.float32([1, 2]), "b": np.int32(3)}
LOSSES = {("train", 1): 0.5, ("val", 1): None}


@pytest.mark.parametrize(
  "arrays, losses, names",
  [
    (ARRAYS, LOSSES, []),
    (ARRAYS | {"a": np.nextafter(np.float32([1, 2]), np.float32(9))}, LOSSES, ["a"]),
    (ARRAYS | {"a": np.float64([1, 2])}, LOSSES, ["a"]),
    ({"a": ARRAYS["a"]}, LOSSES, ["b"]),
    (ARRAYS, LOSSES | {("train", 1): 0.5000001}, ["('train', 1)"]),
    (ARRAYS, {("train", 1): 0.5}, ["('val', 1)"]),
  ],
)
def test_differences(arrays, losses, names):
  assert differences((ARRAYS, LOSSES), (arrays, losses)) == names


@pytest.mark.parametrize(
  "program, wrong", [("pass", None), ("exit(3)", "a process ended with exit code 3")]
)
def test_processes_are_killed_until_one_ends(tmp_path, monkeypatch, program, wrong):
  """The first two sleep and are killed."""
  (tmp_path / "run.log").write_text("the checkpoint of step 4 was not finished; going on\n")
  programs = iter(["import time; time.sleep(60)"] * 2 + [program])

  def start(*_):
    return subprocess.Popen([sys.executable, "-c", next(programs)])

  monkeypatch.setattr(kill_loop, "start", start)
  rng = random.Random(1)
  moments = iter([0.1, 0.1, 60])
  monkeypatch.setattr(rng, "uniform", lambda *_: next(moments))
  tally = Tally()
  assert disturbed(tmp_path / "run", rng, 1.0, {}, tally) == wrong
  assert tally.kills.total() == 2 and tally.unfinished == (0 if wrong else 1)


def test_rounds_are_counted_and_compared(tmp_path, monkeypatch, capsys):
  """Runs that nothing disturbs must be equal, too; here what is left is that of another run."""
  results = {name: ARRAYS for name in ("compiled", "alone", "round-1", "round-2", "round-3")}

  def disturbed(workdir, rng, longest, changes, tally):
    tally.kills["SIGKILL"] += 2

  ended = types.SimpleNamespace(wait=lambda: 0)
  monkeypatch.setattr(kill_loop, "start", lambda *_: ended)
  monkeypatch.setattr(kill_loop, "disturbed", disturbed)
  monkeypatch.setattr(kill_loop, "result", lambda workdir: (results[workdir.name], LOSSES))

  def run():
    return kill_loop.kill_loop(tmp_path, lambda rounds, _: rounds >= 3, 0, {})

  found = run()
  assert found["rounds"] == 3 and found["kills"] == {"SIGKILL": 6}
  assert found["equal_arrays"] == 2 and found["equal_losses"] == 2
  wrong = {"round-2": "round 2: 1 arrays or losses differ: a; ", "compiled": "disturbs differ: a; "}
  for name, text in wrong.items():
    monkeypatch.setitem(results, name, ARRAYS | {"a": np.float32([1, 3])})
    assert run() is None and text in capsys.readouterr().out
