"""A second process on a run's folder is refused and told of the first one."""

import os
import signal
import subprocess
import sys

import pytest

from freqformer.command.files import read_config
from freqformer.train import lock
from freqformer.train.run import train
from tests.command.process import TINY

# A process of its own that writes what holders write, and then waits.
HOLDER = """
import fcntl, os, sys
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
print("process 7 on other", file=file, flush=True)
print(flush=True)
sys.stdin.read()
"""


def test_a_lock_ends_with_its_process(tmp_path):
  command = [sys.executable, "-S", "-c", HOLDER, tmp_path / lock.TRAINING]
  other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
  other.stdout.readline()
  assert lock.holder(tmp_path) == "process 7 on other"
  message = f"^{tmp_path} is in use by process 7 on other: wait for it, stop it, or name another"
  before = os.listdir(tmp_path)
  with pytest.raises(lock.Held, match=message):
    train(read_config(TINY), tmp_path)
  assert os.listdir(tmp_path) == before
  other.send_signal(signal.SIGKILL)
  other.communicate()
  assert lock.holder(tmp_path) is None
  with lock.held(tmp_path):
    assert lock.holder(tmp_path).startswith(f"process {os.getpid()} on ")
    with pytest.raises(lock.Held), lock.held(tmp_path, patience=0):
      pass
  assert lock.holder(tmp_path) is None


def test_to_look_for_a_holder_makes_no_file_and_stops_nobody(tmp_path):
  assert lock.holder(tmp_path / "nowhere") is None and lock.holder(tmp_path) is None
  assert not os.listdir(tmp_path)
  (tmp_path / lock.TRAINING).touch()
  with (tmp_path / lock.TRAINING).open() as file:
    lock.fcntl.flock(file, lock.fcntl.LOCK_SH)  # as `holder` has it for a moment
    with pytest.raises(lock.Held, match="another process"), lock.held(tmp_path, patience=0):
      pass
    assert lock.holder(tmp_path) is None


def test_a_file_system_without_locks_is_no_reason_to_stop(tmp_path, monkeypatch, caplog):
  def none(*_):
    raise OSError(37, "No locks available")

  monkeypatch.setattr(lock.fcntl, "flock", none)
  with lock.held(tmp_path):
    assert lock.holder(tmp_path) is None
  assert "cannot be locked ([Errno 37] No locks available)" in caplog.text
