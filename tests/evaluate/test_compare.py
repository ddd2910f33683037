"""Methods side by side: only the method differs, and figures are those of the videos."""

import json
import re
import types

import jax
import numpy as np
import pytest
from flax import nnx

from freqformer.command.files import read_config
from freqformer.config import ConfigError
from freqformer.cost import Cost
from freqformer.evaluate import compare, quality
from freqformer.model.dit import VideoDiT
from freqformer.pages.compare import slug, text_table, write_comparison
from freqformer.train.checkpoint import Checkpoints
from freqformer.train.experiment import experiment
from tests.command.process import TINY, call

pytestmark = pytest.mark.xdist_group("compare")
TOPK = "block_topk(density=0.5, coarse=none)"
METHODS = ["dense", TOPK, "adaspa(sparsity=0.5)"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A dense checkpoint with noise on adaLN-Zero's zeros: attention reaches the output."""
  workdir = tmp_path_factory.mktemp("compare")
  config = read_config(TINY)
  config.model.attention.method = "dense"
  exp = experiment(config)
  shape = exp.latent_shape
  params = nnx.state(nnx.jit(lambda: VideoDiT(exp.model, shape, 2, nnx.Rngs(0)))())
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), params)
  record = {
    "config": config.to_dict(),
    "class_names": ["a", "b"],
    "latent_shape": shape,
    "statistics": {"mean": [0.0] * shape[-1], "std": [5.0] * shape[-1]},
    "video_shape": exp.data.video_shape,
  }
  Checkpoints(workdir).save(3, {"ema": params}, record)
  return workdir


@pytest.fixture(scope="module")
def compared(workdir):
  """Runs the command once: what it wrote and printed, and the videos that it compared."""
  videos = {}

  def compare_and_keep(*args):
    rows, drawn = comparing(*args)
    videos.update(drawn)
    return rows, drawn

  flags = [f"--workdir={workdir}", f"--out={workdir / 'out'}", "--steps=4", "--samples=2"]
  comparing, compare.compare = compare.compare, compare_and_keep
  try:
    done = call(workdir, "eval.py", *flags, f"--compare={','.join(METHODS)}")
  finally:
    compare.compare = comparing
  result = json.loads((workdir / "out" / "comparison.json").read_text())
  return result, videos, done.stdout


def test_figures_are_those_of_the_videos(compared):
  result, videos, _ = compared
  rows = result["rows"]
  assert [r["method"] for r in rows] == METHODS == list(videos)
  assert rows[0]["quality"] is None
  for r in rows[1:]:
    own = quality.psnr(videos[r["method"]], videos["dense"])
    np.testing.assert_allclose(r["quality_by_sample"]["psnr"], own)
    np.testing.assert_allclose(r["quality"]["psnr"], own.mean())
    # Of other noise it is below 10.
    assert 20 < r["quality"]["psnr"] < 100 and r["quality"]["ssim"] < 1


def test_density_and_flops(compared):
  rows = compared[0]["rows"]
  dense, half, adaspa = rows
  assert np.shape(half["density_by_step_layer_head"]) == (4, 2, 2)
  assert dense["density"] == dense["attention_flops_over_dense"] == 1
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
    np.testing.assert_allclose(r["seconds_per_sample"], r["run_seconds"] / 4)


def test_page(workdir, compared):
  result, _, printed = compared
  assert result["samples"] == 4 and result["steps"] == 4
  assert TOPK in printed and "PSNR" in printed
  out = workdir / "out"
  page = (out / "comparison.html").read_text()
  assert page.count("data:video/mp4;base64,") == 12 and page.count('alt="difference of') == 8
  assert page.count('alt="density of') == 3
  assert "LPIPS was not measured" in page and "not as they chose" in page
  assert "http://" not in page and "https://" not in page
  assert {p.parent.name for p in out.glob("*/*.mp4")} == set(map(slug, METHODS))
  assert len(list(out.glob("*/*.mp4"))) == 12


@pytest.mark.parametrize(
  "args, message",
  [
    (["--compare=dense,freqformer"], "method/router/bias"),
    (["--compare=dense,adaspa", "--metrics=psnr,lpips"], "--lpips_weights"),
    (["--compare=dense,adaspa", "--method=dense"], "--method goes with one method"),
    (["--guidance_interval=low,high"], "must be two numbers"),
    (["--frames=7"], "6 and 8 are"),
    (["--size=24"], "must be ROWSxCOLS"),
    (["--first_frame=picture.png"], "was not trained with first frames"),
  ],
)
def test_command_refuses_before_sampling(workdir, tmp_path, args, message):
  flags = [f"--workdir={workdir}", f"--out={tmp_path / 'out'}", "--steps=4"]
  done = call(tmp_path, "eval.py", *flags, *args, code=2)
  assert message in done.stderr
  assert not (tmp_path / "out").exists() and "sampling" not in done.stderr


def test_samples_of_another_size_by_another_sampler(workdir, tmp_path):
  flags = [f"--workdir={workdir}", "--classes=b", "--frames=8"]
  flags += ["--size=16x40", "--rope=ntk", "--sampler=unipc", "--steps=3"]
  flags += ["--guidance_interval=0.9,1", "--guidance_rescale=0.5"]
  call(tmp_path, "eval.py", *flags)
  out = workdir / "samples-frames_8-16x40"  # the run's own samples stay
  result = json.loads((out / "sampling.json").read_text())
  assert result["video_shape"] == [8, 16, 40] and result["rope"] == "ntk"
  assert result["sampler"] == "unipc" and result["guidance_interval"] == [0.9, 1.0]
  assert result["evaluations"] == 3 and result["forwards"] == 4
  tokens = 4 * 2 * 5
  assert result["attention_flops_per_sample"] == 4 * tokens**2 * 24 * 2 * 4
  latents = np.load(out / "latents.npz")["latents"]
  assert latents.shape == (1, 4, 2, 5, 3) and np.isfinite(latents).all()
  assert next((out / "b").glob("*.mp4")).stat().st_size > 500


def test_refusals(workdir):
  for method, message in (
    ("block_topk", "method block_topk needs parameters .*lacks .*e.g. .*/method/.*; train with it"),
    ("adaspa(search=(7,))", "comes after the last step"),
    ("adapsa", "did you mean 'adaspa'"),
  ):
    with pytest.raises(ConfigError, match=message):
      compare.candidates(workdir, ["dense", method], 4)
  for metrics, weights, message in (
    (("psnr",), "nothing.npz", "nothing is downloaded"),
    (("pnsr",), None, "did you mean 'psnr'"),
  ):
    with pytest.raises(ConfigError, match=message):
      compare.metric_functions(metrics, weights)


def test_methods_of_a_comparison_differ():
  text = "dense, adaspa(search=(0.2, 0.6), levels=[0.8]) ,radial"
  assert compare.split_methods(text) == [
    "dense",
    "adaspa(search=(0.2, 0.6), levels=[0.8])",
    "radial",
  ]
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
  assert re.search("b +inf +1 ", text_table(rows)) and re.search("a +– +– ", text_table(rows))
  assert slug("radial(decay=0.5)") == "radial_decay_0.5"


def test_pairs_are_compared_clip_by_clip():
  """A clip that equals the reference has no number, and its metric no pair."""
  rows = [
    {"method": "dense", "quality_by_sample": None},
    {"method": "a", "quality_by_sample": {"psnr": [30.0, 33.0, 36.0], "ssim": [0.5, 0.5, 0.5]}},
    {"method": "b", "quality_by_sample": {"psnr": [29.0, 31.0, 33.0], "ssim": [0.5, "inf", 0.5]}},
  ]
  (pair,) = compare.paired(rows)
  assert pair["methods"] == ["a", "b"] and pair["metric"] == "psnr" and pair["clips"] == 3
  assert pair["mean"] == pytest.approx(2.0)  # 1, 2, 3
  assert pair["standard_error"] == pytest.approx(3**-0.5)
  assert pair["t"] == pytest.approx(2 * 3**0.5)
