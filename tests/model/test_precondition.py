"""The preconditioner starts a model at the best linear prediction, at any t and on other grids."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from freqformer.grid.transforms import dct
from freqformer.model.architectures import model_config
from freqformer.model.dit import VideoDiT
from freqformer.model.precondition import SPACE_BINS, TIME_BINS, Preconditioner, measured_power
from tests.kernels.block_sparse.suite import relative_error

SHAPE = (4, 6, 5, 2)
_RNG = np.random.default_rng(0)
TABLE = tuple(
  tuple(row) for row in np.exp(_RNG.normal(0, 2, (2 * (TIME_BINS + 1), SPACE_BINS + 1)))
)


def _fields(power, count):
  """Draws latents whose DCT coefficients have this power, `[count, t, y, x, c]`."""
  x = _RNG.standard_normal((count, *power.shape)) * np.sqrt(power)
  for axis, n in enumerate(power.shape[:3], 1):
    x = np.moveaxis(np.tensordot(x, dct(n), (axis, 0)), -1, axis)
  return x


def _model(**changes):
  attention = {"method": "dense", "implementation": "xla"}
  values = {"size": "custom", "width": 24, "depth": 1, "heads": 2, "attention": attention}
  return model_config(values | {"patch": (2, 2, 2), "precondition": True} | changes)


@pytest.mark.parametrize("t", [0.0, 0.02, 0.4, 0.97, 1.0])
def test_a_new_model_is_the_best_linear_prediction(t):
  """By the covariance of all latents, without any transform."""
  model = VideoDiT(_model(spectrum=TABLE), SHAPE, 3, nnx.Rngs(0))
  tables = model.tables(SHAPE)
  power = np.asarray(tables["preconditioner"].power, np.float64)
  np.testing.assert_array_equal(power, Preconditioner.of(TABLE, SHAPE).power)
  basis = np.einsum("ai,bj,ck->abcijk", *(dct(n) for n in SHAPE[:3])).reshape(120, 120)
  covariance = np.einsum("kn,kc,km->cnm", basis, power.reshape(120, 2), basis)
  x = _RNG.standard_normal((2, *SHAPE))
  noisy = (1 - t) ** 2 * covariance + t**2 * np.eye(120)
  if t < 1:
    x = np.einsum("cnm,bmc->bnc", noisy, x.reshape(2, 120, 2)).reshape(x.shape)
  with_v = t * np.eye(120) - (1 - t) * covariance
  best = np.einsum("cnm,bmc->bnc", with_v @ np.linalg.inv(noisy), x.reshape(2, 120, 2))
  given = jnp.asarray(x, jnp.float32)
  velocity, _, _ = model(given, jnp.full(2, t), jnp.zeros(2, jnp.int32), tables)
  assert relative_error(velocity, best.reshape(x.shape)) < 2e-4


def test_the_transformer_sees_mean_square_one_and_adds_what_the_data_have():
  preconditioner = Preconditioner.of(TABLE, SHAPE)
  power = np.asarray(preconditioner.power, np.float64)
  clean = _fields(power, 400)
  noise = _RNG.standard_normal(clean.shape)
  for t in (0.0, 0.3, 0.9, 1.0):
    xt = jnp.asarray((1 - t) * clean + t * noise, jnp.float32)
    time = jnp.full(len(clean), t)
    assert np.mean(np.square(preconditioner.inputs(xt, time))) == pytest.approx(1, rel=0.1)
    # White output, and nothing else, has the power that the linear prediction leaves.
    output = jnp.asarray(_RNG.standard_normal(clean.shape), jnp.float32)
    added = preconditioner.velocity(0 * xt, output, time)
    left = (noise - clean) - np.asarray(preconditioner.velocity(xt, 0 * output, time))
    assert np.mean(np.square(added)) == pytest.approx(np.mean(left**2), rel=0.15)


def test_power_is_measured_by_frequency_and_interpolated_on_other_grids():
  power = np.asarray(Preconditioner.of(TABLE, (8, 16, 16, 2)).power, np.float64)
  table = measured_power(_fields(power, 60))
  assert np.shape(table) == np.shape(TABLE)
  found = np.asarray(Preconditioner.of(table, (8, 16, 16, 2)).power)
  # Rings and bins average over neighbours: compare where a bin has its own frequencies alone.
  assert relative_error(np.log(found[:, 0, 0]), np.log(power[:, 0, 0])) < 0.3
  larger = np.asarray(Preconditioner.of(table, (16, 32, 32, 2)).power)
  np.testing.assert_allclose(larger[::2, ::2, ::2], found, rtol=1e-5)
  white = measured_power(_RNG.standard_normal((200, *SHAPE)))
  assert np.log(white).std() < 0.15 and np.isfinite(white).all()
  np.testing.assert_array_equal(Preconditioner.of((), SHAPE).power, np.ones(SHAPE))


def test_borders_of_patches_are_damped_where_the_data_are_smooth():
  frequency = np.linspace(0, 1, SPACE_BINS + 1)
  smooth = (tuple(np.exp(-24 * frequency)),) * (TIME_BINS + 1)
  preconditioner = Preconditioner.of(smooth, (4, 16, 16, 1))
  patches = _RNG.standard_normal((8, 4, 4, 4, 1)).repeat(4, 2).repeat(4, 3)
  x = jnp.asarray(patches, jnp.float32)

  def seam(x):
    steps = np.abs(np.diff(np.asarray(x), axis=3)).mean((0, 1, 2, 4))
    border = np.arange(1, 16) % 4 == 0
    return steps[border].mean() / steps[~border].mean()

  assert seam(preconditioner.velocity(0 * x, x, jnp.full(8, 0.5))) < 1.5


def test_positions_start_silent_and_tell_tokens_apart():
  config = dataclasses.replace(_model(), positions=True, precondition=False)
  model = VideoDiT(config, SHAPE, 3, nnx.Rngs(0))
  places = model.tables(SHAPE)["places"]
  assert places.shape == (2 * 3 * 3, 24)
  assert len(np.unique(np.round(places, 4), axis=0)) == len(places)
  assert not model.position.kernel[...].any()


def test_a_given_frame_and_the_preconditioner_exclude_each_other():
  with pytest.raises(ValueError, match="mixes all frames"):
    _model(first_frame=True, patch=(1, 2, 2))
