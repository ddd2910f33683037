"""Draws samples from a trained model, timed, with the attention that ran."""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Sequence

import numpy as np
from flax import nnx

from freqformer.config import ConfigError, did_you_mean, refusing
from freqformer.cost import Cost, sampling_cost
from freqformer.diffusion import sampling
from freqformer.diffusion.sampling import SampleConfig
from freqformer.evaluate.conditions import conditioned
from freqformer.evaluate.first_frame import first_frame_latent
from freqformer.evaluate.record_masks import MaskRecorder, RunMasks, realised_density
from freqformer.evaluate.resize import resized
from freqformer.evaluate.restore import Run
from freqformer.placement import multiple
from freqformer.train.experiment import check_guidance

FLOPS_ARE = (
  "the method's cost over the phases of the run, two forwards where guidance acts. Heads that "
  "choose while sampling are counted as expected, not as they chose: by a router's prior, and "
  "where heads are measured by the shares that cost() assumes. Density is what ran."
)
# choice: the most samples of one class whose numbers do not overlap with the next class's.
SAMPLES_PER_CLASS = 10_000
MAX_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Drawn:
  """Samples of one method.

  Attributes:
    run: the model that was sampled.
    config: how it was sampled.
    latents: `[n, t, y, x, c]`, normalised.
    density: `[evaluations, layers, heads]` of one sample, the first of the last batch.
    compile_seconds: near 0 if JAX's persistent cache had the program.
    run_seconds: of all samples.
    masks: the first sample's masks, if they were asked for.
  """

  run: Run
  config: SampleConfig
  latents: np.ndarray
  density: np.ndarray
  compile_seconds: float
  run_seconds: float
  masks: RunMasks | None = None

  @property
  def phases(self) -> list[tuple[str, ...]]:
    """The phase of each evaluation of the model, one name per run of layers."""
    return self.run.model.schedule(len(self.config.guided()))

  @functools.cached_property
  def cost(self) -> Cost:
    """FLOPs of one sample over all evaluations, two forwards where guidance acts."""
    return self._cost(self.run.model.config, self.phases)

  @functools.cached_property
  def dense(self) -> Cost:
    """`cost` of the same run with dense attention in every layer and evaluation."""
    phases = [("",) * len(step) for step in self.phases]
    return self._cost(self.run.model.config.with_method("dense"), phases)

  def _cost(self, model, phases) -> Cost:
    return sampling_cost(model, self.run.latent_shape, phases, self.config.guided())

  def figures(self) -> dict:
    """Returns times, FLOPs and density as plain JSON."""
    return {
      "compile_seconds": self.compile_seconds,
      "run_seconds": self.run_seconds,
      "seconds_per_sample": self.run_seconds / len(self.latents),
      "attention_flops_per_sample": self.cost.attention_flops,
      "total_flops_per_sample": self.cost.total,
      "evaluations": len(self.phases),
      "forwards": len(self.phases) + sum(self.config.guided()),
      "density_by_step": self.density.mean((1, 2)).tolist(),
    }


def requests(
  run: Run, classes: Sequence[str] | None, samples: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns label and number of each sample, int32 `[n]` both; a sample's noise is its number's.

  A number depends on the class and the place within it: asking for other classes changes none.
  None takes all classes that had training clips.

  Raises:
    ConfigError: a class is unknown, or there are more samples of a class than numbers.
  """
  names = run.class_names
  for name in classes or ():
    if name not in names:
      raise ConfigError(f"class {name!r} is not in this checkpoint; {did_you_mean(name, names)}")
  if not 1 <= samples <= SAMPLES_PER_CLASS:
    raise ConfigError(f"samples={samples} of a class must lie in 1..{SAMPLES_PER_CLASS:,}.")
  chosen = [names.index(name) for name in classes or run.trained_classes]
  labels = np.repeat(chosen, samples).astype(np.int32)
  places = np.tile(np.arange(samples), len(chosen))
  return labels, (labels * SAMPLES_PER_CLASS + places).astype(np.int32)


def split_classes(text: str, names: Sequence[str]) -> list[str]:
  """Returns the classes that a text with commas between them names.

  A name may have commas itself: what is longest is taken first. Parts that are no name are left as
  they are, for `requests` to refuse.
  """
  parts = text.split(",")
  found = []
  while parts:
    heads = (",".join(parts[:count]).strip() for count in range(len(parts), 0, -1))
    name = next((head for head in heads if head in names), parts[0].strip())
    del parts[: 1 + name.count(",")]
    if name:
      found.append(name)
  return found


def sample_config(run: Run, count: int, **given) -> SampleConfig:
  """Returns the run's own sampling settings for `count` samples, with the fields that are not None.

  Raises:
    ConfigError: a value is out of its bounds, or needs a class that was never trained.
  """
  base = run.experiment.sample
  given = {name: value for name, value in given.items() if value is not None}
  batch = multiple(min(base.batch_size, count))
  with refusing("sampling"):
    config = dataclasses.replace(base, **given, batch_size=batch)
    check_guidance(config, run.experiment.train, run.experiment.data.condition)
  return config


def draw(
  run: Run,
  labels,
  indices: np.ndarray,
  seed: int,
  config: SampleConfig,
  *,
  first_frame: np.ndarray | None = None,
  null=None,
  want_masks: bool = False,
  progress: bool = True,
) -> Drawn:
  """Samples latents; compiling and running are timed apart.

  Args:
    run: a `Run` or a `PretrainedRun`.
    labels: of `Run.inputs`, or as of `sampling.sample`.
    indices: int `[n]`: a sample's noise depends on (seed, index) only.
    first_frame: of `first_frame_latent`, with which every sample begins.
    null: as of `sampling.sample`.
    want_masks: record the first sample's masks; the seconds then include recording.

  Raises:
    ConfigError: the method's schedule does not fit the number of evaluations, or the seed is out of
      its bounds.
  """
  if not 0 <= seed <= MAX_SEED:
    raise ConfigError(f"seed={seed} must lie in 0..{MAX_SEED:,}: a random key has 32 bits.")
  model = run.model
  shape = run.latent_shape
  tables = model.tables(shape)
  clock = time.monotonic()
  step = _compiled(run, config, tables, first_frame, want_masks=want_masks)
  compile_seconds = time.monotonic() - clock
  recorder = MaskRecorder()
  if want_masks:
    step = recorder.wrap(step, len(config.guided()))
  clock = time.monotonic()
  args = (step, run.params, model, labels, indices, seed, tables, shape, config)
  latents, aux = sampling.sample(*args, progress, first_frame, null)
  run_seconds = time.monotonic() - clock
  masks = recorder.masks() if want_masks else None
  density = realised_density(aux)
  return Drawn(run, config, latents, density, compile_seconds, run_seconds, masks)


def attention_errors(
  run: Run, labels, index: int, seed: int, config: SampleConfig, null=None
) -> np.ndarray:
  """Returns how far attention is from dense attention on the same q, k and v.

  One sample is drawn under the run's method. In each layer dense attention runs beside it; the
  error is the norm of the difference over that of its output, before the output projection.

  Args:
    labels: of the sample, `[1, ...]`.
    index: of the sample.
    seed: of the noise, like what follows as of `draw`.

  Returns:
    float32 `[evaluations, layers]`, means over the halves of guidance.
  """
  tables = run.model.tables(run.latent_shape, with_dense=True)
  config = dataclasses.replace(config, batch_size=multiple(1))
  step = _compiled(run, config, tables, None, want_distance=True)
  args = (step, run.params, run.model, labels, [index], seed, tables, run.latent_shape, config)
  _, aux = sampling.sample(*args, progress=False, null=null)
  squares = [np.concatenate([part["distance"] for part in parts]) for parts in aux]
  return np.sqrt(np.stack(squares)).mean(-1)


def _compiled(run: Run, config: SampleConfig, tables, first_frame, **wants):
  """Returns the compiled step of a run, by noise where it has two models.

  Raises:
    ConfigError: one of two models guides and the other does not.
  """

  def compiled(config, params):
    step = sampling.make_step(
      nnx.graphdef(run.model), config, first_frame=first_frame is not None, **wants
    )
    args = (step, params, run.model, tables, run.latent_shape, config, first_frame)
    return sampling.compile_steps(*args)

  step = compiled(config, run.params)
  if run.low is None:
    return step
  low = step
  guidance = config.guidance if run.low.guidance is None else run.low.guidance
  if (guidance in (0, 1)) != (config.guidance in (0, 1)):
    raise ConfigError(
      f"guidance={config.guidance} at high and {guidance} at low noise: both transformers guide or "
      "none does; set both to 1, or to other numbers."
    )
  if guidance != config.guidance:
    low = compiled(dataclasses.replace(config, guidance=guidance), run.low.params)
  return sampling.by_noise((step, run.params), (low, run.low.params), run.low.boundary)


def sample(
  run: Run,
  classes: Sequence[str] | str | None = None,
  *,
  samples: int = 1,
  seed: int = 0,
  steps: int | None = None,
  guidance: float | None = None,
  sampler: str | None = None,
  guidance_interval: tuple[float, float] | None = None,
  guidance_rescale: float | None = None,
  frames: int | None = None,
  size: tuple[int, int] | None = None,
  rope: str = "trained",
  first_frame: str | pathlib.Path | np.ndarray | None = None,
  progress: bool = False,
) -> np.ndarray:
  """Samples videos of some classes, or for prompts.

  Args:
    run: of `load_run`.
    classes: names, or one name; None takes all classes. Of a run that is conditioned on embeddings
      they are prompts; None takes some validation clips.
    samples: videos per class or prompt.
    seed: of the noise.
    steps: denoising steps; None takes those of the run's config, as for the next four.
    guidance: guidance scale; 1 is none, 0 the null class alone.
    sampler: "euler", "heun", "dpm++2m" or "unipc".
    guidance_interval: lowest and highest t that are guided.
    guidance_rescale: share of the guided velocity whose spread is that of the conditional one.
    frames: length of the videos; None takes that of training.
    size: (rows, cols) of the videos in pixels; None takes that of training.
    rope: rule of rotary positions on a longer axis, "trained" or "ntk" (`rotary.longer_theta`).
    first_frame: picture that the videos begin with, a file or uint8 `[rows, cols, 3]`.
    progress: show a progress bar.

  Returns:
    Videos, uint8 `[classes * samples, t, y, x, 3]`, in the order of `classes`.

  Raises:
    ConfigError: a class is unknown, a number is out of its bounds, the model cannot have the size,
      or was not trained with first frames, or a run has no embedder for prompts.
  """
  classes = [classes] if isinstance(classes, str) else classes
  if run.experiment.data.condition == "embedding":
    run = conditioned(run, classes)
    classes = None
  labels, indices = requests(run, classes, samples)
  run = resized(run, frames, size, rope)
  config = sample_config(
    run,
    len(labels),
    steps=steps,
    guidance=guidance,
    sampler=sampler,
    guidance_interval=guidance_interval,
    guidance_rescale=guidance_rescale,
  )
  frame = None if first_frame is None else first_frame_latent(run, first_frame)
  drawn = draw(run, run.inputs(labels), indices, seed, config, first_frame=frame, progress=progress)
  return run.decode(drawn.latents)
