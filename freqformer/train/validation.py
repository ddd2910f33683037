"""The validation loss, drawn so that every model and every moment of training is judged alike.

Each sample is seen at one timestep in every quarter of t. Its timesteps and noise depend on its
number only, whatever the batches are. Where the exact posterior mean is known, the loss is also
split into the Bayes risk, its distance from the velocity, and the regret, the model's from it.
"""

import functools
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from freqformer.diffusion.flow import BUCKETS, interpolate, linear_velocity, sample_noise
from freqformer.model.config import ModelConfig
from freqformer.placement import split_batch, whole

_SEED = 0


def make_eval_step(
  graphdef, *, soft: bool = False, buckets: int = BUCKETS, time_range: tuple = (0.0, 1.0)
):
  """Returns the jitted pass `(params, batch, power, tables, offset, reference) -> (sums, weight)`.

  `sums` has a leading axis of `buckets`, equal parts of the range of t; `weight` is what to divide
  them by. A batch is `{"latent": [b, t, y, x, c], "label": [b], "weight": [b]}`; `offset` is its
  first sample's number; `reference` is a `Posterior` or None. `soft` evaluates the soft mixture of
  branches instead of the hard choice.
  """

  @jax.jit
  def step(time_range, params, batch, power, tables, offset, reference=None):
    x0 = batch["latent"]
    weight = batch["weight"]
    key = jax.random.key(_SEED)
    model = nnx.merge(graphdef, params)
    index = offset + jnp.arange(x0.shape[0])
    place = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, 2 * i), (buckets,)))(
      index
    )

    def bucket(i):
      time = time_range[0] + (time_range[1] - time_range[0]) * (i + place[:, i]) / buckets
      noise = sample_noise(key, (2 * index + 1) * buckets + i, x0.shape[1:])
      xt, target = interpolate(x0, noise, time)
      velocity, _, aux = model(xt, time, batch["label"], tables, soft_evaluation=soft)

      def error(predicted, target=target):
        return (((predicted - target) ** 2).mean((1, 2, 3, 4)) * weight).sum()

      density = jnp.concatenate([run["density"].mean(-1) for run in aux])  # [layers, b]
      sums = {
        "loss": error(velocity),
        "linear": error(linear_velocity(xt, time, power)),
        "density": (density.mean(0) * weight).sum(),
      }
      if reference is not None:
        best = reference.velocity(xt, time, batch["label"])
        sums["regret"] = error(velocity, best)
        sums["bayes"] = error(best)
      if any("probs" in run for run in aux):
        sums |= _routing(model.config, aux, weight)
      return sums

    return whole((jax.lax.map(bucket, jnp.arange(buckets)), weight.sum()))

  return functools.partial(step, np.float32(time_range))


def _routing(config: ModelConfig, aux: list[dict], weight: jax.Array) -> dict[str, jax.Array]:
  """Returns sums over clips of probs and choices of routed layers, `[layers, heads, branches]`."""
  names = config.branches
  found = {"probs": [], "choice": []}
  for (_, method), run in zip(config.runs(), aux, strict=True):
    if "probs" not in run:
      continue
    hot = jax.nn.one_hot(run["choice"], run["probs"].shape[-1])
    for name, shares in (("probs", run["probs"]), ("choice", hot)):
      total = jnp.einsum("lbhr,b->lhr", shares, weight)
      if method.branches != names:  # a layer has zeros for the branches of other methods
        places = np.array([names.index(branch) for branch in method.branches])
        total = jnp.zeros((*total.shape[:2], len(names))).at[..., places].set(total)
      found[name].append(total)
  return {name: jnp.concatenate(parts) for name, parts in found.items()}


def evaluate(
  step,
  params,
  batches: Iterable[dict],
  power: np.ndarray,
  tables,
  should_stop: Callable[[], bool] = lambda: False,
  reference=None,
) -> dict | None:
  """Computes validation losses, overall and per quarter of t, and the routing.

  Args:
    step: of `make_eval_step`.
    power: `channel_power` of the validation latents, `[c]`, for the best linear prediction.
    should_stop: polled between batches; True gives up.
    reference: the `Posterior` of the validation latents, or None if it is not known.

  Returns:
    `loss`, `buckets` and `linear_buckets` (per quarter of t), `density`, overall and in
    `density_buckets`; with a reference `regret`, `regret_buckets` and `bayes_buckets`; and, where
    heads are routed, `probs` and `choice` `[layers, quarters, heads, branches]`. None if stopped.
  """
  total = None
  count = 0.0
  offset = 0
  for batch in batches:
    if should_stop():
      return None
    found = step(params, split_batch(batch), power, tables, offset, reference)
    sums, weight = jax.device_get(found)
    total = sums if total is None else jax.tree.map(np.add, total, sums)
    count += float(weight)
    offset += len(batch["label"])
  mean = jax.tree.map(lambda x: x / count, total)
  result = {
    "loss": float(mean["loss"].mean()),
    "buckets": mean["loss"].tolist(),
    "linear_buckets": mean["linear"].tolist(),
    "density": float(mean["density"].mean()),
    "density_buckets": mean["density"].tolist(),
  }
  if reference is not None:
    result["regret"] = float(mean["regret"].mean())
    result["regret_buckets"] = mean["regret"].tolist()
    result["bayes_buckets"] = mean["bayes"].tolist()
  for name in mean.keys() & {"probs", "choice"}:
    result[name] = mean[name].transpose(1, 0, 2, 3)  # quarters behind layers, as they are drawn
  return result


def some_latents(split, limit: int = 256) -> Iterator[np.ndarray]:
  """Yields normalised latents `[t, y, x, c]`, at most `limit`, spread evenly over a split."""
  count = min(len(split), limit)
  return (split[i * len(split) // count]["latent"] for i in range(count))


def channel_power(split, limit: int = 256) -> np.ndarray:
  """Returns the mean square `[c]` of the normalised latents, over at most `limit` of them."""
  found = [np.square(x).mean((0, 1, 2)) for x in some_latents(split, limit)]
  return np.mean(found, 0).astype(np.float32)
