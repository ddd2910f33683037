"""Several processes that train one model together, each with the devices of its host.

All run the same programs on the same global arrays. Process 0 alone writes the run's records;
checkpoints are written by all.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NoReturn

import jax
from absl import logging
from orbax.checkpoint import multihost
from tqdm import tqdm

from freqformer.config import ConfigError
from freqformer.train.lock import held

JOIN_SECONDS = 300
# choice: hosts that end a run apart, because one writes the report, wait so long for each other.
_LEAVE_SECONDS = 120
_PORTS = (61440, 4096)  # first one and number of those that a job's number is mapped to
_PAUSE_SECONDS = 0.2
_NUMBER_BYTES = 4  # of a process's number in the roll call
_PRESENT = b"all"
# Keys at the coordinator: how a process failed, and which processes know that one has.
_FAILED = "freqformer/failed"
_KNOWN = "freqformer/known"
_LOOK_SECONDS = 1.0
_KNOWN_SECONDS = 10  # within which all have looked; one that has died never does


@dataclasses.dataclass(frozen=True)
class Place:
  """A process's place among all.

  Attributes:
    index: its number.
    count: of processes.
    coordinator: "host:port" of process 0.
    device: number of the process's own GPU among those that it sees; None where all are.
  """

  index: int
  count: int
  coordinator: str
  device: int | None = None

  def __post_init__(self):
    if not 0 <= self.index < self.count:
      raise ConfigError(
        f"--process={self.index} must be a number from 0 to {self.count - 1}, one for each of "
        f"--processes={self.count}."
      )
    if not re.fullmatch(r".+:\d+", self.coordinator):
      raise ConfigError(
        f"--coordinator={self.coordinator} must be HOST:PORT, a free port of the host of process 0."
      )


def place(coordinator: str | None, count: int | None, index: int | None) -> Place | None:
  """Returns where this process stands, by flags or by its launcher; None if it is alone."""
  if coordinator is not None and None not in (count, index):
    return Place(index, count, coordinator)
  if (count, index) != (None, None):
    raise ConfigError("--coordinator, --processes and --process go together; give all three.")
  found = _launched(coordinator)
  if found is None and coordinator is not None:
    raise ConfigError(f"--coordinator={coordinator} needs --processes and --process.")
  return found


def _launched(coordinator: str | None) -> Place | None:
  """Returns the place that SLURM's srun or Open MPI's mpirun gave; None without several tasks.

  Args:
    coordinator: the user's; None takes the launcher's.
  """
  env = os.environ
  # Before SLURM: in its jobs mpirun starts daemons by srun, and tasks inherit their variables.
  if "OMPI_COMM_WORLD_SIZE" in env:
    count = int(env["OMPI_COMM_WORLD_SIZE"])
    index = int(env["OMPI_COMM_WORLD_RANK"])
    device = int(env["OMPI_COMM_WORLD_LOCAL_RANK"])
    address = _address_of_mpirun
  elif "SLURM_STEP_NUM_TASKS" in env:
    count = int(env["SLURM_STEP_NUM_TASKS"])
    index = int(env["SLURM_PROCID"])
    device = int(env["SLURM_LOCALID"])
    address = _address_of_first_node
  else:
    return None
  if count == 1:
    return None
  # With --gpus-per-task SLURM shows each task its own GPU only, which is number 0 there.
  if re.fullmatch("[^,]+", env.get("CUDA_VISIBLE_DEVICES", "")):
    device = 0
  return Place(index, count, coordinator or address(env), device)


def _address_of_first_node(env: Mapping[str, str]) -> str:
  """Returns the address of the first host of a step of SLURM, where process 0 is."""
  # "node7", "node7,node9" or "node[07-12,15]"
  name, number = re.match(r"([^,\[]+)(?:\[(\d+))?", env["SLURM_STEP_NODELIST"]).groups("")
  return f"{name}{number}:{_port(int(env['SLURM_JOB_ID']))}"


def _address_of_mpirun(env: Mapping[str, str]) -> str:
  """Returns the address of the host of mpirun, where process 0 is unless hosts are chosen."""
  # "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911" or "1531576320.0;tcp6://[fd00::1,fd00::2]:34911"
  uri = env.get("OMPI_MCA_orte_hnp_uri", "")
  found = re.match(r"(\d+)\.\d+;tcp6?://(?:\[([^,\]]+)|([^,:]+))", uri)
  if not found:
    raise ConfigError(
      "Open MPI does not say where mpirun is (from version 5 on): give --coordinator=HOST:PORT, "
      "a free port of the host of process 0."
    )
  job, six, four = found.groups()
  host = f"[{six}]" if six else four
  return f"{host}:{_port(int(job) >> 12)}"  # the lower bits are 0


def _port(job: int) -> int:
  return _PORTS[0] + job % _PORTS[1]


def join(found: Place | None, seconds: int = JOIN_SECONDS):
  """Joins the processes, before JAX's devices are first used; does nothing for None.

  Raises:
    ConfigError: some are not there after so many seconds; says which ones, and where.
  """
  if found is None:
    return
  # JAX would end a process that waits in vain by an abort and a trace of C++.
  call = _call_roll if found.index == 0 else _answer
  call(found, time.monotonic() + seconds)
  jax.distributed.initialize(
    found.coordinator,
    found.count,
    found.index,
    # A user's own choice goes first; JAX reads it.
    None if "JAX_LOCAL_DEVICE_IDS" in os.environ else found.device,
    "deactivate",
    initialization_timeout=seconds,
    shutdown_timeout_seconds=_LEAVE_SECONDS,
  )
  if found.index:
    logging.set_verbosity(logging.ERROR)


def _call_roll(found: Place, deadline: float):
  """Waits on process 0 for a connection from each of the others, and lets them go on."""
  missing = set(range(1, found.count))
  port = int(found.coordinator.rpartition(":")[2])
  both = socket.has_dualstack_ipv6()  # a host's name may have an address of IPv6 alone
  given = dict(family=socket.AF_INET6, dualstack_ipv6=True) if both else {}
  with contextlib.ExitStack() as stack:
    try:
      server = stack.enter_context(socket.create_server(("", port), backlog=found.count, **given))
    except OSError as error:
      raise ConfigError(
        f"--coordinator={found.coordinator}: the port cannot be used ({error.strerror}); name a "
        "free one."
      ) from error
    came = []
    while missing:
      server.settimeout(_left(deadline))
      try:
        connection = stack.enter_context(server.accept()[0])
        connection.settimeout(_left(deadline))
        index = int.from_bytes(connection.recv(_NUMBER_BYTES))
      except TimeoutError as error:
        names = ", ".join(map(str, sorted(missing)))
        raise ConfigError(
          f"process {names} of {found.count} did not come to {found.coordinator} in time: start "
          "it, or look whether its host is up and can reach that address."
        ) from error
      if index in missing:  # else a stranger, or a number that was given twice
        missing.remove(index)
        came.append(connection)
    for connection in came:
      connection.sendall(_PRESENT)


def _answer(found: Place, deadline: float):
  """Tells process 0 that this one is here, and waits until all are."""
  host, _, port = found.coordinator.rpartition(":")
  reason = "no time was left"
  while time.monotonic() < deadline:
    try:
      address = (host.strip("[]"), int(port))  # without the brackets of IPv6
      connection = socket.create_connection(address, timeout=_left(deadline))
    except OSError as error:
      reason = error.strerror or str(error)
      time.sleep(_PAUSE_SECONDS)
      continue
    reason = "the others did not all come"
    with connection, contextlib.suppress(OSError):
      connection.sendall(found.index.to_bytes(_NUMBER_BYTES))
      connection.settimeout(_left(deadline))
      if connection.recv(len(_PRESENT)) == _PRESENT:
        return
    break  # process 0 has given up
  raise ConfigError(
    f"process {found.index} of {found.count} waited in vain at the coordinator "
    f"{found.coordinator} ({reason}): start process 0 there, and all others."
  )


def _left(deadline: float) -> float:
  """Returns the seconds until a deadline, above 0: a socket does not wait at all for 0."""
  return max(0.01, deadline - time.monotonic())


@contextlib.contextmanager
def ending_together(told: Callable[[BaseException], tuple[str, int]]) -> Iterator[None]:
  """Ends all processes where one fails in the block: each prints one sentence, and none waits.

  The others may stand in an exchange of arrays, which nothing in Python interrupts.

  Args:
    told: prints an error; returns its sentence and the exit code that it deserves.
  """
  if jax.process_count() == 1:
    yield
    return
  client = multihost.get_jax_distributed_client()
  done = threading.Event()
  watcher = threading.Thread(target=_watch, args=(client, done), daemon=True)
  watcher.start()
  try:
    yield
  except (Exception, KeyboardInterrupt) as error:  # whatever it is, the others wait in vain
    if _failures(client) == []:  # else this error may come of another process's end
      done.set()
      watcher.join()
      text, code = told(error)
      own = f"process {jax.process_index()} of {jax.process_count()} failed"
      client.key_value_set(f"{_FAILED}/{jax.process_index()}", json.dumps([f"{own}: {text}", code]))
      _leave(client, code)
    watcher.join()
    raise
  done.set()
  watcher.join()


def _watch(client, done: threading.Event):
  """Looks whether another process has failed, until this one is done; ends this one then."""
  while not done.wait(_LOOK_SECONDS):
    found = _failures(client)
    if found is None:
      return
    if found:
      text, code = found[0]
      tqdm.write(f"error: {text}", file=sys.stderr)  # on a line of its own, where a bar stands
      _leave(client, code)


def _failures(client) -> list | None:
  """Returns sentence and exit code of each process that failed; None if the coordinator died.

  JAX then ends this process, too.
  """
  try:
    return [json.loads(value) for _, value in client.key_value_dir_get(_FAILED)]
  except jax.errors.JaxRuntimeError:
    return None


def _leave(client, code: int) -> NoReturn:
  """Ends this process at once: JAX's own way out waits for the others.

  Process 0 goes last, because JAX aborts processes whose coordinator has gone.
  """
  deadline = time.monotonic() + _KNOWN_SECONDS
  client.key_value_set(f"{_KNOWN}/{jax.process_index()}", "")
  while jax.process_index() == 0 and time.monotonic() < deadline:
    if len(client.key_value_dir_get(_KNOWN)) == jax.process_count():
      break
    time.sleep(_PAUSE_SECONDS)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


@contextlib.contextmanager
def records(workdir: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields the folder of a process's records: the run's, locked, or one that is thrown away.

  All begin with the same `metrics.jsonl`, which alarms look back at.

  Raises:
    ConfigError: another run writes there.
  """
  if jax.process_index() == 0:
    with held(workdir):
      yield workdir
    return
  with tempfile.TemporaryDirectory() as folder:
    earlier = workdir / "metrics.jsonl"
    if earlier.exists():
      shutil.copy(earlier, folder)
    yield pathlib.Path(folder)
