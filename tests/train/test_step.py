"""Training steps and validation: they learn, guard, and judge every model on the same draws."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from freqformer.config import ConfigError, numbers
from freqformer.diffusion.flow import give_first_frame, sample_noise
from freqformer.model.architectures import model_config
from freqformer.model.dit import VideoDiT, make_tables
from freqformer.train.diagnosis import _clause, first_not_finite
from freqformer.train.step import (
  SkippedSteps,
  TrainConfig,
  init_state,
  learning_rate,
  make_optimizer,
  make_train_step,
)
from freqformer.train.validation import evaluate, make_eval_step

# One worker: what the file prepares or compiles is then made once.
pytestmark = pytest.mark.xdist_group("training")

SHAPE = (2, 4, 4, 3)
ATTENTION = dict(method="freqformer", block=8, freqformer=dict(window=(1, 1, 1), mid_tiles=2))
ATTENTION["implementation"] = "reference"  # which compiles fastest
SIZES = dict(size="custom", width=24, depth=1, heads=2, patch=(1, 1, 1), remat=False)
MODEL = model_config(dict(SIZES, attention=ATTENTION))
NARROW = "sliding_tile(window=(1, 1, 1))"
TRAIN = TrainConfig(steps=100, batch_size=4, lr=3e-3, warmup=10, ema=0.9, label_dropout=0.1)


def batch_of(n=4, seed=0):
  """Two classes of constant clips, +2 and -2: separable, not zero-mean within a class."""
  label = np.arange(n, dtype=np.int32) % 2
  noise = 0.1 * np.random.default_rng(seed).standard_normal((n, *SHAPE), np.float32)
  latent = noise + np.where(label, 2, -2).astype(np.float32).reshape(-1, 1, 1, 1, 1)
  return {"latent": latent, "label": label, "weight": np.ones(n, np.float32)}


TABLES = make_tables(MODEL, SHAPE)
POWER = np.full(3, 4.01, np.float32)


@pytest.fixture(scope="module")
def model():
  """The graph and the parameters."""
  return nnx.split(nnx.jit(lambda: VideoDiT(MODEL, SHAPE, 2, nnx.Rngs(0)))())


@pytest.fixture(scope="module")
def step(model):
  """The compiled training step, `(state, batch) -> (state, metrics)`."""
  step = make_train_step(model[0], TRAIN)
  return lambda state, batch: step(state, batch, TABLES, numbers(TRAIN))


@pytest.fixture(scope="module")
def eval_step(model):
  return make_eval_step(model[0])


@pytest.fixture(scope="module")
def state(model):
  """The state before the first step, on the host."""
  return jax.device_get(init_state(model[1], TRAIN, 0))


@pytest.fixture(scope="module")
def trained(step, state):
  """The averaged parameters after the steps, the losses and the last metrics."""
  state = jax.tree.map(jnp.asarray, state)
  losses = []
  for i in range(TRAIN.steps):
    state, metrics = step(state, batch_of(seed=i))
    losses.append(float(metrics["loss"]))
  return state.ema, losses, metrics


def test_it_learns_more_than_a_linear_predictor(trained, eval_step):
  average, losses, metrics = trained
  assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:5])
  assert {"grad_norm", "lr", "density", "cost", "router_entropy"} <= metrics.keys()
  result = evaluate(eval_step, average, [batch_of(8, 999)], POWER, TABLES)
  assert np.shape(result["probs"]) == (1, 4, 2, 3) and len(result["buckets"]) == 4
  np.testing.assert_allclose(result["probs"].sum(-1), 1, rtol=1e-5)
  np.testing.assert_allclose(result["choice"].sum(-1), 1, rtol=1e-5)
  assert result["loss"] == pytest.approx(np.mean(result["buckets"]))
  assert (np.asarray(result["buckets"]) < result["linear_buckets"])[1:].all()


def test_embeddings_are_learned_and_their_absence_too():
  """Clips of +2 and -2 are told apart by a vector: at t = 1 nothing else tells."""
  size = 3
  sides = np.float32([[1, 1, 0], [0, -1, 1]])
  dense = model_config(dict(SIZES, attention=dict(ATTENTION, method="dense")))

  def create():
    return VideoDiT(dense, SHAPE, 0, nnx.Rngs(0), embedding=size)

  graphdef, params = nnx.split(nnx.jit(create)())
  nothing = np.array(params.label.nothing[...])
  train = dataclasses.replace(TRAIN, steps=200, lr=1e-2, label_dropout=0.3, batch_size=16)
  step = make_train_step(graphdef, train)
  tables = make_tables(dense, SHAPE)
  state = init_state(params, train, 0)
  for i in range(train.steps):
    batch = batch_of(16, seed=i)
    batch["label"] = sides[batch["label"]]
    state, _ = step(state, batch, tables, numbers(train))
  model = nnx.merge(graphdef, state.params)
  label = np.concatenate([10 * sides, model.null(1)])
  noise = np.random.default_rng(0).standard_normal((1, *SHAPE), np.float32)
  velocity, *_ = nnx.jit(model)(noise.repeat(3, 0), np.ones(3, np.float32), label, tables)
  first, second, unknown = np.asarray(velocity - noise).mean((1, 2, 3, 4))  # means of -x_0
  assert first > 1 and second < -1 and second + 0.5 < unknown < first - 0.5
  assert np.abs(model.label.nothing[...] - nothing).max() > 0.01


def test_validation_does_not_depend_on_batching_or_padding(trained, eval_step):
  """Two batches, against the sums of three others, two of which are padded with weight 0."""
  whole = batch_of(16)

  def part(chosen, weight):
    return {k: v[chosen] for k, v in whole.items()} | {"weight": np.float32(weight)}

  halves = [part(slice(8), [1] * 8), part(slice(8, 16), [1] * 8)]
  result = evaluate(eval_step, trained[0], halves, POWER, TABLES)
  parts = {
    0: part([0, 1, 2, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]),
    3: part(slice(3, 11), [1] * 8),
    11: part([11, 12, 13, 14, 15, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]),
  }
  sums = [eval_step(trained[0], own, POWER, TABLES, at)[0] for at, own in parts.items()]
  mean = jax.tree.map(lambda *own: sum(own) / 16, *sums)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  close(result["buckets"], mean["loss"])
  close(result["density"], mean["density"].mean())
  for name in ("probs", "choice"):
    close(result[name], mean[name].transpose(1, 0, 2, 3))
  assert evaluate(eval_step, trained[0], halves, POWER, TABLES, lambda: True) is None


def test_layers_of_several_methods_are_routed_each_in_its_own_branches():
  attention = dict(ATTENTION, layers=((0, 1, "freqformer"), (1, None, "sparseflow")))
  mixed = model_config(dict(SIZES, depth=2, attention=attention))
  graphdef, params = nnx.split(nnx.jit(lambda: VideoDiT(mixed, SHAPE, 2, nnx.Rngs(0)))())
  tables = make_tables(mixed, SHAPE)
  result = evaluate(make_eval_step(graphdef), params, [batch_of(2)], POWER, tables)
  assert mixed.branches == ("low", "mid", "high", "sparse", "linear")
  for name in ("probs", "choice"):
    bands, others = np.split(result[name].sum((1, 2)), [3], -1)
    np.testing.assert_allclose(bands.sum(-1), (8, 0), rtol=1e-5)  # quarters and heads
    np.testing.assert_allclose(others.sum(-1), (0, 8), rtol=1e-5)


def test_a_step_that_is_not_finite_changes_nothing_but_the_count(step, state):
  data = batch_of()
  bad = {**data, "latent": np.full_like(data["latent"], np.nan)}
  # Loss and gradients are finite, but what the optimizer makes of them is not.
  endless = jax.tree.map(
    lambda x: np.full_like(x, np.inf) if x.dtype == np.float32 else x, state.opt_state
  )
  for given, batch in ((dataclasses.replace(state, opt_state=endless), data), (state, bad)):
    after, metrics = step(jax.tree.map(jnp.asarray, given), batch)
    assert metrics["skipped"] == 1 and after.step == 1
    jax.tree.map(np.testing.assert_array_equal, dataclasses.replace(given, step=1), after)
  after, metrics = step(after, data)
  assert metrics["skipped"] == 0 and np.isfinite(metrics["loss"])


@pytest.mark.parametrize("log_every", [1, 3, 50])
def test_a_run_that_only_skips_is_stopped(log_every):
  """Ten in a row, wherever the checks fall; one step that works starts the count anew."""

  def stops_at(values, config=TRAIN):
    guard = SkippedSteps(config)
    for step, value in enumerate(values, 1):
      guard.add({"skipped": jnp.float32(value)})
      if step % log_every == 0 or step == len(values):
        guard.check(step)

  stops_at([0] + [1] * 9 + [0] + [1] * 9 + [0])
  with pytest.raises(
    ConfigError, match="steps 4 to 13 all had a loss, gradient or update that is not finite"
  ):
    stops_at([0, 1, 0] + [1] * 10 + [0])
  with pytest.raises(ConfigError, match="steps 2 to 4 all"):  # of a short run half
    stops_at([0, 1, 1, 1, 1], dataclasses.replace(TRAIN, steps=5))


@pytest.mark.parametrize(
  "changes, rates",
  [
    (dict(), {0: 3e-4, 5: 1.65e-3, 10: 3e-3, 100: 3e-4}),
    (dict(schedule="constant"), {0: 3e-4, 5: 1.65e-3, 10: 3e-3, 100: 3e-3}),
    (dict(schedule="trapezoid"), {0: 3e-4, 10: 3e-3, 80: 3e-3, 90: 1.5e-3, 100: 0}),
    (dict(schedule="trapezoid", steps=2), {0: 3e-3, 1: 3e-3}),
    (dict(warmup=1), {0: 3e-3, 1: 3e-3}),
    (dict(warmup=0), {0: 3e-3}),
    (dict(warmup=0, schedule="constant"), {0: 3e-3}),
    (dict(steps=8), {4: 3e-3}),  # warm-up is at most half of the run
  ],
)
def test_schedules(changes, rates):
  schedule = learning_rate(dataclasses.replace(TRAIN, **changes))
  assert {step: schedule(step) for step in rates} == pytest.approx(rates)


def test_the_average_follows_with_a_ramped_decay(step, state):
  """Step 0 leaves a part of 10 of what was, step 1 two parts of 11; both move the parameters."""
  states = [state]
  for _ in range(2):
    after, _ = step(jax.tree.map(jnp.asarray, states[-1]), batch_of())
    states.append(jax.device_get(after))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), states[-1].params, states[-2].params)
    assert max(jax.tree.leaves(moved)) > 1e-4

  def check(ema, last, first, old):
    np.testing.assert_allclose(ema, (2 * (old + 9 * first) / 10 + 9 * last) / 11, atol=1e-6)

  jax.tree.map(check, states[2].ema, states[2].params, states[1].params, state.params)


def test_the_loss_leaves_given_first_frames_out():
  """At zero velocity it is the mean square of the target, which the other draws decide as ever."""
  config = model_config(dict(SIZES, first_frame=True, attention=dict(ATTENTION, method="dense")))
  graphdef, params = nnx.split(VideoDiT(config, SHAPE, 2, nnx.Rngs(0)))
  batch = batch_of()
  key = jax.random.fold_in(jax.random.key(0), 0)
  noise = sample_noise(jax.random.split(key, 4)[1], jnp.arange(4), SHAPE)
  square = (noise - batch["latent"]) ** 2
  tables = make_tables(config, SHAPE)
  for share, want in ((0.0, square.mean()), (1.0, square[:, 1:].mean())):
    train = dataclasses.replace(TRAIN, first_frame=share)
    state = init_state(jax.tree.map(jnp.copy, params), train, 0)
    _, metrics = make_train_step(graphdef, train)(state, batch, tables, numbers(train))
    assert float(metrics["loss"]) == pytest.approx(float(want), rel=1e-5)
  given = jnp.array([True, False, True, True])
  xt = give_first_frame(noise, batch["latent"], given)
  np.testing.assert_array_equal(xt[:, 1:], noise[:, 1:])
  np.testing.assert_array_equal(xt[given, 0], batch["latent"][np.asarray(given), 0])
  np.testing.assert_array_equal(xt[1], noise[1])


@pytest.mark.parametrize("first_frame, method", [(0.0, NARROW), (0.5, "dense")], ids=["0.0", "0.5"])
def test_micro_batches_make_the_update_of_the_whole_batch(first_frame, method):
  """Four draws in two halves; a plain mean would weigh first frames that are given too much.

  The first of the models learns from dense attention layer by layer.
  """
  config = model_config(
    dict(SIZES, first_frame=first_frame > 0, attention=dict(ATTENTION, method=method))
  )
  distill = float(method == NARROW)
  graphdef, params = nnx.split(nnx.jit(lambda: VideoDiT(config, SHAPE, 2, nnx.Rngs(0)))())
  found = []
  for accumulate in (1, 2):
    train = dataclasses.replace(
      TRAIN,
      first_frame=first_frame,
      accumulate=accumulate,
      clip=1e9,
      distill=distill,
      distill_at="layers",
    )
    state = init_state(jax.tree.map(jnp.copy, params), train, 0)
    step = make_train_step(graphdef, train)
    tables = make_tables(config, SHAPE, with_dense=True)
    found.append(step(state, batch_of(), tables, numbers(train)))
  (whole, metrics), (parts, of_parts) = found
  for name in ("loss", "distill_loss")[: 1 + bool(distill)]:
    assert 0 < metrics[name] == pytest.approx(float(of_parts[name]), rel=1e-5)
  norm = float(metrics["grad_norm"])
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5 * norm)
  jax.tree.map(close, parts.opt_state[1][0].mu, whole.opt_state[1][0].mu)
  assert parts.step == 1  # one update, and the average follows once
  wanted = jax.tree.map(lambda a, b: (a + 9 * b) / 10, params, parts.params)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), parts.ema, wanted)


@pytest.mark.parametrize(
  "settings, depth, want",
  [
    (dict(), 3, [(100, 0)]),
    (dict(dense_steps=10), 3, [(10, 3), (90, 0)]),
    (dict(dense_steps=10, dense_fall=5), 3, [(10, 3), (2, 2), (3, 1), (85, 0)]),
    (dict(dense_fall=6), 12, [(3, 8), (3, 4), (94, 0)]),
    (dict(dense_steps=97, dense_fall=8), 4, [(97, 4), (3, 2)]),
    (dict(dense_steps=200), 4, [(100, 4)]),
  ],
)
def test_stretches_of_dense_layers(settings, depth, want):
  train = dataclasses.replace(TRAIN, **settings)
  assert train.stages(depth) == want
  found = [train.dense_layers(step, depth) for step in range(100)]
  assert found == [layers for steps, layers in want for _ in range(steps)]


def test_frozen_layers_cannot_be_dense_for_now():
  with pytest.raises(ValueError, match="takes no part in layers that attend densely"):
    dataclasses.replace(TRAIN, freeze="backbone", init_from="any", dense_fall=1)


def test_batches_that_cannot_be_divided_are_refused():
  with pytest.raises(ValueError, match="batch_size=4 must be a multiple of accumulate=3"):
    dataclasses.replace(TRAIN, accumulate=3)


@pytest.mark.parametrize("broken, clause", [("layer", "is that of layer 1"), ("batch", "batch it")])
def test_what_is_not_finite_first_is_named(broken, clause):
  config = model_config(dict(SIZES, depth=2, attention=dict(ATTENTION, method="dense")))
  graphdef, params = nnx.split(nnx.jit(lambda: VideoDiT(config, SHAPE, 2, nnx.Rngs(0)))())
  batch = batch_of()
  if broken == "layer":  # its weights are finite, what comes out is not
    kernel = params["runs"][0]["mlp_out"]["kernel"]
    kernel[...] = kernel[...].at[1].set(3e38)
  else:
    batch["latent"][1] = np.nan
  state = dataclasses.replace(init_state(params, TRAIN, 0), step=1)
  tables = make_tables(config, SHAPE)
  found = first_not_finite(graphdef, TRAIN, state, batch, tables, numbers(TRAIN))
  assert clause in found


def test_gradients_are_looked_at_from_the_end():
  runs = {"runs/0/out/kernel": np.zeros(2, bool), "runs/1/out/kernel": np.zeros(1, bool)}
  bad = {"embed/kernel": False, **runs}
  found = {"batch": True, "params": {}, "layers": np.ones(3), "loss": True}

  def clause(gradients):
    return _clause(found | {"gradients": gradients}, VideoDiT.behind)

  assert clause(bad).endswith("way back, is of layer 2 (out/kernel)")
  assert clause(bad | {"final/bias": False}).endswith("is of final/bias")


def test_muon_moves_the_layers_matrices_alike_in_all_directions_and_leaves_the_rest_to_adamw(model):
  params = model[1]
  rng = np.random.default_rng(0)
  gradients = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), params)
  updates = {}
  for name in ("adamw", "muon"):
    config = dataclasses.replace(TRAIN, optimizer=name, weight_decay=0.0)
    optimizer = make_optimizer(config)
    # At the first step, Nesterov's momentum is half as large again as without.
    _, state = optimizer.update(gradients, optimizer.init(params), params)
    updates[name], _ = optimizer.update(gradients, state, params)
  matrices = 0
  for (path, muon), adamw in zip(
    jax.tree_util.tree_leaves_with_path(updates["muon"]),
    jax.tree.leaves(updates["adamw"]),
    strict=True,
  ):
    name = jax.tree_util.keystr(path)
    if "runs" in name and "kernel" in name and "method" not in name:
      sizes = np.linalg.svd(np.asarray(muon), compute_uv=False)
      assert sizes.min() > 0.4 * sizes.max() > 0, name
      matrices += 1
    else:
      # Optax gives these Nesterov's momentum, too.
      np.testing.assert_allclose(muon, adamw, rtol=0.2, err_msg=name)
  assert matrices == 5


def test_an_unknown_optimizer_is_refused():
  with pytest.raises(ValueError, match="optimizer='sgd' must be"):
    dataclasses.replace(TRAIN, optimizer="sgd")
