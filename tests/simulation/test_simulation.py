"""The simulator: models on devices, the roofline's laws, calibration against measurements."""

import dataclasses

import pytest
from freqformer.kernels.block_sparse.cost import uniform

from freqformer.config import ConfigError
from freqformer.cost import model_cost
from freqformer.model.config import SIZES
from freqformer.simulation import calibrate
from freqformer.simulation import command as simulate
from freqformer.simulation.descriptions import gpu_named, known, load_gpu, load_model
from freqformer.simulation.forward import dense_baseline, make_method
from freqformer.simulation.forward import simulate as forward
from freqformer.simulation.roofline import attention_seconds
from freqformer.simulation.scaling import row
from freqformer.train.experiment import experiment
from tests.simulation.cases import CALL, plan, rows_of, written
from tests.tiny_config import get_config

PUBLISHED = "freqformer/simulation/published/h100.json"


# ---- every model, GPU and method -----------------------------------------------------------------


def with_rates(gpu, **rates):
  return dataclasses.replace(gpu, rates=dataclasses.replace(gpu.rates, **rates))


@pytest.mark.parametrize("gpu", known("gpus"))
def test_every_model_on_every_gpu(gpu):
  for model in known("models"):
    found = row(plan(model, "dense", load_model(model).grid), load_gpu(gpu))
    assert found["seconds"] > 0 and found["tokens_per_s"] > 0 and found["flops_per_byte"] > 1
    assert found["rates"] == "all rates assumed" and load_gpu(gpu).rates_from.startswith("Assumed")


# ---- the cards -----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", known("models"))
def test_parameters_follow_from_the_sizes(model):
  card = load_model(model)
  matrices = sum(float(k) * c for _, _, k, c in card.matmuls(1)) * card.layers
  # HunyuanVideo: 20 of 60 blocks have a second set of weights for text, 12 D^2 and a modulation.
  matrices += 20 * 12 * card.width**2 if model == "hunyuanvideo" else 0
  assert matrices == pytest.approx(card.parameters, rel=0.06)


def test_our_sizes_are_the_model_s_own():
  for size, (width, depth, heads) in SIZES.items():
    card = load_model(size)
    assert (card.width, card.layers, card.heads) == (width, depth, heads)


def test_our_card_counts_like_the_model():
  config = get_config()
  config.model.size = "S"
  config.model.width = config.model.depth = config.model.heads = 0
  config.model.mlp_ratio = 4.0
  config.model.attention.block = 128
  model = experiment(config).model.with_method("dense")
  ours = model_cost(model, (8, 16, 16, 32))
  found = forward(plan("s", "dense", (8, 16, 16)), load_gpu("h100"))
  assert found.attention_flops == ours.attention_flops
  assert found.linear_flops == pytest.approx(ours.linear_flops, rel=1e-12)


def test_the_field_s_shares():
  """Attention has half of a forward's FLOPs at 480p, 70-78 % at 720p, about 95 % at 1M tokens."""
  gpu = load_gpu("h100")
  shares = (((21, 30, 52), 0.45, 0.6), ((21, 45, 80), 0.65, 0.8), ((64, 128, 128), 0.93, 1))
  for grid, low, high in shares:
    found = forward(plan("wan2.1-14b", "dense", grid), gpu)
    assert low < found.attention_flops / found.total_flops < high
  hunyuan = forward(plan("hunyuanvideo", "dense", (30, 48, 80)), gpu)
  assert hunyuan.attention_flops * 50 == pytest.approx(491e15, rel=0.01)


# ---- the roofline --------------------------------------------------------------------------------


def test_roofline_limits():
  h100 = load_gpu("h100")
  long = uniform(1024, 1024, 1024, 128, heads=24)
  few = uniform(1024, 1, 1024, 128, heads=24)
  for call, rates, bound in (
    (long, {}, "compute"),
    (long, {"l2": 1e11}, "l2"),
    (few, {"hbm": 1e9}, "hbm"),
  ):
    assert attention_seconds(call, with_rates(h100, **rates), 24).bound == bound
  # 133 equal items take two waves, as 264 do.
  a, b = (attention_seconds(uniform(n, 64, 512, 128), h100, 1) for n in (133, 264))
  assert a.total == pytest.approx(b.total, rel=0.02)
  assert a.tail > 0.9 * a.compute and b.tail < 1e-6 * b.compute
  empty = attention_seconds(uniform(10, 0, 10, 128), h100, 1)
  assert 0 < empty.total < 1e-3


def test_time_at_a_fixed_key_budget_is_linear_and_at_fixed_density_quadratic():
  gpu = load_gpu("h100")
  for name, low, high in (
    ("sliding_tile(window=(12, 16, 16))", 14, 18),
    ("block_topk(density=0.05)", 200, 280),
    ("dense", 240, 260),
  ):
    few, many = (
      forward(plan("wan2.1-1.3b", name, grid), gpu).attention_seconds
      for grid in ((16, 64, 64), (64, 128, 128))
    )
    assert low < many / few < high


@pytest.mark.parametrize(
  "method, keys", [("octaves", 4000), ("octaves(levels=6, window=(2, 2, 2), deal=octant)", 1100)]
)
def test_octaves_are_linear_from_64k_to_1m_tokens(method, keys):
  """Keys per query hardly grow; FLOPs, bytes and seconds per token stay."""
  gpu = load_gpu("h100")
  small, large = (
    forward(plan(method=method, grid=grid), gpu) for grid in ((16, 64, 64), (64, 128, 128))
  )
  assert small.density * 2**16 < large.density * 2**20 < keys
  for name, most in (("total_flops", 1.1), ("hbm_bytes", 1.1), ("seconds", 1.05)):
    assert 0.95 < getattr(large, name) / getattr(small, name) / 16 < most, name


def test_the_baseline_pays_no_padding():
  """At most one tile of it; our own dense method pays what its layout holds, for the same pairs."""
  gpu = load_gpu("h100")
  for grid, least, most in (
    ((21, 45, 80), 1.1, 1.2),
    ((16, 64, 64), 0.999, 1.001),
    ((11, 48, 85), 1.2, 1.35),
  ):
    ours = plan("wan2.1-14b", "dense", grid, block=128)
    base = dense_baseline(dataclasses.replace(ours, method=make_method("radial"), block=64))
    assert base.layout.n_buffer - base.layout.n < 128 and base.layout.block == 128
    padded = forward(ours, gpu)
    unpadded = forward(base, gpu)
    assert least < padded.attention_seconds / unpadded.attention_seconds < most
    assert padded.attention_flops == unpadded.attention_flops
    assert padded.matmul_seconds == unpadded.matmul_seconds
  (found,) = rows_of("--model=wan2.1-14b", "--method=dense", "--gpus=2")  # a ragged grid
  assert found["speedup_over_dense"] == found["unpadded_dense_seconds"] / found["seconds"] < 0.95


# ---- calibration ---------------------------------------------------------------------------------


def worst(fit, fitted):
  return max(abs(r["error"]) for r in fit.rows if r["fitted"] == fitted)


def test_published_rows_that_were_not_fitted_are_within_15_percent():
  fit = calibrate.fit_file(load_gpu("h100"), PUBLISHED)
  assert set(fit.fitted) == {"attention_flops", "softmax_exposed", "item_s"}
  assert sum(r["fitted"] for r in fit.rows) == 3 and worst(fit, True) < 0.01
  assert sum(not r["fitted"] for r in fit.rows) >= 15 and worst(fit, False) < 0.15
  assert not fit.gpu.fit_warnings and not fit.notes and "not fitted: mean error" in fit.report()
  assert fit.gpu.fitted == fit.fitted
  assert {"l2", "hbm", "matmul_flops", "launch_s"} <= set(fit.gpu.assumed)
  fitted = "attention_flops, softmax_exposed, item_s fitted to 3 measured rows; matmul_flops"
  assert fit.gpu.rates_note.startswith(fitted)
  with pytest.raises(ConfigError, match="tensor_flops, sms, exp_per_sm_s differ"):
    calibrate.carry_over(fit.gpu, load_gpu("a100"))


def test_calibration_finds_known_rates(tmp_path):
  known = {"attention_flops": 700e12, "item_s": 5e-6, "softmax_exposed": 0.5}
  truth = with_rates(load_gpu("h100"), **known)
  rows = []
  for d, n in ((128, 1024), (128, 16384), (64, 16384), (128, 4096)):
    call = uniform(n // 128, n // 128, n // 128, d, heads=16)
    seconds = attention_seconds(call, truth, 16).total
    rows.append(CALL | {"head_dim": d, "tokens": n, "seconds": seconds, "fit": n != 4096})
  path = written(tmp_path / "rows.json", *rows)
  fit = calibrate.fit_file(load_gpu("h100"), path)
  assert fit.gpu.rates.attention_flops == pytest.approx(700e12, rel=0.03)
  assert fit.gpu.rates.item_s == pytest.approx(5e-6, rel=0.1) and worst(fit, False) < 0.02
  own = tmp_path / "fitted.json"
  text = simulate.run(["--gpu=h100", f"--calibrate={path}", f"--write_gpu={own}"])
  assert "fitted" in text and load_gpu(str(own)).fitted == fit.fitted
  assert load_gpu(str(own)).fitted_to == "3 measured rows"
  (shown,) = rows_of(f"--gpu={own}", "--model=s", "--method=dense", "--grid=8,16,16")
  assert shown["rates_fitted"] == list(fit.fitted) and "l2" in shown["rates_assumed"]


def test_a_fit_that_fails_says_so(tmp_path):
  """No choice of rates gives the row: a rate ends on the limit of its search, the row is missed."""
  path = written(tmp_path / "rows.json", CALL | {"seconds": 1e-9})
  fit = calibrate.fit_file(load_gpu("h100"), path)
  limit, missed = fit.gpu.fit_warnings
  assert limit.startswith("attention_flops ended on the limit")
  assert missed.startswith("1 of 1 fitted rows are missed")
  assert fit.report().count("WARNING") == 2 and fit.notes[-1].startswith("nothing was held out")
  assert "DOUBTFUL" in fit.gpu.rates_note and fit.rows[0]["rates_warnings"] == list(
    fit.gpu.fit_warnings
  )


def test_rows_that_do_not_say_are_split(tmp_path):
  """Every other one by size is fitted, or those that ask for it; other kernels are held out."""
  sizes = [
    CALL | {"name": str(n), "tokens": n, "seconds": n**2 * 1.3e-11}
    for n in (4096, 16384, 8192, 2048)
  ]
  other = [CALL | {"name": "other", "implementation": "y", "seconds": 1.0}]
  for rows, fitted in (
    (sizes + other, {"2048", "8192", "16384"}),
    ([sizes[0] | {"fit": True}, *sizes[1:]], {"4096"}),
    ([sizes[0] | {"fit": False}, *sizes[1:3]], {"8192"}),
    (sizes[1:], {"2048", "16384"}),
  ):
    found, said = calibrate.load_rows(written(tmp_path / "rows.json", *rows), "h100")
    assert {m.name for m in found if m.fit} == fitted and len(found) == len(rows)
    assert not any("nothing was held out" in line for line in said)


BAD_ROWS = [
  ({"head_dim": None}, "'x' lacks or misstates a field: 'head_dim'"),
  ({"seconds": None}, "'x' lacks or misstates a field: 'seconds or tflops'"),
  ({"attention_calls": 5}, "'x': attention_calls must hold an object per timed call, got 5"),
  (
    {"attention_calls": {"a": {"heads": 1, "head_dim": 8, "n": 64}}},
    "'x: a' lacks or misstates a field: 'seconds or tflops'",
  ),
  ({"block": 0}, "block=0 must be a positive whole number"),
  ({"heads": 2.5}, "heads=2.5 must be a positive whole number"),
  ({"seconds": None, "tflops": 0}, "tflops=0 must be a positive number"),
  ({"seconds": float("nan")}, "seconds=nan must be"),
  ({"density": -3}, r"density=-3 must lie in \(0, 1\]"),
  ({"fit": "false"}, "fit='false' must be true or false"),
  ({"counts": {"pairs": 1}}, "missing"),
  ({"method": "dense", "grid": [8, 16]}, "grid"),
  ({"gpu": None}, "1 without gpu or device"),
  ({"gpu": None, "device": "NVIDIA A100-SXM4-80GB"}, "1 of a100"),
]


@pytest.mark.parametrize("change, message", BAD_ROWS, ids=[str(c) for c, _ in BAD_ROWS])
def test_a_bad_measured_row_is_named(tmp_path, change, message):
  row = {k: v for k, v in (CALL | change).items() if v is not None}
  with pytest.raises(ConfigError, match=message):
    calibrate.load_rows(written(tmp_path / "rows.json", row), "h100")


@pytest.mark.parametrize(
  "kind, name",
  [
    ("NVIDIA H100 80GB HBM3", "h100"),
    ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ("NVIDIA L40S", "l40s"),
    ("NVIDIA GH200 480GB", None),
    ("cpu", "cpu"),
  ],
)
def test_a_device_is_known_by_its_name(kind, name):
  assert gpu_named(kind) == name
