"""Short training runs of the smallest model with any method."""

import jax
import numpy as np
from flax import nnx

from freqformer.model.config import model_config
from freqformer.model.dit import VideoDiT, make_tables
from freqformer.train.step import TrainConfig, init_state, make_train_step
from tests.tiny_config import get_config

SHAPE = (4, 4, 6, 4)


def batch_of(seed: int, n: int = 4) -> dict:
  """Two classes of nearly constant clips, +2 and -2."""
  label = np.arange(n, dtype=np.int32) % 2
  noise = np.random.default_rng(seed).standard_normal((n, *SHAPE))
  x = 0.1 * noise + np.where(label, 2, -2)[:, None, None, None, None]
  return {"latent": x.astype(np.float32), "label": label}


def train(model, steps: int):
  """Trains a model; returns its graphdef, the parameters before and after, and each loss."""
  config = TrainConfig(steps=steps, batch_size=4, lr=3e-3, warmup=3, ema=0.9)
  graphdef, params = nnx.split(VideoDiT(model, SHAPE, 2, nnx.Rngs(0)))
  before = jax.device_get(params)
  state = init_state(params, config, 0)
  step = make_train_step(graphdef, config, 2)
  tables = make_tables(model, SHAPE)
  losses = []
  for i in range(steps):
    state, metrics = step(state, batch_of(i), tables)
    assert metrics["skipped"] == 0
    losses.append(float(metrics["loss"]))
  return graphdef, before, jax.device_get(state.params), losses


def trains(name: str, fields: dict, steps: int = 20):
  """Trains `tests.tiny_config`'s model with one method; returns the parameters before and after.

  Every loss and parameter must be finite, and the mean loss of the last five steps below 0.9 of the
  first five's.
  """
  config = get_config().model.to_dict()
  config["attention"] = {"method": name, "block": 8, name: fields}
  _, before, after, losses = train(model_config(config), steps)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))
  assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5]), losses
  return before, after
