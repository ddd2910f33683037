"""Lists as GPU kernels read them: the same in NumPy and traced, stored once for static tables."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from freqformer.kernels.block_sparse import api as attention_module
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.block_sparse.table import BlockMask
from freqformer.kernels.core import lists
from freqformer.kernels.core import op as op_module
from freqformer.kernels.hopper.interpret import interpreted

from tests.kernels.block_sparse.suite import CASES, Case, draw_inputs, draw_mask, value_and_grads
from tools import offline


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_entries_hold_tile_and_valid_rows(case):
  mask = draw_mask(case, 1)
  codes, *_ = lists.by_query(mask)
  tiles, rows = lists.decode(jnp.asarray(codes))
  every = np.arange(mask.kv_tiles)  # a table without lists has one, of all tiles
  want = every if mask.kv_indices is None else mask.kv_indices
  np.testing.assert_array_equal(tiles, np.broadcast_to(want, tiles.shape))
  kv_len = np.atleast_2d(mask.kv_len)
  for i in range(len(codes)):
    np.testing.assert_array_equal(rows[i], kv_len[min(i, len(kv_len) - 1)][np.asarray(tiles[i])])


@pytest.mark.parametrize("lead", [(1, 3), (2, 1), (2, 3), (1, 1)])
def test_order_of_a_call_falls(lead):
  counts = np.random.default_rng(0).integers(0, 9, (*lead, 4)).astype(np.int32)
  order = lists.order_of_call(counts, lists.costliest_first(counts), 2, 3)
  if lead == (1, 1):  # one list of counts for all
    assert order is None
    return
  np.testing.assert_array_equal(np.sort(order), np.arange(6))
  costs = np.broadcast_to(counts.sum(-1), (2, 3)).reshape(-1)[order]
  assert (np.diff(costs) <= 0).all() and costs[0] > costs[-1]


def test_stored_lists_are_what_would_be_made():
  mask = draw_mask(CASES[2], 1)
  stored = mask.with_launch()
  assert stored.transpose() is stored.transposed and mask.launch is None
  made = jax.tree.leaves((lists.by_query(mask), lists.by_key(mask)))
  for a, b in zip(made, jax.tree.leaves(stored.launch), strict=True):
    np.testing.assert_array_equal(a, b)
  bare = stored.without_order()
  assert bare.launch.by_query[-1] is bare.launch.by_key[-1] is None
  assert mask.without_order() is mask


def test_parts_of_a_call_order_their_own_heads(monkeypatch):
  """On several devices the stored order, which numbers all heads, is not used; all else is."""
  seen = []

  def one_part(run, operands, *_):
    seen.append(operands[3])
    return run(*operands)

  for module in (attention_module, op_module):
    monkeypatch.setattr(module, "several_devices", lambda: True)
  monkeypatch.setattr(op_module, "by_sample_and_head", one_part)
  mask = draw_mask(CASES[0], 1).with_launch()
  assert mask.launch.by_query[-1] is not None and mask.launch.by_key[-1] is not None
  q, k, v, *_ = draw_inputs(CASES[0], 1, jnp.float32)
  jax.grad(lambda q: attention(q, k, v, mask, implementation="xla")[0].sum())(q)
  assert len(seen) == 2  # forward and backward
  for part in seen:
    assert part.launch.by_query[-1] is part.launch.by_key[-1] is None
    np.testing.assert_array_equal(part.launch.by_query[0], mask.launch.by_query[0])


def test_kernels_read_the_stored_lists():
  """With lists of another table stored, results are that table's."""
  case = Case("stored", h=1, table_h=1)
  one, other = (draw_mask(dataclasses.replace(case, keep=keep), 1) for keep in (0.9, 0.1))
  assert (one.kv_counts != other.kv_counts).any()
  q, k, v, *cotangents = draw_inputs(case, 1, jnp.bfloat16)
  with interpreted():
    run = value_and_grads("pallas_mgpu")
    want = run(q, k, v, other, *cotangents)
    launch = other.with_launch().launch
    found = run(q, k, v, dataclasses.replace(one, launch=launch), *cotangents)
  jax.tree.map(np.testing.assert_array_equal, found, want)


def test_a_static_table_costs_no_work_before_a_call():
  """The compiled forward is the kernel alone: no sort, no sum of counts, no coding of lists."""
  heads = 4
  rng = np.random.default_rng(0)
  ids = rng.permuted(np.tile(np.arange(8), (1, heads, 8, 1)), axis=-1)[..., :4]
  counts = rng.integers(1, 5, ids.shape[:3]).astype(np.int32)
  mask = BlockMask(np.sort(ids).astype(np.int32), counts, np.full(8, 128, np.int32))
  x = jax.ShapeDtypeStruct((1, 1024, heads, 64), jnp.bfloat16)

  def work(mask):
    text = offline.compile_for(attention, x, x, x, mask).compiled.as_text()
    return len(re.findall(r" (?:fusion|sort|reduce)\(", text[text.index("ENTRY") :]))

  assert work(mask) > 0
  assert work(mask.with_launch()) == 0
