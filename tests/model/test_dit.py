"""The model: shapes, neutral start, remat, runs of layers, samples without neighbours."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from freqformer.config import ConfigError
from freqformer.cost import model_cost
from freqformer.diffusion.flow import interpolate, linear_velocity, sample_noise, sample_time
from freqformer.diffusion.sampling import SampleConfig, make_step, sample
from freqformer.model.architectures import model_config
from freqformer.model.dit import VideoDiT, make_tables, patchify, unpatchify

SHAPE = (3, 6, 5, 4)
BASE = dict(size="custom", width=24, depth=2, heads=2, patch=(1, 2, 2))
BASIS = dict(kind="block_dct", low=(0.5, 0.5, 0.5), mid=(0.75, 0.75, 0.75))


def config_of(method="freqformer", attention=(), router=(), **model):
  freqformer = dict(window=(1, 1, 1), mid_tiles=2, basis=BASIS, router=dict(router))
  # The reference backend compiles fastest; backends are held to it elsewhere.
  own = dict(method=method, block=8, implementation="reference", freqformer=freqformer)
  attention = own | dict(attention)
  return model_config({**BASE, "attention": attention, **model})


def model_of(config):
  """A model whose zero-initialised gates are open, so that every layer matters."""
  graphdef, params = nnx.split(VideoDiT(config, SHAPE, 3, nnx.Rngs(0)))
  keys = iter(jax.random.split(jax.random.key(1), 1000))

  def noisy(x):
    return x + 0.05 * jax.random.normal(next(keys), x.shape)

  return nnx.merge(graphdef, jax.tree.map(noisy, params))


def inputs(b=2):
  x = jnp.asarray(np.random.default_rng(0).standard_normal((b, *SHAPE)), jnp.float32)
  return x, jnp.linspace(0.1, 0.9, b), jnp.arange(b) % 3


@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 2), (2, 4, 3)])
def test_patchify_and_back(patch):
  x = inputs()[0]
  np.testing.assert_array_equal(unpatchify(patchify(x, patch), SHAPE, patch), x)


def test_starts_at_zero_velocity():
  model = VideoDiT(config_of(), SHAPE, 3, nnx.Rngs(0))
  velocity, _, aux = model(*inputs(), model.tables(SHAPE))
  assert velocity.shape == (2, *SHAPE) and not velocity.any()
  assert aux[0]["probs"].shape == (2, 2, 2, 3)


def test_gradients_equal_with_and_without_remat():
  """Also of heads that are dealt at random: what is computed again must not choose again.

  Of the policies that keep something, the one that keeps most stands for both.
  """
  grads = []
  kept = []  # numbers that the backward is given
  for policy in ("full", "attention", "products", None):
    remat = dict(remat=False) if policy is None else dict(remat_policy=policy)
    config = config_of(**remat, router=dict(mode="sampled"))
    graphdef, params = nnx.split(model_of(config))

    def loss(params, config=config, graphdef=graphdef):
      out, _, aux = nnx.merge(graphdef, params)(
        *inputs(), make_tables(config, SHAPE), train=True, rng=jax.random.key(3)
      )
      return (out**2).mean() + aux[0]["loss"].mean()

    if policy != "attention":
      grads.append(jax.jit(jax.grad(loss))(params))
    backward = jax.eval_shape(lambda params, loss=loss: jax.vjp(loss, params)[1], params)
    kept.append(sum(x.size for x in jax.tree.leaves(backward)))
  assert kept == sorted(set(kept))
  for found in grads[:-1]:
    # Some gradients are sums that nearly cancel.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, found, grads[-1])


def test_heads_are_dealt_alike_wherever_a_run_of_layers_is_cut():
  router = dict(mode="sampled", temperature=(50.0, 50.0))  # all branches equally likely
  config = config_of(depth=3, remat=False, router=router)
  model = model_of(config)
  tables = make_tables(config, SHAPE)
  found = []
  for first in (0, 1):
    model.config = config.with_dense_layers(first)
    phases = [""] * len(model.config.parts())  # cut there, and nothing is dense
    _, _, aux = model(*inputs(), tables, train=True, rng=jax.random.key(3), phases=phases)
    found.append(jnp.concatenate([part["choice"] for part in aux]))
  assert len(aux) == 2 and len({layer.tobytes() for layer in np.asarray(found[0])}) > 1
  np.testing.assert_array_equal(found[1], found[0])


def test_one_scan_per_run():
  """The program does not grow with depth."""

  def size(depth):
    def program(*args):
      return VideoDiT(config_of(depth=depth), SHAPE, 3, nnx.Rngs(0))(*args)[0]

    return len(str(jax.make_jaxpr(program)(*inputs(), make_tables(config_of(), SHAPE)).jaxpr))

  assert size(6) < 1.3 * size(2)


def test_any_other_grid_at_call_time():
  model = model_of(config_of())
  for shape in ((1, 1, 1, 4), (7, 3, 11, 4)):
    x = jnp.ones((1, *shape))
    out, _, _ = model(x, jnp.ones(1), jnp.zeros(1, jnp.int32), model.tables(shape))
    assert out.shape == x.shape and np.isfinite(out).all()


def test_a_given_first_frame_is_marked():
  """An embedding that begins at zero marks the first frame of the samples that have it."""
  model = VideoDiT(config_of("dense", first_frame=True), SHAPE, 3, nnx.Rngs(0))
  tables = model.tables(SHAPE)
  assert not model.first_frame[...].any()
  assert model_of(config_of("dense")).first_frame is None
  tokens = jnp.zeros((2, tables["layout"].layout.n, 24))
  model.first_frame[...] = jnp.arange(24.0)
  marked = model._marked(tokens, jnp.array([True, False]), tables["layout"].layout.grid)
  np.testing.assert_array_equal(marked[0, :9], jnp.broadcast_to(jnp.arange(24.0), (9, 24)))
  assert not marked[0, 9:].any() and not marked[1].any()
  model = model_of(config_of("dense", first_frame=True))
  without = model(*inputs(), tables)[0]
  moved = model(*inputs(), tables, given=jnp.array([True, False]))[0] - without
  assert np.abs(moved[0]).max() > 1e-4 and np.abs(moved[1]).max() < 1e-6


@pytest.mark.parametrize(
  "bad, message",
  [
    (dict(first_frame=True, patch=(3, 1, 1)), r"first_frame=True needs .* set patch=\(1, 1, 1\)"),
    (dict(attention=dict(layers=((0, 1, "dense"),))), "must cover layers 0..2"),
    (dict(attention=dict(layers=((1, 2, "dense"),))), "without gaps"),
    (dict(attention=dict(tiel=(1, 2, 2))), "did you mean 'tile'"),
    (dict(attention=dict(implementation="cudnn")), "implementation"),
    (dict(size="XL"), "must be one of S, B, L, custom"),
    (dict(heads=5), r"not divisible by 5 heads; heads may be \[1, 2, 3, 4, 6, 12\]"),
    (dict(dtype="float8"), "must be one of float32, bfloat16"),
  ],
)
def test_bad_config(bad, message):
  with pytest.raises(ConfigError, match=message):
    config_of(**bad)


def test_sizes():
  config = model_config(dict(size="B", attention=dict(method="dense")))
  assert (config.width, config.depth, config.heads, config.dims.head_dim) == (768, 12, 12, 64)


def test_noise_and_times():
  key = jax.random.key(0)
  alone = sample_noise(key, jnp.array([5]), (3, 2))
  together = sample_noise(key, jnp.array([4, 5, 6]), (3, 2))
  np.testing.assert_array_equal(alone[0], together[1])
  times = [sample_time(key, 4096, kind) for kind in ("uniform", "logit_normal")]
  for t in times:
    assert 0 < t.min() and t.max() < 1 and abs(float(t.mean()) - 0.5) < 0.01
  assert times[1].std() < 0.22 < times[0].std()


def test_linear_velocity_is_the_least_squares_fit():
  rng = np.random.default_rng(0)
  x0 = jnp.asarray(rng.standard_normal((4000, 1, 1, 1, 2)) * [0.5, 2.0], jnp.float32)
  noise = jnp.asarray(rng.standard_normal(x0.shape), jnp.float32)
  xt, target = interpolate(x0, noise, jnp.full(4000, 0.3))
  got = linear_velocity(xt, jnp.full(4000, 0.3), jnp.array([0.25, 4.0]))
  fit = (xt * target).sum(0) / (xt**2).sum(0) * xt
  np.testing.assert_allclose(got, fit, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_sample_is_the_same_alone_and_in_a_batch(guidance):
  model = model_of(config_of())
  graphdef, params = nnx.split(model)
  tables = model.tables(SHAPE)

  def draw(batch):
    config = SampleConfig(steps=3, guidance=guidance, batch_size=batch)
    step = make_step(graphdef, config)
    samples = (np.arange(3), np.arange(3), 7)  # labels, indices, seed
    return sample(step, params, model, *samples, tables, SHAPE, config, progress=False)[0]

  together = draw(2)  # the last batch is filled up
  # Not bit-equal: another batch size adds in another order in every step; samples are of size 1.
  np.testing.assert_allclose(draw(1), together, atol=1e-4)
  assert np.abs(together[0] - together[1]).max() > 0.1


def test_euler_integrates_a_straight_line():
  """The true velocity of x0 leads to x0 in one step: checks the sign and the direction of time."""

  class Straight(nnx.Module):
    def null(self, count):
      return np.full(count, 3, np.int32)

    def init_state(self, batch, shape, guided):
      return []

    def schedule(self, steps):
      return [()] * steps

    def __call__(self, x, time, label, tables, state, **_):
      return (x - 2.0) / time.reshape(-1, 1, 1, 1, 1), state, []

  graphdef, params = nnx.split(Straight())
  for steps in (1, 5):
    config = SampleConfig(steps=steps, guidance=1.0, batch_size=1)
    step = make_step(graphdef, config)
    out, _ = sample(step, params, Straight(), [0], [0], 0, {}, SHAPE, config, progress=False)
    np.testing.assert_allclose(out, 2.0, atol=1e-5)


def test_model_cost():
  """24 n D^2 FLOPs of the textbook (4 projections, MLP of ratio 4), plus 4 n^2 D of attention."""
  config = config_of("dense", patch=(1, 1, 1))
  cost = model_cost(config, SHAPE)
  n = 90
  width = 24
  assert cost.attention_flops == 2 * 4 * n**2 * width
  assert cost.linear_flops == 2 * (24 * n * width**2 + 12 * width**2) + 4 * n * width * 4


def test_methods_start_from_the_same_weights():
  """Everything that two methods share is bit-equal, whatever the router draws."""

  def weights(attention=(), **fields):
    config = config_of(attention={"qk_gain": 1.0, **dict(attention)}, **fields)
    model = VideoDiT(config, SHAPE, 3, nnx.Rngs(0))
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {path: np.asarray(x[...]) for path, x in flat}

  routed = weights()
  dense = weights(method="dense")
  shared = {path for path in routed if "method" not in path}
  assert shared == dense.keys() and len(routed) > len(dense)
  for path in shared:
    np.testing.assert_array_equal(routed[path], dense[path], err_msg=str(path))
  drawn = [path for path in shared if path[0] == "runs" and dense[path].std() > 0]
  assert len(drawn) >= 4  # qkv, out and the two of the MLP
  for path in drawn:
    assert (dense[path][0] != dense[path][1]).any()  # layers differ
  runs = weights(dict(layers=((0, 1, "dense"), (1, None, "freqformer"))))
  second = {path: x for path, x in runs.items() if path[:2] == ("runs", 1) and "method" not in path}
  assert len(second) == len([path for path in dense if path[0] == "runs"])
  for path, x in second.items():
    np.testing.assert_array_equal(x[0], dense["runs", 0, *path[2:]][1])
