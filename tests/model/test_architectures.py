"""Models by name: made alike, called alike, trained and sampled by the same commands."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from freqformer.command.dry_run import describe
from freqformer.config import ConfigError
from freqformer.data.fields import FieldsConfig
from freqformer.diffusion import sampling
from freqformer.diffusion.sampling import SampleConfig
from freqformer.evaluate.draw import draw
from freqformer.evaluate.restore import load_run
from freqformer.model.architectures import ARCHITECTURES, make_model, model_config
from freqformer.model.wan import WanConfig, WanDiT
from freqformer.train.experiment import experiment
from freqformer.train.metrics import read
from freqformer.train.run import train
from freqformer.train.step import TrainConfig, make_gradients

SHAPE = (2, 4, 8, 4)
SIZES = dict(size="custom", width=24, depth=1, heads=2, patch=(1, 1, 1))
WAN = dict(architecture="wan", mlp=32, text_width=12, text_length=1, frequencies=16)
DENSE = dict(method="dense", block=16, tile=(1, 4, 4), implementation="reference")


def config_of(architecture, **changes):
  own = WAN if architecture == "wan" else {}
  return model_config({**SIZES, **own, "attention": DENSE, **changes})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("condition", [dict(classes=3), dict(embedding=5)])
def test_models_are_made_and_called_alike(architecture, condition):
  model = make_model(config_of(architecture), SHAPE, nnx.Rngs(0), **condition)
  null = model.null(2)
  assert null.shape == ((2, 5) if "embedding" in condition else (2,))
  label = jnp.asarray(np.random.default_rng(0).permutation(10)[:5] * np.ones((2, 1)), jnp.float32)
  label = label if "embedding" in condition else jnp.arange(2)
  params = nnx.state(model)
  # A training step would be compiled twice, once for each kind of type.
  assert not any(leaf.aval.weak_type for leaf in jax.tree.leaves(params))
  model = nnx.merge(nnx.graphdef(model), jax.tree.map(lambda x: x + 0.01, params))
  x = jnp.asarray(np.random.default_rng(1).standard_normal((2, *SHAPE)), jnp.float32)
  args = (x, jnp.full(2, 0.5))
  tables = model.tables(SHAPE)
  velocity = model(*args, label, tables)[0]
  assert velocity.shape == x.shape
  assert not np.allclose(velocity, model(*args, null, tables)[0], atol=1e-4)
  assert set(model.behind) <= {*params.keys(), "skip"}


@pytest.mark.parametrize(
  "values, words",
  [
    (dict(architecture="wam"), "config.model.architecture='wam'; did you mean 'wan'"),
    (dict(WAN, positions=True), "positions=True is of architecture 'dit'"),
    (dict(mlp=32), "config.model has no key 'mlp'"),
  ],
)
def test_what_belongs_to_another_architecture_is_refused(values, words):
  with pytest.raises(ConfigError, match=words):
    model_config({**SIZES, **values, "attention": DENSE})


def test_a_class_is_one_row_of_text():
  config = config_of("wan", text_length=4)
  with pytest.raises(ConfigError, match="text_length=4 must be 1"):
    make_model(config, SHAPE, nnx.Rngs(0), classes=3)
  texts = nnx.eval_shape(lambda: WanDiT(config, SHAPE, nnx.Rngs(0)))
  assert texts.null(2).shape == (2, 4, 12)


class TwoTexts(WanDiT):
  """A model of two texts, as one with two text encoders is: a row for all, and other rows."""

  def null(self, count):
    text = super().null(count)
    return {"all": text[:, 0], "rows": text[:, 1:]}

  def __call__(self, x, time, label, *args, **moment):
    text = jnp.concatenate([label["all"][:, None], label["rows"]], 1)
    return super().__call__(x, time, text, *args, **moment)


def opened(cls):
  model = cls(config_of("wan", text_length=3), SHAPE, nnx.Rngs(0))
  graphdef, params = nnx.split(model)
  return model, graphdef, jax.tree.map(lambda x: x + 0.01, params)


@pytest.mark.parametrize("negative", [False, True])
def test_what_conditions_may_be_several_arrays(negative):
  """Guided sampling and a training step take it apart by samples, and put the null in its place."""
  texts = np.random.default_rng(0).standard_normal((3, 3, 12)).astype(np.float32)
  apart = {"all": texts[:, 0], "rows": texts[:, 1:]}
  null = jax.tree.map(lambda x: x[2], (texts, apart)) if negative else (None, None)
  config = SampleConfig(steps=2, guidance=3.0, batch_size=2)
  trained = TrainConfig(steps=1, batch_size=3, label_dropout=0.5)
  found = []
  for cls, labels, own in zip((WanDiT, TwoTexts), (texts, apart), null, strict=True):
    model, graphdef, params = opened(cls)
    tables = model.tables(SHAPE)
    step = sampling.make_step(graphdef, config)
    args = (step, params, model, labels, np.arange(3), 0, tables, SHAPE, config, False, None)
    latents, _ = sampling.sample(*args, null=own)
    batch = {"latent": latents, "label": labels}
    key = jax.random.key(1)
    gradients = jax.jit(make_gradients(graphdef, trained), static_argnums=4)
    _, grads = gradients(params, key, batch, tables, trained, None, 0.0)
    found.append(jax.tree.leaves((latents, grads)))
  for one, other in zip(*found, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_labels_have_a_row_for_each_sample():
  with pytest.raises(ValueError, match=r"labels have \[2, 3\] rows"):
    sampling.count_rows({"all": np.zeros(2), "rows": np.zeros((3, 4))})


def test_a_wan_model_is_trained_described_and_sampled_like_others(tmp_path):
  data = dict(source="fields", grid=SHAPE[:3], channels=4, val_clips=4, labels="velocity")
  config = ConfigDict(dict(data=data, seed=0))
  config.model = dict(SIZES, **WAN, attention=DENSE)
  config.train = dict(
    steps=2, batch_size=2, warmup=0, log_every=1, val_every=2, val_batches=1, checkpoint_every=9
  )
  config.sample = dict(steps=2, guidance=2.0, batch_size=2)
  exp = experiment(config)
  assert isinstance(exp.model, WanConfig) and isinstance(exp.data, FieldsConfig)
  text = describe(exp)
  assert "1 Dense; width 24, 2 heads" in text
  train(config, tmp_path)
  losses = [row["loss"] for row in read(tmp_path / "metrics.jsonl") if row["kind"] == "train"]
  assert len(losses) == 2 and np.isfinite(losses).all()
  run = load_run(tmp_path, method="block_topk(density=1.0, coarse=none)")
  assert isinstance(run.model, WanDiT)
  drawn = [
    draw(own, np.array([1, 2]), np.arange(2), 0, exp.sample, progress=False).latents
    for own in (run, load_run(tmp_path))
  ]
  np.testing.assert_allclose(drawn[0], drawn[1], atol=1e-4)
