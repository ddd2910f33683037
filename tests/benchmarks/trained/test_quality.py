"""The quality study is fair: equal densities, equal dense steps, a random control, a verdict."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.trained import quality, quality_methods
from freqformer.grid.layout import TileLayout
from freqformer.methods.base import Cond, Dims, Projected

LAYOUT = TileLayout.fit((8, 12, 12), quality.BLOCK)
WARM, STEPS = 2, 12
SETTINGS = list(quality_methods.settings(LAYOUT, WARM, STEPS))


def test_every_training_free_method_has_points():
  ours = "freqformer sliding_tile radial block_topk spatial_temporal adaspa random"
  assert {s.method for s in SETTINGS} == set(ours.split())
  names = [s.name for s in SETTINGS]
  assert len(set(names)) == len(names)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_points_begin_dense_and_have_their_density(setting):
  method = setting.method
  budget = setting.budget
  config = setting.config
  config.check_run(STEPS)
  dense = 6 * LAYOUT.n**2
  flops = [
    config.pairs(LAYOUT, 6, phase=config.phase(s, STEPS)).pairs / dense for s in range(STEPS)
  ]
  assert flops[:WARM] == [1] * WARM and max(flops[WARM + 1 :]) < 0.6
  if method in ("adaspa", "random", "sliding_tile", "block_topk"):
    np.testing.assert_allclose(flops[WARM:], budget / LAYOUT.tiles, rtol=1e-6)
  elif method == "radial":
    assert abs(flops[-1] - budget / LAYOUT.tiles) < 0.03


def lists(method, x, guided=False):
  """Key tiles `[b, h, tiles, k]` that the control draws for queries `x` `[b, n, h, d]`."""
  cond = Cond(jnp.full(x.shape[0], 0.5), jnp.ones((x.shape[0], 8)), guided=guided)
  return np.asarray(method.mask(x, cond, LAYOUT.arrays()).kv_indices)


def test_the_control_is_random():
  x = jax.random.normal(jax.random.key(0), (2, LAYOUT.n_buffer, 3, 4))
  fresh, fixed = quality_methods.RandomTiles(9), quality_methods.RandomTiles(9, fresh=False)
  drawn = lists(fresh, x)
  assert drawn.shape == (2, 3, 72, 9) and (np.diff(drawn) > 0).all()
  assert (drawn == np.arange(72)[:, None]).any(-1).all()  # its own tile
  others = np.bincount(drawn.ravel(), minlength=72)
  assert others.min() > 0.4 * others.mean() and others.max() < 1.8 * others.mean()

  # Between samples, heads and inputs two lists share their own tile and one of the others in nine.
  def shared(a, b):
    pairs = zip(a.reshape(-1, 9), b.reshape(-1, 9), strict=True)
    return np.mean([len(np.intersect1d(p, q)) for p, q in pairs])

  for a, b in ((drawn[0], drawn[1]), (drawn[:, 0], drawn[:, 1]), (drawn, lists(fresh, 2 * x))):
    assert shared(a, b) < 2.5
  assert shared(drawn, lists(fresh, x)) == 9
  still = lists(fixed, x)
  assert (still[0] == still[1]).all() and (still == lists(fixed, 2 * x)).all()
  assert shared(still[0, 0], still[0, 1]) < 2.5
  both = lists(fresh, jnp.concatenate([x, 2 * x]), guided=True)
  assert (both[:2] == both[2:]).all() and (both[0] != both[1]).any()


def test_probe():
  """Lists that lack a quarter err a little; two equal errors add up to twice their squares."""
  layout = TileLayout.fit((4, 8, 8), 16)
  method = quality_methods.Probe(12)
  cond = Cond(jnp.full(2, 0.5), jnp.ones((2, 8)))

  def same(x, positions):
    return x

  @jax.jit
  def step(x, state):
    qkv = Projected(x, x, x, same, same, layout.arrays(), "xla")
    return method(None, qkv, cond, method.tables(layout), state)[1:]

  first, second = (2 * jax.random.normal(jax.random.key(i), (2, 256, 2, 4)) for i in range(2))
  state, once = step(first, method.init_state(2, Dims(2, 4, 8), layout))
  _, twice = step(first, state)
  np.testing.assert_allclose(once["adds_up"], 1, rtol=1e-4)
  np.testing.assert_allclose(twice["adds_up"], 2, rtol=1e-4)
  assert (np.asarray(once["error"]) > 1e-4).all() and (np.asarray(once["error"]) < 0.2).all()
  assert 12 / 16 < once["recall"].mean() < 1
  assert (np.asarray(step(second, state)[1]["adds_up"]) < 1.5).all()


def row(method, psnr, variant="", budget=9):
  return {
    "name": quality_methods.point_name(method, variant, budget),
    "method": method,
    "variant": variant,
    "budget": budget,
    "psnr_by_sample": psnr,
    "psnr": float(np.mean(psnr)),
    "psnr_standard_error": 0.1,
    "ssim": 0.9,
    "density_after_warmup": 0.125,
    "density_of_run": 0.25,
    "attention_flops_over_dense": 0.25,
  }


def test_verdict():
  rows = [
    row("adaspa", [30.0, 32]),
    row("random", [29.0, 30]),
    row("random", [20.0, 20], budget=18),
  ]
  found = quality.verdict(rows)
  assert found["met"] and [f["other"] for f in found["adaspa_over"]] == ["random/9"]
  np.testing.assert_allclose(found["adaspa_over"][0]["gain_db"], 1.5)
  np.testing.assert_allclose(found["adaspa_over"][0]["standard_error"], 0.5)
  assert not quality.verdict([*rows, row("sliding_tile", [31.0, 32])])["met"]
  assert not quality.verdict(rows[:1])["met"]  # nothing compared is nothing shown


def test_lines_join_one_point_per_budget():
  points = [
    row("sliding_tile", [20.0], "3x3x1"),
    row("sliding_tile", [24.0], "1x3x3"),
    row("sliding_tile", [18.0], budget=4),
  ]
  points[2]["density_after_warmup"] = 0.05
  assert quality.best_of_budgets(points) == ([points[2], points[1]], [points[0]])


def test_table_and_plot(tmp_path):
  rows = [
    row("adaspa", [30.0, 32]),
    row("random", [29.0, 30]),
    row("random", [28.0, 30], "fixed"),
    {"name": "model"},
  ]
  text = quality.text(rows)
  assert (
    text.index("adaspa/9") < text.index("random/9") < text.index("random(fixed)/9")
    and "+1.50 dB" in text
  )
  assert quality.plot(rows, tmp_path / "a" / "plot.png").stat().st_size > 5000
