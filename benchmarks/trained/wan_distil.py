"""Routers and gates learned on a small pretrained model of Wan's shape, and what needs no learning.

  JAX_PLATFORMS=cpu python -m benchmarks.trained.wan_distil [--base_steps=400] [--passes=2]

A dense `WanDiT` (3 layers, 512 tokens in 64 tiles) is trained on moving Gaussian fields, whose
velocity is the text: nine fixed embeddings. Its weights then stay. Methods that can learn do so by
`train.distil`, from the nine prompts and the model's own trajectories; others run as they are. Two
figures say how near each is to the dense model, both for noise that no method saw:

* error: the mean over layers, heads and evaluations of the squared difference from dense
  attention's output over its square, on the dense model's trajectory.
* PSNR of the method's own samples against the dense model's, in decibels of latents, the peak being
  the range of the dense model's latents.

The first fifth of the evaluations is dense for all methods that allow it, as AdaSpa and measured
FreqFormer have it; error and density are those of the others. One seed, one small model.
"""

import dataclasses
import pathlib
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags, logging
from flax import nnx
from safetensors.numpy import load_file, save_file

from benchmarks.rows import write_rows
from benchmarks.trained.runs import ROOT, table
from freqformer.command import cli
from freqformer.data.fields import Fields, FieldsConfig
from freqformer.diffusion.flow import interpolate, sample_time
from freqformer.diffusion.sampling import SampleConfig, make_step, sample
from freqformer.evaluate.record_masks import realised_density
from freqformer.methods.base import Method
from freqformer.model.config import AttentionConfig
from freqformer.model.leaves import flatten, leaf_name
from freqformer.model.wan import WanConfig, WanDiT
from freqformer.simulation.output import number
from freqformer.train.distil import DistilConfig, beside_dense, distil

_NAME = "wan_distil"
FIELDS = FieldsConfig(grid=(8, 16, 16), labels="velocity")
SAMPLE = SampleConfig(
  steps=10, guidance=2.0, shift=3.0, sampler="unipc", levels="wan", batch_size=3
)
_WARM = 0.2
_SEED = 1000  # of the noise that methods are judged on
_BATCH = 4  # of the dense model's training
_DROPPED = 0.1  # share of samples trained without their text
# choice: as many keys as a window has, an eighth of all.
_BANDS = "window=(1, 3, 3), mid_tiles=8"
_ROUTER = "router=dict(prior=(1, 1, 1), prior_slope=0.0, noise=0.1, penalty=0.0)"
TRAINING_FREE = (
  "sliding_tile(window=(1, 3, 3), unit=tiles)",
  "adaspa(sparsity=0.86)",
  # On 64 tiles it lists more than it is asked for: this one is as dense as the others.
  "adaspa(sparsity=0.99)",
  "block_topk(density=0.14, coarse=none)",
  f"freqformer(allocation=measured, {_BANDS})",
)
LEARNING = (
  f"freqformer({_BANDS}, {_ROUTER})",
  "block_topk(density=0.125)",
  "sparse_linear(critical=0.14)",
)


def config_of(method: str) -> WanConfig:
  """Returns the small model's config under a method."""
  attention = AttentionConfig(
    (), method="dense", block=8, tile=(2, 2, 2), implementation="reference"
  )
  config = WanConfig(
    attention,
    width=64,
    depth=3,
    heads=2,
    mlp=128,
    text_width=16,
    text_length=4,
    frequencies=64,
    remat=False,
  )
  return config.with_method(method)


def model_of(config: WanConfig) -> WanDiT:
  """Returns the model without arrays."""
  return nnx.eval_shape(lambda: WanDiT(config, FIELDS.latent_shape, nnx.Rngs(0)))


def params_of(config: WanConfig, known: dict):
  """Returns parameters: those that are known by name, others as they begin."""
  fresh = nnx.state(nnx.jit(lambda: WanDiT(config, FIELDS.latent_shape, nnx.Rngs(0)))())
  return jax.tree_util.tree_map_with_path(
    lambda path, x: jnp.asarray(known.get(leaf_name(path), x)), fresh
  )


def texts() -> np.ndarray:
  """Returns an embedding for each velocity, float32 `[9, 4, 16]`."""
  shape = (len(FIELDS.class_names), 4, 16)
  return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def trained(steps: int, path: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the dense model's weights by name, from the file or trained, and written to it."""
  if path.exists():
    return load_file(path)
  config = config_of("dense")
  graphdef = nnx.graphdef(model_of(config))
  params = params_of(config, {})
  optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0, 3e-3, steps // 20, steps), b2=0.99)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optimizer)
  fields = Fields(FIELDS, "train")
  known = jnp.asarray(texts())

  @jax.jit
  def step(params, state, key, latent, label, posterior, tables):
    times, noises, drops = jax.random.split(key, 3)
    time = sample_time(times, len(latent), "uniform")
    noisy, _ = interpolate(latent, jax.random.normal(noises, latent.shape), time)
    wanted = posterior.velocity(noisy, time, label)
    dropped = jax.random.bernoulli(drops, _DROPPED, label.shape)[:, None, None]
    text = jnp.where(dropped, 0, known[label])

    def loss(params):
      velocity, _, _ = nnx.merge(graphdef, params)(noisy, time, text, tables)
      return jnp.mean((velocity - wanted) ** 2)

    value, gradients = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, value

  state = optimizer.init(params)
  tables = model_of(config).tables(FIELDS.latent_shape)
  losses = []
  for done in range(steps):
    clips = [fields[_BATCH * done + i] for i in range(_BATCH)]
    latent, label = (np.stack([clip[name] for clip in clips]) for name in ("latent", "label"))
    key = jax.random.key(done)
    params, state, value = step(params, state, key, latent, label, fields.target, tables)
    losses.append(value)
    if (done + 1) % 100 == 0:
      logging.info("step %d of the dense model: regret %.4f", done + 1, np.mean(losses[-100:]))
  found = {name: np.asarray(x) for name, x in flatten(params).items()}
  path.parent.mkdir(parents=True, exist_ok=True)
  save_file(found, path)
  return found


def sampled(config: WanConfig, known: dict) -> tuple[np.ndarray, list]:
  """Returns latents and the aux of every evaluation, of three prompts."""
  model = model_of(config)
  tables = model.tables(FIELDS.latent_shape)
  step = make_step(nnx.graphdef(model), SAMPLE)
  prompts = texts()[[1, 3, 8]]
  args = (step, params_of(config, known), model, prompts, range(3), _SEED, tables)
  return sample(*args, FIELDS.latent_shape, SAMPLE, progress=False)


def judged(method: str, known: dict, dense: np.ndarray) -> dict:
  """Returns error, density and PSNR of a method with the weights and leaves that are known."""
  first = int(_WARM * SAMPLE.steps + 0.5)
  config = config_of(method)
  own = config.runs()[0][1]
  warm = _warms(own) or own.refuses_dense(own.usual_phase) is None
  if warm and not _warms(own):
    config = config.with_schedule(f"dense_first={_WARM}")
  _, auxes = sampled(beside_dense(config_of(method)), known)
  error = np.mean([run["error"].mean() for aux in auxes[first:] for run in aux])
  latents, auxes = sampled(config, known)
  peak = dense.max() - dense.min()
  return {
    "method": method,
    "warm_up": _WARM if warm else 0.0,
    "density": float(realised_density(auxes)[first:].mean()),
    "error": float(error),
    "psnr": float(10 * np.log10(peak**2 / np.mean((latents - dense) ** 2))),
  }


def _warms(method: Method) -> bool:
  """Tells whether a method has dense evaluations of its own."""
  return method.phase(0, SAMPLE.steps) == "warmup"


def learned(method: str, base: dict, config: DistilConfig) -> dict:
  """Returns what a method learns, and facts."""
  beside = beside_dense(config_of(method))
  model = model_of(beside)
  # One sample at a time, as of a large model.
  alone = dataclasses.replace(SAMPLE, batch_size=1)
  params = params_of(beside, base)
  found = distil(model, params, texts(), FIELDS.latent_shape, alone, config)
  return found.leaves


def main(_):
  folder = ROOT / "runs" / f"{_NAME}-{_BASE_STEPS.value}"
  base = trained(_BASE_STEPS.value, folder / "base.safetensors")
  dense, _ = sampled(config_of("dense"), base)
  command = f"python -m benchmarks.trained.wan_distil --base_steps={_BASE_STEPS.value} "
  command += f"--passes={_PASSES.value}"
  rows = []

  def add(name: str, method: str, known: dict):
    rows.append({"name": name, **judged(method, known, dense)})
    write_rows(_NAME, rows[-1:], command)
    logging.info("%s: error %.4f, PSNR %.2f dB", name, rows[-1]["error"], rows[-1]["psnr"])

  for method in TRAINING_FREE:
    add(method, method, base)
  for method in LEARNING:
    add(f"{method}, untrained", method, base)
    own = learned(method, base, DistilConfig(passes=_PASSES.value))
    add(f"{method}, learned", method, base | own)
  columns = {
    "method": itemgetter("name"),
    "warm-up": number("warm_up", ".1f"),
    "density": number("density", ".3f"),
    "error": number("error", ".4f"),
    "PSNR": number("psnr", ".2f"),
  }
  print(table(rows, columns))


if __name__ == "__main__":
  _BASE_STEPS = flags.DEFINE_integer("base_steps", 400, "Steps of the dense model.", lower_bound=1)
  _PASSES = flags.DEFINE_integer("passes", 2, "How often each prompt is sampled.", lower_bound=1)
  cli.run(main)
