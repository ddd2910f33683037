"""The pyramid of grids: what compression and lifting keep, and which levels there are."""

import jax
import numpy as np
import pytest

from freqformer.grid.layout import TileLayout
from freqformer.grid.pyramid import cell_widths, level_layouts, steps

RAGGED = TileLayout((9, 6, 9), (2, 4, 4), 32)
EVEN = TileLayout((4, 8, 16), (2, 4, 4), 32)
KINDS = ["block_haar", "block_dct", "haar", "dct"]


def field(layout, seed=0):
  """Values `[1, n, 2]` in raster order."""
  return np.random.default_rng(seed).standard_normal((1, layout.n, 2)).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lift", ["linear", "basis"])
@pytest.mark.parametrize("layout", [RAGGED, EVEN], ids=["ragged", "even"])
def test_constants_stay_and_padding_is_neither_read_nor_written(layout, lift, kind):
  fine = layout.arrays()
  x = np.where(fine.valid[None, :, None], np.float32(3), np.float32("nan"))
  for step in steps(layout, 3, kind, lift):
    coarse = np.asarray(step.compress(x))
    assert (coarse == np.where(step.coarse.valid[None, :, None], coarse, 0)).all()
    np.testing.assert_allclose(np.asarray(step.coarse.unpack(coarse)), 3, rtol=1e-6)
    soiled = np.where(step.coarse.valid[None, :, None], coarse, np.float32("nan"))
    lifted = np.asarray(step.lift(soiled))
    assert lifted.shape == x.shape
    np.testing.assert_allclose(np.asarray(step.fine.unpack(lifted)), 3, rtol=1e-6)
    x = soiled


def test_cells_are_means_of_pairs_and_lie_in_raster_order():
  (step,) = steps(EVEN, 2, "block_haar", "linear")
  x = field(EVEN)
  cells = step.coarse.unpack(step.compress(EVEN.arrays().pack(x)))
  grid = x.reshape(2, 2, 4, 2, 8, 2, 2)
  np.testing.assert_allclose(cells[0], grid.mean((1, 3, 5)).reshape(-1, 2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_lifting_by_the_basis_projects(kind):
  (step,) = steps(RAGGED, 2, kind, "basis")
  x = RAGGED.arrays().pack(field(RAGGED))
  once = step.lift(step.compress(x))
  np.testing.assert_allclose(step.lift(step.compress(once)), once, atol=1e-5)
  assert np.linalg.norm(once) < 0.9 * np.linalg.norm(x)


def test_a_ramp_is_interpolated_between_centres():
  """Up to the last centre the lifted ramp is the ramp: no step at the edge of a cell or a tile."""
  (step,) = steps(EVEN, 2, "block_haar", "linear")
  ramp = np.broadcast_to(np.arange(16, dtype=np.float32), EVEN.grid).reshape(1, -1, 1)
  lifted = step.fine.unpack(step.lift(step.compress(EVEN.arrays().pack(ramp))))
  lifted = np.asarray(lifted).reshape(EVEN.grid)
  np.testing.assert_allclose(lifted[..., 1:-1], ramp.reshape(EVEN.grid)[..., 1:-1], atol=1e-5)
  np.testing.assert_allclose(lifted[..., [0, -1]], np.broadcast_to([0.5, 14.5], (4, 8, 2)))


@pytest.mark.parametrize("layout", [RAGGED, EVEN], ids=["ragged", "even"])
@pytest.mark.parametrize("kind, factor", [("block_haar", 2), ("dct", 2), ("haar", 4)])
def test_the_gradient_of_lifting_is_its_transpose(kind, factor, layout):
  """Both forms of the interpolation are one matrix; padding rows get and give nothing."""
  (step,) = steps(layout, 2, kind, "linear", factor)
  draw = np.random.default_rng(1)
  y = draw.standard_normal((1, step.coarse.layout.n_buffer, 3)).astype(np.float32)
  cotangent = draw.standard_normal((1, layout.n_buffer, 3)).astype(np.float32)
  lifted, pull = jax.vjp(jax.jit(step.lift), y)
  (back,) = pull(cotangent)
  assert not np.asarray(lifted)[:, ~step.fine.valid].any()
  assert not np.asarray(back)[:, ~step.coarse.valid].any()
  np.testing.assert_allclose((lifted * cotangent).sum(), (back * y).sum(), rtol=1e-5)


def test_levels():
  layouts = level_layouts(RAGGED, 4, "block_haar", 2)
  # 9 frames in tiles of 2 are 5 tiles of one cell each; then halves of what there is.
  assert [level.grid for level in layouts] == [(9, 6, 9), (5, 3, 5), (3, 2, 3), (2, 1, 2)]
  assert cell_widths(layouts)[3] == (4.5, 6.0, 4.5)
  assert {level.block for level in layouts} == {32}
  with pytest.raises(ValueError, match=r"levels=7.*\(9, 6, 9\).*choose at most 5"):
    level_layouts(RAGGED, 7, "block_haar", 2)
