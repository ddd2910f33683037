"""The conformance suite of attention. Subclass it, name the implementation, change nothing.

The oracle is NumPy in float64 and shares no code with the package. Cotangents of the output *and*
of the LSE are random.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.block_sparse.table import BlockMask, dense_mask, from_tiles, select

NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclasses.dataclass(frozen=True)
class Case:
  """One shape of the suite: sizes, block sizes and how the table is drawn."""

  name: str
  b: int = 1
  h: int = 2
  h_kv: int | None = None  # heads of keys and values; None: h
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
  dense_keys: int | None = None  # the table is `dense_mask` of so many keys; None: it is drawn
  # The last query tile of every head lists three tiles, the first and last at least half full: an
  # online softmax must rescale there. Two stages of the Hopper kernel hold up to 128 keys.
  long: bool = True


BIAS = Case("bias", bias=True)
GROUPED = Case("grouped_heads", h=4, h_kv=2, table_h=4)
# As tokens attend to a text: fewer keys than queries, all seen, the last tile ragged.
CROSS = Case("cross_attention", b=2, d=64, n_q=192, n_kv=128, dense_keys=100)
CASES = (
  Case("plain", ragged=False, empty=False),
  Case("ragged_with_empty_rows"),
  Case("per_batch_per_head", b=2, table_b=2, kv_len_per_batch=True),
  Case("shared_by_heads", b=2, table_h=1, d=64),
  Case("every_tile_in_order", listed=False),
  BIAS,
  Case("rectangular_tiles", block_q=128, block_kv=64, n_q=256, n_kv=320),
  Case("rectangular_tiles_2", block_q=64, block_kv=128, n_q=128, n_kv=384),
  Case("sparse_lists", n_q=512, n_kv=512, keep=0.1, d=64),
  GROUPED,
  CROSS,
)
# Shapes that only backends without alignment needs can run.
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
  """A random table of the case, or its dense one, checked."""
  if case.dense_keys:
    return dense_mask(case.n_q, case.dense_keys, case.block_q, case.block_kv).check()
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
  return mask.check()


def draw_inputs(case: Case, seed: int, dtype):
  """q, k, v and the cotangents of out and LSE."""
  rng = np.random.default_rng(seed + 1000)
  rows = (case.b, case.n_q, case.h, case.d)
  keys = (case.b, case.n_kv, case.h_kv or case.h, case.d)
  shapes = (rows, keys, keys, rows)
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
  group = q.shape[2] // k.shape[2]  # heads of queries that read a head of keys
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  k, v = (np.repeat(x, group, 2) for x in (k, v))
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
  dq = np.einsum("bhij,bjhd->bihd", ds, k)
  dkv = (np.einsum("bhij,bihd->bjhd", ds, q), np.einsum("bhij,bihd->bjhd", p, d_out))
  shape = (*k.shape[:2], -1, group, k.shape[3])
  return out, lse, dq, *(x.reshape(shape).sum(3) for x in dkv)


def _difference(got, want):
  """Returns got - want where that is finite, and the RMS of want; -inf stands where -inf stands."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape
  finite = np.isfinite(want)
  np.testing.assert_array_equal(got[~finite], want[~finite])
  size = np.sqrt(np.mean(want[finite] ** 2)) if finite.any() else 0
  return got[finite] - want[finite], size + 1e-30


def relative_error(got, want):
  """RMS error over RMS size."""
  difference, size = _difference(got, want)
  return float(np.sqrt(np.mean(difference**2)) / size) if difference.size else 0.0


def worst_error(got, want):
  """Largest error over RMS size."""
  difference, size = _difference(got, want)
  return float(np.abs(difference).max(initial=0) / size)


def plain_low_precision(q, k, v, mask, d_out, d_lse):
  """The error model: textbook attention by autodiff, products rounded to the input's dtype."""
  seen = seen_pairs(mask, q.shape[1], k.shape[1])
  some = seen.any(-1, keepdims=True)

  def textbook(q, k, v):
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v))
    s = jnp.einsum("bihd,bjhd->bhij", q, k).astype(jnp.float32) / math.sqrt(q.shape[-1])
    if mask.kv_bias is not None:
      s = s + jnp.repeat(jnp.asarray(mask.kv_bias), mask.block_kv)[: k.shape[1]]
    s = jnp.where(seen, s, jnp.where(some, -jnp.inf, 0))
    lse = jax.nn.logsumexp(s, -1)
    p = jnp.where(some, jnp.exp(s - lse[..., None]), 0).astype(q.dtype)
    return jnp.einsum("bhij,bjhd->bihd", p, v), jnp.where(some[..., 0], lse, -jnp.inf)

  found, vjp = jax.vjp(textbook, *(jnp.asarray(x) for x in (q, k, v)))
  return *found, *vjp((jnp.asarray(d_out), jnp.asarray(d_lse, jnp.float32)))


def value_and_grads(implementation):
  """Returns a jitted function of q, k, v, mask, d_out, d_lse: out, lse, dq, dk, dv under test."""

  @jax.jit
  def run(q, k, v, mask, d_out, d_lse):
    (out, lse), vjp = jax.vjp(
      lambda *a: attention(*a, mask, implementation=implementation), q, k, v
    )
    return out, lse, *vjp((d_out.astype(out.dtype), d_lse.astype(lse.dtype)))

  return run


class AttentionSuite:
  """Subclass per backend: set `implementation`, and the `cases` and `dtypes` that it takes."""

  implementation: str
  cases = CASES + ODD_CASES
  dtypes = (jnp.float32, jnp.bfloat16, jnp.float16)

  def pytest_generate_tests(self, metafunc):
    """Takes all cases in the widest dtype, and one in each other one."""
    if "case" in metafunc.fixturenames:
      widest, *others = self.dtypes
      found = {case.name: (case, widest) for case in self.cases}
      for dtype in others:
        found[f"bias-{dtype.__name__}"] = (BIAS, dtype)
      metafunc.parametrize("case, dtype", found.values(), ids=found)

  def test_case(self, case, dtype):
    """Against the oracle; 16 bits err at most twice as much as the plain computation in them."""
    mask = draw_mask(case, 0)
    q, k, v, d_out, d_lse = draw_inputs(case, 0, dtype)
    got = value_and_grads(self.implementation)(q, k, v, mask, d_out, d_lse)
    want = oracle(q, k, v, mask, d_out, d_lse)
    limits = [3e-6] * 5
    if dtype != jnp.float32:
      plain = plain_low_precision(q, k, v, mask, d_out, d_lse)
      limits = [2 * relative_error(x, y) for x, y in zip(plain, want, strict=True)]
      limits[1] = 5e-3
    for name, x, y, limit in zip(NAMES, got, want, limits, strict=True):
      assert relative_error(x, y) <= limit, name
      assert x.dtype == (jnp.float32 if name == "lse" else dtype)

  def test_padding_and_empty_rows_change_nothing(self):
    """1e4 in padding rows, NaN for cotangents of rows that see nothing: all else is bit-equal.

    Rows of a list of no tile, or of an empty tile alone, have output 0, LSE -inf and no gradient.
    """
    case = Case("padding", n_kv=256)
    tiles = np.ones((3, 4), bool)
    tiles[0] = False
    tiles[1] = [False, True, False, False]
    kv_len = np.array([64, 0, 40, 17])
    mask = from_tiles(tiles, kv_len, case.block_q, case.block_kv)
    q, k, v, d_out, d_lse = draw_inputs(case, 2, self.dtypes[0])
    valid = (np.arange(case.block_kv) < kv_len[:, None]).reshape(-1)
    rows = np.arange(case.n_q)
    dead, padding = rows < 128, rows > 180

    def fill(x, where, value):
      return np.where(where[:, None, None], np.asarray(value, x.dtype), x)

    d_out = fill(d_out, padding, 0)
    d_lse = np.where(padding, 0, d_lse)
    run = value_and_grads(self.implementation)
    clean = run(q, k, v, mask, d_out, d_lse)
    dirty = (fill(q, padding, 1e4), fill(k, ~valid, 1e4), fill(v, ~valid, 1e4))
    soiled = run(*dirty, mask, fill(d_out, dead, np.nan), np.where(dead, np.inf, d_lse))
    for name, a, b in zip(NAMES, clean, soiled, strict=True):
      if name in ("out", "lse"):
        axis = 1 if name == "out" else 2
        a, b = (np.compress(~padding, x, axis) for x in (a, b))
      np.testing.assert_array_equal(a, b)
    out, lse, dq, dk, dv = soiled
    assert np.isneginf(lse[..., dead]).all()
    assert not any(x.any() for x in (out[:, dead], dq[:, dead], dk[:, ~valid], dv[:, ~valid]))

  def test_large_and_hidden_scores(self):
    """Scores of a hundred before or behind small ones, padding between: nothing overflows."""
    case = Case("large", n_q=64, n_kv=448)
    q, k, v, d_out, d_lse = draw_inputs(case, 8, self.dtypes[0])
    sizes = np.ones((448, 2, 1))
    sizes[:128, 0] = sizes[256:384, 1] = 60
    k = (k * sizes).astype(k.dtype)
    kv_len = np.array([64, 64, 0, 0, 64, 50, 0])
    mask = from_tiles(np.ones((1, 7), bool), kv_len, case.block_q, case.block_kv)
    got = value_and_grads(self.implementation)(q, k, v, mask, d_out, d_lse)
    want = oracle(q, k, v, mask, d_out, d_lse)
    # Float32 leaves out more of larger scores. dq and dk cancel where one key has it all.
    rounding = 2e-5 if self.dtypes[0] == jnp.float32 else 4e-3
    for i, limit in ((0, rounding), (1, 1e-6), (4, rounding)):
      assert relative_error(got[i], want[i]) < limit
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in got)

  def test_one_trace_serves_every_table(self):
    """Tables are arguments: two assignments share a compilation and give what each table gives."""
    case, traces = Case("select", empty=False, ragged=False), []
    masks = [draw_mask(dataclasses.replace(case, keep=p), 6) for p in (0.2, 0.9)]
    q, k, v, *_ = draw_inputs(case, 6, self.dtypes[0])

    @jax.jit
    def run(choice):
      traces.append(None)
      return attention(q, k, v, select(masks, choice), implementation=self.implementation)[0]

    # A process's first call may import what adds a setting to jax: then the next one traces anew.
    attention(q, k, v, masks[0], implementation=self.implementation)
    single = [oracle(q, k, v, mask)[0] for mask in masks]
    for choice in ([[0, 1]], [[1, 0]]):
      out = run(jnp.asarray(choice, jnp.int32))
      for head, pick in enumerate(choice[0]):
        limit = 3e-6 if self.dtypes[0] == jnp.float32 else 4e-3
        assert relative_error(out[:, :, head], single[pick][:, :, head]) < limit
    assert len(traces) == 1
