"""The whole path as a user walks it, in processes: train, stop, resume, sample, report, refuse."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from freqformer.data.render import RenderedSet, render_ucf101
from freqformer.pages.run import write_report
from freqformer.train.checkpoint import Checkpoints
from freqformer.train.metrics import read

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.xdist_group("end_to_end")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A rendered data set and an empty cache."""
  root = tmp_path_factory.mktemp("data")
  sizes = RenderedSet(classes=8, groups=3, clips_per_group=1, rows=48, cols=64)
  render_ucf101(root / "ucf", sizes)
  return root


def command(place, script, *args):
  flags = (
    [
      f"--config={ROOT / 'tests' / 'tiny_config.py'}",
      f"--config.data.root={place / 'ucf'}",
      f"--config.data.cache={place / 'cache'}",
    ]
    if script == "train.py"
    else []
  )
  return [sys.executable, str(ROOT / script), *flags, *args]


def call(place, script, *args):
  return subprocess.run(
    command(place, script, *args), capture_output=True, text=True, cwd=place, timeout=300
  )


def arrays(workdir, step):
  """All arrays of a checkpoint as a flat dict."""
  checkpoints = Checkpoints(workdir, create=False)
  assert checkpoints.latest() == step
  found = checkpoints._manager.restore(step)["arrays"]
  return {k: np.asarray(v) for k, v in found.items()}


@pytest.fixture(scope="module")
def whole(place):
  """A run that nothing interrupts."""
  done = call(place, "train.py", f"--workdir={place / 'whole'}")
  assert done.returncode == 0, done.stderr[-3000:]
  return place / "whole", done


def test_run_leaves_what_it_should(whole):
  workdir, done = whole
  rows = read(workdir / "metrics.jsonl")
  assert [r["step"] for r in rows if r["kind"] == "train"] == list(range(1, 41))
  for kind in ("val", "val_soft"):
    assert [r["step"] for r in rows if r["kind"] == kind] == [20, 40]
  assert {"loss", "grad_norm", "router_entropy", "density", "cost", "steps_per_s"} <= rows[5].keys()
  run = json.loads((workdir / "run.json").read_text())
  assert run["finished"] and len(run["classes"]) == 8 and run["seconds"]["compile"] > 0
  routing = json.loads((workdir / "routing.json").read_text())
  assert np.shape(routing["probs"]) == (2, 4, 2, 3)
  assert routing["branches"] == ["low", "mid", "high"]
  record = Checkpoints(workdir, create=False).record()
  keys = "config class_names statistics iterator versions git latent_shape cache"
  assert record.keys() >= set(keys.split())
  assert "_g03_c02.avi: it cannot be opened" in done.stderr


def test_sigterm_and_resume_is_bit_equal(place, whole):
  """2N steps = some steps, SIGTERM, the same command again."""
  workdir = place / "killed"
  process = subprocess.Popen(
    command(place, "train.py", f"--workdir={workdir}"), cwd=place, stderr=subprocess.PIPE, text=True
  )
  for _ in range(3000):
    if any(row["step"] >= 7 for row in read(workdir / "metrics.jsonl")):
      break
    assert process.poll() is None, process.stderr.read()[-3000:]
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  _, log = process.communicate(timeout=120)
  assert process.returncode == 0, log[-3000:]
  stopped = Checkpoints(workdir, create=False).latest()
  assert 7 <= stopped < 40 and "the same command goes on" in log
  # What does not touch the numbers may change; it is said, and the run keeps it.
  again = call(place, "train.py", f"--workdir={workdir}", "--config.train.keep=3")
  assert again.returncode == 0 and f"resumed at step {stopped}" in again.stderr, again.stderr[
    -3000:
  ]
  assert f"changed since the checkpoint of step {stopped}: train.keep 2 -> 3" in again.stderr
  change = [{"step": stopped, "keys": {"train.keep": [2, 3]}}]
  assert json.loads((workdir / "run.json").read_text())["changes"] == change
  assert Checkpoints(workdir, create=False).record()["changes"] == change
  want, got = arrays(whole[0], 40), arrays(workdir, 40)
  assert want.keys() == got.keys()
  for name in want:
    np.testing.assert_array_equal(got[name], want[name], err_msg=name)
  losses = [
    [r["loss"] for r in read(w / "metrics.jsonl") if r["kind"] == "train"]
    for w in (whole[0], workdir)
  ]
  assert losses[0] == losses[1]


def test_eval_writes_videos(place, whole):
  out = whole[0] / "samples"
  done = call(place, "eval.py", f"--workdir={whole[0]}", "--samples=2", "--steps=2")
  assert done.returncode == 0, done.stderr[-3000:]
  result = json.loads((out / "sampling.json").read_text())
  assert (
    result["samples"] == 16
    and result["compile_seconds"] > 0
    and result["run_seconds"] > 0
    and len(result["density_by_step"]) == 2
  )
  assert len(list(out.glob("*.mp4"))) == 8 and (out / "grid.png").stat().st_size > 1000
  saved = dict(np.load(out / "latents.npz"))
  assert saved["latents"].shape == (16, 3, 3, 4, 4) and np.isfinite(saved["latents"]).all()
  # The report shows all that these commands write.
  page = write_report(whole[0]).read_text()
  absent = [
    name
    for name in ("cost.json", "evaluation.json")
    if f"Not shown: this run has no {name}" in page
  ]
  assert page.count("Not shown") == len(absent) == 2 and page.count("data:video/mp4;base64,") == 8
  assert "How they were sampled" in page and page.count("data:image/png;base64,") == 5
  # One class alone gives the very same sample and takes the other classes' videos away. Dense
  # attention on the same weights gives another one, in a folder of its own.
  name = json.loads((whole[0] / "run.json").read_text())["classes"][3]
  for folder, arg, same in (
    (out, "--nosoft", True),
    (whole[0] / "samples-dense", "--method=dense", False),
  ):
    done = call(place, "eval.py", f"--workdir={whole[0]}", "--steps=2", f"--classes={name}", arg)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = np.load(folder / "latents.npz")["latents"][0]
    assert np.allclose(alone, saved["latents"][6], atol=1e-4) == same
    assert [p.name for p in folder.glob("*.mp4")] == [f"{name}.mp4"]
  # The run's own samples are still there.
  assert json.loads((out / "sampling.json").read_text())["method"] == "freqformer"


def test_dry_run_needs_no_data(tmp_path):
  done = subprocess.run(
    [
      sys.executable,
      str(ROOT / "train.py"),
      f"--config={ROOT / 'configs' / 'demo.py'}",
      "--dry_run",
    ],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  for text in ("101 classes, UCF-101's: assumed", "tokens", "GFLOP"):
    assert text in done.stdout
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "args, message",
  [
    (["--config.train.stesp=3"], "config.train.stesp does not exist; did you mean 'train.steps'?"),
    (["--config.data.root=nowhere"], "make demo"),
  ],
)
def test_training_refuses_in_one_sentence(place, args, message):
  done = call(place, "train.py", f"--workdir={place / 'refused'}", *args)
  assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, (
    done.stderr[-3000:]
  )


@pytest.mark.parametrize(
  "args, code, message",
  [
    ([], 0, "already finished at step 40 of 40; raise train.steps"),
    (
      ["--config.model.width=48", "--config.train.steps=41"],
      2,
      "model.width 24 -> 48; start a new --workdir",
    ),
    (
      ["--config.model.width=48", "--config.train.steps=41", "--resume_changed"],
      2,
      "leaves that differ",
    ),
  ],
)
def test_a_finished_run_is_not_begun_anew_nor_turned_into_another(
  place, whole, args, code, message
):
  before = (whole[0] / "run.json").read_text()
  done = call(place, "train.py", f"--workdir={whole[0]}", *args)
  assert done.returncode == code and message in done.stderr and "Traceback" not in done.stderr, (
    done.stderr[-3000:]
  )
  assert json.loads((whole[0] / "run.json").read_text()) == json.loads(before)


@pytest.mark.parametrize(
  "args, message",
  [
    (["--workdir=nothing"], "train first"),
    (["--classes=Nothing"], "is not in this checkpoint"),
    (["--checkpoint=7"], "there are [40]"),
    (["--steps=0"], "steps"),
  ],
)
def test_eval_refuses_in_one_sentence(place, whole, args, message):
  done = call(place, "eval.py", f"--workdir={whole[0]}", *args)
  assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, (
    done.stderr[-3000:]
  )


def test_sweep_runs_and_skips_and_a_dense_checkpoint_lacks_the_router(place):
  """Trials are dense here, whatever the sweep changes of FreqFormer: one program is compiled."""
  args = [
    sys.executable,
    "-m",
    "freqformer.sweep",
    f"--config={ROOT / 'tests' / 'tiny_config.py'}",
    f"--study={place / 'study'}",
    f"--override=data.root={place / 'ucf'}",
    f"--override=data.cache={place / 'cache'}",
    "--override=train.steps=2",
    "--override=train.val_every=2",
    "--override=model.attention.method=dense",
  ]
  for attempt in range(2):
    done = subprocess.run(args, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("finished") == 2 and ("trial 1 of 2" in done.stderr) == (attempt == 0)
  trial = next((place / "study").glob("*/checkpoints")).parent
  done = call(place, "eval.py", f"--workdir={trial}", "--method=freqformer(allocation=routed)")
  assert done.returncode == 2 and "method/router/bias and" in done.stderr, done.stderr[-3000:]
