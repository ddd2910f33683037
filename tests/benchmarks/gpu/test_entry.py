"""What a bare GPU machine must find: commands that need nothing it lacks, and clear words where there is no GPU."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import pytest

from benchmarks import timing
from benchmarks.gpu import rows as gpu_rows
from benchmarks.gpu import run as gpu_run
from benchmarks.gpu import slot_steps as gpu_slot_steps
from benchmarks.gpu.slot import command_line

ROOT = pathlib.Path(__file__).parents[3]
# Of requirements.txt, what a machine that has jax and numpy may lack, or have in another version.
_ABSENT = (
  "flax",
  "ml_collections",
  "grain",
  "array_record",
  "orbax",
  "optax",
  "av",
  "PIL",
  "tqdm",
  "matplotlib",
  "torch",
)


def _make(*arguments):
  done = subprocess.run(
    ["make", "-n", *arguments], capture_output=True, text=True, check=True, cwd=ROOT
  )
  return done.stdout


def test_make_gpu_is_a_slot_and_installs_nothing_where_an_interpreter_is_named():
  text = _make("gpu", "PYTHON=python3", "GPU_MINUTES=3")
  assert "pip" not in text and ".venv" not in text
  assert [line for line in text.splitlines() if "python3" in line] == [
    "python3 -m benchmarks.gpu.slot --minutes=3"
  ]


@pytest.mark.parametrize(
  "module", ["attention", "gpu_check", "gpu_slot", "tune", "torch_peers"]
)
def test_entry_points_import_without_what_a_gpu_machine_may_lack(module):
  absent = "; ".join(f"sys.modules[{name!r}] = None" for name in _ABSENT)
  code = f"import sys; {absent}; import benchmarks.{module}; print('imported')"
  assert timing.in_child(["-c", code], {"JAX_PLATFORMS": "cpu"}) == "imported"


def test_without_a_gpu_it_says_what_to_do():
  code = "from benchmarks.gpu.rows import open_device; open_device(False)"
  with pytest.raises(RuntimeError, match="--rehearse --out=FOLDER"):
    timing.in_child(["-c", code], {"JAX_PLATFORMS": ""})


def test_a_rehearsal_opens_the_cpu():
  assert gpu_rows.open_device(True) == "cpu" and jax.default_backend() == "cpu"


def test_trouble_is_ours_only(tmp_path):
  store = gpu_rows.Store.open(tmp_path, "rows", "command")
  run = gpu_run.Session(None, store, gpu_rows.Deadline(1), "xla")
  for row in (
    {"name": "lists_d10/a", "correct": False},
    {"name": "window/b", "error": "x"},
    {"name": "torch_flex/a", "error": "x"},
    {"name": "cudnn/a", "correct": False},
    {"name": "dense/a", "correct": True},
  ):
    store.add(row)
  assert gpu_run.troubles(run) == ["lists_d10/a", "window/b"]


def test_training_steps_need_no_package_of_the_data_path():
  """Only flax, optax and ml_collections travel as wheels (docs/gpu_queue.md)."""
  absent = "; ".join(
    f"sys.modules[{name!r}] = None"
    for name in ("grain", "array_record", "orbax", "av", "PIL", "matplotlib")
  )
  code = f"import sys; {absent}; import benchmarks.gpu.train; print('imported')"
  assert timing.in_child(["-c", code], {"JAX_PLATFORMS": "cpu"}) == "imported"


_QUEUE = (ROOT / "docs" / "gpu_queue.md").read_text()


def _commands():
  """The indented blocks of docs/gpu_queue.md: each is pasted as one command."""
  return [block.strip() for block in re.findall(r"(?:^    .*\n)+", _QUEUE, re.MULTILINE)]


def test_every_command_of_the_queue_is_short_enough_to_paste():
  assert len(_commands()) >= 5
  for command in _commands():
    assert len(command) < 2000 and not any(
      line.rstrip() != line for line in command.splitlines()
    ), command


def test_every_command_of_the_queue_is_one_that_exists():
  """Modules and files that docs/gpu_queue.md names can be found, and so can the plans, their steps and the wheels."""
  modules = set(re.findall(r"python3? -m ((?:benchmarks|freqformer)[\w.]+)", _QUEUE))
  assert {"benchmarks.gpu.slot"} <= modules
  for module in modules:
    assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), module
  for path in re.findall(r"tests/\w+\.py", _QUEUE):
    assert (ROOT / path).exists(), path
  slots = re.findall(r"benchmarks\.gpu_slot (.*)", _QUEUE)
  used = {match for line in slots for match in re.findall(r"--plan=(\w+)", line)}
  assert used == set(gpu_slot_steps.PLANS) - {"first"}
  wanted = (ROOT / "requirements.txt").read_text()
  for package, version in re.findall(r"\b(flax|optax|ml_collections)==([\d.]+)", _QUEUE):
    pinned = re.search(rf"^{package}(==|>=)([\d.]+)", wanted, re.MULTILINE)
    assert version.startswith(pinned.group(2)), (package, version)


def test_the_queues_slots_can_be_run_and_fit_a_quarter_of_an_hour():
  """Call A and any call B, each with half a minute of its own around the slot and a start of up to a minute and a half."""
  found = [
    command_line().parse_args(shlex.split(line))
    for line in re.findall(r"^    .*benchmarks\.gpu_slot (.*)", _QUEUE, re.M)
  ]
  slots = [options for options in found if not options.rehearse]
  for options in slots:
    assert gpu_slot_steps.plan(options.plan, options.case)
  (first,) = [options.minutes for options in slots if options.plan == "first"]
  others = [options.minutes for options in slots if options.plan != "first"]
  assert len(others) == 3 and 60 * (first + 0.4) <= 420 and first + max(others) + 2 * 2.0 <= 15


def test_children_get_the_environment_and_a_time_limit():
  code = "import os; print(os.environ['OF_THE_CHILD'], 'PATH' in os.environ)"
  assert timing.in_child(["-c", code], {"OF_THE_CHILD": "here"}) == "here True"
  with pytest.raises(RuntimeError, match="took longer than 1 s"):
    timing.in_child(["-c", "import time; time.sleep(20)"], timeout_s=1)
  assert "OF_THE_CHILD" not in os.environ and sys.executable
