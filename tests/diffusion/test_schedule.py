"""`attention.schedule`: dense evaluations and layers of a sampling run, whatever the method."""

import dataclasses
import functools
import types

import jax
import numpy as np
import pytest
from flax import nnx

from freqformer.command.dry_run import describe
from freqformer.config import ConfigError
from freqformer.cost import model_cost, sampling_cost
from freqformer.diffusion.sampling import SampleConfig, make_step, sample
from freqformer.evaluate.draw import Drawn
from freqformer.evaluate.record_masks import realised_density
from freqformer.model.architectures import model_config
from freqformer.model.dit import VideoDiT
from freqformer.model.schedule import DenseSchedule
from freqformer.pages.cost import counted
from freqformer.train.experiment import experiment
from freqformer.train.resume import changes
from tests.command.test_fields import small

SHAPE = (2, 4, 4, 2)
SIZES = dict(size="custom", width=24, depth=3, heads=2, patch=(1, 1, 1))
STEPS = 5
SAMPLING = SampleConfig(steps=STEPS, guidance=1.0, batch_size=2)


def config_of(method, schedule=None, **attention):
  # The reference backend compiles fastest; backends are held to it elsewhere.
  attention = dict(block=8, tile=(1, 2, 2), implementation="reference", method=method) | attention
  return model_config(dict(SIZES, attention=attention | {"schedule": schedule or {}}))


@functools.cache
def drawn(method, schedule=None):
  """Returns latents and each evaluation's density `[layers, heads]` on weights that all share."""
  config = config_of(method, dict(schedule or ()))
  model = nnx.eval_shape(lambda: VideoDiT(config, SHAPE, 2, nnx.Rngs(0)))
  graphdef, params = nnx.split(model)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape, np.float32), params)
  step = make_step(graphdef, SAMPLING)
  args = ([0, 1], np.arange(2), 0, model.tables(SHAPE), SHAPE, SAMPLING)
  latents, aux = sample(step, params, model, *args, progress=False)
  return latents, realised_density(aux), model


def flops(model):
  return sampling_cost(model.config, SHAPE, model.schedule(STEPS), SAMPLING.guided())


def test_all_evaluations_dense_is_dense_attention():
  latents, density, model = drawn("sliding_tile(window=(1, 1, 1))", (("dense_first", 1.0),))
  dense, _, other = drawn("dense")
  np.testing.assert_array_equal(latents, dense)
  assert (density == 1).all() and flops(model) == flops(other)
  every = drawn("sliding_tile(window=(1, 1, 1))", (("dense_layers", (0, 1, -1)),))
  np.testing.assert_array_equal(every[0], dense)
  assert np.abs(drawn("sliding_tile(window=(1, 1, 1))")[0] - dense).max() > 1e-3


def test_ends_and_layers_are_dense_and_counted():
  """Density is what ran; FLOPs are the sum over evaluations and layers."""
  method = "sliding_tile(window=(1, 1, 1))"
  schedule = (
    ("dense_first", 0.2),
    ("dense_last", 0.01),
    ("dense_at", (0.5,)),
    ("dense_layers", (1,)),
  )
  _, density, model = drawn(method, schedule)
  assert [(row == 1).all() for row in density] == [True, False, True, False, True]
  assert [(row == 1).all(-1).tolist() for row in density[1::2]] == [[False, True, False]] * 2
  assert model.schedule(STEPS) == [("dense",) * 3, ("", "dense", "")] * 2 + [("dense",) * 3]
  dense = model_cost(config_of("dense"), SHAPE)
  got = flops(model)
  assert got.linear_flops == pytest.approx(STEPS * dense.linear_flops)
  assert got.attention_flops == pytest.approx(STEPS * dense.attention_flops * density.mean())
  # Training and validation are the method's own.
  assert model_cost(model.config, SHAPE) == model_cost(config_of(method), SHAPE)


def test_all_totals_of_a_run_are_the_sum_by_hand():
  """cost.json, --dry_run and a page that compares; guided and dense evaluations overlap."""
  config = small()
  config.model.update(dict(depth=3))
  config.model.attention.method = "sliding_tile"
  config.model.attention.sliding_tile = dict(window=(1, 1, 1))
  config.model.attention.schedule = dict(dense_first=0.5, dense_layers=(1,))
  config.sample.update(dict(steps=4, guidance=2.0, guidance_interval=(0.3, 0.9)))
  exp = experiment(config)
  assert exp.sample.guided() == [False, True, True, False]
  own, dense = (
    model_cost(exp.model.with_method(name), exp.latent_shape).total
    for name in ("sliding_tile", "dense")
  )
  wanted = 3 * dense + 3 * (2 * own + dense) / 3  # 1 + 2 forwards, then 2 + 1
  found = counted(exp)["sampling"]
  assert found["own"]["total_flops"] == pytest.approx(wanted)
  assert found["dense"]["total_flops"] == pytest.approx(6 * dense)
  assert f"in 4 evaluations, {wanted / (6 * dense):.1%} of the dense model's" in describe(exp)
  model = nnx.eval_shape(lambda: VideoDiT(exp.model, exp.latent_shape, 2, nnx.Rngs(0)))
  run = types.SimpleNamespace(model=model, latent_shape=exp.latent_shape)
  drawn = Drawn(run, exp.sample, None, None, 0.0, 0.0)
  assert drawn.cost.total == pytest.approx(wanted)
  assert drawn.dense.total == pytest.approx(6 * dense)


def test_what_a_method_remembers_goes_on_behind_dense_evaluations():
  """AdaSpa searches at evaluation 1; 2 is dense, 3 and 4 still run by what 1 found."""
  method = "adaspa(sparsity=0.5, search=(0.2,))"
  _, density, model = drawn(method, (("dense_at", (2,)),))
  phases = ["warmup", "search_first", "dense", "reuse", "reuse"]
  assert model.schedule(STEPS) == [(phase,) for phase in phases]
  # Lists that had been lost would be empty.
  np.testing.assert_allclose(density.mean((1, 2)), [1, 1, 1, 0.5, 0.5])


@pytest.mark.parametrize(
  "method, schedule, message",
  [
    ("radial", dict(dense_first=0.6, dense_last=0.5), "together more than the whole run"),
    ("radial", dict(dense_first=1.5), "dense_first=1.5 must be at least 0 and at most 1"),
    ("radial", dict(dense_at=(-1,)), "integers >= 0"),
    ("radial", dict(dense_at=(0, 5)), "names evaluation 5, but the run has 5"),
    ("radial", dict(dense_layers=(3,)), "no layer 3 in a model of 3 layers"),
    ("adaspa", dict(dense_first=0.5), "evaluation 1 of 5 dense, which AdaSpa .* searches there"),
    ("spatial_temporal", dict(dense_first=0.5), "SpatialTemporal cannot be: it measures heads"),
    ("sparse_linear", dict(dense_last=0.1), "evaluation 4 of 5 .* SparseLinear .* trained parts"),
    ("sparseflow", dict(dense_layers=(0,)), "evaluation 0 of 5 dense, which SparseFlow"),
    ("block_topk", dict(dense_first=0.1), "BlockTopK cannot be: trained parts"),
    ("freqformer(summary=2)", dict(dense_first=0.1), "FreqFormer cannot be: trained parts"),
  ],
)
def test_what_does_not_fit_is_refused(method, schedule, message):
  with pytest.raises(ConfigError, match=message):
    config_of(method, schedule).phases(STEPS)


def test_methods_that_have_a_dense_form():
  for method in ("dense", "block_topk(coarse=none)", "freqformer", "spatial_temporal"):
    config = config_of(method, dict(dense_last=0.2, dense_layers=(0,)))
    assert config.phases(STEPS)[-1] == ("dense", "dense")


def test_a_run_is_refused_before_data_are_read_and_may_change_it_later():
  config = small()
  config.model.attention.schedule = dict(dense_at=(100,))
  with pytest.raises(ConfigError, match="names evaluation 100"):
    experiment(config)
  config.model.attention.schedule = dict(dense_last=0.5)
  found = changes(experiment(small()), experiment(config))
  assert list(found) == ["model.attention.schedule.dense_last"]


def test_the_text_of_a_flag():
  config = config_of("radial", dict(dense_first=0.5))
  text = "dense_last=0.1, dense_at=(3, 0.5), dense_layers=(-1,)"
  schedule = config.with_schedule(text).attention.schedule
  assert schedule == DenseSchedule(dense_last=0.1, dense_at=(3, 0.5), dense_layers=(-1,))
  assert config.with_schedule("").attention.schedule == DenseSchedule()
  assert config.with_method("dense").attention.schedule == config.attention.schedule
  with pytest.raises(ConfigError, match="must read like dense_first=0.1"):
    config.with_schedule("0.1")
  with pytest.raises(ConfigError, match="did you mean 'dense_first'"):
    config.with_schedule("dense_frist=0.1")
  assert dataclasses.asdict(DenseSchedule()).keys() == {
    "dense_first",
    "dense_last",
    "dense_at",
    "dense_layers",
  }
