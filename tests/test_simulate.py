"""The simulator: rows and refusals of the command, the roofline's laws, calibration against published measurements."""

import csv
import dataclasses
import io
import json
import math
import resource
import time

import pytest

from freqformer import simulate
from freqformer.config import ConfigError
from freqformer.cost import model_cost
from freqformer.methods.registry import METHODS
from freqformer.model_config import SIZES
from freqformer.simulation import calibrate
from freqformer.simulation.descriptions import known, load_gpu, load_model
from freqformer.simulation.forward import Plan, cubic_grid, make_method, row, run_seconds
from freqformer.simulation.forward import simulate as forward
from freqformer.simulation.roofline import attention_seconds
from freqformer.simulation.scaling import check_fits, imbalance, largest_video, memory_bytes, parallel
from kernels.cost import uniform
from tests.tiny_config import get_config

PUBLISHED = "freqformer/simulation/published/h100.json"
FIELDS = ("model", "method", "gpu", "tokens", "grid", "attention_flops", "linear_flops", "total_flops", "hbm_bytes", "seconds")


def rows_of(*argv):
  return json.loads(simulate.run([*argv, "--format=json"]))


def plan(model="wan2.1-1.3b", method="dense", grid=(21, 30, 52), **fields):
  return Plan(load_model(model), method, make_method(method), grid, **fields)


# ---- the command ---------------------------------------------------------------------------------------------------------


def test_rows_have_the_fields_and_add_up():
  rows = rows_of("--model=wan2.1-1.3b", "--method=freqformer", "--gpu=h100", "--tokens=64k,75600", "--compare=dense,radial")
  assert [r["tokens"] for r in rows] == [65536] * 3 + [75600] * 3
  for r in rows:
    assert all(name in r for name in FIELDS) and r["measured"] is False
    assert r["total_flops"] == r["attention_flops"] + r["linear_flops"] and math.prod(r["grid"]) == r["tokens"]
    parts = ("attention_seconds", "around_seconds", "matmul_seconds", "elementwise_seconds")
    assert r["seconds"] == pytest.approx(sum(r[p] for p in parts))
  dense = next(r for r in rows if r["method"] == "dense")
  assert dense["speedup_over_dense"] == 1 and dense["attention_flops"] == 30 * 4 * 65536**2 * 1536


def test_formats_agree(capsys):
  argv = ["--model=s", "--method=sliding_tile(window=(4, 8, 8))", "--grid=8,16,16", "--gpu=a100"]
  (one,) = rows_of(*argv)
  (line,) = csv.DictReader(io.StringIO(simulate.run([*argv, "--format=csv"])))
  assert float(line["seconds"]) == one["seconds"] and line["grid"] == "8x16x16" and line["measured"] == "False"
  text = simulate.run([*argv, "--format=table"])
  assert "2,048" in text and text.splitlines()[0].split()[-1] == "measured" and text.splitlines()[1].split()[-1] == "no"
  assert "Assumed, not calibrated" in capsys.readouterr().err


def test_any_integer_works_and_the_grid_is_printed(capsys):
  (one,) = rows_of("--model=s", "--method=radial", "--tokens=10007")  # a prime
  assert one["grid"] == [1, 1, 10007] and "1x1x10007" in capsys.readouterr().err
  assert [cubic_grid(n) for n in (1, 64, 75600, 65536, 1 << 20)] == [
    (1, 1, 1),
    (4, 4, 4),
    (40, 42, 45),
    (32, 32, 64),
    (64, 128, 128),
  ]


@pytest.mark.parametrize("model", known("models"))
@pytest.mark.parametrize("gpu", known("gpus"))
def test_every_model_on_every_gpu(model, gpu):
  card = load_model(model)
  found = row(plan(model, "dense", card.grid), load_gpu(gpu))
  assert found["seconds"] > 0 and found["tokens_per_s"] > 0 and found["flops_per_byte"] > 1
  assert found["rates_calibrated"] is False and load_gpu(gpu).rates_from.startswith("Assumed")


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_is_simulated_and_run(method):
  p, gpu = plan("wan2.1-1.3b", method), load_gpu("h100")
  seconds, phases = run_seconds(p, gpu)
  assert sum(phases.values()) == 50 and seconds > 0
  dense = run_seconds(plan(), gpu)[0]
  assert method == "dense" or seconds < 1.2 * dense


REFUSALS = [
  (["--gpu=h900"], r"gpu 'h900' is unknown; known: a100, b200, cpu, h100, h200\. .*JSON file with name"),
  (["--model=wan3"], r"model 'wan3' is unknown; known: b, cogvideox1\.5-5b"),
  (["--method=frequency"], "unknown"),
  (["--method=block_topk(density=2.0)"], "density"),
  (["--method=block_topk(densty=0.2)"], "did you mean 'density'"),
  (["--tokens=64q"], "no positive whole number"),
  (["--tokens=1.3"], "no positive whole number"),
  (["--grid=8,16"], "three positive token counts"),
  (["--grid=8,16,16", "--tokens=64k"], "has 2048 tokens"),
  (["--model=hunyuanvideo", "--tokens=16m"], r"GB too much\. What fits: --gpus=\d+ or at most [\d,]+ tokens"),
  (["--model=s", "--gpus=7", "--grid=8,16,16"], "needs a whole head"),
  (["--calibrate=nowhere.json"], "cannot be read"),
  (["--gpu=a100", f"--calibrate={PUBLISHED}"], "no row of a100"),
  (["--model=s", "--method=adaspa(search=(10, 60))", "--grid=8,16,16", "--run"], "60"),
]


@pytest.mark.parametrize("argv, message", REFUSALS, ids=[" ".join(a) for a, _ in REFUSALS])
def test_refusals(argv, message):
  with pytest.raises(ConfigError, match=message):
    simulate.run(argv)


def test_main_exits_with_a_sentence(capsys):
  with pytest.raises(SystemExit, match="2"):
    simulate.main(["--gpu=h900"])
  assert capsys.readouterr().err.startswith("error: gpu 'h900'")


def test_a_user_s_own_gpu_and_model(tmp_path):
  gpu = json.loads((simulate.pathlib.Path("freqformer/simulation/gpus/h100.json")).read_text())
  gpu |= {"name": "mine", "hbm_bytes_per_s": 1e12, "rates": gpu["rates"] | {"hbm": 0.9e12}}
  (tmp_path / "mine.json").write_text(json.dumps(gpu))
  (found,) = rows_of(f"--gpu={tmp_path}/mine.json", "--model=s", "--method=dense", "--grid=8,16,16")
  assert found["gpu"] == "mine"
  (tmp_path / "bad.json").write_text(json.dumps(gpu | {"smss": 3}))
  with pytest.raises(ConfigError, match="did you mean 'sms'"):
    load_gpu(f"{tmp_path}/bad.json")


def test_plot_and_speed_at_a_million_tokens(tmp_path):
  start = time.monotonic()
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  (found,) = rows_of("--model=wan2.1-14b", "--method=freqformer", "--tokens=1m", f"--plot={tmp_path}/p.svg")
  assert time.monotonic() - start < 5 and found["tokens"] == 1 << 20
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6  # kilobytes
  assert "simulated" in (tmp_path / "p.svg").read_text()


# ---- the cards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", known("models"))
def test_parameters_follow_from_the_sizes(model):
  card = load_model(model)
  matrices = sum(float(k) * c for _, _, k, c in card.block.matmuls(1)) * card.layers
  # Of HunyuanVideo's 60 blocks 20 have a second set of weights, for text: 12 D^2 and a modulation each.
  matrices += 20 * 12 * card.width**2 if model == "hunyuanvideo" else 0
  assert matrices == pytest.approx(card.parameters, rel=0.06)


def test_our_sizes_are_the_model_s_own():
  for size, (width, depth, heads) in SIZES.items():
    card = load_model(size)
    assert (card.width, card.layers, card.heads) == (width, depth, heads)


def test_our_card_counts_like_the_model():
  from freqformer.experiment import experiment

  config = get_config()
  config.model.size, config.model.width, config.model.depth, config.model.heads = "S", 0, 0, 0
  config.model.mlp_ratio, config.model.attention.block = 4.0, 128
  model = experiment(config).model.with_method("dense")
  ours = model_cost(model, (8, 16, 16, 32))
  found = forward(plan("s", "dense", (8, 16, 16)), load_gpu("h100"))
  assert found.attention_flops == ours.attention_flops and found.linear_flops == pytest.approx(ours.linear_flops, rel=1e-12)


def test_the_field_s_shares():
  """Attention has about half of a forward at 480p, 70-78 % at 720p, about 95 % at 1M tokens (by FLOPs)."""
  share = lambda f: f.attention_flops / f.total_flops
  gpu = load_gpu("h100")
  assert 0.45 < share(forward(plan("wan2.1-14b", "dense", (21, 30, 52)), gpu)) < 0.6
  assert 0.65 < share(forward(plan("wan2.1-14b", "dense", (21, 45, 80)), gpu)) < 0.8
  assert share(forward(plan("wan2.1-14b", "dense", (64, 128, 128)), gpu)) > 0.93
  hunyuan = forward(plan("hunyuanvideo", "dense", (30, 48, 80)), gpu)
  assert hunyuan.attention_flops * 50 == pytest.approx(491e15, rel=0.01)


# ---- the roofline --------------------------------------------------------------------------------------------------------


def test_roofline_limits():
  h100 = load_gpu("h100")
  long, few = uniform(1024, 1024, 1024, 128, heads=24), uniform(1024, 1, 1024, 128, heads=24)
  assert attention_seconds(long, h100, 24).bound == "compute"
  thin = dataclasses.replace(h100, rates=dataclasses.replace(h100.rates, l2=1e11))
  assert attention_seconds(long, thin, 24).bound == "l2"
  slow = dataclasses.replace(h100, rates=dataclasses.replace(h100.rates, hbm=1e9))
  assert attention_seconds(few, slow, 24).bound == "hbm"
  # 133 equal items take two waves, as 264 do.
  a, b = (attention_seconds(uniform(n, 64, 512, 128), h100, 1) for n in (133, 264))
  assert a.total == pytest.approx(b.total, rel=0.02) and a.tail > 0.9 * a.compute and b.tail < 1e-6 * b.compute
  empty = attention_seconds(uniform(10, 0, 10, 128), h100, 1)
  assert 0 < empty.total < 1e-3


def test_time_at_a_fixed_key_budget_is_linear_and_at_fixed_density_quadratic():
  gpu = load_gpu("h100")
  grids = ((16, 64, 64), (64, 128, 128))
  seconds = {}
  for name in ("sliding_tile(window=(12, 16, 16))", "block_topk(density=0.05)", "dense"):
    seconds[name] = [forward(plan("wan2.1-1.3b", name, g), gpu).attention_s for g in grids]
  ratios = [b / a for a, b in seconds.values()]
  assert 14 < ratios[0] < 18 and 200 < ratios[1] < 280 and 240 < ratios[2] < 260


def test_memory_and_the_largest_video():
  gpu = load_gpu("h100")
  p = plan("hunyuanvideo", "dense", (33, 45, 80))
  grid = largest_video(p, gpu)
  check_fits(dataclasses.replace(p, grid=grid), gpu)
  with pytest.raises(ConfigError, match="too much"):
    check_fits(dataclasses.replace(p, grid=(grid[0] + 1, *grid[1:])), gpu)
  assert memory_bytes(p, 8) < memory_bytes(p) and memory_bytes(plan("hunyuanvideo", "adaspa", (33, 45, 80))) > memory_bytes(p)


def test_more_gpus():
  gpu, p = load_gpu("h100"), plan("wan2.1-14b", "freqformer", (21, 45, 80))
  one, four = parallel(p, gpu, 1), parallel(p, gpu, 4)
  assert one.speedup == 1 and 1 < four.speedup < 4 and four.sent_bytes == 40 * 4 * 75600 * 5120 * 2 * 3 / 16
  assert imbalance(plan(), 4) == 1 and imbalance(p, 40) > 1.2  # one head each: the dearest branch is the busiest


# ---- calibration ---------------------------------------------------------------------------------------------------------


def test_sta_is_predicted_from_the_dense_rate_alone():
  measured = calibrate.load_rows(PUBLISHED, "h100")
  only = [dataclasses.replace(m, fit=m.name == "FA3 dense on 30x48x80") for m in measured]
  fit = calibrate.calibrate(load_gpu("h100"), only, free=("attention_flops",))
  found = {r["name"]: r for r in fit.rows}
  assert abs(found["FA3 dense on 30x48x80"]["error"]) < 1e-3
  sta = found["STA 18x24x24 on 30x48x80"]
  assert not sta["fitted"] and abs(sta["error"]) < 0.15


def test_published_rows_that_were_not_fitted_are_within_15_percent():
  fit = calibrate.calibrate(load_gpu("h100"), calibrate.load_rows(PUBLISHED, "h100"))
  assert set(fit.fitted) == {"attention_flops", "softmax_exposed", "item_s"}
  assert sum(r["fitted"] for r in fit.rows) == 3 and fit.worst(True) < 0.01
  assert sum(not r["fitted"] for r in fit.rows) >= 15 and fit.worst(False) < 0.15
  assert fit.gpu.calibrated and not load_gpu("h100").calibrated
  assert "not fitted: mean error" in fit.report()


def test_calibration_finds_known_rates(tmp_path):
  truth = load_gpu("h100")
  truth = dataclasses.replace(
    truth, rates=dataclasses.replace(truth.rates, attention_flops=700e12, item_s=5e-6, softmax_exposed=0.5)
  )
  rows = []
  for d, n in ((128, 1024), (128, 16384), (64, 16384), (128, 4096)):
    call = uniform(n // 128, n // 128, n // 128, d, heads=16)
    rows.append({"name": f"{d} {n}", "gpu": "h100", "heads": 16, "head_dim": d, "n": n})
    rows[-1] |= {"seconds": attention_seconds(call, truth, 16).total, "fit": n != 4096}
  (tmp_path / "rows.json").write_text(json.dumps(rows))
  fit = calibrate.calibrate(load_gpu("h100"), calibrate.load_rows(tmp_path / "rows.json", "h100"))
  assert fit.gpu.rates.attention_flops == pytest.approx(700e12, rel=0.03) and fit.gpu.rates.item_s == pytest.approx(
    5e-6, rel=0.1
  )
  assert fit.worst(False) < 0.02
  text = simulate.run(["--gpu=h100", f"--calibrate={tmp_path}/rows.json", f"--write_gpu={tmp_path}/fitted.json"])
  assert "fitted" in text and load_gpu(f"{tmp_path}/fitted.json").calibrated


def test_a_bad_measured_row_is_named(tmp_path):
  (tmp_path / "rows.json").write_text(json.dumps([{"name": "x", "gpu": "h100", "heads": 4, "tokens": 5, "seconds": 1}]))
  with pytest.raises(ConfigError, match="'x' lacks or misstates a field: 'head_dim'"):
    calibrate.load_rows(tmp_path / "rows.json", "h100")
