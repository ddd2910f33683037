"""Methods side by side: only the method differs, and figures are those of the videos."""

import json
import re
import types

import numpy as np
import pytest

from freqformer.config import ConfigError
from freqformer.cost import Cost
from freqformer.diffusion.sampling import SampleConfig
from freqformer.evaluate import compare, quality
from freqformer.pages.compare import slug, text_table, write_comparison
from tests.command.process import call, render

pytestmark = pytest.mark.xdist_group("compare")
TOPK = "block_topk(density=0.5, coarse=none)"
METHODS = ("dense", "block_topk(density=1.0, coarse=none)", TOPK, "adaspa(sparsity=0.5)")
SAMPLING = SampleConfig(steps=4, guidance=2.0, batch_size=2)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A dense checkpoint of a few steps: past adaLN-Zero's zeros, attention reaches the output."""
  place = tmp_path_factory.mktemp("compare")
  render(place, classes=2)
  changed = dict(steps=30, val_every=0, lr=1e-2)
  flags = [f"--config.train.{key}={value}" for key, value in changed.items()]
  flags += [f"--workdir={place / 'run'}", "--config.model.attention.method=dense"]
  call(place, "train.py", *flags)
  return place / "run"


@pytest.fixture(scope="module")
def compared(workdir):
  metrics = compare.metric_functions(("psnr", "ssim"))
  labels, indices = np.array([0, 1, 1], np.int32), np.array([0, 10_000, 10_001], np.int32)
  found = compare.candidates(workdir, METHODS, SAMPLING.steps)
  return compare.compare(found, labels, indices, 0, SAMPLING, metrics)


def test_figures_are_those_of_the_videos(compared):
  rows, videos = compared
  assert [r["method"] for r in rows] == list(METHODS) == list(videos)
  assert rows[0]["quality"] is None
  for r in rows[2:]:
    own = quality.psnr(videos[r["method"]], videos["dense"])
    np.testing.assert_allclose(r["quality_by_sample"]["psnr"], own)
    np.testing.assert_allclose(r["quality"]["psnr"], own.mean())
    assert 5 < r["quality"]["psnr"] < 100 and r["quality"]["ssim"] < 1


def test_density_one_is_the_reference(compared):
  """A method that lists every tile draws the videos of dense attention, to a grey level."""
  _, videos = compared
  full, dense = (videos[m].astype(int) for m in METHODS[1::-1])
  assert np.abs(full - dense).max() <= 1
  assert np.abs(videos[TOPK].astype(int) - dense).max() > 1


def test_density_and_flops(compared):
  rows, _ = compared
  dense, full, half, adaspa = rows
  assert np.shape(half["density_by_step_layer_head"]) == (4, 2, 2)
  assert dense["density"] == 1
  assert dense["attention_flops_over_dense"] == full["attention_flops_over_dense"] == 1
  tokens = 3 * 3 * 4
  layer = 4 * tokens**2 * 24  # width 24
  flops = layer * 2 * 4 * 2  # layers, steps, halves of guidance
  assert dense["attention_flops_per_sample"] == flops
  np.testing.assert_allclose(half["density"], half["attention_flops_over_dense"], rtol=0.2)
  assert half["density"] < 0.7
  assert half["total_flops_over_dense"] > half["attention_flops_over_dense"]
  # AdaSpa's first search step is dense, later ones are not: density and FLOPs follow the phases.
  assert adaspa["phases"] == ["search_first", "reuse", "search", "reuse"]
  by_step = np.array(adaspa["density_by_step"])
  assert by_step[0] == 1 and (by_step[1:] < 0.7).all()
  np.testing.assert_allclose(adaspa["attention_flops_over_dense"], (1 + 3 * 0.5) / 4, rtol=0.1)
  for r in rows:
    assert r["compile_seconds"] > 0 and r["run_seconds"] > 0
    np.testing.assert_allclose(r["seconds_per_sample"], r["run_seconds"] / 3)


def test_command_and_page(workdir, tmp_path):
  out = tmp_path / "out"
  flags = [f"--workdir={workdir}", f"--out={out}", "--steps=2", "--samples=2"]
  done = call(tmp_path, "eval.py", *flags, f"--compare=dense,{TOPK}")
  result = json.loads((out / "comparison.json").read_text())
  assert [r["method"] for r in result["rows"]] == ["dense", TOPK]
  assert result["samples"] == 4 and result["steps"] == 2
  assert TOPK in done.stdout and "psnr" in done.stdout
  page = (out / "comparison.html").read_text()
  assert page.count("data:video/mp4;base64,") == 8 and page.count('alt="difference of') == 4
  assert page.count('alt="density of') == 2
  assert "LPIPS was not measured" in page and "not as they chose" in page
  assert "http://" not in page and "https://" not in page
  assert {p.parent.name for p in out.glob("*/*.mp4")} == {
    "dense",
    "block_topk_density_0.5_coarse_none",
  }
  assert len(list(out.glob("*/*.mp4"))) == 8


@pytest.mark.parametrize(
  "args, message",
  [
    (["--compare=dense,freqformer"], "method/router/bias"),
    (["--compare=dense,adaspa", "--metrics=psnr,lpips"], "--lpips_weights"),
    (["--compare=dense,adaspa", "--method=dense"], "--method goes with one method"),
  ],
)
def test_command_refuses_before_sampling(workdir, tmp_path, args, message):
  flags = [f"--workdir={workdir}", f"--out={tmp_path / 'out'}", "--steps=4"]
  done = call(tmp_path, "eval.py", *flags, *args, code=2)
  assert message in done.stderr
  assert not (tmp_path / "out").exists() and "sampling" not in done.stderr


def test_refusals(workdir):
  for method, message in (
    ("block_topk", "method block_topk needs parameters .*lacks .*e.g. .*/method/.*; train with it"),
    ("adaspa(search=(7,))", "comes after the last step"),
    ("adapsa", "did you mean 'adaspa'"),
  ):
    with pytest.raises(ConfigError, match=message):
      compare.candidates(workdir, ["dense", method], SAMPLING.steps)
  for metrics, weights, message in (
    (("psnr", "lpips"), None, "--lpips_weights"),
    (("psnr",), "nothing.npz", "nothing is downloaded"),
    (("pnsr",), None, "did you mean 'psnr'"),
  ):
    with pytest.raises(ConfigError, match=message):
      compare.metric_functions(metrics, weights)


def test_methods_of_a_comparison_differ():
  text = "dense,adaspa(search=(0.2, 0.6))"
  assert compare.split_methods(text) == ["dense", "adaspa(search=(0.2, 0.6))"]
  for text in ("dense,", "dense,dense"):
    with pytest.raises(ConfigError, match="at least two different"):
      compare.split_methods(text)


def test_page_of_equal_videos(tmp_path):
  """A PSNR of infinity is valid JSON and is shown; the heatmap of no difference is black."""
  video = np.random.default_rng(0).integers(0, 256, (1, 2, 32, 32, 3), dtype=np.uint8)
  drawn = types.SimpleNamespace(
    figures=lambda: {"compile_seconds": 1.0, "run_seconds": 2.0, "seconds_per_sample": 2.0},
    density=np.ones((2, 1, 1)),
    phases=[("",), ("",)],
    cost=Cost(1.0, 1.0),
    dense=Cost(1.0, 1.0),
  )
  metrics = compare.metric_functions(("psnr", "ssim"))
  references = {"radial(decay=0.5)": None, "b": video}
  rows = [compare.row(name, drawn, video, other, metrics) for name, other in references.items()]
  # Videos of an earlier comparison go, other files in their folders stay.
  write_comparison(tmp_path, {"rows": rows}, dict.fromkeys(references, video), ["old"], 12.5)
  (tmp_path / "b" / "mine.mp4").write_text("")
  rows[0]["method"] = "a"
  videos = {"a": video, "b": video}
  page = write_comparison(tmp_path, {"rows": rows}, videos, ["<one>"], 12.5).read_text()
  found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*"))
  assert found == ["a/000_one.mp4", "b/000_one.mp4", "b/mine.mp4"]
  assert "Infinity" not in (tmp_path / "comparison.json").read_text()
  assert ">inf<" in page and "&lt;one&gt;" in page
  assert re.search("inf +1.000", text_table(rows))
  assert re.search("reference +reference", text_table(rows))
  assert slug("radial(decay=0.5)") == "radial_decay_0.5"
