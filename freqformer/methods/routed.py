"""Base of methods that give each head one branch: dealt by a router, or by fixed head counts."""

import dataclasses
import re
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from freqformer.config import with_numbers
from freqformer.cost import branch_costs
from freqformer.methods.allocation import check_counts, check_heads, deal_heads, head_shares
from freqformer.methods.base import Method
from freqformer.methods.parts.router import (
  ONE_BRANCH,
  RouterConfig,
  Routing,
  SpectralRouter,
  check_budget,
  entropy,
  penalty,
)

_PARTS = 3  # of a head's energy, which the router reads
_HEAD_DIM = 64  # at which branches are weighed against each other


@dataclasses.dataclass(frozen=True)
class RoutedMethod(Method):
  """Base of methods with branches; a subclass names them and runs what `route` decides.

  Its tables have an attribute `router`, the router's `numbers`.

  Attributes:
    allocation: "routed"; or head counts per branch for a fixed assignment, where "2,2,2" means
      (2, 2, 2), so that a command line can override one with the other; or another of
      `allocations`.
    router: for `allocation="routed"`.
    allocations: values of `allocation` other than head counts.
  """

  allocation: str | tuple[int, ...] = "routed"
  router: RouterConfig = RouterConfig()

  allocations: ClassVar[tuple[str, ...]] = ("routed",)

  def __post_init__(self):
    if isinstance(self.allocation, str) and re.fullmatch(r"\(?\d+(, ?\d+)*\)?", self.allocation):
      object.__setattr__(self, "allocation", tuple(map(int, re.findall(r"\d+", self.allocation))))
    branches = f"({', '.join(self.branches)})"
    if not isinstance(self.allocation, str):
      check_counts(self.allocation, self.branches)
    elif self.allocation not in self.allocations:
      words = ", ".join(f'"{word}"' for word in self.allocations)
      raise ValueError(
        f"{self.allocation=} must be {words} or {len(self.branches)} head counts {branches}."
      )
    if self.router.mode == "gates":
      raise ValueError('router mode "gates" gives no head to a branch; it is for octaves.')
    if len(self.router.prior) != len(self.branches):
      raise ValueError(
        f"router prior {self.router.prior} must have one share per branch {branches}."
      )

  @property
  def routed(self):
    return self.allocation == "routed"

  @property
  def trains_all_branches(self):
    return self.routed and self.router.mode not in ONE_BRANCH

  def shares(self, heads: int, allocation=None) -> np.ndarray:
    """Returns the share of heads per branch: as given, else the fixed one, else the router's prior.

    Raises:
      ConfigError: for invalid weights, or fixed head counts that are not those of `heads`.
    """
    if allocation is not None:
      return head_shares(allocation, self.branches)
    if isinstance(self.allocation, str):
      return head_shares(self.router.prior, self.branches)
    check_heads(self.allocation, heads)
    return head_shares(self.allocation, self.branches)

  def build(self, dims, layout, rngs):
    if not isinstance(self.allocation, str):
      check_heads(self.allocation, dims.heads)
    return RoutedModules(self, dims, rngs)

  def check_training(self, layout, heads):
    if self.routed:
      alone = np.eye(len(self.branches)) * heads
      costs = [self.pairs(layout, heads, tuple(counts)).pairs for counts in alone]
      check_budget(self.router, min(costs) / heads, layout)

  def energies(self, v: jax.Array, layout, tables) -> jax.Array:
    """Returns energies `[b, h, 3]` of values `[b, n_buffer, h, d]`, inputs of the router."""
    raise NotImplementedError

  @jax.named_scope("router")
  def route(self, module, qkv, cond, tables, choice=None) -> Routing:
    """Returns the router's decision, or each head's branch: fixed, or else `choice`, `[b, h]`."""
    b, _, h, _ = qkv.q.shape
    if self.routed:
      stats = None
      if self.router.statistics:
        energy = self.energies(jax.lax.stop_gradient(qkv.v), qkv.layout, tables).astype(jnp.float32)
        stats = jnp.log((energy + 1e-6) / (energy.sum(-1, keepdims=True) + _PARTS * 1e-6))
      routing = module.router(cond, stats, tables.router)
    else:
      branches = len(self.branches)
      if choice is None:
        choice = qkv.in_order(self._fixed_choice()[None])
      hot = jnp.broadcast_to(jax.nn.one_hot(choice, branches), (b, h, branches))
      routing = Routing(hot, jnp.broadcast_to(choice, (b, h)), hot, False)
    return dataclasses.replace(routing, choice=checkpoint_name(routing.choice, "routing"))

  def _fixed_choice(self) -> np.ndarray:
    """Returns the branch of each head of a fixed allocation, int32 `[h]`."""
    return np.repeat(np.arange(len(self.branches), dtype=np.int32), self.allocation)

  def head_order(self, layout, heads, devices):
    if isinstance(self.allocation, str):
      return None
    costs = branch_costs(self, layout, heads, _HEAD_DIM)
    return np.concatenate(deal_heads(costs[self._fixed_choice()], devices))

  def for_counting(self):
    """Returns the routed method in place of fixed head counts: its program has all parts."""
    if isinstance(self.allocation, str):
      return self
    return dataclasses.replace(self, allocation="routed")

  def aux(self, routing: Routing, density, qkv, cond, tables) -> dict:
    """Returns the layer's aux of `density` `[b, h, branches]`, router's entropy and penalty."""
    taken = jnp.take_along_axis(density, routing.choice[..., None], -1)[..., 0]
    run = density.sum(-1) if routing.all_branches else taken
    loss = jnp.float32(0)
    if self.routed and cond.train:
      costs = branch_costs(self, qkv.layout.layout, *qkv.q.shape[2:])
      loss = penalty(with_numbers(self.router, tables.router), routing.probs, costs)
    return {
      "density": taken,
      "cost": run.mean(),
      "loss": loss,
      "probs": routing.probs,
      "choice": routing.choice,
      "expected_density": (routing.probs * density).sum(-1),
      "entropy": entropy(routing.probs),
    }


class RoutedModules(nnx.Module):
  """The method's parameters: a router where heads are routed."""

  def __init__(self, method: RoutedMethod, dims, rngs):
    self.router = (
      SpectralRouter(method.router, dims.heads, dims.cond_dim, _PARTS, rngs)
      if method.routed
      else None
    )
