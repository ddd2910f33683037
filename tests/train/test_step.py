"""Training steps and validation as pure functions: they learn, they guard, they judge every model on the same draws."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from freqformer.config import ConfigError
from freqformer.model.config import model_config
from freqformer.model.dit import VideoDiT, make_tables
from freqformer.train.step import (
  SkippedSteps,
  TrainConfig,
  init_state,
  learning_rate,
  make_train_step,
)
from freqformer.train.validation import evaluate, make_eval_step

# One worker: what the file prepares or compiles is then made once.
pytestmark = pytest.mark.xdist_group("training")

SHAPE = (2, 4, 4, 3)
MODEL = model_config(
  dict(
    size="custom",
    width=24,
    depth=2,
    heads=2,
    patch=(1, 1, 1),
    attention=dict(method="freqformer", block=8, freqformer=dict(window=(1, 1, 1), mid_tiles=2)),
  )
)
TRAIN = TrainConfig(steps=200, batch_size=4, lr=3e-3, warmup=10, ema=0.9, label_dropout=0.1)


def batch_of(n=4, seed=0):
  """Two classes of constant clips, +2 and -2: separable, not zero-mean within a class."""
  label = np.arange(n) % 2
  x = (
    np.random.default_rng(seed).standard_normal((n, *SHAPE)) * 0.1
    + np.where(label, 2, -2)[:, None, None, None, None]
  )
  return {
    "latent": x.astype(np.float32),
    "label": label.astype(np.int32),
    "weight": np.ones(n, np.float32),
  }


@pytest.fixture(scope="module")
def trained():
  """A state after 200 steps, its graph and its metrics."""
  graphdef, params = nnx.split(VideoDiT(MODEL, SHAPE, 2, nnx.Rngs(0)))
  state, step, tables = (
    init_state(params, TRAIN, 0),
    make_train_step(graphdef, TRAIN, 2),
    make_tables(MODEL, SHAPE),
  )
  losses = []
  for i in range(200):
    data = batch_of(seed=i)
    state, metrics = step(state, {k: data[k] for k in ("latent", "label")}, tables)
    losses.append(float(metrics["loss"]))
  return graphdef, state, losses, metrics


def test_it_learns_more_than_a_linear_predictor(trained):
  graphdef, state, losses, metrics = trained
  assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:5])
  assert {
    "loss",
    "grad_norm",
    "lr",
    "density",
    "cost",
    "router_entropy",
    "expected_density",
  } <= metrics.keys()
  power = np.full(3, 4.01, np.float32)
  result = evaluate(
    make_eval_step(graphdef), state.ema, [batch_of(8, 999)], power, make_tables(MODEL, SHAPE)
  )
  assert np.shape(result["probs"]) == (2, 4, 2, 3) and len(result["buckets"]) == 4
  np.testing.assert_allclose(result["probs"].sum(-1), 1, rtol=1e-5)
  np.testing.assert_allclose(result["choice"].sum(-1), 1, rtol=1e-5)
  assert result["loss"] == pytest.approx(np.mean(result["buckets"]))
  assert all(
    a < b for a, b in zip(result["buckets"][1:], result["linear_buckets"][1:], strict=True)
  )


def test_validation_does_not_depend_on_batching_or_padding(trained):
  graphdef, state, *_ = trained
  step, tables, power = make_eval_step(graphdef), make_tables(MODEL, SHAPE), np.ones(3, np.float32)
  whole = batch_of(6)
  parts = [{k: v[i : i + 4] for k, v in whole.items()} for i in (0, 4)]
  parts[1] = {k: np.concatenate([v, v * 0]) for k, v in parts[1].items()}  # padded with weight 0
  a, b = (
    evaluate(step, state.ema, [whole], power, tables),
    evaluate(step, state.ema, parts, power, tables),
  )
  np.testing.assert_allclose(a["buckets"], b["buckets"], rtol=1e-4)
  assert evaluate(step, state.ema, parts, power, tables, should_stop=lambda: True) is None


def test_a_step_that_is_not_finite_changes_nothing_but_the_count():
  graphdef, params = nnx.split(VideoDiT(MODEL, SHAPE, 2, nnx.Rngs(0)))
  step, tables = make_train_step(graphdef, TRAIN, 2), make_tables(MODEL, SHAPE)
  data = {k: batch_of()[k] for k in ("latent", "label")}
  before = jax.device_get(init_state(params, TRAIN, 0))
  bad = {**data, "latent": np.full_like(data["latent"], np.nan)}
  # Loss and gradients are finite, but what the optimizer makes of them is not.
  endless = jax.tree.map(
    lambda x: np.full_like(x, np.inf) if x.dtype == np.float32 else x, before.opt_state
  )
  for given, batch in ((dataclasses.replace(before, opt_state=endless), data), (before, bad)):
    after, metrics = step(jax.tree.map(jnp.asarray, given), batch, tables)
    assert metrics["skipped"] == 1 and after.step == 1
    for a, b in zip(
      jax.tree.leaves((given.params, given.ema, given.opt_state)),
      jax.tree.leaves((after.params, after.ema, after.opt_state)),
      strict=True,
    ):
      np.testing.assert_array_equal(a, b)
  after, metrics = step(after, data, tables)
  assert metrics["skipped"] == 0 and np.isfinite(metrics["loss"])


@pytest.mark.parametrize("log_every", [1, 3, 50])
def test_a_run_that_only_skips_is_stopped(log_every):
  """Ten in a row, wherever they lie between two looks; one step that works starts the count anew."""

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


def test_schedules():
  rate = learning_rate(TRAIN)
  assert rate(0) == 0 and rate(10) == pytest.approx(3e-3) and rate(200) == pytest.approx(3e-4)
  flat = learning_rate(dataclasses.replace(TRAIN, schedule="constant"))
  assert flat(10) == flat(200) == pytest.approx(3e-3)
  assert [
    learning_rate(dataclasses.replace(TRAIN, warmup=0, schedule=s))(0)
    for s in ("constant", "cosine")
  ] == [3e-3] * 2
  short = dataclasses.replace(TRAIN, steps=8)
  assert short.warm_steps == 4 and learning_rate(short)(4) == pytest.approx(3e-3)


@pytest.mark.parametrize(
  "bad, message",
  [
    (dict(schedule="linear"), "schedule"),
    (dict(steps=0), "steps=0 must be at least 1"),
    (dict(ema=1.0), "ema=1.0 must be at least 0 and below 1"),
    (dict(clip=0.0), "clip"),
  ],
)
def test_refusals(bad, message):
  with pytest.raises(ValueError, match=message):
    TrainConfig(**{"steps": 1, "batch_size": 1, **bad})
