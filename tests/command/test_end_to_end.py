"""The whole path as a user walks it: train, stop, resume, sample, report, refuse."""

import html
import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from freqformer.command.trials import result_of
from freqformer.data.cache import LatentCache
from freqformer.data.codec import LatentStatistics
from freqformer.evaluate.quality import artefacts
from freqformer.evaluate.restore import load_run
from freqformer.model.precondition import TIME_BINS
from freqformer.pages.run import SECTIONS
from freqformer.train.checkpoint import Checkpoints
from freqformer.train.metrics import read
from tests.command.process import ROOT, TINY, call, render
from tests.data.helpers import moving_square, write_clip, write_folder
from tests.pages.markup import sections

pytestmark = pytest.mark.xdist_group("end_to_end")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A rendered data set and an empty cache."""
  root = tmp_path_factory.mktemp("data")
  render(root, classes=3)
  return root


def arrays(workdir, step):
  """All arrays of a checkpoint as a flat dict."""
  checkpoints = Checkpoints(workdir, create=False)
  assert checkpoints.latest() == step
  found = checkpoints._manager.restore(step)["arrays"]
  return {k: np.asarray(v) for k, v in found.items()}


@pytest.fixture(scope="module")
def whole(place):
  """A run that nothing interrupts."""
  return place / "whole", call(place, "train.py", f"--workdir={place / 'whole'}")


def test_run_leaves_what_it_should(whole):
  workdir, done = whole
  rows = read(workdir / "metrics.jsonl")
  assert [r["step"] for r in rows if r["kind"] == "train"] == list(range(1, 41))
  for kind in ("val", "val_soft"):
    assert [r["step"] for r in rows if r["kind"] == kind] == [20, 40]
  assert {"loss", "grad_norm", "router_entropy", "density", "cost", "steps_per_s"} <= rows[5].keys()
  run = json.loads((workdir / "run.json").read_text())
  assert run["finished"] and len(run["classes"]) == 3 and run["seconds"]["compile"] > 0
  said = rf"compiling the training step \.\.\.\n.*in {run['seconds']['compile']:.1f} s"
  assert re.search(said, done.stderr, re.DOTALL)
  cost = json.loads((workdir / "cost.json").read_text())["training"]
  assert result_of(workdir) == {
    "step": 40,
    "val_loss": rows[-2]["loss"],
    "val_density": rows[-2]["density"],
    "val_soft_loss": rows[-1]["loss"],
    "attn/dense": cost["own"]["attention_flops"] / cost["dense"]["attention_flops"],
    "router_entropy": rows[-3]["router_entropy"],
    "flops": rows[-3]["flops"],
    "seconds": rows[-3]["seconds"],
  }
  assert rows[-3]["flops"] == pytest.approx(40 * rows[0]["flops"])
  assert 0 < rows[-3]["seconds"] < run["seconds"]["train"]  # which has validation, too
  routing = json.loads((workdir / "routing.json").read_text())
  assert np.shape(routing["probs"]) == (2, 4, 2, 3)
  assert routing["branches"] == ["low", "mid", "high"]
  record = Checkpoints(workdir, create=False).record()
  keys = "config class_names statistics iterator versions git latent_shape cache"
  assert record.keys() >= set(keys.split())
  assert record["fps"] == 12.5 and len(record["class_counts"]) == 3 and all(record["class_counts"])
  assert len(record["config"]["model"]["spectrum"]) == 3 * (TIME_BINS + 1)
  # One damaged clip is left out, once, and its name and reason are logged.
  left_out = re.findall(r"(\d+) of \d+ \w+ clips could not be used:\n\s*(.*)", done.stderr)
  assert [count for count, _ in left_out] == ["1"], done.stderr
  assert re.search(r"_g03_c02\.avi: it cannot be opened as a video", left_out[0][1])


def test_the_report_is_there_when_training_ends(whole):
  workdir, done = whole
  names = json.loads((workdir / "run.json").read_text())["classes"]
  assert sorted(path.stem for path in (workdir / "real").glob("*.mp4")) == sorted(names)
  drawn = workdir / "samples-in-training"
  assert sorted(path.name for path in drawn.glob("*.mp4")) == ["00000020.mp4", "00000040.mp4"]
  about = json.loads((drawn / "about.json").read_text())
  assert about["classes"] == names and about["steps"] == 3
  cost = json.loads((workdir / "cost.json").read_text())
  last = read(workdir / "metrics.jsonl")[-1]
  # What was counted for the report is what training adds up: 40 steps of two samples.
  assert cost["training"]["own"]["total_flops"] * 80 == pytest.approx(last["flops"])
  assert cost["sampling"]["own"]["total_flops"] < cost["sampling"]["dense"]["total_flops"]
  page = (workdir / "report.html").read_text()
  shown = sections(page)
  assert shown == list(SECTIONS) and shown[0] == "Samples"
  # Nothing was sampled or evaluated yet.
  assert page.count("Not shown") == 1 and "this run was not evaluated" in page
  assert "Real clips only" in page and page.count("data:video/mp4;base64,") == 3 + 2
  assert "training has not finished" not in page


SWEEP = """
from tests.tiny_config import get_config

def sweep():
  yield {"train.keep": 2, "train.samples": 0}
"""


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_sigterm_and_resume_is_bit_equal(place, whole):
  """2N steps = some steps in a trial of a sweep, SIGTERM, the rest by train.py.

  The whole run draws samples while it trains, the other one none.
  """
  (place / "config.py").write_text(SWEEP)
  line = [sys.executable, "-m", "freqformer.sweep", f"--config={place / 'config.py'}"]
  line += [f"--study={place / 'study'}", f"--override=data.root={place / 'ucf'}"]
  line += [f"--override=data.cache={place / 'cache'}"]
  process = subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True)
  for _ in range(15_000):
    rows = [row for path in place.glob("study/*/metrics.jsonl") for row in read(path)]
    if any(row["step"] >= 7 for row in rows):
      break
    assert process.poll() is None, process.stderr.read()[-3000:]
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  _, log = process.communicate(timeout=120)
  assert process.returncode == 0 and "Traceback" not in log, log[-3000:]
  assert "trial 1 of 1" in log and "the same command goes on" in log
  (row,) = json.loads((place / "study" / "study.json").read_text())
  assert row["status"] == "stopped"
  workdir = place / "study" / row["trial"]
  stopped = Checkpoints(workdir, create=False).latest()
  assert 7 <= stopped < 40
  # What does not touch the numbers may change; it is said, and the run keeps it.
  changed = ("--config.train.keep=3", "--config.train.samples=0")
  again = call(place, "train.py", f"--workdir={workdir}", *changed)
  assert f"resumed at step {stopped}" in again.stderr
  assert f"changed since the checkpoint of step {stopped}: train.keep 2 -> 3" in again.stderr
  change = [{"step": stopped, "keys": {"train.keep": [2, 3]}}]
  assert json.loads((workdir / "run.json").read_text())["changes"] == change
  assert Checkpoints(workdir, create=False).record()["changes"] == change
  want, got = arrays(whole[0], 40), arrays(workdir, 40)
  assert want.keys() == got.keys()
  for name in want:
    np.testing.assert_array_equal(got[name], want[name], err_msg=name)
  rows = [read(folder / "metrics.jsonl") for folder in (whole[0], workdir)]
  for key in ("loss", "flops"):
    values = [[row[key] for row in own if row["kind"] == "train"] for own in rows]
    assert values[0] == pytest.approx(values[1], rel=0 if key == "loss" else 1e-9)
  seconds = [row["seconds"] for row in rows[1] if row["kind"] == "train"]
  assert seconds == sorted(seconds) and seconds[stopped] > 0
  # Both on a page.
  assert not (workdir / "samples-in-training").exists()
  call(place, "freqformer/report.py", "--compare", str(whole[0]), str(workdir))
  page = (place / "compare.html").read_text()
  assert sections(page) == ["Samples", "Losses", "Figures", "Configs"]
  assert ">whole<" in page and f">{html.escape(row['trial'])}<" in page
  for name, text in {"keep": "<td>2</td><td>3</td>", "samples": "<td>3</td><td>0</td>"}.items():
    assert f"<td>train.{name}</td>{text}" in page.replace(' class="n"', "")


def test_eval_writes_videos(place, whole):
  out = whole[0] / "samples"
  call(place, "eval.py", f"--workdir={whole[0]}", "--samples=2", "--steps=2")
  result = json.loads((out / "sampling.json").read_text())
  assert result["samples"] == 6 and len(result["density_by_step"]) == 2
  assert result["compile_seconds"] > 0 and result["run_seconds"] > 0
  last = read(whole[0] / "metrics.jsonl")[-1]
  assert result["training_flops"] == last["flops"]
  assert result["training_seconds"] >= last["seconds"] > 0
  assert len(list(out.glob("*/*.mp4"))) == 6 and (out / "grid.png").stat().st_size > 1000
  saved = dict(np.load(out / "latents.npz"))
  assert saved["latents"].shape == (6, 3, 3, 4, 3) and np.isfinite(saved["latents"]).all()
  # Tiles of 1 x 3 x 2 of 3 x 3 x 4 tokens meet in the middle of x; in t nothing else is there.
  found = artefacts(load_run(whole[0]), saved["latents"], saved["latents"])
  assert found["flicker"] == 1
  assert found["seam_ratio"][:2] == [None, None] and 0.2 < found["seam_ratio"][2] < 5
  # The report shows all that these commands write.
  page = (whole[0] / "report.html").read_text()
  assert sections(page) == list(SECTIONS) and page.count("Not shown") == 1
  assert "How they were sampled" in page and "by eval.py, 6 samples" in page
  assert page.count("data:video/mp4;base64,") == 6 + 3 + 2
  # One class alone gives the very same samples and takes the other classes' videos away. Dense
  # attention on the same weights gives others, in a folder of its own.
  name = json.loads((whole[0] / "run.json").read_text())["classes"][2]
  for folder, args, same in (
    ("samples", ["--samples=4", "--nosoft"], True),
    ("samples-dense", ["--samples=2", "--method=dense"], False),
  ):
    call(place, "eval.py", f"--workdir={whole[0]}", "--steps=2", f"--classes={name}", *args)
    folder = whole[0] / folder
    alone = np.load(folder / "latents.npz")["latents"][:2]
    assert np.allclose(alone, saved["latents"][4:], atol=1e-4) == same
    videos = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.mp4"))
    assert videos == [f"{name}/{i:05d}.mp4" for i in range(len(videos))] and len(videos) >= 2
  # The run's own samples are still there.
  assert json.loads((out / "sampling.json").read_text())["method"] == "freqformer"


def test_measured_samples_are_drawn_once(place, whole):
  folder = whole[0] / "evaluation"

  def measured(count, *args):
    line = (f"--workdir={whole[0]}", f"--n={count}", "--metrics=flicker,psd", "--steps=2", *args)
    return call(place, "freqformer/evaluate/__main__.py", *line)

  measured(3)
  (first,) = sorted((folder / "latents").glob("*.npz"))
  before = first.stat().st_mtime_ns
  done = measured(3)
  assert first.stat().st_mtime_ns == before
  assert len(list((folder / "samples").glob("*/00000.mp4"))) == 3
  rows = json.loads((whole[0] / "evaluation.json").read_text())
  assert [row["name"] for row in rows] == ["flicker", "psd"]
  for row in rows:
    assert row["counts"]["samples"] == row["protocol"]["samples"] == 3
    assert row["protocol"]["seed"] == 0 and row["protocol"]["steps"] == 2
    assert set(row["controls"]) == {"colour_noise", "shuffled", "frozen"}
    assert row["name"] in done.stdout
  for line, words in (
    ("--metrics=psd --steps=3", "samples drawn with steps=2, not 3"),
    ("--metrics=fvd --steps=2", "videos [b, t, y, x, 3] of at least 8 frames"),
  ):
    line = (f"--workdir={whole[0]}", *line.split())
    refused = call(place, "freqformer/evaluate/__main__.py", *line, code=2)
    assert words in refused.stderr


def test_validation_on_own_and_on_other_clips(place, whole):
  done = call(place, "eval.py", f"--workdir={whole[0]}", "--validate", "--clips=2")
  own = json.loads((whole[0] / "validation" / "own.json").read_text())
  last = [row for row in read(whole[0] / "metrics.jsonl") if row["kind"] == "val"][-1]
  assert own["split"] == "val" and "null_class" not in own
  for key in ("buckets", "linear_buckets", "density_buckets"):
    np.testing.assert_allclose(own[key], last[key], rtol=1e-5)
  assert re.search(rf"0.00 to 0.25 +{last['buckets'][0]:.4f}", done.stdout)
  page = (whole[0] / "report.html").read_text()
  assert "Not shown" not in page and "validated on" in page
  # Without class folders, longer, at another rate, one of them too short for it.
  clips = place / "clips"
  for name, frames in (("long", 40), ("short", 20)):
    write_clip(clips / f"{name}.mp4", moving_square(frames))
  other = ("source=folder", "root=clips", f"cache={place / 'cache'}", "frames=10", "stride=4")
  flags = [f"--config.data.{key}" for key in other]
  done = call(
    place, "eval.py", f"--workdir={whole[0]}", f"--out={place / 'other'}", "--validate", *flags
  )
  (path,) = (place / "other").glob("source_folder_root_clips*.json")
  found = json.loads(path.read_text())
  assert found["clips"] == 2 and found["split"] == "all" and found["null_class"] == ["clips"]
  assert found["latent_shape"] == [5, 3, 4, 3] and found["rates"] == {"6.25": 1, "12.5": 1}
  assert np.isfinite(found["buckets"]).all() and len(found["weights"]) == 4
  assert "all of the folder" in done.stdout and "the model has no such class" in done.stdout
  # The model's normalisation, not the clips' own.
  statistics = LatentStatistics.from_json(
    Checkpoints(whole[0], create=False).record()["statistics"]
  )
  (cache,) = (place / "cache").glob("folder-all-*")
  np.testing.assert_array_equal(LatentCache(cache).statistics.std, statistics.std)
  assert not list((place / "cache").glob("folder-train-*"))
  # A grid that the method cannot have is refused before clips are encoded for it.
  smaller = ("--method=adaspa", "--config.data.resolution=8,8", "--config.data.frames=2")
  done = call(place, "eval.py", f"--workdir={whole[0]}", "--validate", *flags, *smaller, code=2)
  assert "rounds to no tile per query tile" in done.stderr
  assert list((place / "cache").glob("folder-all-*")) == [cache]


def test_data_can_be_checked_and_encoded_before_training(tmp_path):
  write_folder(tmp_path / "clips")
  (tmp_path / "clips" / "cat" / "broken.avi").write_bytes(b"nothing")
  line = (f"--config={TINY}", "--config.data.source=folder", "--config.data.root=clips")
  line += ("--config.data.cache=cache", "--config.data.val_fraction=0.3")
  done = call(tmp_path, "freqformer/data/__main__.py", *line)
  assert "of 2 classes (" in done.stderr and "cat/broken.avi: it cannot be opened" in done.stderr
  first, second = done.stdout.splitlines()
  assert re.match(r"train: \d views of \d clips \(0 with a remark, \d left out\), lat", first)
  assert second.startswith("val: ") and "12.5 frames a second" in second
  again = call(tmp_path, "freqformer/data/__main__.py", *line)
  assert again.stdout == done.stdout and "encoding" not in again.stderr
  fields = f"--config={ROOT / 'configs' / 'fields.py'}"
  refused = call(tmp_path, "freqformer/data/__main__.py", fields, code=2)
  assert "there is nothing to encode" in refused.stderr


def test_dry_run_needs_no_data(tmp_path):
  small = ("--config.model.attention.method=dense", "--config.model.depth=1")  # compiles fast
  done = call(tmp_path, "train.py", "--dry_run", *small)
  for text in ("101 classes, UCF-101's: assumed", "tokens", "GFLOP"):
    assert text in done.stdout
  assert not list(tmp_path.iterdir())


WIDER = ("--config.model.width=48", "--config.train.steps=41")


@pytest.mark.parametrize(
  "args, code, message",
  [
    ((), 0, "already finished at step 40 of 40; raise train.steps"),
    (WIDER, 2, "model.width 24 -> 48; start a new --workdir"),
    ((*WIDER, "--resume_changed"), 2, "leaves that differ"),
  ],
)
def test_a_finished_run_stays_what_it_is(place, whole, args, code, message):
  before = (whole[0] / "run.json").read_text()
  done = call(place, "train.py", f"--workdir={whole[0]}", *args, code=code)
  assert message in done.stderr and (whole[0] / "run.json").read_text() == before


@pytest.mark.parametrize(
  "script, arg, message",
  [
    ("train.py", "--config.train.stesp=3", "does not exist; did you mean 'train.steps'?"),
    ("train.py", "--config.data.root=nowhere", "make demo"),
    ("eval.py", "--workdir=nothing", "train first"),
    ("eval.py", "--classes=Nothing", "is not in this checkpoint"),
    ("eval.py", "--checkpoint=7", "there are [40]"),
    ("eval.py", "--steps=0", "steps"),
    ("eval.py", "--config.data.frames=4", "--config.data.frames needs --validate"),
  ],
)
def test_refusals_are_one_sentence(place, whole, script, arg, message):
  workdir = whole[0] if script == "eval.py" else place / "refused"
  done = call(place, script, f"--workdir={workdir}", arg, code=2)
  assert re.fullmatch(f"error: .*{re.escape(message)}.*", done.stderr.strip().splitlines()[-1])
