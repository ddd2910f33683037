"""Commands for a bare GPU machine: they need nothing that it lacks, and refuse in clear words."""

import re
import shlex
import subprocess

import pytest

from benchmarks import attention, timing
from benchmarks.gpu import code, device, slot, slot_steps, study, tune, wan
from benchmarks.gpu.code import ROOT
from benchmarks.gpu.device import Deadline

# Packages that a machine with jax and numpy may lack, or have in another version.
_ABSENT = ("flax", "ml_collections", "optax", "matplotlib", "torch", "tqdm")
# Those of the data path, of which no wheel travels.
_DATA = ("grain", "array_record", "orbax", "av", "PIL", "matplotlib")
_MODULES = ("attention", "gpu.check", "gpu.slot", "gpu.tune", "gpu.torch_peers")


@pytest.mark.parametrize(
  "modules, absent",
  [
    (_MODULES, _ABSENT + _DATA),
    # Only flax, optax and ml_collections travel as wheels (docs/gpu_queue.md).
    (("gpu.train",), _DATA),
    # The parent of a slot must outlive whatever a kernel does.
    (("gpu.slot",), ("jax",)),
  ],
  ids=["entry points", "training", "slot"],
)
def test_modules_import_without_what_a_gpu_machine_may_lack(modules, absent):
  lacking = "; ".join(f"sys.modules[{name!r}] = None" for name in absent)
  wanted = ", ".join(f"benchmarks.{module}" for module in modules)
  text = f"import sys; {lacking}; import {wanted}; print('imported')"
  assert timing.in_child(["-c", text], {"JAX_PLATFORMS": "cpu"}) == "imported"


def test_make_gpu_is_a_slot_and_installs_nothing_where_an_interpreter_is_named():
  command = ["make", "-n", "gpu", "PYTHON=python3", "GPU_MINUTES=3"]
  done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
  commands = [line for line in done.stdout.splitlines() if not line.startswith("make")]
  assert commands == ["python3 -m benchmarks.gpu.slot --minutes=3"]


def test_without_a_gpu_it_says_what_to_do():
  text = "from benchmarks.gpu.device import open_device; open_device(False)"
  with pytest.raises(RuntimeError, match="--rehearse --out=FOLDER"):
    timing.in_child(["-c", text], {"JAX_PLATFORMS": ""})


def test_devices_have_files_of_their_own():
  assert device.device_slug("NVIDIA H100 80GB HBM3") == "h100"
  assert device.device_slug("NVIDIA A100-SXM4-40GB") == "a100-sxm4-40gb"
  assert device.device_slug("cpu") == "cpu"


def test_prose_makes_no_row_void_and_code_does():
  """A hash of code ignores comments, docstrings and line breaks, and nothing else."""
  text = 'def f(x):\n  """Adds."""\n  return g(x, "a")  # why\n'
  same = '"""A module."""\n\n\ndef f(x):\n  return g(\n    x,\n    "a",\n  )\n'
  assert code.meaning(text) == code.meaning(same)
  others = (text.replace('"a"', '"b"'), text.replace("(x)", "(y)"), text.replace("return ", ""))
  assert len({code.meaning(other) for other in (text, *others)}) == 4
  assert code.meaning('{"a": 1,\n "b": 2}', ".json") == code.meaning('{"b": 2, "a": 1}', ".json")


def test_the_kernels_digest_covers_the_attention_kernels():
  patterns = [pattern for own in code._KERNELS.values() for pattern in own]
  found = {path.name for pattern in patterns for path in ROOT.glob(pattern)}
  assert {
    "hopper_forward.py",
    "hopper_backward.py",
    "launch.py",
    "lists.py",
    "triton_launch.py",
  } <= found
  assert all(list(ROOT.glob(pattern)) for pattern in (*patterns, *code._NOT_CODE))


# ---- commands ------------------------------------------------------------------------------------

_QUEUE = (ROOT / "docs" / "gpu_queue.md").read_text()


def _slots():
  """Returns the options of every slot that docs/gpu_queue.md runs."""
  lines = re.findall(r"^    .*python3? -m benchmarks\.gpu\.slot (.*)", _QUEUE, re.M)
  return [slot.command_line().parse_args(shlex.split(line)) for line in lines]


def test_the_queues_slots_can_be_run_and_fit_a_quarter_of_an_hour():
  """Call A and any call B, each with half a minute around it and up to two minutes to start."""
  found = [options for options in _slots() if not options.rehearse]
  for options in found:
    assert slot_steps.plan(options.plan, options.case)
  assert [options.plan for options in found] == list(slot_steps.PLANS)
  alone = ("study_1", "study_2", "wan", "triton")  # in a quarter of an hour of their own
  first, *others = (options.minutes for options in found if options.plan not in alone)
  assert 60 * (first + 0.4) <= 420 and first + max(others) + 2 * 2.0 <= 15


def test_the_study_s_calls_fit_a_quarter_of_an_hour_of_their_own():
  """The machine stays warm between both; two steps of either end before it does."""
  found = [options for options in _slots() if "study" in options.plan]
  assert len(found) == 2 and sum(60 * (options.minutes + 0.4) for options in found) + 120 <= 900
  for options in found:
    steps = slot_steps.plan(options.plan)
    assert sum(step.seconds for step in steps[1:]) + 10 + slot.CLOSING <= 60 * options.minutes
    for step in steps[1:]:
      chosen = study.parser().parse_args([*step.arguments, "--minutes=1", "--out=x"])
      assert chosen.seconds + slot_steps.START + slot_steps.MARGIN < step.seconds - 45  # compiling


def test_calls_of_their_own_end_in_time():
  (triton,) = (options for options in _slots() if options.plan == "triton")
  assert 60 * (triton.minutes + 0.4) <= 420
  (options,) = (options for options in _slots() if options.plan == "wan")
  steps = slot_steps.plan("wan")
  assert sum(step.seconds for step in steps[1:]) <= 60 * options.minutes
  for step in steps[1:]:
    part = wan.parser().parse_args([*step.arguments, "--minutes=1", "--out=x"]).part
    guards = sum(job.seconds for job in wan.jobs(part, False, Deadline(1)))
    assert guards + slot_steps.START + slot_steps.MARGIN < step.seconds


def test_every_command_of_the_queue_exists_and_can_be_pasted():
  modules = set(re.findall(r"python3? -m (benchmarks[\w.]+)", _QUEUE))
  assert "benchmarks.gpu.slot" in modules
  for module in modules:
    assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), module
  blocks = re.findall(r"(?:^    .*\n)+", _QUEUE, re.MULTILINE)
  assert len(blocks) >= 5 and max(map(len, blocks)) < 2000


def test_every_steps_arguments_are_taken():
  """Only steps whose modules do not run in test_slot.py or test_train.py."""
  parsers = {slot_steps.TIMED: attention.command_line, "benchmarks.gpu.tune": tune.command_line}
  for step in (*slot_steps.FIRST, *slot_steps.RIGHT, *slot_steps.REST):
    if step.module in parsers:
      added = ["--minutes=1", "--rehearse", "--out=x"]
      parsers[step.module]().parse_args([*step.arguments, *added])


def test_children_get_the_environment_and_a_time_limit():
  text = "import os; print(os.environ['OF_THE_CHILD'], 'PATH' in os.environ)"
  assert timing.in_child(["-c", text], {"OF_THE_CHILD": "here"}) == "here True"
  with pytest.raises(RuntimeError, match="took longer than 1 s"):
    timing.in_child(["-c", "import time; time.sleep(20)"], timeout_s=1)
