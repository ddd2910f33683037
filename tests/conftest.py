"""Settings of all tests; `pytest --device=gpu` runs the conformance tests on a GPU.

There the kernels run as they are compiled, where they are interpreted elsewhere. The lines that are
printed about each test are those of a step of `benchmarks.gpu.slot`, which kills a test that hangs.
"""

import contextlib
import gc
import importlib
import importlib.util
import os
import pathlib
import re
import time

import pytest

_TESTS = pathlib.Path(__file__).parent
# The modules that hold `interpreted`, in which tests run the kernels on a CPU.
INTERPRETERS = ("freqformer.kernels.hopper.interpret", "freqformer.kernels.triton.interpret")
# Conformance tests by file, the cheapest last. All others are about a CPU, the interpreter or the
# compiler, which a GPU does not change.
ON_DEVICE = {
  "kernels/block_sparse/test_hopper.py": (
    "TestPallasMgpu",
    "test_every_cut_of_tiles_into_stages",
    "test_every_form_of_the_forward",
    "test_two_tiles_in_a_block",
    "test_odd_scales",
  ),
  "kernels/block_sparse/test_triton.py": (
    "TestTriton",
    "test_every_cut_of_tiles",
    "test_other_head_dimensions",
    "test_odd_scales",
  ),
  "kernels/around/test_around.py": (
    "test_layer_with_and_without_kernels",
    "test_prepare_kernel",
    "test_lift_kernel",
  ),
  "kernels/linear/test_hopper.py": (
    "test_errs_no_more_than_xla",
    "test_rows_without_a_segment_and_repeats",
  ),
  "kernels/selection/test_topk.py": (
    "test_the_hopper_kernel_finds_the_same_sets",
    "test_tiles_per_head_with_fixed_ones",
    "test_nan_rows_still_list_valid_tiles",
  ),
  "kernels/selection/test_block_scores.py": (
    "test_the_hopper_kernel_gives_the_same_masses",
    "test_sums_of_many_key_tiles",
    "test_chunks_cross_heads",
  ),
}


def pytest_addoption(parser):
  group = parser.getgroup("device")
  group.addoption("--device", choices=("cpu", "gpu"), default="cpu", help="where kernels run")
  group.addoption("--minutes", type=float, help="on a GPU: begin no test after so many minutes")
  group.addoption("--only", default="", help="on a GPU: regular expression that finds the tests")
  group.addoption(
    "--rehearse", action="store_true", help="with --device=gpu: one test of each file, on the CPU"
  )


def pytest_configure(config):
  # XLA's GPU interpreter blocks one host thread per warpgroup; by default there are as many threads
  # as cores.
  os.environ.setdefault("NPROC", "16")
  if config.option.device == "gpu" and not config.option.rehearse:
    _open_gpu()
  else:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # XLA optimises little: most programs run once, so that compiling them well costs more than it
    # saves, and numbers are the same up to rounding. Processes that tests start inherit it.
    # `tools.offline` compiles for a GPU as well as ever.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    # The earlier emitters of fused loops compile a training step in a third of the time.
    quick = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    if quick not in os.environ.get("XLA_FLAGS", ""):  # workers inherit it
      os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}".strip()
    # Lines of code in a program are a twelfth of the time that it takes to compile; names of
    # operations stay.
    os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
    # A trace makes many objects, few of them garbage: looking for that as often as Python does by
    # default takes a quarter of the time of tracing.
    gc.set_threshold(20_000, 10, 10)
  if config.option.device == "gpu":
    config.pluginmanager.register(OnDevice(config), "on_device")

  import jax  # reads the environment

  # A warm run pays for no compilation twice.
  jax.config.update("jax_compilation_cache_dir", str(_TESTS.parent / ".cache" / "jax"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def pytest_collection_modifyitems(items):
  """Begins with what takes one worker longest, so that none waits for another in the end."""
  items.sort(key=lambda item: item.path.name != "test_mesh.py")


def _open_gpu():
  """Takes the GPU for all tests.

  Raises:
    UsageError: if there is none.
  """
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  import jax

  jax.config.update("jax_platforms", "cuda")
  # Plain forms in float32 are what kernels are compared with: no TF32.
  jax.config.update("jax_default_matmul_precision", "highest")
  try:
    jax.devices()
  except (RuntimeError, AssertionError) as error:  # depends on what exactly is missing
    raise pytest.UsageError(
      "--device=gpu needs a CUDA GPU that jax can use (jax[cuda13] and a driver); without the "
      f"option the kernels run in the interpreter on a CPU. {str(error)[:200]}"
    ) from None
  run_as_compiled()


def run_as_compiled():
  """Makes `interpreted` a context that changes nothing; to be called before tests import it."""
  for name in INTERPRETERS:
    importlib.import_module(name).interpreted = _as_compiled


@contextlib.contextmanager
def _as_compiled(detect_races: bool = False):
  """Stands for `interpreted`; races are looked for in the interpreter only."""
  yield


class OnDevice:
  """Runs the conformance tests only, and prints what a step of a slot prints.

  Attributes:
    config: of the session.
    deadline: in seconds of the monotonic clock; None: no limit.
  """

  def __init__(self, config):
    minutes = config.option.minutes
    self.config = config
    self.deadline = None if minutes is None else time.monotonic() + 60 * minutes

  def pytest_ignore_collect(self, collection_path):
    """Leaves out other files, which may import packages that a GPU machine lacks."""
    name = collection_path.relative_to(_TESTS.parent).as_posix().removeprefix("tests/")
    if not collection_path.name.startswith("test_"):
      return None
    # There, attention runs without Triton; what `--only=triton` asks for is then not found.
    lacks = name.endswith("test_triton.py") and importlib.util.find_spec("triton") is None
    return True if lacks or name not in ON_DEVICE else None

  def pytest_collection_modifyitems(self, items):
    wanted = [item for item in items if self._selected(item)]
    if self.config.option.rehearse:
      last = [item for item in wanted if self._name(item).startswith(self._names(item)[-1])]
      wanted = list({item.path: item for item in last}.values())
    if not wanted:
      raise pytest.UsageError("--device=gpu finds no conformance test here; see tests/conftest.py")
    self.config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
    items[:] = wanted
    for item in wanted:
      self._say(f"wanted {item.nodeid}")

  def _selected(self, item) -> bool:
    found = any(re.match(rf"{name}\b", self._name(item)) for name in self._names(item))
    return found and re.search(self.config.option.only, item.nodeid) is not None

  def _name(self, item) -> str:
    return item.nodeid.split("::", 1)[1]

  def _names(self, item) -> tuple[str, ...]:
    return ON_DEVICE[item.path.relative_to(_TESTS).as_posix()]

  @pytest.hookimpl(tryfirst=True)
  def pytest_runtest_protocol(self, item):
    """Announces a test; one for which there is no time is named and makes the run fail."""
    if self.deadline is None or time.monotonic() < self.deadline:
      self._say(f"begin {item.nodeid}")
      return None
    self._say(f"unreached {item.nodeid}")
    item.session.testsfailed += 1
    return True

  def pytest_runtest_logreport(self, report):
    if report.when == "call" or not report.passed:
      self._say(f"{'ok   ' if report.passed else 'WRONG'} {report.nodeid}")

  def _say(self, line: str):
    """Prints a line at once, though the output of tests is captured."""
    reporter = self.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:  # a worker of pytest-xdist has none
      reporter.write(f"\n{line}\n")
      reporter.flush()
