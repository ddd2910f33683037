"""Exact counts of one `attention` call: FLOPs, traffic, work items, of a table or in closed form.

Forward: 2 matmuls, `4 * pairs * d` FLOPs (FlashAttention, arXiv 2205.14135, counts the same).
Backward: 5; 7 where a kernel walks the table twice. Each listing query tile reads its q once, k and
v of all its tiles, and writes out and LSE. L2 delivers that sum; device memory every distinct byte
once, or, where a head's k and v exceed L2, about the union of concurrent lists. Not counted:
softmax beyond the exponentials, instruction issue, counts and offsets (4 bytes per query tile).
"""

import dataclasses

import numpy as np
from freqformer.kernels.block_sparse.table import BlockMask, one_list
from freqformer.kernels.hopper.machine import MULTIPROCESSORS

FORWARD_MATMULS = 2
BACKWARD_MATMULS = {"one_pass": 5, "two_pass": 7}
# Of the three kernels on Hopper; both of the backward recompute q k^T and dO v^T.
KERNEL_MATMULS = {"forward": 2, "dq": 3, "dkv": 4}
# Elementwise operations per pair of `kernels/block_sparse/reference.py`, as XLA counts them beside
# two exponentials: scale, mask, maximum, differences, sum. No useful work, in no other count.
REFERENCE_SOFTMAX = 8
# Query tiles that run at the same time where nothing better is known: one per SM of an H100.
CONCURRENT = MULTIPROCESSORS


@dataclasses.dataclass(frozen=True)
class CallCost:
  """Counts of one call over all samples and heads; no rates: any device, any precision.

  Attributes:
    pairs: scored valid (query, key) pairs: the useful work.
    computed_pairs: rows times keys of all listed tiles, with padding; also the exponentials.
    rows: query tiles, whether they list something or not.
    items: query tiles that list something: work items of a kernel.
    loads: listed key tiles, summed over query tiles.
    distinct: key tiles that at least one list of their head names, summed over heads.
    wave_loads: unions of the lists of `CONCURRENT` neighbouring query tiles of a head, summed.
    longest: tiles of the longest list.
    head_dim, block_q, block_kv: of the call.
  """

  pairs: float
  computed_pairs: float
  rows: float
  items: float
  loads: float
  distinct: float
  wave_loads: float
  longest: float
  head_dim: int
  block_q: int = 128
  block_kv: int = 128

  def __add__(self, other: "CallCost") -> "CallCost":
    """Returns the counts of both in one launch.

    Raises:
      ValueError: if head dimension or tile sizes differ.
    """
    mine = (self.head_dim, self.block_q, self.block_kv)
    theirs = (other.head_dim, other.block_q, other.block_kv)
    if mine != theirs:
      raise ValueError(
        f"costs of one launch need equal (head_dim, block_q, block_kv), got {mine} and {theirs}."
      )
    summed = {n: getattr(self, n) + getattr(other, n) for n in _COUNTS}
    return dataclasses.replace(self, **summed, longest=max(self.longest, other.longest))

  def scaled(self, factor: float) -> "CallCost":
    """Returns the counts of `factor` times as many heads or samples; the longest list stays."""
    return dataclasses.replace(self, **{n: getattr(self, n) * factor for n in _COUNTS})

  # ---- work --------------------------------------------------------------------------------------

  @property
  def flops(self) -> float:
    """Useful FLOPs of the forward: `4 * pairs * head_dim`."""
    return 2.0 * FORWARD_MATMULS * self.pairs * self.head_dim

  @property
  def computed_flops(self) -> float:
    """FLOPs that a tile kernel does, padding included."""
    return 2.0 * FORWARD_MATMULS * self.computed_pairs * self.head_dim

  def backward_flops(self, passes: str = "one_pass") -> float:
    """Returns useful FLOPs of the backward, by a name of `BACKWARD_MATMULS`."""
    return 2.0 * BACKWARD_MATMULS[passes] * self.pairs * self.head_dim

  # ---- bytes -------------------------------------------------------------------------------------

  def kv_bytes(self, itemsize: int = 2) -> float:
    """Returns the bytes of k and v that L2 delivers; `block_q` queries share a tile's read."""
    return 2.0 * self.loads * self.block_kv * self.head_dim * itemsize

  def row_bytes(self, itemsize: int = 2) -> float:
    """Returns the bytes of q of rows with a list, out and LSE (float32) of all rows, and lists."""
    q_out = (self.items + self.rows) * self.block_q * self.head_dim * itemsize
    return q_out + 4.0 * self.rows * self.block_q + 4.0 * self.loads

  def l2_bytes(self, itemsize: int = 2) -> float:
    """Returns all bytes that pass L2."""
    return self.kv_bytes(itemsize) + self.row_bytes(itemsize)

  def min_bytes(self, itemsize: int = 2) -> float:
    """Returns the bytes of device memory at best: every distinct one once."""
    return 2.0 * self.distinct * self.block_kv * self.head_dim * itemsize + self.row_bytes(itemsize)

  def expected_bytes(self, itemsize: int = 2, cache: float = 0.0, heads: float = 1.0) -> float:
    """Returns the bytes of device memory where L2 holds one head, and sorted lists sweep together.

    Args:
      itemsize: bytes per element of q, k, v and out.
      cache: bytes of L2. A head whose listed k and v fit is read once; else every group of
        concurrent tiles reads its union.
      heads: heads times samples in this call.
    """
    head = 2.0 * self.distinct / max(heads, 1.0) * self.block_kv * self.head_dim * itemsize
    loads = self.distinct if head <= cache else self.wave_loads
    return 2.0 * loads * self.block_kv * self.head_dim * itemsize + self.row_bytes(itemsize)

  def estimate(self, itemsize: int = 2, kernel: str = "forward") -> dict[str, int]:
    """Returns the arguments of `pallas.CostEstimate` for a kernel of `KERNEL_MATMULS`.

    Every distinct byte counts once, as in `min_bytes`. Both backward kernels read q, k, v, dO, LSE
    and delta (float32) and the lists; one writes dQ, the other dK and dV.
    """
    moved = self.min_bytes(itemsize)
    if kernel != "forward":
      queries, keys = self.items * self.block_q, self.distinct * self.block_kv
      arrays = {"dq": 3 * queries + 2 * keys, "dkv": 2 * queries + 4 * keys}[kernel]
      moved = arrays * self.head_dim * itemsize + 8.0 * self.rows * self.block_q + 4.0 * self.loads
    return {
      "flops": round(2.0 * KERNEL_MATMULS[kernel] * self.computed_pairs * self.head_dim),
      "transcendentals": round(self.computed_pairs),
      "bytes_accessed": round(moved),
    }


_COUNTS = ("pairs", "computed_pairs", "rows", "items", "loads", "distinct", "wave_loads")


def count(
  mask: BlockMask, head_dim: int, *, batch: int = 1, heads: int = 1, concurrent: int = CONCURRENT
) -> CallCost:
  """Counts a concrete table exactly.

  Args:
    mask: NumPy leaves (or concrete arrays).
    batch, heads: of the call; a table with dimension 1 serves all.
    concurrent: query tiles of a head that run at the same time, for `wave_loads`.

  Raises:
    ValueError: if the table is for another batch or number of heads.
  """
  lead = mask.kv_counts.shape[:2]
  for what, got, have in (("batch", batch, lead[0]), ("heads", heads, lead[1])):
    if have not in (1, got):
      raise ValueError(
        f"the table is for {what}={have}, the call has {got}; it must match or be 1."
      )
  counts = np.asarray(mask.kv_counts)
  ids = mask.kv_indices
  shared = batch / lead[0] * heads / lead[1]
  pairs = np.asarray(mask.pairs(), np.float64)
  pairs = np.broadcast_to(pairs, np.broadcast_shapes(pairs.shape, lead))
  if ids is None or one_list(ids):  # prefixes of one list: a union is its longest
    distinct, waves = _prefix_unions(counts, concurrent)
  else:
    distinct, waves = _unions(np.asarray(ids), counts, mask.kv_tiles, concurrent)
  return CallCost(
    pairs=float(pairs.sum()) * batch * heads / pairs.size,
    computed_pairs=float(counts.sum()) * mask.block_q * mask.block_kv * shared,
    rows=float(counts.size) * shared,
    items=float((counts > 0).sum()) * shared,
    loads=float(counts.sum()) * shared,
    distinct=distinct * shared,
    wave_loads=waves * shared,
    longest=float(counts.max(initial=0)),
    head_dim=head_dim,
    block_q=mask.block_q,
    block_kv=mask.block_kv,
  )


def _prefix_unions(counts, concurrent):
  """Returns what `_unions` does of lists that are prefixes of one list: a union is the longest."""
  groups = np.pad(counts, ((0, 0), (0, 0), (0, -counts.shape[-1] % concurrent)))
  groups = groups.reshape(*counts.shape[:2], -1, concurrent)
  return float(counts.max(-1).sum()), float(groups.max(-1).sum())


def _unions(ids, counts, kv_tiles, concurrent):
  """Returns listed key tiles summed over heads, and over groups of `concurrent` query tiles."""
  slots = np.arange(ids.shape[-1], dtype=np.int32)
  distinct = waves = 0
  for b, h in np.ndindex(*counts.shape[:2]):
    whole = np.zeros(kv_tiles, bool)
    for start in range(0, counts.shape[-1], concurrent):
      group = slice(start, start + concurrent)
      seen = np.zeros(kv_tiles, bool)
      seen[ids[b, h, group][slots < counts[b, h, group, None]]] = True
      waves += int(seen.sum())
      whole |= seen
    distinct += int(whole.sum())
  return float(distinct), float(waves)


def expected(mask: BlockMask, head_dim: int, heads: int) -> CallCost:
  """Returns a perhaps traced table's cost, of lists as long as `with_mean` says, else full.

  `heads` are heads times samples of the call.
  """
  listed = mask.max_kv if mask.mean_listed is None else mask.mean_listed
  return uniform(
    mask.q_tiles,
    listed,
    mask.kv_tiles,
    head_dim,
    block=mask.block_q,
    block_kv=mask.block_kv,
    heads=heads,
  )


def uniform(
  q_tiles: float,
  listed: float,
  kv_tiles: float,
  head_dim: int,
  *,
  block: int = 128,
  block_kv: int | None = None,
  fill: float = 1.0,
  heads: float = 1.0,
) -> CallCost:
  """Returns the counts in closed form: every query tile lists `listed` of `kv_tiles` key tiles.

  With `listed = kv_tiles` it is dense attention on a padded buffer; only `pairs` is inexact there
  if `fill` varies. Unions are those of independent random lists: `c` of them miss a key tile with
  probability `(1 - listed / kv_tiles)^c`. That is an upper bound where neighbours prefer the same
  keys.

  Args:
    q_tiles, kv_tiles: of one head.
    listed: tiles per list; may be a mean.
    block, block_kv: rows of a query and of a key tile; `block_kv` None: as many.
    fill: share of a tile's rows that hold a token.
    heads: heads times samples.
  """
  listed = min(listed, kv_tiles)
  block_kv = block_kv or block

  def union(rows):
    return kv_tiles * (1.0 - (1.0 - listed / kv_tiles) ** rows) if kv_tiles else 0.0

  groups, rest = divmod(q_tiles, CONCURRENT)
  loads = q_tiles * listed
  one = CallCost(
    pairs=loads * fill**2 * block * block_kv,
    computed_pairs=loads * block * block_kv,
    rows=q_tiles,
    items=q_tiles if listed > 0 else 0.0,
    loads=loads,
    distinct=union(q_tiles),
    wave_loads=groups * union(CONCURRENT) + union(rest),
    longest=float(np.ceil(listed)),
    head_dim=head_dim,
    block_q=block,
    block_kv=block_kv,
  )
  return one.scaled(heads)
