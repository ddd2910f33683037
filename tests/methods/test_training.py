"""A short training run of the smallest model with a method that other tests do not train."""

import jax
import numpy as np
from flax import nnx

from freqformer.config import numbers
from freqformer.model.architectures import model_config
from freqformer.model.dit import VideoDiT, make_tables
from freqformer.train.step import TrainConfig, init_state, make_train_step
from tests.tiny_config import get_config

SHAPE = (4, 4, 6, 4)
SPARSEFLOW = dict(
  schedule=dict(frames=(1, 2)),
  around=(1, 1),
  router=dict(mode="sampled", hidden=8, prior=(0.6, 0.4)),
)


def batch_of(seed: int, n: int = 4) -> dict:
  """Two classes of nearly constant clips, +2 and -2."""
  label = np.arange(n, dtype=np.int32) % 2
  noise = np.random.default_rng(seed).standard_normal((n, *SHAPE))
  x = 0.1 * noise + np.where(label, 2, -2)[:, None, None, None, None]
  return {"latent": x.astype(np.float32), "label": label}


def test_sparseflow_trains():
  config = get_config().model.to_dict()
  config["depth"] = 1
  # The reference backend compiles fastest; backends are held to it elsewhere.
  own = {"method": "sparseflow", "implementation": "reference", "sparseflow": SPARSEFLOW}
  config["attention"] = {"block": 8, **own}
  model = model_config(config)
  training = TrainConfig(steps=20, batch_size=4, lr=3e-3, warmup=3, ema=0.9)
  graphdef, params = nnx.split(VideoDiT(model, SHAPE, 2, nnx.Rngs(0)))
  state = init_state(params, training, 0)
  step = make_train_step(graphdef, training)
  tables = make_tables(model, SHAPE)
  losses = []
  for i in range(20):
    state, metrics = step(state, batch_of(i), tables, numbers(training))
    assert metrics["skipped"] == 0
    losses.append(float(metrics["loss"]))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
  assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5]), losses
