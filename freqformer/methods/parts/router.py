"""The router: a distribution over a method's branches for each sample and head.

Evaluation takes the likeliest branch. Training runs in one of three ways:
  soft              every branch runs, outputs weighted by p: exact gradients, cost of all branches
  straight_through  every branch runs, weights onehot + p - sg(p): hard forward, gradients of soft
  sampled           one branch runs, drawn by Gumbel-max, output times 1 + p_c - sg(p_c): cheap,
                    *biased* (the gradient never sees the other branches' outputs)
  gates             for octaves: every branch runs, weighed by a gate of its own; they need not sum
                    to one
  random            one branch runs, drawn from the first distribution, also in evaluation: nothing
                    is learned; what a router must beat
"""

# choice: architecture, prior and schedules; the abstract of arXiv 2604.22808 gives only the inputs.

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from freqformer.config import ConfigError, require, require_one_of, with_numbers
from freqformer.grid.layout import TileLayout

MODES = ("soft", "straight_through", "sampled", "gates", "random")
ONE_BRANCH = ("sampled", "random")  # modes in which a training step runs one branch per head


@dataclasses.dataclass(frozen=True)
class RouterConfig:
  """Fields of the router.

  Attributes:
    mode: training mode, one of `MODES`.
    hidden: width of the router's two-layer network.
    statistics: also feed log energy fractions of each head's values (off: timestep and head only).
    prior: initial share of heads per branch; most heads local is what the evidence supports. Empty,
      where a method allows it: uniform.
    prior_slope: times (t - 1/2), added to the first branch's logit: more global at high noise. Of
      octaves the coarsest level's logit rises by it over the finest one's, others in between.
    temperature: of the softmax at the start and the end of training, geometric in between.
    budget: expected cost per head, relative to dense, above which the penalty starts.
    penalty: weight of the penalty `max(0, cost / budget - 1)`.
    noise: spread of the head-wise initial logits, so that heads can specialise.
    NUMBERS: fields that a method's tables bring, as arguments of compiled programs.
  """

  NUMBERS: ClassVar[tuple[str, ...]] = ("temperature", "budget", "penalty")

  mode: str = "soft"
  hidden: int = 64
  statistics: bool = True
  prior: tuple[float, ...] = (0.1, 0.3, 0.6)
  prior_slope: float = 1.0
  temperature: tuple[float, float] = (1.0, 0.3)
  budget: float = 0.2
  penalty: float = 0.1
  noise: float = 0.5

  def __post_init__(self):
    require_one_of(self, "mode", MODES)
    require(self, "prior temperature", above=0)
    require(self, "hidden", least=1)
    require(self, "penalty noise", least=0)
    require(self, "budget", above=0, most=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
  """The router's decision.

  Attributes:
    probs, weights: float32 `[b, h, branches]`; weights are factors of the branches' outputs.
    choice: int32 `[b, h]`, the branch that runs where only one does.
    all_branches: whether every branch must run; static.
  """

  probs: jax.Array
  choice: jax.Array
  weights: jax.Array
  all_branches: bool = dataclasses.field(metadata={"static": True})


class SpectralRouter(nnx.Module):
  """A shared two-layer network over heads with a learned bias per head; one per layer.

  Args:
    tilt: factor of `prior_slope` in each branch's logit; None: 1 in the first, 0 in the others.
  """

  def __init__(
    self,
    config: RouterConfig,
    heads: int,
    cond_dim: int,
    stats: int,
    rngs: nnx.Rngs,
    tilt: Sequence[float] | None = None,
  ):
    if tilt is None:
      tilt = np.eye(len(config.prior))[0]
    branches = len(tilt)
    prior = config.prior or (1.0,) * branches
    hidden = config.hidden
    self.config = config
    self.time = nnx.Linear(cond_dim, hidden, rngs=rngs)
    self.stats = nnx.Linear(stats, hidden, use_bias=False, rngs=rngs) if config.statistics else None
    self.head = nnx.Param(jax.random.normal(rngs.params(), (heads, hidden)))
    self.out = nnx.Linear(
      hidden, branches, use_bias=False, kernel_init=nnx.initializers.zeros_init(), rngs=rngs
    )
    prior = jnp.log(jnp.asarray(prior, jnp.float32) / sum(prior))
    self.bias = nnx.Param(
      prior + config.noise * jax.random.normal(rngs.params(), (heads, branches))
    )
    slope = config.prior_slope * jnp.asarray(tilt, jnp.float32)
    self.slope = nnx.Param(jnp.broadcast_to(slope, (heads, branches)))

  def logits(self, embedding: jax.Array, time: jax.Array, stats: jax.Array | None) -> jax.Array:
    """Computes `[b, h, branches]` from embedding `[b, cond_dim]`, time `[b]`, stats `[b, h, s]`."""
    x = self.time(embedding.astype(jnp.float32))[:, None] + self.head[...]
    if self.stats is not None:
      x = x + self.stats(jax.lax.stop_gradient(stats).astype(jnp.float32))
    return self.out(jax.nn.silu(x)) + self.bias[...] + self.slope[...] * (time[:, None, None] - 0.5)

  def __call__(self, cond, stats: jax.Array | None, numbers: Mapping) -> Routing:
    """Routes a batch.

    Args:
      cond: the layer's `Cond`.
      stats: `[b, h, stats]` or None.
      numbers: of the router's config.
    """
    logits = cond.share(self.logits(cond.embedding, cond.time, stats))
    return route(logits, with_numbers(self.config, numbers), cond)


def temperature(config: RouterConfig, progress) -> jax.Array:
  """Returns the temperature at a training progress in [0, 1], geometric from start to end."""
  start, end = jnp.log(jnp.asarray(config.temperature))
  return jnp.exp(start + (end - start) * jnp.clip(progress, 0, 1))


def probabilities(logits: jax.Array, config: RouterConfig, progress) -> jax.Array:
  """Returns the branches' distribution, or gates, of logits `[b, h, branches]`, float32."""
  logits = logits.astype(jnp.float32) / temperature(config, progress)
  return jax.nn.sigmoid(logits) if config.mode == "gates" else jax.nn.softmax(logits)


def route(logits: jax.Array, config: RouterConfig, cond) -> Routing:
  """Weighs branches by logits `[b, h, branches]`: as the mode says in training, hard otherwise."""
  logits = logits.astype(jnp.float32)
  if config.mode == "random":
    logits = jax.lax.stop_gradient(logits)
  branches = logits.shape[-1]
  probs = probabilities(logits, config, cond.progress)
  if cond.soft_evaluation or (cond.train and config.mode == "soft"):
    return Routing(probs, probs.argmax(-1).astype(jnp.int32), probs, True)
  choice = logits
  if config.mode == "random" or (cond.train and config.mode == "sampled"):
    # Evaluation has no key: its draws follow from the logits, which differ by layer and time.
    key = cond.rng if cond.train else jax.random.key(_bits(logits))
    choice = jnp.log(probs) + jax.random.gumbel(key, logits.shape, jnp.float32)
  choice = cond.share(jax.lax.stop_gradient(choice.argmax(-1)).astype(jnp.int32))
  hot = jax.nn.one_hot(choice, branches, dtype=jnp.float32)
  if not cond.train or config.mode == "random":
    return Routing(probs, choice, hot, False)
  frozen = jax.lax.stop_gradient(probs)
  if config.mode == "straight_through":
    return Routing(probs, choice, hot + probs - frozen, True)
  return Routing(probs, choice, hot * (1 + probs - frozen), False)


def _bits(x: jax.Array) -> jax.Array:
  """Returns a scalar uint32 that differs with the sum of a float32 array."""
  return jax.lax.bitcast_convert_type(x.sum(), jnp.uint32)


def penalty(config: RouterConfig, probs: jax.Array, costs) -> jax.Array:
  """Returns `penalty * max(0, cost / budget - 1)`; probs `[b, h, branches]`, costs `[branches]`."""
  expected = (probs.mean((0, 1)) * jnp.asarray(costs, jnp.float32)).sum()
  return config.penalty * jnp.maximum(0, expected / config.budget - 1)


def check_budget(config: RouterConfig, pairs: float, layout: TileLayout) -> None:
  """Raises ConfigError if a penalty asks for less than the cheapest branch costs.

  `pairs` are those of a head in that branch.
  """
  least = pairs / layout.n**2
  if config.penalty and config.budget < least:
    raise ConfigError(
      f"router.budget={config.budget} cannot be kept: the cheapest branch costs {least:.2g} of "
      f"dense attention on {layout.grid}; raise it, or set router.penalty=0."
    )


def entropy(probs: jax.Array) -> jax.Array:
  """Mean entropy of the distributions in nats; 0 = decided, log(branches) = undecided."""
  return -(probs * jnp.log(jnp.maximum(probs, 1e-9))).sum(-1).mean()
