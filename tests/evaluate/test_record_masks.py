"""Masks of a run: what is recorded, written and read again is what the methods say they ran."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from freqformer.kernels.block_sparse.table import from_tiles

from freqformer.diffusion.sampling import SampleConfig, compile_steps, make_step, sample
from freqformer.evaluate.record_masks import (
  MaskRecorder,
  RunMasks,
  density_picture,
  load_masks,
  realised_density,
)
from freqformer.model.architectures import model_config
from freqformer.model.dit import VideoDiT

# One worker: what the file prepares or compiles is then made once.
pytestmark = pytest.mark.xdist_group("masks")

SHAPE = (4, 6, 6, 2)
LAYERS = ((0, 2, "spatial_temporal"), (2, None, "block_topk"))
PROFILED = dict(frames=0, places=0, profile=dict(warmup=0.3))


@contextlib.contextmanager
def compiled():
  """The names of compilations while it is open."""
  names, watching = [], True

  def listen(event, seconds, **_):
    if watching and "backend_compile" in event:
      names.append(event)

  # For the rest of the process, deaf after this.
  jax.monitoring.register_event_duration_secs_listener(listen)
  yield names
  watching = False


def test_masks_of_a_run(tmp_path):
  fields = dict(block=8, implementation="reference")
  attention = dict(
    layers=LAYERS, spatial_temporal=PROFILED, block_topk=dict(density=0.3, coarse="none"), **fields
  )
  config = model_config(
    dict(size="custom", width=12, depth=4, heads=2, patch=(1, 1, 1), attention=attention)
  )
  model = nnx.jit(lambda: VideoDiT(config, SHAPE, 3, nnx.Rngs(0)))()
  run = SampleConfig(steps=3, guidance=2.0, batch_size=2)
  graphdef, params = nnx.split(model)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), jax.device_get(params)
  )
  tables, recorder = model.tables(SHAPE), MaskRecorder()
  args = (params, model, jnp.array([0, 1, 2]), np.arange(3), 0, tables, SHAPE, run)
  step = compile_steps(make_step(graphdef, run, want_masks=True), params, model, tables, SHAPE, run)
  with compiled() as late:
    _, aux = sample(recorder.wrap(step, run.steps), *args, progress=False)
  assert not late  # what is timed as running does not compile
  assert all("mask" not in layers for one in aux for layers in one)  # no step's tables stay behind
  recorder.masks().save(tmp_path, pictures=2)
  read = load_masks(tmp_path / "masks.npz")
  np.testing.assert_array_equal(read.index, recorder.masks().index)
  assert read.index.shape == (3, 4)
  assert read.density.shape == (3, 4, 2) == realised_density(aux).shape
  for at in np.ndindex(3, 4):
    (density,) = read.tables[read.index[at]].check().density(4 * 6 * 6)
    np.testing.assert_allclose(np.broadcast_to(density, 2), read.density[at], rtol=1e-5)
  # Dense attention in the first step, then the tables that were measured; the others' are chosen
  # anew in every step and layer.
  assert read.index[0, 0] == read.index[0, 1] and (read.index[1] == read.index[2])[:2].all()
  assert (read.index[0] != read.index[1])[:2].all() and len(set(read.index[:, 2:].ravel())) == 6
  names = sorted(p.name for p in tmp_path.iterdir())
  assert names[0] == "density.png" and names[1] == "masks.npz" and 1 <= len(names[2:]) <= 2
  assert all(p.stat().st_size > 1000 for p in tmp_path.glob("*.png"))


def test_pictures_show_what_is_listed():
  tiles = np.random.default_rng(0).random((1, 3, 144, 144)) < 0.5
  mask = from_tiles(tiles, np.full(144, 8), 8, 8)
  run = RunMasks((mask,), np.zeros((1, 2), np.int32), np.zeros((1, 2, 3), np.float32))
  image = np.asarray(run.picture(0).axes[0].images[0].get_array())
  panel = 1 - image[2:74, 2:74, 0]  # two tiles a pixel
  np.testing.assert_allclose(panel, tiles[0, 0].reshape(72, 2, 72, 2).mean((1, 3)), atol=1e-6)
  assert image.shape[:2] == (2 * 76, 3 * 76)


@pytest.mark.parametrize("heads, layers, tiles", [(1, 1, 4), (1, 2, 100), (6, 3, 9)])
def test_what_is_written_on_pictures_lies_on_them(heads, layers, tiles):
  mask = from_tiles(np.ones((1, heads, tiles, tiles), bool), np.full(tiles, 8), 8, 8)
  run = RunMasks((mask,), np.zeros((3, layers), np.int32), np.ones((3, layers, heads), np.float32))
  for figure in (run.picture(2), density_picture(run.density)):
    figure.draw_without_rendering()
    box, bounds = figure.get_tightbbox().get_points(), figure.get_size_inches()
    assert (box > 0).all() and (box < bounds).all()
  assert ("all heads" in run.picture(0).axes[0].get_title()) == (heads == 1)
  axis, bar = figure.axes
  assert bar.get_ylabel() and all(float(tick).is_integer() for tick in axis.get_xticks())
