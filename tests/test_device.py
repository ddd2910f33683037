"""`pytest --device=gpu`: what it runs, and what it says where there is no GPU."""

import subprocess
import sys
import types

import pytest

from benchmarks import timing
from benchmarks.gpu import slot_steps
from benchmarks.gpu.code import ROOT
from benchmarks.gpu.slot_output import read_output
from tests.conftest import ON_DEVICE, OnDevice

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


def test_its_tests_exist_and_are_unreached_without_time():
  """Every name in the list is a test, and the files that hold none are not even imported."""
  done = _pytest("--rehearse", "--minutes=0", "tests/kernels")
  # As a slot reads it; tests/benchmarks/gpu/test_slot.py runs one that is reached.
  found = read_output(slot_steps.tests("all", ""), done.stdout, done.returncode)
  assert found.state == "unreached" and not found.wrong
  assert {node.split("::")[0] for node in found.unreached} == {
    f"tests/{name}" for name in ON_DEVICE
  }
  for name, tests in ON_DEVICE.items():
    text = (ROOT / "tests" / name).read_text()
    for test in tests:
      assert f"class {test}(" in text or f"def {test}(" in text, test


def test_a_pattern_that_finds_nothing_is_refused():
  options = types.SimpleNamespace(minutes=None, only="nothing", rehearse=False)
  item = types.SimpleNamespace(nodeid=f"{_FILE}::test_chunks", path=ROOT / _FILE)
  with pytest.raises(pytest.UsageError, match="finds no conformance test here"):
    OnDevice(types.SimpleNamespace(option=options)).pytest_collection_modifyitems([item])


def test_kernels_are_not_interpreted_on_a_device():
  """Every conformance test then calls the kernel itself, which a CPU refuses."""
  text = (
    "import pytest; from tests import conftest; conftest.run_as_compiled(); "
    "from tests.kernels.block_sparse import test_hopper as t; "
    "pytest.raises(NotImplementedError, t.test_odd_scales, 0.0); print('refused')"
  )
  assert timing.in_child(["-c", text], {"JAX_PLATFORMS": "cpu"}) == "refused"
