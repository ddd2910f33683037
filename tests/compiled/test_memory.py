"""Temporary memory on an H100, from compiles without one: ceilings for attention and training.

`python -m tests.golden memory --write` measures `tests/golden/memory.json` anew.
"""

import functools
import re

import pytest

from tests import golden
from tests.compiled.memory_cases import CASES, HEADS, LARGE

# One worker: a program that the file compiles is then compiled once.
pytestmark = pytest.mark.xdist_group("memory")

SLACK = 0.1
KB = 1024


@functools.cache
def _compiled(name):
  return CASES[name].compile()


def test_every_case_has_its_golden_number():
  assert set(golden.read("memory")) == set(CASES), "run python -m tests.golden memory --write"


@pytest.mark.parametrize("name", CASES)
def test_temporary_bytes_stay_where_they_were(name):
  found = _compiled(name).temp_bytes
  known = golden.read("memory")[name]
  change = found / known - 1
  assert abs(change) <= SLACK, (
    f"temporary bytes of {name} moved by {change:+.0%}, {known:,} -> {found:,}; if meant: "
    "python -m tests.golden memory --write"
  )


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("attention")])
def test_attention_takes_at_most_3_kb_per_token_and_head(name):
  """Forward and backward together: what must live between them, and what the backward adds."""
  assert _compiled(name).temp_bytes <= 3 * KB * CASES[name].tokens * HEADS


@pytest.mark.parametrize("what", ["block", "train"])
def test_memory_is_linear_in_tokens(what):
  """From 64K to 128K tokens memory may not grow faster than they do: nothing is n x n."""
  names = [f"{what}_pallas_mgpu_d128_{size}" for size in LARGE]
  fewer, more = (_compiled(name).temp_bytes / CASES[name].tokens for name in names)
  assert more <= 1.02 * fewer


def test_kernels_of_a_train_step_do_not_spill():
  kernels = _compiled("train_pallas_mgpu_d128_64k").kernels
  assert len(kernels) >= 3
  assert not any(kernel.spill_stores or kernel.spill_loads for kernel in kernels), kernels


def test_eight_gpus_each_attend_to_their_own_sample():
  """Data parallel: gradients are reduced, q, k and v stay where they are."""
  text = _compiled("train_pallas_mgpu_d64_16k_8gpus").compiled.as_text()
  assert re.search(r" all-reduce(-start)?\(", text)
  assert not re.search(r" all-(gather|to-all)(-start)?\(", text)
