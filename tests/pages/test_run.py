"""The report shows what a run wrote, says what it lacks, and needs nothing but itself."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from freqformer.config import ConfigError
from freqformer.pages import run as report
from freqformer.pages.files import Absent, check
from freqformer.pages.mp4 import write_mp4

TITLES = [section.title for section in report.SECTIONS]


def routing(layers=2, heads=3):
  probs = np.random.default_rng(0).dirichlet([1, 1, 2], (layers, 4, heads))
  choice = np.eye(3)[probs.argmax(-1)]
  edges = [0, 0.25, 0.5, 0.75, 1]
  return {
    "branches": ["low", "mid", "high"],
    "bucket_edges": edges,
    "probs": probs.tolist(),
    "choice": choice.tolist(),
  }


def metrics():
  for step in range(10, 101, 10):
    loss = float("nan") if step == 50 else 100 / (50 + step)
    train = {
      "loss": loss,
      "grad_norm": 1.0,
      "lr": 1e-3,
      "steps_per_s": 2.5,
      "router_entropy": 0.9,
      "density": 0.3,
      "cost": 0.4,
    }
    yield {"step": step, "kind": "train", **train}
  yield {
    "step": 100,
    "kind": "val",
    "loss": 0.7,
    "buckets": [0.9, 0.8, 0.7, 0.4321],
    "linear_buckets": [1.1, 1.0, 0.9, 0.8765],
  }


def fill(path):
  run = {
    "git": "abc1234",
    "versions": {"jax": "0.0.1"},
    "device": "a <device>",
    "params": 1234567,
    "tokens": 1152,
    "tiles": 18,
  }
  run |= {"changes": [{"step": 40, "keys": {"train.lr": [0.001, 0.1]}}]}
  run |= {
    "grid": [8, 12, 12],
    "tile": [4, 4, 4],
    "method": "freqformer",
    "seconds": {"train": 12.5},
  }
  dense = {
    "method": "dense",
    "attention_flops": 2e9,
    "linear_flops": 1e9,
    "density": 1.0,
    "layer_ms": 40.0,
    "attention_ms": None,
  }
  sparse = {
    **dense,
    "method": "freqformer",
    "attention_flops": 5e8,
    "density": 0.2,
    "layer_ms": None,
    "note": "six heads",
  }
  classifier = {"samples": 0.81, "real_val": 0.96, "chance": 0.125, "count": 64}
  files = {
    "run": run,
    "config": {"model": {"width": 96}},
    "routing": routing(),
    "cost": [dense, sparse],
  }
  for name, value in {**files, "evaluation": {"classifier": classifier}}.items():
    (path / f"{name}.json").write_text(json.dumps(value))
  (path / "metrics.jsonl").write_text(
    "".join(json.dumps(row) + "\n" for row in metrics()) + '{"step": 110, "ki'
  )
  clip = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
  write_mp4(path / "samples" / "FallingDots.mp4", clip, 12.5)
  write_mp4(path / "samples" / "Hammering.mp4", clip, 12.5)
  write_mp4(path / "real" / "FallingDots.mp4", clip, 12.5)
  sampling = {"method": "freqformer", "seconds_per_sample": 1.2345, "density_by_step": [0.2, 0.3]}
  (path / "samples" / "sampling.json").write_text(json.dumps(sampling))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
  path = tmp_path_factory.mktemp("run")
  fill(path)
  out = report.write_report(path)
  assert out == path / "report.html"
  return out.read_text()


def test_every_section_is_shown(page):
  assert re.findall(r"<h2>(.*?)</h2>", page) == TITLES
  assert "Not shown" not in page
  assert page.count("data:image/png;base64,") == 6 and page.count("data:video/mp4;base64,") == 3
  assert "no clip" in page  # Hammering has no real clip beside it.
  assert page.count('class="file">From ') == len(TITLES)


@pytest.mark.parametrize(
  "text",
  [
    "1,234,567",
    "8 × 12 × 12",
    "a &lt;device&gt;",
    "GFLOP",
    "0.4321",
    "0.8765",
    "0.81",
    "six heads",
    "How they were sampled",
    "1.234",
    "step 40",
  ],
)
def test_numbers_stand_in_it(page, text):
  assert text in page


def test_self_contained(page):
  bare = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
  assert (
    "http" not in bare and "@import" not in bare and "<script" not in bare and "<link" not in bare
  )
  assert all(source.startswith("data:") for source in re.findall(r'(?:src|href)="([^"]*)"', page))


def test_missing_files_are_named(tmp_path):
  page = report.write_report(tmp_path).read_text()
  assert page.count("Not shown") == len(TITLES)
  for name in (
    "run.json",
    "samples",
    "metrics.jsonl",
    "routing.json",
    "cost.json",
    "evaluation.json",
    "config.json",
  ):
    assert f"this run has no {name}" in page
  with pytest.raises(ConfigError, match="--workdir"):
    report.write_report(tmp_path / "absent")


ROUTING = {"branches": ["low"], "bucket_edges": [0, 1], "choice": []}


@pytest.mark.parametrize("name", ["run.json", "routing.json", "cost.json", "evaluation.json"])
@pytest.mark.parametrize(
  "text,says",
  [
    ("{", "not valid JSON"),
    ('{"probs": 3, "method": 4, "seconds": [1]}', "form than expected"),
    ("[]", ""),
    ('[{"method": "dense"}]', "form than expected"),
    (json.dumps(ROUTING | {"classifier": {"samples": "x"}, "probs": [[1], [2, 3]]}), ""),
    (json.dumps(ROUTING | {"classifier": None, "probs": [[[0.5]]]}), ""),
  ],
)
def test_foreign_content_costs_one_section(tmp_path, name, text, says):
  (tmp_path / name).write_text(text)
  page = report.write_report(tmp_path).read_text()
  assert re.findall(r"<h2>(.*?)</h2>", page) == TITLES and says in page


def test_what_is_wrong_with_the_drawing_is_not_blamed_on_a_file(tmp_path):
  def broken(workdir):
    raise TypeError("a mistake of ours")

  with pytest.raises(TypeError, match="of ours"):
    report.Section("Title", "run.json", "Intro.", broken).html(tmp_path)


def test_check_names_the_place():
  form = {"a": [float], "b?": {str: int}}
  assert check({"a": [1, 2.5], "b": {"x": 1}, "c": "ignored"}, form, "f.json") and check(
    {"a": [], "b": None}, form, "f.json"
  )
  for value, place in (
    ({"a": [1, "x"]}, r"f.json: a\[1\]"),
    ({"a": [], "b": {"x": True}}, "f.json: b: x"),
    ({}, "lacks a"),
  ):
    with pytest.raises(Absent, match=place):
      check(value, form, "f.json")


def test_young_run_without_router_or_validation(tmp_path):
  (tmp_path / "metrics.jsonl").write_text(
    '{"step": 1, "kind": "train", "loss": 1.0, "grad_norm": 2.0}\n'
  )
  page = report.write_report(tmp_path).read_text()
  assert page.count("data:image/png") == 1
  assert "no validation line" in page and "no training line has router_entropy" in page


def test_cost_without_dense_has_no_chart(tmp_path):
  row = {"method": "radial", "attention_flops": 1.0, "linear_flops": 1.0, "density": 0.5}
  (tmp_path / "cost.json").write_text(json.dumps([row]))
  page = report.write_report(tmp_path).read_text()
  assert "no row named dense" in page and "radial" in page


def test_heatmap(tmp_path):
  for layers in (1, 30):
    drawn = {
      key: np.asarray(value) if key == "probs" else value
      for key, value in routing(layers, 6).items()
    }
    report.heatmap(drawn).savefig(tmp_path / "heat.png")
    assert min(Image.open(tmp_path / "heat.png").size) > 200


def test_command_line(tmp_path):
  done = subprocess.run(
    [sys.executable, "-m", "freqformer.report", f"--workdir={tmp_path}"],
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout.strip() == str(tmp_path / "report.html")
