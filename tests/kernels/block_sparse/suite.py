"""The conformance suite of attention. Subclass it, name the implementation, change nothing.

The oracle is NumPy in float64 and shares no code with the package. Cotangents of the output *and*
of the LSE are random.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.block_sparse.table import BlockMask, dense_mask, from_tiles, select

# Tiles that an online softmax must meet in some list of every head, lest it pass without rescaling
# what it has: two stages of the Hopper kernel, which hold up to 128 keys.
LONG = 3


@dataclasses.dataclass(frozen=True)
class Case:
  """One shape of the suite: sizes, block sizes and how the table is drawn."""

  name: str
  b: int = 1
  h: int = 2
  d: int = 32
  n_q: int = 192
  n_kv: int = 192
  block_q: int = 64
  block_kv: int = 64
  keep: float = 0.5  # probability that a tile is listed
  table_b: int = 1
  table_h: int = 2
  ragged: bool = True
  empty: bool = True  # the first query tile sees nothing
  bias: bool = False
  kv_len_per_batch: bool = False
  listed: bool = True  # False: kv_indices is None
  long: bool = True  # the last query tile of every head lists at least `LONG` tiles


CASES = (
  Case("plain", ragged=False, empty=False),
  Case("ragged_with_empty_rows"),
  Case("per_batch_per_head", b=2, table_b=2, kv_len_per_batch=True),
  Case("shared_by_heads", b=2, table_h=1, d=64),
  Case("bias", bias=True),
  Case("rectangular_tiles", block_q=128, block_kv=64, n_q=256, n_kv=320),
  Case("rectangular_tiles_2", block_q=64, block_kv=128, n_q=128, n_kv=384),
  Case("every_tile_in_order", listed=False),
  Case("sparse_lists", n_q=512, n_kv=512, keep=0.1, d=64),
)
# Shapes that only backends without alignment needs can run; such a backend keeps `any_shape =
# True`.
ODD_CASES = (
  Case("odd_d_and_tiles", d=7, block_q=5, block_kv=3, n_q=35, n_kv=24),
  Case("cut_last_tiles", d=16, block_q=16, block_kv=16, n_q=45, n_kv=70, ragged=False),
  Case(
    "one_token",
    h=1,
    d=1,
    n_q=1,
    n_kv=1,
    block_q=1,
    block_kv=1,
    table_h=1,
    keep=1.0,
    ragged=False,
    empty=False,
    long=False,
  ),
)


def draw_mask(case: Case, seed: int) -> BlockMask:
  """A random table of the case, checked."""
  rng = np.random.default_rng(seed)
  q_tiles, kv_tiles = -(-case.n_q // case.block_q), -(-case.n_kv // case.block_kv)
  tiles = rng.random((case.table_b, case.table_h, q_tiles, kv_tiles)) < case.keep
  tiles[..., 0] |= ~tiles.any(-1)
  if case.long:
    tiles[..., -1, [0, kv_tiles // 2, -1]] = True
  if case.empty:
    tiles[:, :, 0] = False
  lead = (case.b,) if case.kv_len_per_batch else ()
  kv_len = np.full((*lead, kv_tiles), case.block_kv, np.int32)
  if case.ragged:
    kv_len = rng.integers(0, case.block_kv + 1, kv_len.shape).astype(np.int32)
    kv_len[..., 0] = max(1, case.block_kv - 1)
    kv_len[..., -1] = -(-case.block_kv // 2)
  mask = from_tiles(tiles, kv_len, case.block_q, case.block_kv)
  if case.bias:
    mask = dataclasses.replace(mask, kv_bias=rng.standard_normal(kv_tiles).astype(np.float32))
  if not case.listed:
    mask = dataclasses.replace(
      mask, kv_indices=None, kv_counts=np.minimum(mask.kv_counts + 1, kv_tiles)
    )
    mask.kv_counts[:, :, 0] = 0
  mask = mask.check()
  if case.long:
    _check_long(mask)
  return mask


def _check_long(mask: BlockMask):
  """Asserts that some list of every head has many keys in its first tile and behind the second.

  Only there can a running maximum move from one stage to the next.
  """
  ids, lengths = np.asarray(mask.indices()), np.atleast_2d(mask.kv_len).min(0)
  listed = np.arange(mask.max_kv) < mask.kv_counts[..., None]
  filled = listed & (2 * lengths[ids] >= mask.block_kv)
  long = filled[..., 0] & filled[..., LONG - 1 :].any(-1)
  assert long.any(-1).all(), f"a head has no list of {LONG} tiles: {mask.kv_counts}"


def draw_inputs(case: Case, seed: int, dtype):
  """q, k, v and the cotangents of out and LSE."""
  rng = np.random.default_rng(seed + 1000)
  shapes = [(case.b, n, case.h, case.d) for n in (case.n_q, case.n_kv, case.n_kv, case.n_q)]
  q, k, v, d_out = (np.asarray(jnp.asarray(rng.standard_normal(s), dtype)) for s in shapes)
  return q, k, v, d_out, rng.standard_normal((case.b, case.h, case.n_q))


def seen_pairs(mask: BlockMask, n_q: int, n_kv: int) -> np.ndarray:
  """bool `[b, h, n_q, n_kv]` by loops over the lists: the oracle's own reading of the table."""
  kv_len = np.atleast_2d(np.asarray(mask.kv_len))
  counts = np.asarray(mask.kv_counts)
  b, h = max(counts.shape[0], kv_len.shape[0]), counts.shape[1]
  seen = np.zeros((b, h, mask.q_tiles * mask.block_q, mask.kv_tiles * mask.block_kv), bool)
  for i, j, tile in np.ndindex(b, h, mask.q_tiles):
    row = min(i, counts.shape[0] - 1)
    rows = slice(tile * mask.block_q, (tile + 1) * mask.block_q)
    for step in range(counts[row, j, tile]):
      kv = step if mask.kv_indices is None else int(np.asarray(mask.kv_indices)[row, j, tile, step])
      start = kv * mask.block_kv
      seen[i, j, rows, start : start + kv_len[min(i, len(kv_len) - 1), kv]] = True
  return seen[..., :n_q, :n_kv]


def oracle(q, k, v, mask, d_out=None, d_lse=None):
  """out, lse and (with cotangents) dq, dk, dv in float64."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  scale = 1 / math.sqrt(q.shape[-1])
  seen = seen_pairs(mask, q.shape[1], k.shape[1])
  s = np.einsum("bihd,bjhd->bhij", q, k) * scale
  if mask.kv_bias is not None:
    s = s + np.repeat(np.asarray(mask.kv_bias, np.float64), mask.block_kv)[: k.shape[1]]
  s = np.where(seen, s, -np.inf)
  top = s.max(-1, keepdims=True)
  top = np.where(np.isfinite(top), top, 0)
  e = np.exp(s - top)
  total = e.sum(-1, keepdims=True)
  p = e / np.where(total > 0, total, 1)
  with np.errstate(divide="ignore"):
    lse = (np.log(total) + top)[..., 0]
  out = np.einsum("bhij,bjhd->bihd", p, v)
  if d_out is None:
    return out, lse
  d_out, d_lse = np.asarray(d_out, np.float64), np.asarray(d_lse, np.float64)
  dp = np.einsum("bihd,bjhd->bhij", d_out, v)
  # d softmax: P (dP - sum P dP), d LSE: P dLSE
  ds = p * (dp - (p * dp).sum(-1, keepdims=True) + d_lse[..., None]) * scale
  return (
    out,
    lse,
    np.einsum("bhij,bjhd->bihd", ds, k),
    np.einsum("bhij,bihd->bjhd", ds, q),
    np.einsum("bhij,bihd->bjhd", p, d_out),
  )


def relative_error(got, want):
  """RMS error over RMS size; -inf must stand where -inf stands."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape
  finite = np.isfinite(want)
  np.testing.assert_array_equal(got[~finite], want[~finite])
  if not finite.any():
    return 0.0
  return float(
    np.sqrt(np.mean((got[finite] - want[finite]) ** 2))
    / (np.sqrt(np.mean(want[finite] ** 2)) + 1e-30)
  )


def plain_low_precision(q, k, v, mask, d_out, d_lse):
  """The error model: textbook attention by autodiff, products rounded to the input's dtype."""

  def textbook(q, k, v):
    s = jnp.einsum("bihd,bjhd->bhij", q, k).astype(jnp.float32) / math.sqrt(q.shape[-1])
    if mask.kv_bias is not None:
      s = s + jnp.repeat(jnp.asarray(mask.kv_bias), mask.block_kv)[: k.shape[1]]
    seen = seen_pairs(mask, q.shape[1], k.shape[1])
    some = seen.any(-1, keepdims=True)
    s = jnp.where(seen, s, jnp.where(some, -jnp.inf, 0))
    lse = jax.nn.logsumexp(s, -1)
    p = jnp.where(some, jnp.exp(s - lse[..., None]), 0).astype(q.dtype)
    return jnp.einsum("bhij,bjhd->bihd", p, v), jnp.where(some[..., 0], lse, 0)

  (out, _), vjp = jax.vjp(textbook, *(jnp.asarray(x) for x in (q, k, v)))
  alive = np.isfinite(oracle(q, k, v, mask)[1])
  return out, *vjp((jnp.asarray(d_out), jnp.asarray(np.where(alive, d_lse, 0), jnp.float32)))


def value_and_grads(q, k, v, mask, d_out, d_lse, implementation):
  """out, lse, dq, dk, dv of the code under test, in one jit."""

  @jax.jit
  def run(q, k, v, mask, d_out, d_lse):
    (out, lse), vjp = jax.vjp(
      lambda *a: attention(*a, mask, implementation=implementation), q, k, v
    )
    return out, lse, *vjp((d_out.astype(out.dtype), d_lse.astype(lse.dtype)))

  return run(q, k, v, mask, d_out, d_lse)


def _cases(cls):
  return CASES + (ODD_CASES if cls.any_shape else ())


class AttentionSuite:
  """Subclass per backend: set `implementation`, and `any_shape` / `dtypes` to what it declares."""

  implementation: str
  any_shape = True
  dtypes = (jnp.float32, jnp.bfloat16, jnp.float16)

  def pytest_generate_tests(self, metafunc):
    if "case" in metafunc.fixturenames:
      cases = _cases(type(self) if not isinstance(self, type) else self)
      metafunc.parametrize("case", cases, ids=[c.name for c in cases])

  def run(self, q, k, v, mask, d_out, d_lse):
    return value_and_grads(q, k, v, mask, d_out, d_lse, self.implementation)

  def test_case(self, case):
    """Against the oracle, in the widest dtype that the backend declares."""
    dtype = self.dtypes[0]
    mask, data = draw_mask(case, 0), draw_inputs(case, 0, dtype)
    got, want = self.run(*data[:3], mask, *data[3:]), oracle(*data[:3], mask, *data[3:])
    limits = [3e-6] * 5
    if dtype != jnp.float32:
      out, *grads = plain_low_precision(*data[:3], mask, *data[3:])
      limits = [
        5e-3 if i == 1 else 2 * relative_error(p, want[i])
        for i, p in enumerate((out, want[1], *grads))
      ]
    for i, (name, limit) in enumerate(zip(("out", "lse", "dq", "dk", "dv"), limits, strict=True)):
      assert relative_error(got[i], want[i]) <= limit, name
      assert got[i].dtype == (jnp.float32 if name == "lse" else dtype)

  @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
  def test_low_precision(self, dtype):
    """At most twice the plain low-precision error, and gradients in their input's dtype."""
    for case in (CASES[1], CASES[4]):
      mask, data = draw_mask(case, 1), draw_inputs(case, 1, dtype)
      got = self.run(*data[:3], mask, *data[3:])
      want = oracle(*data[:3], mask, *data[3:])
      plain = plain_low_precision(*data[:3], mask, *data[3:])
      assert relative_error(got[1], want[1]) < 5e-3 and got[1].dtype == jnp.float32
      for g, w, p in zip((got[0], *got[2:]), (want[0], *want[2:]), plain, strict=True):
        assert g.dtype == dtype
        assert relative_error(g, w) <= 2 * relative_error(p, w)

  def test_padding_rows_change_nothing(self):
    """1e4 in padding rows of q, k and v: bit-equal valid outputs and gradients."""
    case = Case("padding", n_q=192, n_kv=192)
    mask = draw_mask(case, 2)
    q, k, v, d_out, d_lse = draw_inputs(case, 2, self.dtypes[0])
    valid = (np.arange(case.block_kv) < mask.kv_len[:, None]).reshape(
      -1
    )  # queries and keys share the buffer
    d_out, d_lse = (
      np.where(valid[:, None, None], d_out, 0).astype(d_out.dtype),
      np.where(valid, d_lse, 0),
    )
    clean = self.run(q, k, v, mask, d_out, d_lse)
    dirty = [np.where(valid[:, None, None], x, np.asarray(1e4, x.dtype)) for x in (q, k, v)]
    soiled = self.run(*dirty, mask, d_out, d_lse)
    for a, b in zip(clean, soiled, strict=True):
      axis = 2 if a.ndim == 3 else 1
      np.testing.assert_array_equal(np.compress(valid, a, axis), np.compress(valid, b, axis))
      if axis == 1 and b is not soiled[0]:
        np.testing.assert_array_equal(np.asarray(np.compress(~valid, b, 1), np.float32), 0)

  def test_empty_rows(self):
    """Count 0, or only empty tiles: output 0, LSE -inf, gradients 0 though cotangents are NaN."""
    case = Case("empty", ragged=False, empty=True)
    mask = draw_mask(case, 3)
    q, k, v, d_out, d_lse = draw_inputs(case, 3, self.dtypes[0])
    rows = slice(0, case.block_q)
    bad_out, bad_lse = d_out.copy(), d_lse.copy()
    bad_out[:, rows], bad_lse[..., rows] = np.nan, np.inf
    out, lse, *grads = self.run(q, k, v, mask, bad_out, bad_lse)
    assert not np.asarray(out[:, rows], np.float32).any() and np.isneginf(lse[..., rows]).all()
    assert not np.asarray(grads[0][:, rows], np.float32).any()
    for got, want in zip(grads, self.run(q, k, v, mask, d_out, d_lse)[2:], strict=True):
      np.testing.assert_array_equal(got, want)
    hollow = dataclasses.replace(mask, kv_len=np.zeros_like(mask.kv_len))
    for x in self.run(q, k, v, hollow, bad_out * np.nan, bad_lse):
      x = np.asarray(x, np.float32)
      assert np.isneginf(x).all() if x.ndim == 3 else not x.any()

  def test_large_and_hidden_scores(self):
    """Scores of a hundred before or behind small ones, padding between: nothing overflows."""
    case = Case("large", n_q=64, n_kv=448)
    q, k, v, d_out, d_lse = draw_inputs(case, 8, self.dtypes[0])
    sizes = np.ones((448, 2, 1))
    sizes[:128, 0] = sizes[256:384, 1] = 60
    k = (k * sizes).astype(k.dtype)
    kv_len = np.array([64, 64, 0, 0, 64, 50, 0])
    mask = from_tiles(np.ones((1, 7), bool), kv_len, case.block_q, case.block_kv)
    got, want = self.run(q, k, v, mask, d_out, d_lse), oracle(q, k, v, mask, d_out, d_lse)
    low = self.dtypes[0] != jnp.float32
    # Float32 leaves out more of larger scores. dq and dk cancel where one key has it all.
    rounding = 4e-3 if low else 2e-5
    for i, limit in ((0, rounding), (1, 1e-6), (4, rounding)):
      assert relative_error(got[i], want[i]) < limit
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in got)

  def test_entries_behind_the_count_are_not_read(self):
    case = Case("behind", empty=False)
    mask, data = draw_mask(case, 4), draw_inputs(case, 4, self.dtypes[0])
    wide = np.pad(mask.kv_indices, ((0, 0),) * 3 + ((0, 3),), constant_values=1)
    for a, b in zip(
      self.run(*data[:3], mask, *data[3:]),
      self.run(*data[:3], dataclasses.replace(mask, kv_indices=wide), *data[3:]),
      strict=True,
    ):
      assert relative_error(b, np.asarray(a, np.float64)) < 1e-6

  def test_deterministic(self):
    case = Case("twice", n_q=256, n_kv=384, keep=0.5)
    mask, data = draw_mask(case, 5), draw_inputs(case, 5, self.dtypes[0])
    for a, b in zip(
      self.run(*data[:3], mask, *data[3:]), self.run(*data[:3], mask, *data[3:]), strict=True
    ):
      np.testing.assert_array_equal(a, b)

  def test_one_trace_serves_every_table(self):
    """Tables are arguments: two assignments share a compilation and give what each table gives."""
    case, traces = Case("select", n_q=256, n_kv=256, empty=False, ragged=False), []
    masks = [draw_mask(dataclasses.replace(case, keep=p), 6) for p in (0.2, 0.6)]
    q, k, v, *_ = draw_inputs(case, 6, self.dtypes[0])

    @jax.jit
    def run(choice):
      traces.append(None)
      return attention(q, k, v, select(masks, choice), implementation=self.implementation)[0]

    single = [
      np.asarray(attention(q, k, v, m, implementation=self.implementation)[0], np.float32)
      for m in masks
    ]
    for choice in ([[0, 1]], [[1, 0]]):
      out = np.asarray(run(jnp.asarray(choice, jnp.int32)), np.float32)
      for head, pick in enumerate(choice[0]):
        assert (
          relative_error(out[:, :, head], single[pick][:, :, head]) < 3e-6
        )  # the same sums, whatever the dtype
    assert len(traces) == 1

  def test_merge_of_two_halves_is_the_whole(self):
    """Two disjoint key sets merged by LSE give the joint softmax and its gradient: needs dLSE."""
    case = Case("halves", keep=1.0, ragged=False, empty=False, n_q=128, n_kv=256)
    q, k, v, d_out, d_lse = draw_inputs(case, 7, self.dtypes[0])
    tiles = np.zeros((1, 1, 2, 4), bool)
    tiles[..., :2] = True
    kv_len = np.full(4, 64)
    halves = [from_tiles(t, kv_len, 64, 64) for t in (tiles, ~tiles)]

    def merged(q, k, v):
      parts = [attention(q, k, v, m, implementation=self.implementation) for m in halves]
      outs, lses = (jnp.stack(x) for x in zip(*parts, strict=True))
      shares = jax.nn.softmax(lses, 0).transpose(0, 1, 3, 2)[..., None]
      return (outs * shares).sum(0).astype(q.dtype), jax.nn.logsumexp(lses, 0)

    (out, lse), vjp = jax.vjp(jax.jit(merged), q, k, v)
    got = (out, lse, *vjp((jnp.asarray(d_out, out.dtype), jnp.asarray(d_lse, lse.dtype))))
    whole = dense_mask(128, 256, 64, 64)
    tolerance = 3e-6 if self.dtypes[0] == jnp.float32 else 2e-2
    for g, w in zip(got, oracle(q, k, v, whole, d_out, d_lse), strict=True):
      assert relative_error(g, w) < tolerance

  def test_refuses_what_does_not_fit(self):
    q = jnp.zeros((1, 128, 2, 32), self.dtypes[0])
    mask = dense_mask(64, 64, 64, 64)
    with pytest.raises(ValueError, match="build the table for this buffer"):
      attention(q, q, q, mask, implementation=self.implementation)
    with pytest.raises(ValueError, match="must share one of"):
      attention(q, q, q.astype(jnp.int32), implementation=self.implementation)
    with pytest.raises(ValueError, match="each must match or be 1"):
      attention(
        q,
        q,
        q,
        dataclasses.replace(dense_mask(128, 128), kv_counts=np.ones((1, 3, 1), np.int32)),
        implementation=self.implementation,
      )
