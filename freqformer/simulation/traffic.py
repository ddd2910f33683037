"""Bytes and launches of what methods do around attention, on a Hopper GPU.

The one table of such numbers. They are read off layers compiled for an H100 (`python -m
benchmarks.compiled.layer_traffic`, rows in `benchmarks/results/layer_traffic.json`; `python -m
benchmarks.compiled.linear`, rows in `linear.json`); nothing was measured on a GPU. Norm and rotary
are not among them: every method has them (`BlockShape.elementwise_bytes`). Other devices are
simulated with the same numbers.
"""

import dataclasses
import functools
import math

from freqformer.grid.layout import TileLayout
from freqformer.grid.pyramid import compression
from freqformer.grid.sizes import coarse_tokens, most_cells
from freqformer.kernels.around.prepare import BLOCKS, HEAD_DIMS, MAX_CELLS
from freqformer.methods.adaspa import AdaSpa
from freqformer.methods.base import Method
from freqformer.methods.block_topk import BlockTopK
from freqformer.methods.freqformer import FreqFormer
from freqformer.methods.octaves import Octaves
from freqformer.methods.sparse_linear import SparseLinear
from freqformer.methods.sparseflow import LINEAR, SparseFlow, frame_segments
from freqformer.methods.spatial_temporal import SpatialTemporal


@dataclasses.dataclass(frozen=True)
class Part:
  """An entry of the table.

  Attributes:
    passes: reads and writes of one bf16 array of tokens `[n, D]`.
    launches: kernels in addition to the attention call.
    rows: of layer_traffic.json or the named file, where it was counted (a difference: b - a).
  """

  passes: float
  launches: float
  rows: str


BANDS = "freqformer(allocation=(3, 6, 3))"
AXES = "freqformer(allocation=(3, 6, 3), basis=dict(kind=dct))"
PARTS = {
  # FreqFormer's transforms, packing and lift, by who does them: the Hopper kernels (v in and out,
  # which other methods' layers move uncounted; angles; lift in and out), XLA in tiles of 16 cells,
  # XLA along whole axes. Of the latter two all but norm and
  # rotary (6), means (2), selection and "other".
  "bands, kernels": Part(4.4, 1, f"{BANDS} - dense"),
  "bands, tiles": Part(14.5, 14, "around/a_64k_xla"),
  "bands, axes": Part(48.3, 26, AXES),
  "filter v, kernels": Part(0.0, 1, f"{BANDS}, filter=v - none"),
  "filter v, tiles": Part(14.0, 6, "around/a_64k_filter_v_xla - around/a_64k_xla"),
  "filter v, axes": Part(54.1, 23, f"{AXES}, filter=v - none"),
  "filter qkv, kernels": Part(0.0, 1, f"{BANDS}, filter=qkv - none"),
  "filter qkv, tiles": Part(50.3, 18, "around/a_64k_filter_qkv_xla - around/a_64k_xla"),
  "filter qkv, axes": Part(170.2, 68, f"{AXES}, filter=qkv - none"),
  # A linear low band.
  "linear low band, kernels": Part(0.8, 4, f"{BANDS}, low_op=linear - {BANDS}"),
  "linear low band": Part(0.0, 4, f"{BANDS}, low_op=linear - {BANDS}"),
  "summary": Part(52.0, 57, f"{BANDS}, summary=4 - 0"),
  "summary, axes": Part(139.9, 89, f"{AXES}, summary=4 - 0"),
  "each summary token": Part(0.64, 0, f"{BANDS}, summary=16 - 4"),
  # Band energies for the router, and its network, choice and lists.
  "energies": Part(4.75, 11, f"freqformer - {BANDS}"),
  "energies, axes": Part(15.3, 13, f"freqformer(basis=dict(kind=dct)) - {AXES}"),
  "variances": Part(1.2, 11, "sparseflow - sparseflow(allocation=(7, 5))"),
  "router": Part(0.0, 6, f"freqformer - {BANDS}"),
  # Measured heads: q and k by head in float32 for the dense rows; norm and rotary once more for
  # each of three bands and for the dense rows (4 passes each). Launches of rows are per head.
  "dense rows": Part(29.0, 0, "spatial_temporal@profile - @run"),
  "norm and rotary again": Part(16.0, 0, "freqformer(allocation=measured)@profile - @run"),
  # Linear attention: passes over the linear heads' own channels. Frames that share boxes of eight
  # rows cost more; what the kernels refuse runs in XLA.
  "linear, own boxes": Part(4.55, 4, "linear.json: h100_sparseflow_fixed_64k"),
  "linear, shared boxes": Part(13.6, 5, "linear.json: h100_sparseflow_fixed_21x30x52"),
  "linear, refused": Part(18.55, 8, "linear.json: h100_sparseflow_fixed_64k_xla"),
  "linear over tiles": Part(13.0, 9, "linear.json: h100_sparse_linear_64k (8), projection (5)"),
  # Octaves of two levels, by the factor between them: prepare, compression, coarse rows and lift,
  # without norm and rotary of the tokens (4); what a third level adds, and each one after it.
  "octaves": Part(9.3, 27, "a_64k/octaves(levels=2) - a_64k/dense"),
  "octaves, axes": Part(34.1, 27, "octaves(levels=2, basis=haar) - dense"),
  "octaves by 4": Part(7.6, 21, "octaves(levels=2, factor=4) - dense"),
  "octaves by 4, axes": Part(21.2, 27, "octaves(levels=2, basis=haar, factor=4) - dense"),
  "third level": Part(1.6, 11, "a_64k/octaves - a_64k/octaves(levels=2)"),
  "third level, axes": Part(3.9, 16, "octaves(basis=haar) - octaves(levels=2, basis=haar)"),
  "each further level": Part(0.12, 9, "a_64k/octaves(levels=5) - a_64k/octaves"),
  "energies of levels": Part(1.2, 7, "octaves(router=dict(statistics=True)) - octaves"),
  # Means of q and k, where no other kernel makes them on its way; scores and search beside them.
  "means": Part(2.0, 0, "block_topk(coarse=none) - dense"),
  "selection": Part(0.0, 9, "block_topk(coarse=none) - dense"),
  "gate": Part(7.0, 6, "block_topk - block_topk(coarse=none)"),
  "lists of bits": Part(0.0, 4, "adaspa@reuse - dense"),
}
# Bytes per pooled score that the selection moves: 17 to 21 for 512 to 8,192 tiles, 67 to 71 in XLA
# alone (rows around/a_64k to around/a_1m, part "select").
SCORE_BYTES = 20.0
# Bytes per pair of tiles of AdaSpa's search: masses and their ranking (adaspa@search - @reuse).
SEARCH_BYTES = 58.0
SEARCH_PAIRS = 2**23  # pairs of tiles of one chunk of the search
SEARCH_LAUNCHES = 20  # kernels per chunk
LIST_BYTES = 40.0  # bytes per listed tile where lists are written out from bits (adaspa@reuse)
# Of the dense rows that heads are measured on (spatial_temporal@profile, rows=64 and 32).
ROW_SCORE_BYTES = 10.0  # bytes per score of each pattern
ROW_LAUNCHES = 12  # kernels per head


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Work around attention: bytes of device memory at 2 per element, kernels besides attention's."""

  bytes: float = 0.0
  launches: float = 0.0

  def __add__(self, other: "Traffic") -> "Traffic":
    return Traffic(self.bytes + other.bytes, self.launches + other.launches)


@dataclasses.dataclass(frozen=True)
class Layer:
  """Sizes of the layer whose traffic is counted, and the step that it does."""

  layout: TileLayout
  heads: int
  head_dim: int
  allocation: tuple[float, ...] | None
  phase: str

  def part(self, name: str, form: str = "", share: float = 1.0) -> Traffic:
    """Returns an entry of the table, in its own `form` if it has one, for a share of the heads."""
    part = PARTS.get(f"{name}, {form}") or PARTS[name]
    moved = 2.0 * part.passes * self.layout.n * self.heads * self.head_dim * share
    return Traffic(moved, part.launches)

  def selection(self, means: bool = True) -> Traffic:
    """Ranking of all pairs of tiles by pooled scores; `means`: of q and k, made for it alone."""
    scores = Traffic(SCORE_BYTES * self.heads * self.layout.tiles**2)
    found = self.part("selection") + scores
    return found + self.part("means") if means else found

  def measured_rows(self, rows: int, patterns: int) -> Traffic:
    """Dense attention of a few rows; values are summed `patterns` times."""
    scores = ROW_SCORE_BYTES * patterns * min(rows, self.layout.n) * self.layout.n * self.heads
    return self.part("dense rows") + Traffic(scores, ROW_LAUNCHES * self.heads)


def around_attention(
  method: Method,
  layout: TileLayout,
  heads: int,
  head_dim: int,
  allocation: tuple[float, ...] | None = None,
  phase: str | None = None,
) -> Traffic:
  """Returns bytes and launches of a method's work around attention in one layer.

  Arguments as those of `layer_cost`. A method without an entry here is taken to read q, k and v
  once if it does more than attend.
  """
  phase = method.usual_phase if phase is None else phase
  if method.only_attends(phase):
    return Traffic()
  return _traffic(method, Layer(layout, heads, head_dim, allocation, phase))


@functools.singledispatch
def _traffic(method: Method, layer: Layer) -> Traffic:
  return Traffic(6.0 * layer.layout.n * layer.heads * layer.head_dim)


@_traffic.register
def _(method: FreqFormer, layer: Layer) -> Traffic:
  if method.allocation == "measured" and layer.phase == "warmup":
    return Traffic()
  found = _bands(method, layer)
  if method.summary:
    each = layer.part("each summary token")
    found += layer.part("summary", _form(method, layer))
    found += Traffic(each.bytes * method.summary)
  if method.routed:
    found += layer.part("router")
    if method.router.statistics:
      found += layer.part("energies", _form(method, layer))
  if method.allocation == "measured" and layer.phase != "run":
    for _ in range(3):
      found += _bands(method, layer)
    found += layer.part("norm and rotary again")
    found += layer.measured_rows(method.profile.rows, patterns=1)
  return found


def _form(method: FreqFormer, layer: Layer) -> str:
  """The program of FreqFormer's transforms: Hopper kernels, or XLA in tiles or along whole axes."""
  if not method.basis.tiled:
    return "axes"
  cells = most_cells(method.basis, layer.layout)
  taken = layer.head_dim in HEAD_DIMS and layer.layout.block in BLOCKS and cells <= MAX_CELLS
  return "kernels" if taken else "tiles"


def _bands(method: FreqFormer, layer: Layer) -> Traffic:
  """Transforms, filters, packing, selection and lift."""
  form = _form(method, layer)
  found = layer.part("bands", form) + layer.selection(means=form != "kernels")
  if form == "kernels":  # coarse rows are written and read for q, k, v and the output
    n_coarse = coarse_tokens(method.basis, layer.layout)
    found += Traffic(4 * 2.0 * n_coarse * layer.heads * layer.head_dim)
  if method.filter != "none":
    found += layer.part(f"filter {method.filter}", form)
  if method.low_op == "linear":
    found += layer.part("linear low band", form)
  return found


@_traffic.register
def _(method: Octaves, layer: Layer) -> Traffic:
  form = "" if compression(method.basis, method.factor).tiled else "axes"
  found = Traffic()
  if method.levels > 1:
    found += layer.part("octaves" if method.factor == 2 else "octaves by 4", form)
  if method.levels > 2:
    found += layer.part("third level", form)
    further = layer.part("each further level")
    more = method.levels - 3
    found += Traffic(more * further.bytes, more * further.launches)
  if method.mid_tiles:  # the kernel that packs makes the means
    found += layer.selection(means=False)
  if method.router.statistics:
    found += layer.part("energies of levels")
  return found


@_traffic.register
def _(method: SparseFlow, layer: Layer) -> Traffic:
  work = frame_segments(layer.layout).work
  kind = "refused" if work is None else "shared boxes" if work.mixed else "own boxes"
  share = float(method.shares(layer.heads, layer.allocation)[LINEAR])
  found = layer.part("linear", kind, share)
  if method.routed:
    found += layer.part("router")
    if method.router.statistics:
      found += layer.part("variances")
  return found


@_traffic.register
def _(method: BlockTopK, layer: Layer) -> Traffic:
  found = layer.selection()
  return found + layer.part("gate") if method.coarse == "gated" else found


@_traffic.register
def _(method: SparseLinear, layer: Layer) -> Traffic:
  return layer.part("linear over tiles") + layer.selection() + layer.selection(means=False)


@_traffic.register
def _(method: SpatialTemporal, layer: Layer) -> Traffic:
  return layer.measured_rows(method.profile.rows, patterns=3)


@_traffic.register
def _(method: AdaSpa, layer: Layer) -> Traffic:
  layout = layer.layout
  found = Traffic()
  if layer.phase in ("reuse", "search"):
    _, _, most = method.budgets(layout)
    written = layer.heads * layout.tiles * (layout.tiles / 8 + LIST_BYTES * most)
    found += layer.part("lists of bits") + Traffic(written)
  if layer.phase.startswith("search"):
    pairs = layer.heads * float(layout.tiles) ** 2
    read = 4.0 * layout.n_buffer * layer.heads * layer.head_dim
    chunks = math.ceil(pairs / SEARCH_PAIRS)
    found += Traffic(read + SEARCH_BYTES * pairs, SEARCH_LAUNCHES * chunks)
  return found
