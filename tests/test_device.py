"""`pytest --device=gpu`: what it runs, and what it says where there is no GPU."""

import subprocess
import sys

import pytest

from benchmarks import timing
from benchmarks.gpu import slot_steps
from benchmarks.gpu.code import ROOT
from benchmarks.gpu.slot_output import read_output
from tests.conftest import ON_DEVICE

_FILE = "tests/kernels/selection/test_topk.py"


def _pytest(*arguments):
  command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--device=gpu", *arguments]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_without_a_gpu_it_refuses_in_one_sentence():
  done = _pytest(_FILE)
  assert done.returncode == pytest.ExitCode.USAGE_ERROR
  # Lines before it are jax' own.
  assert done.stderr.splitlines()[-2].startswith("ERROR: --device=gpu needs a CUDA GPU")
  assert "Traceback" not in done.stdout and "wanted" not in done.stdout


def test_its_tests_exist():
  """Every name in the list is a test, and the files that hold none are not even imported."""
  done = _pytest("--rehearse", "--collect-only", "tests/kernels")
  assert done.returncode == 0, done.stdout
  collected = {line.removeprefix("wanted ") for line in done.stdout.splitlines() if "::" in line}
  assert {node.split("::")[0] for node in collected} == {f"tests/{name}" for name in ON_DEVICE}
  for name, tests in ON_DEVICE.items():
    text = (ROOT / "tests" / name).read_text()
    for test in tests:
      assert f"class {test}(" in text or f"def {test}(" in text, test


def test_kernels_are_not_interpreted_on_a_device():
  """Every conformance test then calls the kernel itself, which a CPU refuses."""
  text = (
    "import pytest; from tests import conftest; conftest.run_as_compiled(); "
    "from tests.kernels.block_sparse import test_hopper as t; "
    "pytest.raises(NotImplementedError, t.test_odd_scales, 0.0); print('refused')"
  )
  assert timing.in_child(["-c", text], {"JAX_PLATFORMS": "cpu"}) == "refused"


def test_a_slot_reads_its_lines():
  """One test runs, the rest are left out; where there is no time, it is unreached, not wrong."""
  step = slot_steps.tests("selection", "selection")
  name = f"{_FILE}::test_nan_rows_still_list_valid_tiles"
  done = _pytest("--rehearse", _FILE)
  found = read_output(step, done.stdout, done.returncode)
  assert (found.state, found.reached, found.unreached) == ("ok", [name], [])
  late = _pytest("--rehearse", "--minutes=0", _FILE)
  found = read_output(step, late.stdout, late.returncode)
  assert found.state == "unreached" and found.unreached == [name] and late.returncode == 1
  assert _pytest("--rehearse", "--only=nothing", _FILE).returncode == pytest.ExitCode.USAGE_ERROR
