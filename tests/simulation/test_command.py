"""The simulator's command: rows on one and several GPUs, what fits, what is refused and how."""

import csv
import dataclasses
import io
import json
import math
import re
import tracemalloc

import pytest

from freqformer.config import ConfigError
from freqformer.methods.registry import METHODS
from freqformer.simulation import command as simulate
from freqformer.simulation import scaling
from freqformer.simulation.descriptions import known, load_gpu, load_model, write_gpu
from freqformer.simulation.forward import cubic_grid
from tests.simulation.cases import CALL, plan, rows_of, written

PUBLISHED = "freqformer/simulation/published/h100.json"
COUNTS = ("attention_flops", "linear_flops", "total_flops", "hbm_bytes", "seconds")
FIELDS = ("model", "method", "gpu", "tokens", "grid", *COUNTS)
PARTS = ("attention", "around", "matmul", "elementwise", "communication")


# ---- rows ----------------------------------------------------------------------------------------


def check_identities(r):
  """Identities of the numbers of one row, on any number of GPUs."""
  assert all(name in r for name in FIELDS) and r["measured"] is False
  assert math.prod(r["grid"]) == r["tokens"]
  assert r["total_flops"] == r["attention_flops"] + r["linear_flops"]
  assert r["seconds"] == pytest.approx(sum(r[f"{part}_seconds"] for part in PARTS))
  assert r["tokens_per_s"] * r["seconds"] == pytest.approx(r["tokens"])
  assert r["tflops_per_s"] * r["seconds"] == pytest.approx(r["total_flops"] / 1e12)
  assert r["tflops_per_s_per_gpu"] * r["gpus"] == pytest.approx(r["tflops_per_s"])
  assert r["flops_per_byte"] * r["hbm_bytes"] == pytest.approx(r["total_flops"])
  assert (r["communication_seconds"] == r["sent_bytes"] == 0) == (r["gpus"] == 1)


def test_rows_have_the_fields_and_add_up():
  nested = (
    "freqformer(low_shared=true, router=dict(prior=(1, 1, 2)), basis=dict(low=(0.25, 0.5, 0.5)))"
  )
  argv = ["--model=wan2.1-1.3b", "--method=freqformer", "--gpu=h100", "--tokens=64k,75600"]
  rows = rows_of(*argv, f"--compare=dense,{nested}")
  assert [r["tokens"] for r in rows] == [65536] * 3 + [75600] * 3
  for r in rows:
    check_identities(r)
  plain, dense, changed = rows[:3]
  assert dense["speedup_over_dense"] == 1 and dense["attention_flops"] == 30 * 4 * 65536**2 * 1536
  assert changed["method"] == nested and changed["attention_flops"] != plain["attention_flops"]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_rows_on_several_gpus(method):
  """Rates, parts and a whole run follow from the work of each GPU, phase by phase."""
  p = plan(method=method)
  gpu = load_gpu("h100")
  steps = p.card.steps
  phases = [p.method.phase(i, steps) or None for i in range(steps)]
  alone, eight = (scaling.row(p, gpu, gpus) for gpus in (1, 8))
  for r in (alone, eight):
    check_identities(r)
    found = scaling.denoising_run(p, gpu, r["gpus"])
    seconds = found["run_seconds"]
    each = {phase: scaling.parallel(p, gpu, r["gpus"], phase).seconds for phase in set(phases)}
    assert seconds == pytest.approx(p.card.forwards * sum(each[phase] for phase in phases))
    assert sum(found["run_phases"].values()) == steps
  for name in ("total_flops", "hbm_bytes", "kv_bytes", "launches"):
    assert eight[name] == alone[name]
  assert alone["speedup_over_one_gpu"] == 1 < eight["speedup_over_one_gpu"] < 8
  speedup = alone["seconds"] / eight["seconds"]
  assert speedup == pytest.approx(eight["speedup_over_one_gpu"]) and eight["imbalance"] >= 1
  assert alone["memory_bytes"] > eight["memory_bytes"]
  assert seconds < 1.2 * scaling.denoising_run(plan(), gpu, 8)["run_seconds"]


def test_a_run_is_shown():
  p = plan("hunyuanvideo", "adaspa", (33, 45, 80))
  asked = ("--model=hunyuanvideo", "--method=adaspa", "--grid=33,45,80")
  (shown,) = rows_of(*asked, "--gpus=8", "--run")
  assert shown["run_seconds"] == scaling.denoising_run(p, load_gpu("h100"), 8)["run_seconds"]
  assert shown["largest_video_seconds"] > shown["video_seconds"]


def test_dense_steps_and_layers_of_a_run_are_counted():
  """By hand: 2 forwards of each of 50 steps, 6 of them dense, in the others 3 of 30 layers."""
  method = "--method=sliding_tile(window=(1, 1, 1))"
  asked = ("--model=wan2.1-1.3b", "--grid=16,24,32", "--run", "--steps=50")
  schedule = "--schedule=dense_first=0.1, dense_at=(0.5,), dense_layers=(0, 3, -1)"
  own, dense = rows_of(*asked, method, "--compare=dense")
  assert own["total_flops"] < 0.9 * dense["total_flops"]
  (found,) = rows_of(*asked, method, schedule)
  assert found["run_phases"] == {"dense": 6, "": 44}
  for one, whole in (("total_flops", "run_flops"), ("seconds", "run_seconds")):
    mixed = 0.1 * dense[one] + 0.9 * own[one]
    assert found[whole] == pytest.approx(2 * (6 * dense[one] + 44 * mixed))
    assert own[whole] == pytest.approx(2 * 50 * own[one]) and found[one] == own[one]
  everywhere = rows_of(*asked, method, "--schedule=dense_first=1.0")[0]
  assert everywhere["run_flops"] == pytest.approx(dense["run_flops"])


def test_more_gpus():
  p = plan("wan2.1-14b", "freqformer", (21, 45, 80))
  four = scaling.parallel(p, load_gpu("h100"), 4)
  assert four.sent_bytes == 40 * 4 * 75600 * 5120 * 2 * 3 / 16
  assert scaling.imbalance(plan(), 4) == 1
  assert scaling.imbalance(plan(), 8) == 4 / 3  # 12 heads on 8 GPUs: two or one each
  assert scaling.imbalance(p, 40) > 1.2  # one head each: the dearest branch is the busiest
  linear = plan("wan2.1-1.3b", "sparseflow(allocation=(0, 12))")
  assert scaling.imbalance(linear, 4) == 1  # no pairs at all


def test_bytes_per_element_count_everywhere():
  gpu = load_gpu("h100")
  wide = dataclasses.replace(gpu, itemsize=4)
  two, four = (scaling.row(plan(), g, 4) for g in (gpu, wide))
  for name in ("hbm_bytes", "sent_bytes", "elementwise_seconds", "memory_bytes"):
    assert four[name] == pytest.approx(2 * two[name], rel=0.05)


# ---- the command ---------------------------------------------------------------------------------


def test_formats_agree(capsys):
  argv = ["--model=s", "--method=sliding_tile(window=(4, 8, 8))", "--grid=8,16,16"]
  argv += ["--gpu=a100", "--gpus=2"]
  (one,) = rows_of(*argv)
  (line,) = csv.DictReader(io.StringIO(simulate.run([*argv, "--format=csv"])))
  assert float(line["seconds"]) == one["seconds"]
  assert line["grid"] == "8x16x16" and line["measured"] == "False"
  title, rates, head, found = simulate.run(argv).splitlines()
  assert title == "s on 2 x a100: one forward at batch 1, simulated" and rates.startswith("rates: ")
  cells = dict(zip(re.split("  +", head.strip()), re.split("  +", found.strip()), strict=True))
  assert cells["tokens"] == "2,048" and cells["GPUs"] == "2" and cells["measured"] == "no"
  assert "Assumed, not calibrated" in capsys.readouterr().err


def test_any_integer_works_and_the_grid_is_printed(capsys):
  (one,) = rows_of("--model=s", "--method=radial", "--tokens=10007")  # a prime
  assert one["grid"] == [1, 1, 10007] and "1x1x10007, the most cubic" in capsys.readouterr().err
  own = rows_of("--model=wan2.1-14b", "--method=dense", "--tokens=75600,32760")
  assert [r["grid"] for r in own] == [[21, 45, 80], [21, 30, 52]]
  assert own[0]["video_seconds"] == 81 / 16
  assert "75,600 tokens: grid 21x45x80, of a video of wan2.1-14b" in capsys.readouterr().err
  rows_of("--model=s", "--method=dense")
  assert "2,048 tokens: grid 8x16x16, of a video of s" in capsys.readouterr().err
  (upper,) = rows_of("--model=s", "--method=dense", "--grid=8X16x16")
  assert upper["grid"] == [8, 16, 16]
  grids = [cubic_grid(n) for n in (1, 64, 75600, 65536, 1 << 20)]
  assert grids == [(1, 1, 1), (4, 4, 4), (40, 42, 45), (32, 32, 64), (64, 128, 128)]


@pytest.mark.parametrize("form", ["table", "json", "csv"])
def test_what_does_not_fit_has_a_row_that_says_so(form, tmp_path):
  argv = ["--tokens=1m", "--model=wan2.1-14b", f"--format={form}"]
  argv += ["--method=block_topk", "--compare=adaspa,dense"]
  text = simulate.run([*argv, f"--plot={tmp_path}/p.svg"])
  if form == "json":
    topk, adaspa, dense = json.loads(text)
    assert "GB too much" in adaspa["error"] and all(adaspa[name] is None for name in COUNTS)
    assert "error" not in dense
    assert topk["speedup_over_dense"] > 5 and "speedup_over_dense" not in adaspa
  elif form == "csv":
    _, adaspa, dense = csv.DictReader(io.StringIO(text))
    assert adaspa["seconds"] == "" and "GB too much" in adaspa["error"]
    assert float(dense["seconds"]) > 0
  else:
    lines = text.splitlines()
    assert len(lines) == 7 and lines[4].split()[:4] == ["1,048,576", "64x128x128", "adaspa", "1"]
    assert lines[-1].startswith("refused: adaspa on 1,048,576 tokens: ")
    assert "What fits: --gpus=2" in lines[-1]
    assert "simulated" in (tmp_path / "p.svg").read_text()


REFUSALS = [
  (
    ["--gpu=h900"],
    r"gpu 'h900' is unknown; known: a100, b200, cpu, h100, h200, l40s, rtx4090, rtx5090\. .*JSON "
    "file with name",
  ),
  (["--method=frequency"], "unknown"),
  (["--method=block_topk(densty=0.2)"], "did you mean 'density'"),
  (["--method=freqformer(mid_tiles=0)"], "^freqformer: mid_tiles=0 must"),
  (["--tokens=64q"], "no positive whole number"),
  (["--tokens=inf"], "no positive whole number"),
  (["--tokens=1000000000000"], r"1,000,000,000,000 are 465\.7 times the 2,147,483,647 tokens"),
  (["--tokens=2147483647"], r"2,147,483,648 rows, more than .*What fits: --grid=\d+,30,52 \("),
  (["--grid=8,16,0"], "three positive token counts"),
  (["--grid=8,16,16", "--tokens=64k"], "has 2048 tokens"),
  (["--model=s", "--gpus=7", "--grid=8,16,16"], "needs a whole head"),
  (["--gpus=0"], "--gpus=0 must be at least 1"),
  (["--block=0"], r"--block=0 must lie in 1\.\.1024"),
  (["--calibrate=nowhere.json"], "cannot be read"),
  (["--model=s", "--method=adaspa(search=(10, 60))", "--grid=8,16,16", "--run"], "60"),
  (["--steps=5"], "add --run"),
  (["--schedule=dense_first=0.1"], "add --run"),
  (["--model=s", "--run", "--schedule=dense_frist=0.1"], "did you mean 'dense_first'"),
  (["--model=s", "--grid=8,16,16", "--run", "--schedule=dense_at=(99,)"], "names evaluation 99"),
  (
    ["--model=s", "--method=adaspa", "--grid=8,16,16", "--run", "--schedule=dense_first=1.0"],
    "dense, which AdaSpa cannot be",
  ),
  (
    ["--model=s", "--method=octaves", "--grid=8,16,16", "--run", "--schedule=dense_layers=(0,)"],
    "dense, which Octaves cannot be",
  ),
  (["--steps=0", "--run"], "must be at least 1"),
  (["--write_gpu=x.json"], "add --calibrate"),
  (["--plot=x.foo"], r"must end in one of .*\.svg"),
  (["--model=s", "--method=dense", "--plot=/proc/x/y.svg"], "cannot be written to /proc/x/y.svg"),
  ([f"--calibrate={PUBLISHED}", "--write_gpu=/no/such/x.json"], "be written to /no/such/x.json"),
]


@pytest.mark.parametrize("argv, message", REFUSALS, ids=[" ".join(a) for a, _ in REFUSALS])
def test_refusals(argv, message):
  with pytest.raises(ConfigError, match=message) as found:
    simulate.run(argv)
  assert "self." not in str(found.value) and "get_config" not in str(found.value)


def test_main_exits_with_a_sentence(capsys):
  with pytest.raises(SystemExit, match="2"):
    simulate.main(["--gpu=h900"])
  assert capsys.readouterr().err.startswith("error: gpu 'h900'")


def test_calibration_alone_shows_the_fit_and_with_anything_else_rows(tmp_path):
  fit = f"--calibrate={written(tmp_path / 'rows.json', CALL)}"
  rows = json.loads(simulate.run([fit, "--format=json", f"--plot={tmp_path}/fit.svg"]))
  lines = list(csv.DictReader(io.StringIO(simulate.run([fit, "--format=csv"]))))
  assert [r["name"] for r in lines] == [r["name"] for r in rows] and (tmp_path / "fit.svg").exists()
  for ask in ("--model=s", "--method=dense", "--compare=dense", "--gpus=2", "--block=64", "--run"):
    assert "one forward at batch 1" in simulate.run([fit, ask])


# ---- what fits -----------------------------------------------------------------------------------


def test_memory_and_the_largest_video():
  gpu = load_gpu("h100")
  p = plan("hunyuanvideo", "dense", (33, 45, 80))
  grid = scaling.largest_video(p, gpu)
  scaling.check_fits(dataclasses.replace(p, grid=grid), gpu)
  with pytest.raises(ConfigError, match="too much"):
    scaling.check_fits(dataclasses.replace(p, grid=(grid[0] + 1, *grid[1:])), gpu)
  assert scaling.memory_bytes(p, 8) < scaling.memory_bytes(p)
  with_state = plan("hunyuanvideo", "adaspa", (33, 45, 80))
  assert scaling.memory_bytes(with_state) > scaling.memory_bytes(p)
  huge = dataclasses.replace(p, grid=(1, 1 << 20, 1 << 20))
  assert scaling.largest_video(huge, gpu) is None and not scaling.fits(huge, gpu)


TOO_MUCH = [
  ["--model=hunyuanvideo", "--tokens=16m"],
  ["--model=wan2.1-14b", "--tokens=1m", "--method=adaspa"],
  ["--model=s", "--tokens=300m"],
  ["--model=wan2.1-14b", "--gpu=cpu"],
]


@pytest.mark.parametrize("argv", TOO_MUCH, ids=" ".join)
def test_what_a_refusal_recommends_is_accepted(argv):
  argv = [*argv, *(["--method=dense"] if "--method=adaspa" not in argv else [])]
  message = r"(GB too much|int32 index reaches.*)\. What fits: "
  with pytest.raises(ConfigError, match=message) as refused:
    simulate.run(argv)
  options = re.findall(r"--(\w+)=([\w,]+)", str(refused.value).split("What fits")[1])
  assert options
  for name, value in options:
    replaced = (f"--{name}=", "--tokens=") if name == "grid" else (f"--{name}=",)
    without = [a for a in argv if not a.startswith(replaced)]
    (found,) = rows_of(*without, f"--{name}={value}")
    check_identities(found)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_two_million_tokens_are_counted_in_little_memory(method):
  """Less than a byte for each of the 16,384^2 pairs of tiles."""
  argv = ["--tokens=2m", "--model=wan2.1-14b", "--gpu=h200", "--gpus=8", f"--method={method}"]
  tracemalloc.start()
  try:
    (found,) = rows_of(*argv)
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert found["seconds"] > 0 and peak < 250e6


# ---- descriptions --------------------------------------------------------------------------------


H100, WAN = (
  json.load(open(f"freqformer/simulation/{name}.json"))
  for name in ("gpus/h100", "models/wan2.1-14b")
)
BAD_GPUS = [
  ({"smss": 3}, "Gpu has no key 'smss'; did you mean 'sms'"),
  ({"l2_bytes": -5}, r"l2_bytes=-5\.0 must be above 0"),
  ({"rates": H100["rates"] | {"hbm": math.nan}}, r"rates\.hbm must be a finite number"),
  ({"rates": H100["rates"] | {"link": 0}}, r"link=0\.0 must be above 0"),
  ({"rates": H100["rates"] | {"item_s": -1}}, "item_s=-1.0 must be at least 0"),
  ({"rates": H100["rates"] | {"matmul_flops": 1e18}}, "exceeds the data sheet's tensor_flops"),
  ({"rates": {}}, "rates lacks attention_flops, .*; add them"),
]
BAD_MODELS = [
  ({"grid": [0, 4, 4]}, "grid=.* must be above 0"),
  ({"grids": [[1, 2, 0]]}, "grids=.* must be of positive"),
  ({"text": -4}, "text=-4 must be at least 0"),
  ({"text": 0}, "must both say whether there is text"),
  ({"text_mode": "crss"}, "did you mean 'cross'"),
  ({"heads": 7}, "heads=7 must divide width=5120"),
  ({"padded_latents": 1}, "padded_latents=1 must be at least 0 and below 1"),
]


@pytest.mark.parametrize(
  "change, message", BAD_GPUS + BAD_MODELS, ids=[str(c) for c, _ in BAD_GPUS + BAD_MODELS]
)
def test_a_file_that_describes_nothing_is_refused(change, message, tmp_path):
  kind, base = ("gpu", H100) if (change, message) in BAD_GPUS else ("model", WAN)
  (tmp_path / "mine.json").write_text(json.dumps(base | change))
  with pytest.raises(ConfigError, match=rf"mine\.json: .*{message}") as found:
    simulate.run([f"--{kind}={tmp_path}/mine.json"])
  assert "config." not in str(found.value) and "self." not in str(found.value)


def test_a_user_s_own_gpu(tmp_path):
  mine = H100 | {"name": "mine", "hbm_bytes_per_s": 1e12, "rates": H100["rates"] | {"hbm": 0.9e12}}
  (tmp_path / "mine.json").write_text(json.dumps(mine))
  small = ("--model=s", "--method=dense", "--grid=8,16,16")
  (found,) = rows_of(f"--gpu={tmp_path}/mine.json", *small)
  assert found["gpu"] == "mine"
  (tmp_path / "mine.json").write_text("{")
  with pytest.raises(ConfigError, match="cannot be read as JSON"):
    load_gpu(f"{tmp_path}/mine.json")
  for name in known("gpus"):  # an infinite link is no number of JSON
    write_gpu(load_gpu(name), tmp_path / "same.json")
    assert load_gpu(f"{tmp_path}/same.json") == load_gpu(name)
    json.loads((tmp_path / "same.json").read_text(), parse_constant=pytest.fail)


def test_padding_is_no_video():
  card = load_model("cogvideox1.5-5b")  # 81 frames are 21 latent ones, padded to 22 in pairs
  assert card.video_seconds(card.grid) == 81 / 16 and card.video_seconds((1, 1, 1)) == 1 / 16
  for name in known("models"):
    card = load_model(name)
    assert card.grid_of(math.prod(card.grid)) == card.grid and card.grid_of(7) is None


def test_more_steps_take_longer():
  asked = ("--model=wan2.1-1.3b", "--method=adaspa", "--tokens=16k", "--run")
  few, many = (rows_of(*asked, f"--steps={n}")[0]["run_seconds"] for n in (10, 50))
  assert few < 0.5 * many
