"""Selecting key tiles by mass without a sort, and packing the choice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from freqformer.tables.adaspa_memory import lists_of_bits, top_bits, unpack_bits


@pytest.mark.parametrize("tiles", [1, 7, 8, 33, 64])
def test_top_bits_are_the_sorted_choice(tiles):
  rng = np.random.default_rng(tiles)
  mass = rng.choice([0, 1e-38, 1e-3, 0.5, 1, 2, 3e9], (5, tiles)).astype(np.float32)  # many ties
  mass[0] = rng.standard_normal(tiles) ** 2
  counts = sorted({1, (tiles + 1) // 2, tiles})
  bits = jax.jit(lambda m: top_bits(m, counts))(mass)
  assert bits.dtype == jnp.uint8 and bits.shape == (5, len(counts), -(-tiles // 8))
  got = np.asarray(unpack_bits(bits, tiles))
  order = np.argsort(-mass, -1, kind="stable")
  for i, count in enumerate(counts):
    want = np.zeros_like(mass, bool)
    np.put_along_axis(want, order[:, :count], True, -1)
    np.testing.assert_array_equal(got[:, i], want)


def test_fixed_tiles_come_first_inside_the_budget():
  mass = np.tile(np.arange(8, dtype=np.float32), (2, 1))
  got = unpack_bits(top_bits(mass, [3], fixed=np.array([[0, 0], [2, 1]])), 8)[:, 0]
  assert [np.flatnonzero(row).tolist() for row in got] == [[0, 6, 7], [1, 2, 7]]


@pytest.mark.parametrize("tiles", [1, 8, 9, 31, 64])
def test_bits_and_lists_round_trip(tiles):
  rng = np.random.default_rng(0)
  marked = rng.random((2, 3, tiles, tiles)) < rng.random(
    (2, 3, tiles, 1)
  )  # rows from empty to full
  bits = jnp.asarray(np.packbits(marked, axis=-1, bitorder="little"))
  np.testing.assert_array_equal(unpack_bits(bits, tiles), marked)
  table = jax.jit(lambda bits: lists_of_bits(bits, tiles, np.full(tiles, 4, np.int32), 4))(bits)
  np.testing.assert_array_equal(jax.tree.map(np.asarray, table).check().to_tiles(), marked)
