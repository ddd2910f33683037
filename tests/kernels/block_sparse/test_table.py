"""Laws of the table: its other forms hold the same pairs, on NumPy and on tracers."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from freqformer.kernels.block_sparse import table as table_module
from freqformer.kernels.block_sparse.table import BlockMask, dense_mask, from_tiles, select
from freqformer.kernels.core import lists

from tests.kernels.block_sparse.suite import CASES, draw_mask, seen_pairs


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def mask(request):
  return draw_mask(request.param, 1)


def test_forms_agree_with_brute_force(mask):
  seen = seen_pairs(mask, mask.q_tiles * mask.block_q, mask.kv_tiles * mask.block_kv)
  np.testing.assert_array_equal(*np.broadcast_arrays(mask.to_dense(), seen))
  pairs = seen * query_rows(mask)[:, None, :, None]
  np.testing.assert_array_equal(*np.broadcast_arrays(mask.pairs(), pairs.sum((2, 3))))


def query_rows(mask):
  """bool `[b, rows]`: a query row is valid where its key row is, if both live in one buffer."""
  rows = mask.q_tiles * mask.block_q
  kv_len = np.atleast_2d(mask.kv_len)
  if rows != mask.kv_tiles * mask.block_kv:
    return np.ones((1, rows), bool)
  return (np.arange(mask.block_kv) < kv_len[..., None]).reshape(len(kv_len), -1)


def test_transpose(mask):
  """Both forms of the table by key tile name its readers, the first one in ascending order."""
  tiles = mask.to_tiles()
  flipped = mask.transpose()
  starts, counts, readers, _ = lists.by_key(mask)
  for b, h, j in np.ndindex(*counts.shape):
    want = np.flatnonzero(tiles[b, h, :, j])
    own = slice(flipped.offsets[b, h, j], flipped.offsets[b, h, j + 1])
    np.testing.assert_array_equal(flipped.q_indices[b, h, own], want)
    found = readers[b, h, starts[b, h, j] :][: counts[b, h, j]]
    np.testing.assert_array_equal(np.sort(found), want)


def test_traced_forms_are_those_of_numpy(mask):
  def forms(mask):
    listed = (mask.transpose(), lists.by_query(mask), lists.by_key(mask))
    return listed, (mask.to_dense(), mask.pairs())

  plain, traced = forms(mask), jax.jit(forms)(mask)
  assert {x.dtype for x in jax.tree.leaves((plain[0], traced[0]))} == {np.dtype(np.int32)}
  jax.tree.map(np.testing.assert_array_equal, plain, traced)


def test_refine_keeps_the_pairs():
  mask = draw_mask(CASES[1], 3)
  fine = mask.refine(2).check()
  assert (fine.block_q, fine.block_kv, fine.q_tiles) == (32, 32, 2 * mask.q_tiles)
  np.testing.assert_array_equal(fine.to_dense(), mask.to_dense())
  np.testing.assert_array_equal(fine.pairs(), mask.pairs())
  with pytest.raises(ValueError, match="divisible"):
    mask.refine(3)


def test_select_takes_rows_per_head():
  a, b = (draw_mask(dataclasses.replace(CASES[0], keep=p), 5) for p in (0.2, 0.9))
  chosen = select([a, b], np.array([[0, 1], [1, 1]], np.int32)).check()
  tiles = chosen.to_tiles()
  np.testing.assert_array_equal(tiles[0, 0], a.to_tiles()[0, 0])
  np.testing.assert_array_equal(tiles[0, 1], b.to_tiles()[0, 1])
  np.testing.assert_array_equal(tiles[1, 0], b.to_tiles()[0, 0])
  traced = jax.jit(lambda c: select([a, b], c))(jnp.array([[0, 1], [1, 1]], jnp.int32))
  np.testing.assert_array_equal(traced.to_tiles(), tiles)
  with pytest.raises(ValueError, match="over one buffer"):
    select([a, a.refine(2)], np.array([[0]], np.int32))


def test_density_of_dense_is_one():
  mask = dense_mask(300, 300, 64, 64)
  assert mask.density() == 1.0 and mask.density(300) == 1.0 and mask.pairs() == 90000


def test_lists_that_are_not_written_out_count_as_if_they_were():
  """Prefixes of all key tiles, ragged ones too, without an array of tiles x tiles."""
  rng = np.random.default_rng(0)
  for b, lead in itertools.product((1, 2), ((), (2,))):
    counts = rng.integers(0, 10, (b, 3, 9), np.int32)
    mask = BlockMask(None, counts, rng.integers(0, 5, (*lead, 9), np.int32), None, 4, 4)
    written = dataclasses.replace(mask, kv_indices=np.array(mask.indices()))
    np.testing.assert_array_equal(mask.pairs(), written.pairs())
    np.testing.assert_array_equal(jax.jit(BlockMask.pairs)(mask), written.pairs())
  compiled = jax.jit(BlockMask.density).lower(dense_mask(1 << 20, 1 << 20)).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 1 << 23


def test_a_large_table_is_checked_without_copies(monkeypatch):
  """Some rows at a time, and rows that are prefixes of one list only once."""
  monkeypatch.setattr(table_module, "_COUNTED", 64)
  rng = np.random.default_rng(1)
  ids = np.sort(rng.random((2, 1, 50, 64)).argsort(-1)[..., :20], -1).astype(np.int32)
  mask = BlockMask(ids, np.full((2, 1, 50), 20, np.int32), np.full(64, 8, np.int32), None, 8, 8)
  mask.check()
  late = ids.copy()
  late[1, 0, 49, 19] = late[1, 0, 49, 18]
  with pytest.raises(ValueError, match="strictly ascending"):
    dataclasses.replace(mask, kv_indices=late).check()
  many = 1 << 18  # 256 GB if written out
  every = np.broadcast_to(np.arange(many, dtype=np.int32), (1, 1, many, many))
  counts = np.full((1, 1, many), many, np.int32)
  sparse = BlockMask(every, counts, np.full(many, 8, np.int32), None, 8, 8).check()
  with pytest.raises(ValueError, match="strictly ascending"):
    dataclasses.replace(sparse, kv_indices=every[..., ::-1]).check()


def test_from_tiles_and_draw():
  tiles = np.tril(np.ones((4, 4), bool))
  mask = from_tiles(tiles, np.full(4, 8), 8, 8).check()
  np.testing.assert_array_equal(mask.to_tiles()[0, 0], tiles)
  lines = mask.draw().splitlines()
  assert "62.5% of tiles" in lines[0] and lines[1:] == ["█   ", "██  ", "███ ", "████"]


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(kv_counts=np.full((1, 1, 2), 3, np.int32)), "kv_counts must lie in 0..2"),
    (dict(kv_len=np.array([9, 8], np.int32)), "kv_len must lie in 0..8"),
    (dict(kv_indices=np.array([[[[1, 0], [0, 1]]]], np.int32)), "strictly ascending"),
    (dict(kv_indices=np.array([[[[0, 2], [0, 1]]]], np.int32)), "kv_indices must lie in 0..1"),
    (dict(kv_len=np.array([8.0, 8.0])), "must be int32"),
    (dict(kv_bias=np.zeros(3, np.float32)), "kv_bias must be"),
    (dict(kv_counts=np.zeros((1, 2), np.int32)), "kv_counts must be"),
    (dict(block_q=0), "block sizes"),
  ],
)
def test_check_names_what_is_wrong(change, message):
  good = BlockMask(
    np.array([[[[0, 1], [0, 1]]]], np.int32),
    np.full((1, 1, 2), 2, np.int32),
    np.full(2, 8, np.int32),
    None,
    8,
    8,
  )
  good.check()
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(good, **change).check()
