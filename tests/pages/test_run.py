"""The report shows what a run wrote, says what it lacks, and needs nothing but itself."""

import json
import re

import numpy as np
import pytest

from freqformer.config import ConfigError
from freqformer.pages import run as report
from freqformer.pages.mp4 import write_mp4
from tests.command.process import call

TITLES = list(report.SECTIONS)
PROBS = np.random.default_rng(0).dirichlet([1, 1, 2], (2, 4, 3))  # layers, quarters of t, heads
TRAIN = dict(grad_norm=1.0, lr=1e-3, steps_per_s=2.5, router_entropy=0.9, density=0.3, cost=0.4)
VAL = dict(
  loss=0.7,
  flops=2.5e12,
  seconds=61.2,
  buckets=[0.9, 0.8, 0.7, 0.4321],
  linear_buckets=[1.1, 1.0, 0.9, 0.8765],
)
DENSE = dict(method="dense", attention_flops=2e9, linear_flops=1e9, density=1.0, layer_ms=40.0)
SPARSE = dict(method="freqformer", attention_flops=5e8, linear_flops=1e9, density=0.2, note="six")
FILES = {
  "run": dict(
    git="abc1234",
    versions={"jax": "0.0.1"},
    device="a <device>",
    params=1234567,
    tokens=1152,
    tiles=18,
    changes=[{"step": 40, "keys": {"train.lr": [0.001, 0.1]}}],
    grid=[8, 12, 12],
    tile=[4, 4, 4],
    method="freqformer",
    seconds={"train": 12.5},
  ),
  "config": {"model": {"width": 96}},
  "routing": dict(
    branches=["low", "mid", "high"],
    bucket_edges=[0, 0.25, 0.5, 0.75, 1],
    probs=PROBS.tolist(),
    choice=np.eye(3)[PROBS.argmax(-1)].tolist(),
  ),
  "cost": [DENSE, SPARSE],
  "evaluation": {"samples": dict(count=8, seam_ratio=[None, 1.62, 0.9], flicker=0.81)},
  "samples/sampling": {"seconds_per_sample": 1.2345, "density_by_step": [0.2, 0.3]},
}


def fill(path):
  clip = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
  for name in ("samples/FallingDots", "samples/Hammering", "real/FallingDots"):
    write_mp4(path / f"{name}.mp4", clip, 12.5)
  for name, value in FILES.items():
    (path / f"{name}.json").write_text(json.dumps(value))
  losses = [float("nan") if step == 50 else 100 / (50 + step) for step in range(10, 101, 10)]
  rows = [dict(step=10 * i, kind="train", loss=loss, **TRAIN) for i, loss in enumerate(losses, 1)]
  lines = [json.dumps(row) for row in (*rows, dict(step=100, kind="val", **VAL))]
  (path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 110, "ki']))


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
  assert page.count("data:image/png;base64,") == 7 and page.count("data:video/mp4;base64,") == 3
  assert "no clip" in page  # Hammering has no real clip beside it.
  assert page.count('class="file">From ') == len(TITLES)


def test_numbers_stand_in_it(page):
  numbers = ["1,234,567", "8 × 12 × 12", "GFLOP", "0.4321", "0.8765", "0.81", "1.62", "1.234"]
  for text in [*numbers, "a &lt;device&gt;", "six", "How they were sampled", "step 40"]:
    assert text in page, text


def test_self_contained(page):
  bare = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
  assert not re.search("http|@import|<script|<link", bare)
  assert all(source.startswith("data:") for source in re.findall(r'(?:src|href)="([^"]*)"', page))


def test_missing_files_are_named(tmp_path):
  page = report.write_report(tmp_path).read_text()
  assert page.count("Not shown") == len(TITLES)
  for name in ("samples", "metrics.jsonl", *(f"{name}.json" for name in FILES if "/" not in name)):
    assert f"this run has no {name}" in page
  with pytest.raises(ConfigError, match="--workdir"):
    report.write_report(tmp_path / "absent")


@pytest.mark.parametrize(
  "text, says", [("{", "not valid JSON"), ('[{"probs": 3, "method": 4}]', "form than expected")]
)
def test_foreign_content_costs_its_sections(tmp_path, text, says):
  for name in ("run", "routing", "cost", "evaluation"):
    (tmp_path / f"{name}.json").write_text(text)
  page = report.write_report(tmp_path).read_text()
  assert re.findall(r"<h2>(.*?)</h2>", page) == TITLES and page.count(says) == 4


def test_young_run_without_router_or_validation_and_costs_without_dense(tmp_path):
  (tmp_path / "metrics.jsonl").write_text(
    '{"step": 1, "kind": "train", "loss": 1.0, "grad_norm": 2.0}\n'
  )
  (tmp_path / "cost.json").write_text(json.dumps([SPARSE]))
  page = report.write_report(tmp_path).read_text()
  assert page.count("data:image/png") == 1  # the losses
  assert "no validation line" in page and "no training line has router_entropy" in page
  assert "no row named dense" in page and "freqformer" in page


@pytest.mark.parametrize("layers", [1, 30])
def test_heatmap(layers):
  probs = np.resize(PROBS, (layers, *PROBS.shape[1:]))
  figure = report.heatmap(FILES["routing"] | {"probs": probs})
  figure.draw_without_rendering()
  box = figure.get_tightbbox().get_points()
  assert (box > -0.1).all() and (box < figure.get_size_inches() + 0.1).all()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_command_line(tmp_path):
  done = call(tmp_path, "freqformer/report.py", f"--workdir={tmp_path}")
  assert done.stdout.strip() == str(tmp_path / "report.html")
