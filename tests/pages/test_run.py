"""The report shows what a run wrote, says what it lacks, and needs nothing but itself."""

import json

import numpy as np
import pytest

from freqformer.config import ConfigError
from freqformer.pages import html as pieces
from freqformer.pages import losses, routing
from freqformer.pages import run as report
from freqformer.pages.mp4 import write_mp4
from tests.pages.markup import sections

KINDS = ("probs", "choice")
TITLES = list(report.SECTIONS)
PROBS = np.random.default_rng(0).dirichlet([1, 1, 2], (2, 4, 3))  # layers, quarters of t, heads
TRAIN = dict(lr=1e-3, steps_per_s=2.5, router_entropy=0.9, density=0.3, cost=0.4)
VAL = dict(
  loss=0.7,
  flops=2.5e12,
  seconds=61.2,
  buckets=[0.9, 0.8, 0.7, 0.4321],
  linear_buckets=[1.1, 1.0, 0.9, 0.8765],
)
OWN = dict(attention_flops=5e8, total_flops=1.5e9)
DENSE = dict(attention_flops=2e9, total_flops=3e9)
SAMPLED = dict(steps=24, samples=8, device="a <device>")
STAGES = ("training", "sampling")
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
  "cost": {"method": "freqformer", **{s: {"own": OWN, "dense": DENSE} for s in STAGES}},
  "evaluation": {
    "samples": dict(count=8, seam_ratio=[None, 1.62, 0.9], flicker=0.81),
    "rows": [{"name": "fvd", "value": 7.5, "floor": {"mean": 3.25}}],
  },
  "samples/sampling": SAMPLED | {"seconds_per_sample": 1.2345, "density_by_step": [0.2, 0.3]},
  "samples-dense/sampling": SAMPLED | {"seconds_per_sample": 2.0575},
  "samples-in-training/about": dict(classes=["FallingDots", "Hammering"], steps=12),
  "validation/own": dict(loss=0.625, density=0.21, checkpoint=100, clips=6),
}


def fill(path):
  clip = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
  # A class with a folder, one of an earlier version, and that without a real clip.
  for name in ("FallingDots/0", "FallingDots/1", "FallingDots", "Hammering"):
    write_mp4(path / "samples" / f"{name}.mp4", clip, 12.5)
  write_mp4(path / "real" / "FallingDots.mp4", clip, 12.5)
  for step in range(20, 181, 20):
    write_mp4(path / "samples-in-training" / f"{step:08d}.mp4", clip, 12.5)
  for name, value in FILES.items():
    (path / f"{name}.json").parent.mkdir(exist_ok=True)
    (path / f"{name}.json").write_text(json.dumps(value))
  values = [float("nan") if step == 50 else 100 / (50 + step) for step in range(10, 101, 10)]
  rows = [
    dict(step=10 * i, kind="train", loss=loss, grad_norm=i, **TRAIN)
    for i, loss in enumerate(values, 1)
  ]
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
  assert sections(page) == TITLES
  assert TITLES[:3] == ["Samples", "Samples over training", "Losses"] and TITLES[-1] == "Config"
  assert "Not shown" not in page
  # Two samples and a real clip, one sample; of nine validations six.
  assert page.count("data:video/mp4;base64,") == 4 + 6 and "3 further steps" in page
  assert page.count("data:image/png;base64,") == 6
  assert page.count('class="file">From ') == len(TITLES)


def test_numbers_stand_in_it(page):
  numbers = ["1,234,567", "8 × 12 × 12", "GFLOP", "0.4321", "0.8765", "0.81", "–, 1.62, 0.9"]
  numbers += ["1.234", "2.058", ">0.6<", "7.5", "3.25", "0.625", "2.5 (median", "step 180"]
  for text in [*numbers, "a &lt;device&gt;", "How they were sampled", "0.7 (step 100)"]:
    assert text in page, text
  # Curves that do not move are numbers.
  assert "router entropy (nats), in all steps" in page


def test_missing_files_are_named(tmp_path):
  page = report.write_report(tmp_path).read_text()
  assert sections(page) == TITLES and page.count("Not shown") == len(TITLES)
  for name in ("samples yet", "evaluation.json", "routing.json", "cost.json", "run.json"):
    assert f"no {name}" in page
  with pytest.raises(ConfigError, match="--workdir"):
    report.write_report(tmp_path / "absent")


@pytest.mark.parametrize(
  "text, says", [("{", "not valid JSON"), ('[{"probs": 3, "method": 4}]', "form than expected")]
)
def test_foreign_content_costs_its_sections(tmp_path, text, says):
  for name in ("run", "routing", "cost"):
    (tmp_path / f"{name}.json").write_text(text)
  page = report.write_report(tmp_path).read_text()
  assert sections(page) == TITLES and page.count(says) == 3


def test_a_file_that_cannot_be_read_costs_its_section(tmp_path):
  (tmp_path / "samples" / "Falling.mp4").mkdir(parents=True)
  page = report.write_report(tmp_path).read_text()
  assert sections(page) == TITLES and page.count("a file cannot be read") == 1


def test_young_run_without_router_or_validation(tmp_path):
  (tmp_path / "metrics.jsonl").write_text(
    '{"step": 1, "kind": "train", "loss": 1.0, "grad_norm": 2.0}\n'
  )
  (tmp_path / "cost.json").write_text(json.dumps(FILES["cost"]))
  page = report.write_report(tmp_path).read_text()
  assert page.count("data:image/png") == 2  # losses and costs
  assert "no validation line" in page and "--time_dense" in page


def test_metrics_with_their_company(tmp_path):
  """Rows of `freqformer.evaluate`: a line each, floor and controls beside it, the rest folded."""
  company = dict(floor={"mean": 3.25, "spread": 0.5}, controls={"one_frame": {"mean": 9.5}})
  rows = [
    dict(name="kvd", unit="", value=7.5, mean=7.25, spread=0.125, **company),
    dict(name="judge", unit="%", value=40.5, floor=None, protocol={"drawn": "samples"}),
  ]
  (tmp_path / "evaluation.json").write_text(json.dumps(rows))
  write_mp4(
    tmp_path / "evaluation" / "samples" / "Kicks" / "00000.mp4",
    np.zeros((2, 16, 16, 3), np.uint8),
    8,
  )
  page = report.write_report(tmp_path).read_text()
  assert sections(page) == TITLES and "All that was recorded" in page
  shown = page.replace(' class="n"', "")
  assert "<td>7.5</td><td>7.25</td><td>0.125</td><td>3.25</td><td>9.5</td>" in shown
  assert "<td>judge</td><td>%</td><td>samples</td><td>40.5</td><td>–</td>" in shown
  assert page.count("data:video/mp4;base64,") == 1  # drawn to be measured


def test_the_norm_of_gradients_has_plain_ticks():
  figure, (axis,) = pieces.panels(1)
  axis.plot([1, 2], [0.3, 6.0])
  losses.plain_log(axis)
  figure.draw_without_rendering()
  texts = [tick.get_text() for tick in axis.get_yticklabels(which="both")]
  assert {"0.5", "1", "2", "5"} <= set(texts) and not any("10" in text for text in texts)


@pytest.mark.parametrize("layers", [1, 30])
def test_heatmap(layers):
  """Every head has its name, soft is on the left, and nothing leaves the figure."""
  kinds = {kind: np.resize(FILES["routing"][kind], (layers, 4, 3, 3)) for kind in KINDS}
  figure = routing.heatmap(FILES["routing"] | kinds)
  figure.draw_without_rendering()
  box = figure.get_tightbbox().get_points()
  assert (box > -0.1).all() and (box < figure.get_size_inches() + 0.1).all()
  axis = figure.axes[0]
  names = [label.get_text() for label in axis.get_yticklabels()]
  assert names[:2] == ["layer 0.head 0", "layer 0.head 1" if layers == 1 else "layer 0.head 2"]
  values = axis.images[0].get_array()
  np.testing.assert_allclose(values[0, :3], kinds["probs"][0, 0, 0])
  np.testing.assert_allclose(values[0, -3:], kinds["choice"][0, -1, 0])


def test_any_json_is_shown():
  """Objects of one kind share a table, and what does not fit into a cell has one of its own."""
  found = {"a": [{"x": 1, "deep": {"y": [1.5, None], "z": {}}}], "b": "text", "c": [[1, [2]]]}
  shown = pieces.json_tables(found)
  for text in ("<h3>a</h3>", ">x<", "1 deep", "1.5, –", ">text<"):
    assert text in shown, text
  for value in (None, 3, [], {}, [1, 2]):
    sections(pieces.page("any", [pieces.json_tables(value)]))
