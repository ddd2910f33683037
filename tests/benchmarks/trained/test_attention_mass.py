"""Shells and bands of matrices whose answer is known, and of every pair counted one by one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.trained import attention_mass
from freqformer.grid.layout import TileLayout
from freqformer.grid.spectrum import level_mass, power_law, wiener
from freqformer.methods.base import Cond, Projected

# Ragged tiles along t, ragged cells along t and x: padding rows are there.
LAYOUT = TileLayout((3, 4, 6), (2, 2, 2), 8)


def tokens_of(layout, x):
  """Returns rows of tokens in raster order, NumPy."""
  return np.asarray(x)[layout.arrays().scatter]


def packed(layout, x):
  """Returns raster rows in the buffer, padding 0."""
  found = np.zeros((layout.n_buffer, *x.shape[1:]), np.float32)
  found[layout.arrays().scatter] = x
  return found


def shell_of(apart):
  """Returns the shell of a distance in tokens."""
  return 0 if apart <= 1 else 1 if apart <= 3 else 2 if apart <= 6 else 3


def test_shells_go_round_the_grid():
  shell = attention_mass.shells(LAYOUT)
  rows = LAYOUT.arrays().scatter
  found = shell[np.ix_(rows, rows)]
  tokens = list(itertools.product(*map(range, LAYOUT.grid)))
  for i, j in itertools.product(range(0, LAYOUT.n, 7), range(LAYOUT.n)):
    gaps = [abs(a - b) for a, b in zip(tokens[i], tokens[j], strict=True)]
    apart = max(min(gap, n - gap) for gap, n in zip(gaps, LAYOUT.grid, strict=True))
    assert found[i, j] == shell_of(apart)
  padding = ~LAYOUT.arrays().valid
  assert padding.sum() == 24 and (shell[padding] == -1).all() and (shell[:, padding] == -1).all()
  assert attention_mass.shell_edges((8, 16, 16)) == [2, 3.5, 6.5]


def test_attention_that_is_the_wiener_kernel_has_its_mass():
  """The shells are those of `level_mass`: the theory that they are compared with."""
  layout = TileLayout.fit((2, 8, 16), 8)
  spectrum = power_law(layout.grid, 3.8)
  kernel = np.abs(np.fft.ifftn(wiener(spectrum, 0.7)).real)
  tokens = np.array(list(np.ndindex(layout.grid)))
  apart = (tokens[:, None] - tokens) % layout.grid
  attention = packed(layout, packed(layout, kernel[tuple(apart.transpose(2, 0, 1))].T).T)
  levels = len(attention_mass.shell_edges(layout.grid)) + 1
  found = attention_mass.mass(attention, attention_mass.shells(layout), levels)
  assert levels == 4
  np.testing.assert_allclose(found, level_mass(spectrum, levels, [0.7])[0], rtol=1e-5)


def test_bands_of_matrices_that_are_known():
  cells = attention_mass.cells(LAYOUT)
  v = packed(LAYOUT, np.random.default_rng(0).standard_normal((LAYOUT.n, 2)))
  low = cells.T @ (cells @ v)
  # Cells of 3 x 4 x 4 and of 3 x 4 x 2 tokens.
  boxes = tokens_of(LAYOUT, v).reshape(*LAYOUT.grid, 2)
  means = [boxes[:, :, part].mean((0, 1, 2)) for part in (slice(4), slice(4, 6))]
  raster = tokens_of(LAYOUT, low).reshape(boxes.shape)
  np.testing.assert_allclose(raster[1, 2, 3], means[0], rtol=1e-4)
  np.testing.assert_allclose(raster[2, 0, 4], means[1], rtol=1e-4)

  kept = attention_mass.between_bands(lambda x: x, v, cells)
  share = (low**2).sum() / (v**2).sum()
  np.testing.assert_allclose(kept, [share, 0, 0, 1 - share], atol=1e-6)
  # The mean of all tokens is low, and comes from low.
  valid = LAYOUT.arrays().valid[:, None]
  uniform = valid @ valid.T / LAYOUT.n
  np.testing.assert_allclose(
    attention_mass.between_bands(lambda x: uniform @ x, v, cells), [1, 0, 0, 0], atol=1e-6
  )
  # A token's value, seen by all, is low, and comes from both.
  first = np.zeros_like(uniform)
  first[:, LAYOUT.arrays().scatter[0]] = valid[:, 0]
  found = attention_mass.between_bands(lambda x: first @ x, v, cells)
  assert found[0] > 0.01 and found[2] > 0.01
  np.testing.assert_allclose(found[0] + found[2], 1, rtol=1e-5)


def test_heads_of_a_layer_pair_by_pair():
  arrays = LAYOUT.arrays()
  draws = np.random.default_rng(0).standard_normal((3, 1, LAYOUT.n_buffer, 2, 8))
  q, k, v = 2 * draws.astype(np.float32)

  def as_is(x, positions):
    return x

  method = attention_mass.Observed()
  tables = method.tables(LAYOUT)

  @jax.jit
  def run(q, k, v, tables):
    qkv = Projected(q, k, v, as_is, as_is, arrays, "reference")
    return method(None, qkv, Cond(jnp.ones(1), jnp.ones((1, 4))), tables, {})

  out, _, aux = run(q, k, v, tables)
  assert aux["probs"].shape == (1, 2, 2 + 4) and aux["choice"].shape == (1, 2)
  # Band by band it is the attention that runs: all of it comes back.
  rows = arrays.scatter
  shell = tables["shells"][np.ix_(rows, rows)]
  low = (tables["cells"].T @ tables["cells"])[np.ix_(rows, rows)].astype(float)
  high = np.eye(LAYOUT.n) - low
  for head in range(2):
    own = [np.asarray(x[0, rows, head], float) for x in (q, k, v)]
    score = np.exp(own[0] @ own[1].T / np.sqrt(8))
    attention = score / score.sum(1, keepdims=True)
    np.testing.assert_allclose(tokens_of(LAYOUT, out[0, :, head]), attention @ own[2], atol=1e-4)
    mass = [attention[shell == s].sum() / LAYOUT.n for s in range(2)]
    energy = [(b @ attention @ c @ own[2]) ** 2 for c in (low, high) for b in (low, high)]
    energy = np.array([part.sum() for part in energy])
    expected = [*mass, *(energy / energy.sum())]
    np.testing.assert_allclose(aux["probs"][0, head], expected, rtol=1e-4)


def test_the_wiener_filter_keeps_bands_where_it_changes_nothing():
  """Without noise it is the identity; of white fields at any t it is a factor."""
  arrays = TileLayout.fit((2, 8, 8), 8).arrays()
  white = np.ones((2, 8, 8))
  smooth = power_law((2, 8, 8), 3.8)
  clean, even = attention_mass.wiener_between_bands([white], [0.0, 0.6], arrays)
  cells = 4 / 128  # of 2 x 4 x 4 tokens
  np.testing.assert_allclose(clean, [cells, 0, 0, 1 - cells], atol=5e-3)
  np.testing.assert_allclose(even, clean, rtol=1e-4, atol=1e-6)
  (noisy,) = attention_mass.wiener_between_bands([smooth], [0.9], arrays)
  assert noisy[0] > 0.9 and noisy.sum() == pytest.approx(1)
