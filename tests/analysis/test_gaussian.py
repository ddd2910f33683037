"""The best linear denoiser of Gaussian latents, against dense algebra and independent figures."""

import itertools
import json
import math

import numpy as np
import pytest
from freqformer.kernels.block_sparse.table import BlockMask

from freqformer.analysis import contexts, theory
from freqformer.analysis.contexts import Boxes, Level, Table, octaves, parse, queries, window
from freqformer.analysis.gaussian import excess, full_error, measured_spectrum
from freqformer.command.cli import guarded
from freqformer.grid.layout import TileLayout
from freqformer.grid.pyramid import level_layouts
from freqformer.grid.spectrum import (
  LEAST_MASS,
  level_mass,
  level_prior,
  most_levels,
  power_law,
  suggested_levels,
  wiener,
)
from freqformer.methods.octaves import Octaves
from freqformer.tables.window import sliding_tile

TIMES = (0.1, 0.5, 0.9)
REVIEW_TIMES = (0.15, 0.3, 0.5, 0.7, 0.85, 0.95)


def of(text, grid, slope=3.8, times=TIMES, count=4):
  """Returns the excess of a set's name in percent, averaged over at most `count` queries."""
  context = parse(text, grid)
  places = queries(context, grid, count)
  return np.array(excess(power_law(grid, slope), context, times, places).percent)


def dense(spectrum, boxes, query, t):
  """Returns the excess by matrices over all tokens, in percent."""
  grid = spectrum.shape
  covariance = np.fft.ifftn(spectrum).real
  tokens = list(itertools.product(*map(range, grid)))
  offsets = (np.array(tokens)[:, None] - np.array(tokens)) % grid
  signal = covariance[tuple(np.moveaxis(offsets, -1, 0))]
  means = np.zeros((len(boxes) + 1, *grid))
  means[(0, *query)] = 1
  for row, start, size in zip(means[1:], boxes.start, boxes.size, strict=True):
    for inside in itertools.product(*map(range, size)):
      row[tuple((start + inside) % grid)] = 1 / math.prod(size)
  means = means.reshape(len(means), -1)
  own = tokens.index(tuple(query))
  cross = (1 - t) * means @ signal[own]
  observed = means @ ((1 - t) ** 2 * signal + t**2 * np.eye(len(tokens))) @ means.T
  error = signal[own, own] - cross @ np.linalg.lstsq(observed, cross, rcond=1e-13)[0]
  everything = (1 - t) ** 2 * signal + t**2 * np.eye(len(tokens))
  least = signal[own, own] - (1 - t) ** 2 * signal[own] @ np.linalg.solve(everything, signal[own])
  assert least == pytest.approx(full_error(spectrum, t), rel=1e-10)
  return 100 * (error / least - 1)


# ---- the algebra ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "text", ["window3", "cells2", "window1x3x3+cells2x2x3w3x1x3", "octaves2", "octaves3+window3"]
)
def test_the_fast_form_is_the_dense_one(text):
  """Also where cells are ragged, leave a query alone or lie within a window."""
  grid = (3, 4, 5)
  spectrum = power_law(grid, 3)
  context = parse(text, grid)
  places = queries(context, grid, 3, seed=1)
  found = excess(spectrum, context, TIMES, places).percent
  for t, percent in zip(TIMES, found, strict=True):
    boxes = [context.boxes(grid, place) for place in places]
    each = [dense(spectrum, b, q, t) for b, q in zip(boxes, places, strict=True)]
    assert percent == pytest.approx(np.mean(each), abs=1e-6)  # 1e-8 of the error


def test_boxes_may_go_round_the_grid():
  grid = (2, 3, 5)
  boxes = Boxes(np.array([[1, 2, 3], [0, 0, 0]]), np.array([[2, 2, 4], [1, 3, 5]]))

  class Fixed:
    def boxes(self, grid, query):
      return boxes

  spectrum = power_law(grid, 2)
  places = np.array([[1, 1, 4]])
  found = excess(spectrum, Fixed(), (0.4,), places)
  assert found.percent[0] == pytest.approx(dense(spectrum, boxes, places[0], 0.4), abs=1e-6)
  assert found.keys == 2


def test_all_tokens_lose_nothing():
  for text in ("window5", "cells1", "octaves2r2+window3x5x5"):
    assert np.abs(of(text, (3, 4, 5))).max() < 1e-7


def test_white_latents_need_their_own_token_only():
  for text in ("window1", "cells2", "octaves"):
    assert np.abs(of(text, (4, 8, 8), slope=0)).max() < 1e-7


def test_more_keys_never_lose_more():
  grid = (4, 8, 8)
  names = ("window1", "window3", "window3+cells4", "window3+cells4+cells2w3", "window3+octaves3r2")
  places = queries(parse(names[-1], grid), grid, 2)
  spectrum = power_law(grid, 3.8)
  found = [excess(spectrum, parse(name, grid), TIMES, places).percent for name in names]
  assert (np.diff(found, axis=0) < 1e-9).all() and np.subtract(found[0], found[-1]).min() > 0.1


# ---- figures of an independent program -----------------------------------------------------------


class Centred:
  """A window of three cells at every level, with the query in the middle of each of its cells."""

  def boxes(self, grid, query):
    parts = []
    for cell in (2**l for l in range(6)):
      index = np.array(list(itertools.product((-1, 0, 1), repeat=3)))
      start = query + index * cell - cell // 2
      parts.append(Boxes(start % grid, np.full((27, 3), cell)))
    return Boxes.join(parts)


@pytest.mark.parametrize(
  "text, expected",
  [
    ("window5", (1.1, 2.3, 31.4, 193, 740, 1617)),
    ("window7", (0.1, 1.2, 4.1, 50, 279, 1099)),
    ("window5+cells16", (0.4, 2.0, 11.6, 10.5, 6.9, 4.7)),
    (Centred(), (0.3, 0.7, 0.8, 0.9, 0.9, 0.9)),
  ],
  ids=("window5", "window7", "low", "octaves"),
)
def test_a_million_tokens(text, expected):
  """Rounded figures of another program, whose query is in the middle of its cell."""
  grid = (64, 128, 128)
  context = parse(text, grid) if isinstance(text, str) else text
  places = np.array([[8, 8, 8]])
  found = excess(power_law(grid, 3.8), context, REVIEW_TIMES, places).percent
  for ours, theirs in zip(found, expected, strict=True):
    assert ours == pytest.approx(theirs, rel=0.005, abs=0.06)


def test_places_within_a_cell_matter():
  """Averaged over places, a low level and octaves lose some times as much as in the middle."""
  grid = (64, 128, 128)
  low = of("window5+cells16", grid, times=(0.5, 0.7))
  pyramid = of("octaves", grid, times=(0.5, 0.7))
  assert (low > (15, 20)).all() and (pyramid > 2).all() and (pyramid < 4).all()


@pytest.mark.parametrize(
  "grid, text, expected",
  [
    ((8, 12, 12), "window5", (1.9, 14.7, 68.6, 149)),
    ((8, 16, 16), "window3", (82.5, 218, 440, 362)),
    ((8, 16, 16), "window3+cells4", (5.9, 5.0, 3.3, 0.3)),
    ((8, 16, 16), "octaves", (2.0, 2.3, 2.1, 0.2)),
  ],
)
def test_small_grids(grid, text, expected):
  """The other program averaged over three random queries."""
  found = of(text, grid, times=(0.56, 0.69, 0.81, 0.94), count=16)
  assert found == pytest.approx(expected, rel=0.1, abs=0.1)


# ---- what a query sees ---------------------------------------------------------------------------


def rows(boxes):
  return {(*start, *size) for start, size in zip(boxes.start, boxes.size, strict=True)}


def test_a_window_of_tiles_of_one_token_is_a_window():
  grid = (5, 6, 7)
  layout = TileLayout(grid, (1, 1, 1), 1)
  table = Table(sliding_tile(layout, (3, 3, 3), "clip"), ((layout, (1, 1, 1)),))
  inside = (2, 3, 3)
  assert rows(table.boxes(grid, inside)) == rows(window((3, 3, 3)).boxes(grid, inside))
  assert len(table.boxes(grid, (0, 0, 0))) == 8  # a table does not go round the grid
  assert len(queries(table, grid, 1000)) == 210


def test_a_table_of_two_levels():
  """A query sees what its token's tile and its cell's tile list, over all heads; padding not."""
  grid = (3, 4, 4)
  tokens = TileLayout(grid, (3, 2, 2), 16)  # four tiles of 12 tokens
  cells = TileLayout((2, 2, 2), (2, 2, 2), 16)  # one tile of 8 cells
  # The first head lists tiles of tokens, the second the tile of cells.
  kv_indices = np.zeros((1, 2, 5, 2), np.int32)
  kv_indices[0, 0, 2] = (1, 3)
  kv_counts = np.zeros((1, 2, 5), np.int32)
  kv_counts[0, 0, 2] = 2
  kv_indices[0, 1, 4] = 4
  kv_counts[0, 1, 4] = 1
  kv_len = np.array([12, 12, 12, 12, 8], np.int32)
  mask = BlockMask(kv_indices, kv_counts, kv_len, None, 16, 16).check()
  table = Table(mask, ((tokens, (1, 1, 1)), (cells, (2, 2, 2))))
  of_cells = rows(Level((2, 2, 2), None).boxes(grid, (0, 0, 0)))
  assert (2, 0, 0, 1, 2, 2) in of_cells and len(of_cells) == 8
  assert rows(table.boxes(grid, (0, 0, 0))) == of_cells
  seen = rows(table.boxes(grid, (1, 2, 0)))
  right = {(t, y, x, 1, 1, 1) for t in range(3) for y in range(4) for x in (2, 3)}
  assert seen == of_cells | right  # the padding rows of a tile are no token (0, 0, 0)
  found = excess(power_law(grid, 3), table, (0.5,), np.array([[1, 2, 0]]))
  boxes = table.boxes(grid, (1, 2, 0))
  expected = dense(power_law(grid, 3), boxes, (1, 2, 0), 0.5)
  assert found.keys == 32 and found.percent[0] == pytest.approx(expected, abs=1e-6)


def test_the_table_of_octaves():
  """Over all queries, the keys are the pairs that the method counts, of a cell for each token."""
  grid = (4, 8, 8)
  layout = TileLayout(grid, (2, 2, 2), 8)
  method = Octaves(levels=2)
  fine, coarse = level_layouts(layout, 2, method.basis, method.factor)
  table = Table(method.tables(layout).mask, ((coarse, (2, 2, 2)), (fine, (1, 1, 1))))
  places = queries(table, grid, layout.n)
  keys = sum(len(table.boxes(grid, place)) for place in places)
  pairs = [method.pairs(layout, 1, share).pairs for share in ((1, 0), (0, 1))]
  assert keys == pairs[0] + 8 * pairs[1]
  found = excess(power_law(grid, 3.8), table, TIMES, places[:4])
  assert max(found.percent) < min(of("window1", grid)[1:])


def test_a_table_of_another_buffer_is_refused():
  layout = TileLayout((4, 4, 4), (2, 2, 2), 8)
  mask = sliding_tile(layout, (1, 1, 1))
  with pytest.raises(ValueError, match="128 rows together, but the table has 64 query rows"):
    Table(mask, ((layout, (1, 1, 1)), (layout, (2, 2, 2))))
  with pytest.raises(ValueError, match="is none of the grid 8x4x4"):
    Table(mask, ((layout, (1, 1, 1)),)).boxes((8, 4, 4), (0, 0, 0))


def test_octaves_see_all_of_the_coarsest_level():
  grid = (8, 16, 16)
  boxes = octaves(grid).boxes(grid, (0, 15, 3))
  sizes, counts = np.unique(boxes.size, axis=0, return_counts=True)
  assert sizes[:, 0].tolist() == [1, 2, 4] and counts.tolist() == [27, 27, 32]


def test_windows_go_round_the_grid_once():
  found = window((3, 3, 5)).boxes((2, 8, 8), (1, 0, 7))
  assert len(found) == 2 * 3 * 5 and set(found.start[:, 1]) == {7, 0, 1}


# ---- spectra and levels --------------------------------------------------------------------------


def test_power_law():
  spectrum = power_law((4, 64, 64), 3.8)
  assert spectrum.mean() == pytest.approx(1)
  assert np.log2(spectrum[0, 0, 8] / spectrum[0, 0, 16]) == pytest.approx(3.8, abs=0.01)
  flat = power_law((4, 64, 64), 3.8, scale=2)
  assert flat[0, 0, 0] / flat[0, 0, 1] < 1.1 < spectrum[0, 0, 0] / spectrum[0, 0, 1]


def test_the_filter_between_data_and_noise():
  spectrum = power_law((4, 8, 8), 3)
  assert wiener(spectrum, 1e-6) == pytest.approx(1, abs=1e-5)
  rng = np.random.default_rng(0)
  errors = []
  for _ in range(20):
    x, noise = np.fft.fftn(rng.standard_normal((2, *spectrum.shape)), axes=(1, 2, 3))
    x = x * np.sqrt(spectrum)
    wrong = x - wiener(spectrum, 0.5) * (0.5 * x + 0.5 * noise)
    errors.append(np.mean(np.fft.ifftn(wrong).real ** 2))
  assert np.mean(errors) == pytest.approx(full_error(spectrum, 0.5), rel=0.05)


def test_mass_moves_to_coarse_levels_with_noise():
  spectrum = power_law((8, 16, 16), 3.8)
  mass = level_mass(spectrum, 3, (0.2, 0.5, 0.9))
  assert mass.sum(1) == pytest.approx(1) and mass.min() >= 0
  assert (np.diff(mass[:, 0]) < 0).all() and (np.diff(mass[:, 2]) > 0).all()
  assert level_mass(spectrum, 1, (0.5,)) == pytest.approx(1)
  kernel = np.abs(np.fft.ifftn(wiener(spectrum, 0.5)).real)
  # A window of three tokens reaches 1 token, one of three cells of two reaches 3.
  boxes = [kernel[np.ix_(*[range(-r, r + 1)] * 3)].sum() / kernel.sum() for r in (1, 3)]
  assert mass[1] == pytest.approx([boxes[0], boxes[1] - boxes[0], 1 - boxes[1]])


def test_the_prior_is_finite():
  prior = level_prior(power_law((8, 16, 16), 0), 3, (0.3, 0.6))
  assert prior == pytest.approx(np.log([[1, LEAST_MASS, LEAST_MASS]] * 2))


def test_levels_of_grids():
  grids = ((8, 12, 12), (8, 16, 16), (16, 32, 32), (64, 128, 128), (21, 45, 80), (1, 2, 2))
  assert [suggested_levels(grid) for grid in grids] == [3, 3, 4, 6, 5, 1]
  assert suggested_levels((8, 16, 16), cells=1) == most_levels((8, 16, 16)) == 5
  assert most_levels((1, 1, 1)) == 1 and most_levels((5, 9, 9)) == 5


def test_a_measured_spectrum_has_the_field_s_shape():
  """Clips are cut from a larger field: the jump between their ends must not look like power.

  Only the shape is compared: a clip holds less of the largest scales' variance than its field.
  """
  large = power_law((24, 48, 48), 3.8, scale=8)
  rng = np.random.default_rng(0)
  clips = []
  for _ in range(32):
    field = np.fft.ifftn(np.fft.fftn(rng.standard_normal(large.shape)) * np.sqrt(large)).real
    white = rng.standard_normal(large.shape)
    clips.append(np.stack([field, 5 * white], -1)[:8, :16, :16])
  steep, white = measured_spectrum(clips, per_channel=True)
  ratio = np.log(steep / power_law((8, 16, 16), 3.8, scale=8))
  assert ratio.std() < 0.35
  # Along an axis the Fourier transform of the clips is off by 2.
  assert np.median(ratio[0, 0, 4:9]) == pytest.approx(np.median(ratio), abs=0.3)
  assert np.log(white).std() < 0.35 and white.mean() == pytest.approx(1)
  both = measured_spectrum(clips)
  assert both.mean() == pytest.approx(1) and both[0, 0, 8] > 5 * steep[0, 0, 8]
  with pytest.raises(ValueError, match="no latents"):
    measured_spectrum([])


# ---- refusals and the command --------------------------------------------------------------------


def test_what_cannot_be_is_refused():
  white = power_law((4, 4, 4), 0)
  for t in (0, 1, math.nan):
    with pytest.raises(ValueError, match="must lie between 0"):
      excess(white, window((1, 1, 1)), (t,))
  with pytest.raises(ValueError, match="the same at k and -k"):
    excess(np.arange(64.0).reshape(4, 4, 4), window((1, 1, 1)), (0.5,))
  with pytest.raises(ValueError, match="slope=nan"):
    power_law((4, 4, 4), math.nan)
  with pytest.raises(ValueError, match=r"at most 11,585 keys"):
    excess(power_law((23, 23, 23), 1), window((23, 23, 23)), (0.5,))


def test_a_pyramid_without_its_finest_level():
  grid = (4, 16, 16)
  assert parse("coarse4", grid) == parse("cells2w3+cells4w3+cells4x8x8", grid)
  assert parse("window3+coarse3", grid) == parse("octaves3", grid)
  assert parse("coarse3r2", grid) == parse("cells2w5+cells4", grid)


@pytest.mark.parametrize(
  "flag, message",
  [
    ("--sets=window4", "must be odd along each axis"),
    ("--sets=octaves7", "a grid of 4x8x8 has 1 to 4 levels"),
    ("--sets=window3+cells8", "cells of 8x8x8 tokens do not fit into a grid of 4x8x8"),
    ("--sets=windows3", "'windows3' is no set of keys"),
    ("--sets=coarse1", "a pyramid of one level has no coarse ones"),
    ("--times=0.5,1", "must be above 0 and below 1"),
    ("--grid=4,8", "three positive token counts"),
    ("--data=nowhere", "leave out --grid and --slope"),
  ],
)
def test_the_command_refuses(flag, message, capsys):
  with pytest.raises(SystemExit) as stopped:
    guarded(theory.main)(["--grid=4,8,8", flag])
  assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_the_command(tmp_path, capsys):
  arguments = ["--grid=4,8,8", "--slope=2.5", "--times=0.3,0.8", f"--out={tmp_path}/new"]
  found = theory.main(arguments)
  text = capsys.readouterr().out
  assert "4x8x8 = 256 tokens, spectrum: slope 2.5" in text
  assert all(name in text for name in contexts.default_sets((4, 8, 8)))
  assert json.loads((tmp_path / "new" / "theory.json").read_text()) == found
  assert (tmp_path / "new" / "theory.png").stat().st_size > 10_000
  expected = of("octaves", (4, 8, 8), 2.5, (0.3, 0.8), count=16)
  assert found["sets"]["octaves"]["excess"] == pytest.approx(expected, rel=1e-5)
  assert np.sum(found["mass"], 1) == pytest.approx(1, abs=1e-5)


def test_the_command_measures_a_cache(monkeypatch, capsys, tmp_path):
  class Cache:
    path = tmp_path / "mine"
    latent_shape = (2, 4, 4, 3)

    def __init__(self, path):
      assert path == self.path

    def __len__(self):
      return 5

    def __getitem__(self, index):
      return {"latent": np.random.default_rng(index).standard_normal(self.latent_shape)}

  monkeypatch.setattr(theory, "LatentCache", Cache)
  found = theory.main([f"--data={tmp_path}/mine", "--times=0.5", "--sets=window1"])
  assert found["grid"] == [2, 4, 4] and found["sets"]["window1"]["keys"] == 1
  assert "mean of 5 clips and 3 channels of mine" in capsys.readouterr().out
