"""The contract of the six kernel ops: what is named is used or refused, a choice is logged once."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from freqformer.kernels.around.lift import LIFT, Expansion, lift
from freqformer.kernels.around.prepare import PREPARE, prepare
from freqformer.kernels.block_sparse.api import ATTENTION, attention
from freqformer.kernels.block_sparse.table import dense_mask
from freqformer.kernels.core import op as op_module
from freqformer.kernels.core.op import NoImplementation, Op
from freqformer.kernels.core.target import Target
from freqformer.kernels.linear.api import LINEAR_ATTENTION, Segments, linear_attention
from freqformer.kernels.selection.block_scores import BLOCK_MASS, block_mass
from freqformer.kernels.selection.topk import TOP_K, top_ids

HOPPER = Target("cuda", "NVIDIA H100 80GB HBM3", "9.0")
AMPERE = Target("cuda", "NVIDIA A100-SXM4-80GB", "8.0")


@dataclasses.dataclass(frozen=True)
class Case:
  """One op.

  Attributes:
    op: its record.
    run: calls it on small zeros, with an implementation.
    fits: what `Op.choose` reads of a call that the Hopper kernels take.
    misfits: of one that they do not take.
    reasons: what they say of that one, in order.
  """

  op: Op
  run: Callable
  fits: tuple
  misfits: tuple
  reasons: tuple[str, ...]


def _zeros(*shape, dtype=jnp.bfloat16):
  return jnp.zeros(shape, dtype)


def _expansion(block, cells):
  ids = np.zeros(2, np.int32)
  return Expansion(np.zeros((1, block, cells), np.float32), ids, ids, front=2 * block)


def _table(block):
  return dense_mask(2 * block, 2 * block, block, block)


ROWS = np.array([64, 64], np.int32)
X = _zeros(1, 128, 2, 64)
ODD = _zeros(1, 80, 2, 48, dtype=jnp.float32)
SCORES = _zeros(2, 9, dtype=jnp.float32)
NORM = (jnp.ones(64), jnp.ones(64))
ANGLES = (_zeros(128, 32, dtype=jnp.float32),) * 2
WEIGHTS = jnp.ones((1, 2))

CASES = {
  "attention": Case(
    ATTENTION,
    lambda name: attention(X, X, X, _table(64), implementation=name),
    (X, X, X, _table(64)),
    (ODD, ODD, ODD, _table(40)),
    ("float32", "head_dim is 48", "block_q is 40", "block_kv is 40"),
  ),
  "linear attention": Case(
    LINEAR_ATTENTION,
    lambda name: linear_attention(X, X, X, implementation=name),
    (X, Segments.whole(128)),
    (ODD, Segments.of_ids(np.arange(80) % 4)),
    ("float32", "head_dim is 48", "a few rows only"),
  ),
  "block mass": Case(
    BLOCK_MASS,
    lambda name: block_mass(X, X, _zeros(1, 2, 128), ROWS, 64, implementation=name),
    (X, 64),
    (ODD, 40),
    ("float32", "head_dim 48", "tiles of 40 rows"),
  ),
  "top-k": Case(
    TOP_K,
    lambda name: top_ids(SCORES, 3, implementation=name),
    (SCORES,),
    (_zeros(1, 1 << 15),),
    ("bfloat16", "32768 candidates"),
  ),
  "prepare": Case(
    PREPARE,
    lambda name: prepare(
      _zeros(1, 128, 3, 2, 64), _zeros(3, 2, 64), NORM, ANGLES, ROWS, implementation=name
    ),
    (_zeros(1, 128, 3, 2, 64), ROWS, None),
    (_zeros(1, 80, 3, 2, 48, dtype=jnp.float32), ROWS, None),
    ("float32", "head_dim is 48", "40 rows"),
  ),
  "lift": Case(
    LIFT,
    lambda name: lift(_zeros(1, 256, 2, 64), WEIGHTS, WEIGHTS > 0, _expansion(64, 8), name),
    (_zeros(1, 256, 2, 64), _expansion(64, 8)),
    (_zeros(1, 160, 2, 48, dtype=jnp.float32), _expansion(40, 72)),
    ("float32", "head_dim is 48", "40 rows", "72 coarse tokens"),
  ),
}


@pytest.fixture(params=CASES)
def case(request):
  return CASES[request.param]


def test_every_op_is_here():
  """The record's name, and the definition: it runs every call."""
  for name, case in CASES.items():
    assert case.op.name == name
    assert getattr(case.op.definition, "unsupported", None) is None
    last = list(case.op.implementations)[-1]
    assert case.op.choose(*case.misfits, implementation=last, target=HOPPER) == last


def test_a_named_implementation_is_used(case, monkeypatch):
  """Its module's `forward` runs and no other's; a former name counts as the new one."""
  ran = []

  def spy(name, forward):
    def recorded(*operands, **settings):
      ran.append(name)
      return forward(*operands, **settings)

    return recorded

  definition = case.op.definition.forward
  for name in case.op.implementations:
    module = case.op.module(name)
    monkeypatch.setattr(module, "unsupported", lambda *_: None, raising=False)
    monkeypatch.setattr(module, "forward", spy(name, definition))
  for name in (*case.op.implementations, "pallas_mgpu"):
    ran.clear()
    case.run(name)
    assert ran == ["hopper" if name == "pallas_mgpu" else name]


@pytest.mark.parametrize("name", ["hopper", "pallas_mgpu"])
def test_a_named_implementation_is_refused_with_every_reason(case, name):
  words = f"no implementation of {case.op.name} .*hopper: .*cpu"
  with pytest.raises(NoImplementation, match=words):
    case.run(name)  # on this machine
  with pytest.raises(NoImplementation) as error:
    case.op.choose(*case.misfits, implementation=name, target=AMPERE)
  for reason in ("compute capability 9.0", "A100", *case.reasons):
    assert reason in str(error.value), reason


def test_an_unknown_implementation_is_refused_with_the_known_ones(case):
  known = ", ".join(case.op.implementations)
  words = f"implementation='hoper' is unknown; choose one of {known} or None .*mean 'hopper'"
  with pytest.raises(ValueError, match=words):
    case.run("hoper")


def test_a_choice_is_logged_once_with_what_was_passed_over(case, monkeypatch):
  lines = []
  monkeypatch.setattr(logging, "log", lambda _, form, *words: lines.append(form % words))
  op_module._log_choice.cache_clear()
  for _ in range(2):
    assert case.op.choose(*case.fits, target=HOPPER) == "hopper"
  assert lines == [f"{case.op.name} runs on implementation 'hopper' for {HOPPER}"]
  assert case.op.choose(*case.misfits, target=HOPPER) == "xla"
  assert len(lines) == 2 and all(reason in lines[1] for reason in ("'xla'", *case.reasons))
  case.op.choose(*case.fits, implementation="xla", target=HOPPER)
  assert len(lines) == 2  # what was named is no choice
