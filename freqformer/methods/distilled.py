"""A method that learns beside dense attention: its own leaves, layer by layer, and nothing else.

Every layer passes dense attention's output on. What the student would have given is compared with
it, so that each layer learns alone, from the inputs that it has in the dense model. Only routers,
gates and level weights learn: q, k and v are constants to them, no attention runs backward, and
nothing is kept between layers. No config names this method: `train.distil` puts it around another.
"""

import dataclasses
from collections.abc import Collection

import jax
import jax.numpy as jnp
from flax import nnx

from freqformer.methods.base import Method, attend, even_lists
from freqformer.methods.routed import RoutedMethod
from freqformer.tables.dense import dense

_LEAST_SQUARE = 1e-12  # choice: of a head's dense output, so that no error is divided by 0


@dataclasses.dataclass(frozen=True)
class Distilled(Method):
  """Dense attention, and a student that is compared with it.

  Its module, state, phases and branches are the student's, so that learned leaves have the names
  that they have in the student. What acts within the student's attention does not learn.

  Attributes:
    student: the method that learns, or that is only measured where it has no parameters.
  """

  student: Method

  @property
  def shares_state(self):
    return self.student.shares_state

  @property
  def usual_phase(self):
    return self.student.usual_phase

  @property
  def routed(self):
    return self.student.routed

  @property
  def trains_all_branches(self):
    return self.student.trains_all_branches

  @property
  def branches(self):
    return self.student.branches

  @property
  def branch_of_part(self):
    return self.student.branch_of_part

  def build(self, dims, layout, rngs):
    return self.student.build(dims, layout, rngs)

  def tables(self, layout):
    return {"dense": dense(layout), "student": self.student.tables(layout)}

  def init_state(self, batch, dims, layout):
    return self.student.init_state(batch, dims, layout)

  def phase(self, step, steps):
    return self.student.phase(step, steps)

  def check_run(self, steps):
    self.student.check_run(steps)

  def check_training(self, layout, heads):
    self.student.check_training(layout, heads)

  def __call__(self, module, qkv, cond, tables, state):
    """Returns dense attention's output, the student's state, and its aux.

    There, `error` `[b, h]` is the square of the student's difference from dense attention's output
    over the square of that output, summed over a head's tokens; in training of a router the mean of
    its branches' errors by their probabilities. `loss` is the mean error plus the student's own
    loss, a router's penalty. In training it has a gradient in the module alone.
    """
    passed_on, _ = attend(qkv, tables["dense"], cond)
    target = passed_on.astype(jnp.float32)
    valid = qkv.layout.valid[:, None, None]  # padding rows hold anything
    size = jnp.maximum(jnp.sum(target**2, (1, 3), where=valid), _LEAST_SQUARE)

    def error_of(out):
      return jnp.sum((out - target) ** 2, (1, 3), where=valid) / size

    def loss(module):
      if cond.train and isinstance(self.student, RoutedMethod) and self.student.routed:
        new = state
        error, aux = self._expected(module, qkv, cond, tables["student"], state, error_of)
      else:
        out, new, aux = self.student(module, qkv, cond, tables["student"], state)
        error = error_of(out)
      return aux["loss"] + error.mean(), (new, aux | {"error": error})

    if cond.train and module is not None:
      value, (new, aux) = _with_gradient(loss, module, self.student.within_attention)
    else:
      value, (new, aux) = loss(module)
    return passed_on, new, aux | {"loss": value}

  def _expected(self, module, qkv, cond, tables, state, error_of) -> tuple[jax.Array, dict]:
    """Returns the expected error `[b, h]` of a head that draws its branch, and the router's aux.

    Evaluation gives each head one branch. A mixture's error, soft or straight through, says little
    about that: it falls where branches err in different ways, however much each of them errs.
    """
    heads = qkv.q.shape[2]
    errors = []
    densities = []
    count = len(self.student.branches)
    for branch in range(count):
      allocation = tuple(heads * (branch == i) for i in range(count))
      alone = dataclasses.replace(self.student, allocation=allocation)
      out, _, aux = alone(module, qkv, cond, tables, state)
      errors.append(error_of(out))
      densities.append(aux["density"])
    routing = self.student.route(module, qkv, cond, tables)
    aux = self.student.aux(routing, jnp.stack(densities, -1), qkv, cond, tables)
    return jnp.sum(routing.probs * jnp.stack(errors, -1), -1), aux

  def pairs(self, layout, heads, allocation=None, phase=None):
    """Counts dense attention's pairs and the student's."""
    own = self.student.pairs(layout, heads, allocation, phase)
    return even_lists(layout, heads, layout.n**2) + own


def _with_gradient(loss, module: nnx.Module, fixed_names: Collection[str] = ()):
  """Returns `loss(module)` and its aux, with the gradient taken at once.

  Attributes of the module that are named as fixed get none.

  A backward pass through many layers would keep what each computed, such as all branches' outputs,
  or compute it again. Here value and gradient g are found together, and the result is
  `stop(value) + sum(stop(g) * (p - stop(p)))`: it has this value and, in the parameters p, this
  gradient, and what is kept of a layer has the size of its parameters.
  """

  def learns(path, variable):
    return isinstance(variable, nnx.Param) and path[0] not in fixed_names

  graphdef, params, rest = nnx.split(module, learns, ...)
  fixed, rest = jax.lax.stop_gradient((params, rest))

  def of_params(params):
    return loss(nnx.merge(graphdef, params, rest))

  (value, aux), gradients = jax.value_and_grad(of_params, has_aux=True)(fixed)
  value, aux, gradients = jax.lax.stop_gradient((value, aux, gradients))
  slopes = jax.tree.map(lambda g, p, at: jnp.sum(g * (p - at)), gradients, params, fixed)
  return value + sum(jax.tree.leaves(slopes)), aux
