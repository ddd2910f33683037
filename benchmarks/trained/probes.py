"""Trained models of the study in conditions that they were not trained in: evaluation only.

A probe takes the checkpoint of a finished trial and returns results by setting. Every setting of a
probe sees the same clips, timesteps and noise, so that settings of a run are paired. Probes see 16
clips in every part of t, 128 draws, where the study's rows see 512.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.trained import attention_mass
from benchmarks.trained.runs import with_method
from benchmarks.trained.study import BUCKETS, judge
from benchmarks.trained.study_summary import middles
from freqformer.config import require_one_of
from freqformer.data.fields import Fields, FieldsConfig, spectra
from freqformer.data.loader import val_batches
from freqformer.data.sources import open_split
from freqformer.diffusion.flow import sample_noise
from freqformer.diffusion.posterior import Posterior
from freqformer.diffusion.sampling import SampleConfig
from freqformer.evaluate.draw import draw
from freqformer.evaluate.quality import artefacts, seam_ratio, spread
from freqformer.evaluate.restore import Run
from freqformer.grid.spectrum import level_mass
from freqformer.methods.base import Method
from freqformer.methods.dense import Dense
from freqformer.methods.freqformer import FreqFormer
from freqformer.methods.octaves import Octaves
from freqformer.methods.sliding_tile import SlidingTile
from freqformer.model.dit import VideoDiT
from freqformer.model.leaves import flatten
from freqformer.train.validation import channel_power, evaluate, make_eval_step

CLIPS = 16
THRESHOLDS = (0.0, 0.02, 0.05, 0.1, 0.2)
WINDOWS = ((3, 3, 3), (3, 5, 5))  # tiles: the window of the study's arms, and a larger one
_SAMPLING_STEPS = 24
_ORACLE_PARTS = 4  # of t
# A logit that decides, whatever the others are.
_DECIDED = 1e3
_BIAS = "router/bias"  # [layers, heads, branches]


@dataclasses.dataclass(frozen=True)
class Subject:
  """A finished trial.

  Attributes:
    arm: of the study.
    seed: of its training.
    digest: of its settings.
    workdir: its folder.
  """

  arm: str
  seed: int
  digest: str
  workdir: pathlib.Path


def subjects(folder: pathlib.Path) -> list[Subject]:
  """Returns the finished trials in a folder of the study's runs, by seed and arm."""
  found = []
  for workdir in folder.glob("*-seed*-*"):
    record = workdir / "run.json"
    if record.exists() and json.loads(record.read_text())["finished"]:
      arm, seed, digest = workdir.name.rsplit("-", 2)
      found.append(Subject(arm, int(seed.removeprefix("seed")), digest, workdir))
  return sorted(found, key=lambda subject: (subject.seed, subject.arm))


def method_of(run: Run) -> Method:
  """Returns the attention method of a run's layers, which is one."""
  ((_, method),) = run.model.config.runs()
  return method


# ---- other data ----------------------------------------------------------------------------------


def transfer(run: Run) -> dict[str, dict]:
  """Judges a run on other grids and motions; its rotary base and gain stay as they were trained.

  The regret is the distance from the exact posterior of those clips. A larger frame shows the same
  scene in more tokens: the fields' scale is half the height.
  """
  return {
    name: judge(run, data, clips=CLIPS, batch_size=2)
    for name, data in other_data(run.experiment.data).items()
  }


def other_data(data: FieldsConfig) -> dict[str, FieldsConfig]:
  """Returns the data of `transfer` by name."""
  t, y, x = data.grid
  return {
    "as trained": data,
    "2 x frames": dataclasses.replace(data, grid=(2 * t, y, x)),
    "1.5 x height, width": dataclasses.replace(data, grid=(t, 3 * y // 2, 3 * x // 2)),
    "velocities to twice": dataclasses.replace(data, speed=2 * data.speed),
  }


# ---- other attention -----------------------------------------------------------------------------


def threshold(run: Run) -> dict[str, dict]:
  """Judges a run of octaves with other thresholds below which a level is left out."""
  method = method_of(run)
  found = {}
  for value in THRESHOLDS:
    changed = dataclasses.replace(method, threshold=value, threshold_from=1.0)
    model = with_method(run, changed)
    found[f"{value:g}"] = judge(dataclasses.replace(run, model=model), clips=CLIPS)
  return found


def windows(run: Run) -> dict[str, dict]:
  """Judges a dense run whose attention is a window, weights as they are: is what it does local?"""
  found = {"all tokens": judge(run, clips=CLIPS)}
  for window in WINDOWS:
    method = SlidingTile(window=window, unit="tiles", border="clip")
    changed = dataclasses.replace(run, model=with_method(run, method))
    found["x".join(map(str, window)) + " tiles"] = judge(changed, clips=CLIPS)
  return found


def layers(run: Run) -> dict[str, dict]:
  """Judges a run whose layers' attention reaches the tokens no more, one layer at a time."""
  depth = leaf_of(run.params, "attention/out/kernel").shape[0]
  found = {"all layers": judge(run, clips=CLIPS)}
  for layer in range(depth):
    params = without_attention(run.params, layer)
    found[f"without {layer + 1}"] = judge(dataclasses.replace(run, params=params), clips=CLIPS)
  return found


def without_attention(params, layer: int):
  """Returns parameters of a model with one run of layers in which a layer's attention gives 0."""
  kernel = leaf_of(params, "attention/out/kernel")
  return with_leaf(params, kernel, kernel.at[layer].set(0))


STATISTICS = ("own", "mean", "another")


@dataclasses.dataclass(frozen=True)
class OtherStatistics(FreqFormer):
  """FreqFormer whose router reads other clips' energies; draws of a batch have t close together.

  Attributes:
    source: "own" energies, the "mean" of the batch, or those of "another" clip of it.
  """

  source: str = "own"

  def __post_init__(self):
    super().__post_init__()
    require_one_of(self, "source", STATISTICS)

  def energies(self, v, layout, tables):
    found = super().energies(v, layout, tables)
    # A head's own sum stays, so that the router's guard against log 0 weighs what it did.
    total = found.sum(-1, keepdims=True)
    if self.source == "mean":
      return (found / total).mean(0) * total
    if self.source == "another":
      return jnp.roll(found / total, 1, 0) * total
    return found


def statistics(run: Run) -> dict[str, dict]:
  """Judges a run of FreqFormer whose router is given the energies of other clips."""
  method = method_of(run)
  fields = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
  found = {}
  for source in STATISTICS:
    model = with_method(run, OtherStatistics(**fields, source=source))
    found[source] = judge(dataclasses.replace(run, model=model), clips=CLIPS, batch_size=CLIPS)
  return found


def oracle(run: Run) -> dict[str, dict]:
  """Forces one head at a time to each branch, by its router's bias.

  Half of the clips choose the best branch of a head and part of t, the other half tell what it
  gains, so that the best of several noisy numbers is no gain by itself. Choices of several heads
  are not combined.

  Returns:
    Under "heads": `routed` regret `[parts of t]`; `forced` `[layers, heads, branches, parts]`, both
    of the second half; `gain` `[parts]`, the mean over heads of routed minus chosen; and
    `best_gain`, that of the single head that gains most.
  """
  data = open_split(run.experiment.data, "val")
  step = make_eval_step(
    nnx.graphdef(run.model), buckets=_ORACLE_PARTS, time_range=run.experiment.train.time_range
  )
  tables = run.model.tables(run.latent_shape)
  power = channel_power(data)
  halves = list(val_batches(data, CLIPS // 2, limit=CLIPS))

  def regret(params) -> np.ndarray:
    """Returns the regret of both halves, `[2, parts]`."""
    found = []
    for number, batch in enumerate(halves):
      offset = number * CLIPS // 2
      sums, weight = step(params, batch, power, tables, offset, data.reference)
      found.append(np.asarray(sums["regret"] / weight))
    return np.stack(found)

  routed = regret(run.params)
  forced = np.stack([regret(params) for params in forced_routings(run.params)], 1)
  forced = forced.reshape(2, *leaf_of(run.params, _BIAS).shape, _ORACLE_PARTS)
  chosen = forced[0].argmin(2)
  judged = np.take_along_axis(forced[1], chosen[:, :, None], 2)[:, :, 0]
  gain = routed[1] - judged  # [layers, heads, parts]
  return {
    "heads": {
      "clips": CLIPS // 2,
      "regret_buckets": routed[1].tolist(),
      "forced": forced[1].tolist(),
      "gain": gain.mean((0, 1)).tolist(),
      "best_gain": float(gain.mean(-1).max()),
    }
  }


def forced_routings(params):
  """Yields parameters with one head forced to one branch: by layer, head and branch."""
  bias = leaf_of(params, _BIAS)
  for place in np.ndindex(*bias.shape):
    yield with_leaf(params, bias, bias.at[place].add(_DECIDED))


def leaf_of(params, name: str) -> jax.Array:
  """Returns the one leaf whose path ends so."""
  (found,) = (leaf for path, leaf in flatten(params).items() if path.endswith(name))
  return found


def with_leaf(params, old: jax.Array, new: jax.Array):
  """Returns parameters with another leaf in the place of `old`."""
  return jax.tree.map(lambda leaf: new if leaf is old else leaf, params)


# ---- dense attention -----------------------------------------------------------------------------


def mass(run: Run) -> dict[str, dict]:
  """Measures where a dense run's attention lies, and what it moves between bands.

  Returns:
    Results of the "trained" attention and of the "untrained" one that the run began with
    `[layers, heads, parts of t, shares]`, of the "wiener" filter `[parts of t, shares]`, the mean
    over the clips' velocities, and of "uniform" attention `[shares]`: `mass` by shell, of which
    `farthest` is the last distance in tokens, and `bands` by path, see `attention_mass`.
  """
  data = open_split(run.experiment.data, "val")
  model = with_method(run, attention_mass.Observed())
  training = run.experiment.train
  step = make_eval_step(nnx.graphdef(model), buckets=BUCKETS, time_range=training.time_range)
  tables = model.tables(run.latent_shape)
  power = channel_power(data)
  edges = attention_mass.shell_edges(data.config.grid)
  levels = len(edges) + 1

  def observed(params) -> dict:
    batches = val_batches(data, training.batch_size, limit=CLIPS)
    found = evaluate(step, params, batches, power, tables, reference=data.reference)
    shares = found["probs"].swapaxes(1, 2)
    return {
      "regret_buckets": found["regret_buckets"],
      "mass": shares[..., :levels].tolist(),
      "bands": shares[..., levels:].tolist(),
    }

  times = middles({"overrides": {"train.time_range": training.time_range}}, BUCKETS)
  every = spectra(data.config)
  arrays = model.config.layout(run.latent_shape).arrays()
  shell = attention_mass.shells(arrays.layout)
  pairs = np.bincount(shell[arrays.valid][:, arrays.valid].ravel())
  return {
    "trained": {"clips": CLIPS, **observed(run.params)},
    "untrained": {"clips": CLIPS, **observed(initial(run))},
    "wiener": {
      "mass": np.mean([level_mass(s, levels, times) for s in every], 0).tolist(),
      "bands": attention_mass.wiener_between_bands(every, times, arrays).tolist(),
    },
    "uniform": {
      "mass": (pairs / pairs.sum()).tolist(),
      "farthest": [*(math.ceil(edge) - 1 for edge in edges), max(data.config.grid) // 2],
    },
  }


def initial(run: Run) -> nnx.State:
  """Returns the parameters that a run began with."""
  rngs = nnx.Rngs(run.experiment.seed)
  return nnx.state(VideoDiT(run.model.config, run.latent_shape, len(run.class_names), rngs))


# ---- samples -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shortened(SampleConfig):
  """A sampler that ends at a clean estimate from `last`, below which a model was not trained.

  Attributes:
    last: t of the last velocity; the step from there goes to 0.
  """

  last: float = 0.0

  def times(self):
    """Returns the step boundaries `[steps + 1]`, from 1 down to `last`, then 0."""
    return np.append(np.linspace(1, self.last, self.steps), 0).astype(np.float32)


def samples(run: Run) -> dict[str, dict]:
  """Measures seams and flicker of samples, beside those that the exact velocity gives.

  The exact velocity begins with the same noise and takes the same steps: its figures are those of
  the sampler, whose last step goes from the lowest t of training to a clean estimate.
  """
  split = open_split(run.experiment.data, "val")
  last = run.experiment.train.time_range[0]
  config = Shortened(steps=_SAMPLING_STEPS, guidance=1.0, batch_size=CLIPS // 2, last=last)
  labels = np.zeros(CLIPS, np.int32)
  indices = np.arange(CLIPS, dtype=np.int32)
  drawn = draw(run, labels, indices, 0, config, progress=False)
  real = spread(split)
  found = {"model": _artefacts(run, drawn.latents, real)}
  if split.reference is not None:
    exact = exact_samples(split, split.reference, labels, indices, config)
    found["exact"] = _artefacts(run, exact, real)
  return found


def exact_samples(
  split: Fields, reference: Posterior, labels, indices, config: SampleConfig
) -> np.ndarray:
  """Draws latents as `sampling.sample` does with seed 0, by the exact velocity."""
  x = sample_noise(jax.random.key(0), jnp.asarray(indices), split.latent_shape)
  velocity = jax.jit(reference.velocity)
  times = config.times()
  for t, t_next in zip(times[:-1], times[1:], strict=True):
    x = x + (t_next - t) * velocity(x, jnp.full(len(labels), t), labels)
  return np.asarray(x)


def _artefacts(run: Run, latents: np.ndarray, real: np.ndarray) -> dict:
  """Returns seams and flicker, and seams of tiles of twice the extents (of the next level)."""
  config = run.model.config
  tile = config.layout(run.latent_shape).tile
  twice = [2 * extent * p for extent, p in zip(tile, config.patch, strict=True)]
  ratios = [None if np.isnan(ratio) else float(ratio) for ratio in seam_ratio(latents, twice)]
  return {"clips": len(latents), **artefacts(run, latents, real), "seam_ratio_twice": ratios}


# ---- which probe fits which run ------------------------------------------------------------------


def _any_run(run: Run) -> bool:
  return isinstance(run.experiment.data, FieldsConfig)


def _routed_of_known_regret(run: Run) -> bool:
  return method_of(run).routed and not run.experiment.data.copies


def _dense_of_known_spectrum(run: Run) -> bool:
  return isinstance(method_of(run), Dense) and not run.experiment.data.copies


def _weighed(run: Run) -> bool:
  method = method_of(run)
  return isinstance(method, Octaves) and method.router.mode == "soft"


def _reads_content(run: Run) -> bool:
  method = method_of(run)
  return isinstance(method, FreqFormer) and method.routed and method.router.statistics


@dataclasses.dataclass(frozen=True)
class Probe:
  """A probe and the runs that it says something about.

  Attributes:
    measure: from a run to results by setting.
    fits: whether a run can be measured.
  """

  measure: Callable[[Run], dict[str, dict]]
  fits: Callable[[Run], bool]


PROBES = {
  "transfer": Probe(transfer, _any_run),
  "layers": Probe(layers, _any_run),
  "windows": Probe(windows, _dense_of_known_spectrum),
  "threshold": Probe(threshold, _weighed),
  "statistics": Probe(statistics, _reads_content),
  "oracle": Probe(oracle, _routed_of_known_regret),
  "mass": Probe(mass, _dense_of_known_spectrum),
  "samples": Probe(samples, _any_run),
}
