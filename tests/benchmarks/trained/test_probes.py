"""Probes of trained models: other grids, thresholds, statistics, heads, samples, resuming."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import probes as command
from benchmarks.rows import Store
from benchmarks.trained import probes, study
from freqformer.data.fields import Fields, FieldsConfig
from freqformer.diffusion.posterior import Posterior
from freqformer.evaluate.restore import Run
from freqformer.grid.layout import TileLayout
from freqformer.methods.dense import Dense
from freqformer.methods.freqformer import FreqFormer
from freqformer.methods.octaves import Octaves
from freqformer.model.dit import VideoDiT
from freqformer.model.leaves import flatten
from freqformer.train.experiment import experiment

pytestmark = pytest.mark.xdist_group("study")
DATA = FieldsConfig(grid=(2, 8, 8), channels=4, val_clips=8)


def untrained(arm, frames=2):
  """A tiny run of an arm of the study: random weights, so that routing changes what comes out."""
  overrides = study.REHEARSAL.overrides | {"data.grid": (frames, 8, 8)}
  trial = study.Trial(dataclasses.replace(study.REHEARSAL, overrides=overrides), arm, 0)
  exp = experiment(trial.config())
  model = VideoDiT(exp.model, exp.latent_shape, 1, nnx.Rngs(0))
  noise = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: leaf + 0.3 * noise.standard_normal(leaf.shape).astype(np.float32), nnx.state(model)
  )
  record = {
    "latent_shape": list(exp.latent_shape),
    "class_names": ["field"],
    "step": 0,
    "statistics": {"mean": [0.0] * 4, "std": [1.0] * 4},
  }
  return Run(nnx.eval_shape(lambda: model), params, exp, record)


@pytest.fixture(scope="module")
def octaves():
  return untrained("low2")


def test_a_run_is_judged_on_another_grid(octaves, monkeypatch):
  """By that grid's own posterior; half of the clip's tokens are new, all rotary bases are old."""
  seen = []
  monkeypatch.setattr(probes, "judge", lambda run, data, **_: seen.append(data) or {})
  assert list(probes.transfer(octaves)) == list(probes.other_data(DATA))
  trained, longer, larger, faster = seen
  assert trained == DATA and longer.grid == (4, 8, 8) and larger.grid == (2, 12, 12)
  assert faster.speed == 2
  monkeypatch.undo()
  found = study.judge(octaves, longer, clips=4)
  assert found["clips"] == 4 and len(found["weights"]) == study.BUCKETS
  np.testing.assert_allclose(np.sum(found["weights"], 1), 1, rtol=1e-5)
  split = np.add(found["regret_buckets"], found["bayes_buckets"])
  # In expectation: the noise of the draw is not correlated with the model's error.
  np.testing.assert_allclose(found["buckets"], split, rtol=0.2)


def test_a_layer_without_attention(octaves, monkeypatch):
  seen = []
  monkeypatch.setattr(probes, "judge", lambda run, **_: seen.append(flatten(run.params)) or {})
  assert list(probes.layers(octaves)) == ["all layers", "without 1"]
  before, after = seen
  changed = {name for name in before if not np.array_equal(before[name], after[name])}
  assert changed == {"runs/0/attention/out/kernel"} and not after[changed.pop()].any()


def test_thresholds_leave_levels_out(octaves, monkeypatch):
  kept = []
  monkeypatch.setattr(probes, "judge", lambda run, **_: kept.append(probes.method_of(run)) or {})
  trained = probes.method_of(octaves)
  late = dataclasses.replace(trained, threshold=0.1, threshold_from=0.5)
  run = dataclasses.replace(octaves, model=probes.with_method(octaves, late))
  assert list(probes.threshold(run)) == ["0", "0.02", "0.05", "0.1", "0.2"]
  assert [method.threshold for method in kept] == list(probes.THRESHOLDS)
  assert {method.levels for method in kept} == {2}


def test_dense_runs_attend_in_windows(monkeypatch):
  run = untrained("dense")
  kept = []
  monkeypatch.setattr(probes, "judge", lambda run, **_: kept.append(run) or {})
  assert list(probes.windows(run)) == ["all tokens", "3x3x3 tiles", "3x5x5 tiles"]
  dense, *windows = (probes.method_of(found) for found in kept)
  assert isinstance(dense, Dense)
  fields = [(own.window, own.unit, own.border) for own in windows]
  assert fields == [(window, "tiles", "clip") for window in probes.WINDOWS]  # as the study's arms
  assert all(found.params is run.params for found in kept)


def test_statistics_of_other_clips():
  layout = TileLayout.fit((2, 8, 8), 8)
  v = jax.random.normal(jax.random.key(0), (3, layout.n_buffer, 2, 4))
  tables = FreqFormer().tables(layout)
  own, mean, another = (
    probes.OtherStatistics(source=source).energies(v, layout.arrays(), tables)
    for source in probes.STATISTICS
  )
  np.testing.assert_array_equal(own, FreqFormer().energies(v, layout.arrays(), tables))
  for found in (mean, another):
    np.testing.assert_allclose(found.sum(-1), own.sum(-1), rtol=1e-5)
  own, mean, another = (found / found.sum(-1, keepdims=True) for found in (own, mean, another))
  np.testing.assert_allclose(mean, np.broadcast_to(own.mean(0), mean.shape), rtol=1e-5)
  np.testing.assert_allclose(another, np.roll(own, 1, 0), rtol=1e-5)
  assert np.abs(own - mean).max() > 0.01
  with pytest.raises(ValueError, match="source='none' must be one of own, mean, another"):
    probes.OtherStatistics(source="none")


def test_the_oracle_chooses_on_other_clips_than_it_judges(monkeypatch):
  """Head 1 seems best in branch 2 and is worst there: forcing it does not count as a gain."""
  run = untrained("freqformer")
  bias = probes.leaf_of(run.params, "router/bias")
  assert bias.shape == (1, 2, 3)
  chosen = {0: [[0.0, -0.4, 0.0], [0.0, 0.0, -0.9]], 4: [[0.0, -0.2, 0.0], [0.0, 0.0, 0.6]]}
  asked = []

  def make_eval_step(graphdef, *, buckets, time_range):
    def step(params, batch, power, tables, offset, reference):
      change = probes.leaf_of(params, "router/bias") - bias
      forced = np.asarray(change[0] > 500)
      asked.append(forced)
      weight = batch["weight"].sum()
      value = 1 + (forced * np.array(chosen[offset])).sum()
      return {"regret": jnp.full(buckets, value * weight)}, weight

    return step

  monkeypatch.setattr(probes, "make_eval_step", make_eval_step)
  monkeypatch.setattr(probes, "CLIPS", 8)
  found = probes.oracle(run)["heads"]
  assert [int(forced.sum()) for forced in asked] == 2 * [0] + 12 * [1]
  np.testing.assert_allclose(found["regret_buckets"], np.ones(4))
  np.testing.assert_allclose(found["gain"], np.full(4, (0.2 - 0.6) / 2), rtol=1e-5)
  assert found["best_gain"] == pytest.approx(0.2, rel=1e-5)
  assert np.shape(found["forced"]) == (1, 2, 3, 4)


def test_dense_attention_is_measured_on_validation_draws(monkeypatch):
  run = untrained("dense")
  shares = np.random.default_rng(0).random((1, study.BUCKETS, 2, 3 + 4))
  seen = []
  judged = []

  def evaluate(step, params, batches, power, tables, reference):
    """Traces the step and returns layers' shares, as validation does."""
    batch = next(iter(batches))
    sums, _ = jax.eval_shape(step, params, batch, power, tables, 0, reference)
    seen.append(sums["probs"].shape)
    judged.append(params)
    return {"probs": shares, "regret_buckets": [0.5] * study.BUCKETS}

  monkeypatch.setattr(probes, "evaluate", evaluate)
  found = probes.mass(run)
  assert seen == [(study.BUCKETS, 1, 2, 3 + 4)] * 2
  # `untrained` adds noise to what a run of this seed begins with.
  trained, began = (probes.leaf_of(params, "attention/out/kernel") for params in judged)
  assert trained is probes.leaf_of(run.params, "attention/out/kernel")
  assert 0.2 < np.std(trained - began) < 0.4
  attention = found["trained"]
  np.testing.assert_array_equal(np.array(attention["mass"])[0, 1, 5], shares[0, 5, 1, :3])
  np.testing.assert_array_equal(np.array(attention["bands"])[0, 1, 5], shares[0, 5, 1, 3:])
  assert found["uniform"]["farthest"] == [1, 3, 4]
  # Of 2 x 8 x 8 tokens a query has 18, 80 and 30 in its shells.
  np.testing.assert_allclose(found["uniform"]["mass"], np.array([18, 80, 30]) / 128)
  theory = np.array(found["wiener"]["mass"])
  assert theory.shape == (study.BUCKETS, 3) and theory[0, 0] > 2 * theory[-1, 0]
  assert np.shape(found["wiener"]["bands"]) == (study.BUCKETS, 4)


def test_samples_end_where_training_did(monkeypatch):
  config = probes.Shortened(steps=3, last=0.4, batch_size=2)
  np.testing.assert_allclose(config.times(), [1, 0.7, 0.4, 0], rtol=1e-6)
  run = untrained("window", frames=4)
  real = probes.spread(Fields(run.experiment.data, "val"))
  # Within a tile columns differ by a tenth of what they differ by across its borders.
  seamed = np.repeat(real[:, :, :, ::2], 2, 3)
  seamed[:, :, :, 1::2] += 0.1 * (np.roll(real, -1, 3) - real)[:, :, :, 1::2]
  drawn = types.SimpleNamespace(latents=seamed)
  monkeypatch.setattr(probes, "draw", lambda *args, **_: drawn)
  found = probes.samples(run)
  assert found["model"]["seam_ratio"][2] > 5 and found["model"]["clips"] == 8
  # Eight clips of 8 x 8 tokens have seams of their own by chance, of a tenth or so.
  assert found["model"]["seam_ratio"][1] == pytest.approx(1, abs=0.15)
  assert found["model"]["seam_ratio_twice"][0] is None  # four frames are one tile of the next level
  assert found["exact"]["clips"] == probes.CLIPS
  # A clean estimate from t = 0 on, the default, is smoother than a clip, and as large.
  assert 0 < found["exact"]["flicker"] < 1.5
  np.testing.assert_allclose(found["exact"]["seam_ratio"][1:], 1, atol=0.15)


def test_the_exact_velocity_makes_samples_of_the_data():
  """White clips of variance 1 come out of white noise of variance 1 unchanged in size."""
  split = Fields(dataclasses.replace(DATA, slope=0.0), "val")
  config = probes.Shortened(steps=24, last=0.02)
  labels = np.zeros(4, np.int32)
  spectrum = Posterior(jnp.ones((1, 2, 8, 8)), labelled=False)
  found = probes.exact_samples(split, spectrum, labels, np.arange(4), config)
  assert found.shape == (4, 2, 8, 8, 4) and found.std() == pytest.approx(1, abs=0.05)


def test_probes_go_to_the_runs_that_they_fit(octaves):
  def fitting(run):
    return {name for name, probe in probes.PROBES.items() if probe.fits(run)}

  def of(method):
    model = types.SimpleNamespace(config=types.SimpleNamespace(runs=lambda: ((1, method),)))
    return dataclasses.replace(octaves, model=model)

  every = {"transfer", "samples", "layers"}
  assert fitting(octaves) == every | {"threshold", "oracle"}
  copies = dataclasses.replace(DATA, grid=(2, 16, 16), copies=1, target="velocity")
  planted = dataclasses.replace(octaves.experiment, data=copies)
  unknown = dataclasses.replace(octaves, experiment=planted)
  assert fitting(unknown) == every | {"threshold"}  # of a regret that is not known
  assert fitting(of(Dense())) == every | {"mass", "windows"}
  assert fitting(dataclasses.replace(of(Dense()), experiment=planted)) == every
  hard = dataclasses.replace(Octaves().router, mode="straight_through")
  assert fitting(of(Octaves(router=hard))) == every | {"oracle"}
  assert fitting(of(FreqFormer())) == every | {"statistics", "oracle"}
  blind = dataclasses.replace(FreqFormer().router, statistics=False)
  assert fitting(of(FreqFormer(router=blind))) == every | {"oracle"}
  assert fitting(of(FreqFormer(allocation=(1, 0, 1)))) == every


@pytest.fixture
def folder(tmp_path):
  """A finished run, one that is not, and something else."""
  for name, finished in (("low2-seed1-abcd", True), ("low2-seed0-abcd", False)):
    (tmp_path / name).mkdir()
    (tmp_path / name / "run.json").write_text(json.dumps({"finished": finished}))
  (tmp_path / "notes").mkdir()
  return tmp_path


def test_finished_runs_are_measured_once(folder, octaves, monkeypatch):
  (subject,) = probes.subjects(folder)
  assert (subject.arm, subject.seed, subject.digest) == ("low2", 1, "abcd")
  calls = []

  def measure(run):
    calls.append(run)
    return {"as trained": {"regret": 1 / 3}}

  monkeypatch.setattr(command, "load_run", lambda workdir: octaves)
  fake = {
    "transfer": probes.Probe(measure, lambda run: True),
    "oracle": probes.Probe(measure, lambda run: False),
  }
  monkeypatch.setattr(probes, "PROBES", fake)
  store = Store(folder / "rows.json", {"command": "test"})
  for _ in range(2):
    command.measure(subject, list(fake), store)
  (row,) = store.all()
  assert len(calls) == 1 and row["results"] == {"as trained": {"regret": 0.333333}}
  assert row["name"] == "transfer/low2/seed1"
  # The same arm and seed with other settings is another run.
  command.measure(dataclasses.replace(subject, digest="other"), ["transfer"], store)
  assert len(calls) == 2 and len(store.all()) == 1
