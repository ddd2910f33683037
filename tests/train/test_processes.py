"""Two processes of two devices train as one device does; a missing one is named.

The processes read this very file as their config.
"""

import concurrent.futures
import contextlib
import itertools
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from freqformer.config import ConfigError
from freqformer.train import mesh, preemption, processes
from freqformer.train.lock import held
from freqformer.train.processes import Place, join, place
from tests.command.process import ROOT, call
from tests.command.test_fields import rows, small

# One worker: both runs are then made once.
pytestmark = pytest.mark.xdist_group("processes")


def get_config(data=2, fsdp=2, steps=2):
  config = small(steps, grid=(2, 4, 4), target="velocity")
  config.model.attention.update(dict(tile=(2, 2, 2), block=8))
  config.train.update(dict(val_every=2, checkpoint_every=2, samples=4))
  config.mesh.update(dict(data=data, fsdp=fsdp))
  return config


def keep(folder, patch=setattr):
  """Writes into a folder what this process trains on, and the latents that it draws.

  Args:
    folder: gets `clips-PROCESS-NUMBER.npy` and `drawn-NUMBER.npy`, counted from 1.
    patch: sets an attribute.
  """
  from freqformer.diffusion import sampling
  from freqformer.train import run

  split_batch = run.split_batch
  sample = sampling.sample
  batches = itertools.count(1)
  draws = itertools.count(1)

  def splitting(batch, size):
    np.save(folder / f"clips-{jax.process_index()}-{next(batches)}.npy", batch["latent"])
    return split_batch(batch, size)

  def sampling_latents(*args, **given):
    latents, aux = sample(*args, **given)
    if not jax.process_index():
      np.save(folder / f"drawn-{next(draws)}.npy", latents)
    return latents, aux

  patch(run, "split_batch", splitting)
  patch(sampling, "sample", sampling_latents)


if "KEEP_IN" in os.environ:  # in the processes of `runs`
  keep(pathlib.Path(os.environ["KEEP_IN"]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Folders of a run of three steps on one device, and of one of two steps by two processes."""
  from freqformer.pages.progress import Progress
  from freqformer.train.run import train

  folder = tmp_path_factory.mktemp("processes")
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
  python = os.path.dirname(sys.executable)
  for name in ("one", "two"):
    (folder / name).mkdir()
  command = [ROOT / "scripts/local_cluster.sh", "2", f"--config={__file__}"]
  found = subprocess.run(
    [*command, f"--workdir={folder / 'two'}"],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=os.environ
    | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PATH": f"{python}:{os.environ['PATH']}"}
    | {"KEEP_IN": str(folder / "two")},
  )
  assert found.returncode == 0, found.stderr[-5000:]
  assert found.stderr.count("runs on 4 of 4 cpu (data 2 x fsdp 2 x context 1 in 2 processes)") == 1
  with pytest.MonkeyPatch.context() as patched:
    keep(folder / "one", patched.setattr)
    train(get_config(1, 1, steps=3), folder / "one", watch=Progress())
  return folder / "one", folder / "two"


def _leaves(workdir, step):
  from freqformer.train.checkpoint import Checkpoints

  checkpoints = Checkpoints(workdir, create=False)
  found = checkpoints._manager.item_metadata(step)["arrays"]
  shapes = {name: np.zeros(x.shape, x.dtype) for name, x in getattr(found, "tree", found).items()}
  return checkpoints.restore(shapes, step), checkpoints.record(step)


def _same_leaves(found, wanted):
  """Compares the states of two runs, by the size of what they have in each kind of leaf."""
  assert found.keys() == wanted.keys()
  for kind in ("params", "ema", "mu", "nu"):
    names = [name for name in wanted if kind in name.split("/")]
    most = max(np.abs(wanted[name]).max() for name in names)
    for name in names:
      np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-5 * most)
  for name in ("step", "key"):
    np.testing.assert_array_equal(found[name], wanted[name])


def _same_rows(one, two, kind, step):
  """Compares the only line of a kind and a step in two runs."""
  (wanted,), (found,) = ([r for r in rows(w, kind) if r["step"] == step] for w in (one, two))
  names = {"loss", "grad_norm", "buckets", "regret"} & wanted.keys()
  assert len(names) > 1
  for name in names:
    np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5)


def test_two_processes_equal_one_device(runs):
  one, two = runs
  for step in (1, 2):
    _same_rows(one, two, "train", step)
  _same_rows(one, two, "val", 2)
  (wanted, of_one), (found, of_two) = (_leaves(folder, 2) for folder in runs)
  _same_leaves(found, wanted)
  assert of_one["iterator"] == of_two["iterator"]
  assert (two / "report.html").exists()


def test_processes_train_on_the_clips_of_one_device_in_their_order(runs):
  one, two = runs
  for number in (1, 2):
    wanted = np.load(one / f"clips-0-{number}.npy")
    parts = [np.load(two / f"clips-{process}-{number}.npy") for process in (0, 1)]
    assert len(parts[0]) == len(parts[1]) < len(wanted)
    np.testing.assert_array_equal(np.concatenate(parts), wanted)


def test_samples_of_two_processes_equal_those_of_one_device(runs):
  wanted, found = (np.load(workdir / "drawn-1.npy") for workdir in runs)
  assert wanted.shape[0] > 1 and np.ptp(wanted) > 1
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
  assert (runs[1] / "samples-in-training" / "00000002.mp4").exists()


def test_one_process_goes_on_from_two(runs):
  from freqformer.train.run import train

  one, two = runs
  train(get_config(1, 1, steps=3), two)
  _same_rows(one, two, "train", 3)
  _same_leaves(_leaves(two, 3)[0], _leaves(one, 3)[0])


def test_a_process_that_fails_ends_the_others_with_its_sentence(tmp_path):
  """Process 0 alone needs the lock; the other one would wait for it in an exchange of arrays."""
  with socket.create_server(("", 0)) as server:
    free = f"localhost:{server.getsockname()[1]}"
  command = [sys.executable, "train.py", f"--config={__file__}", f"--workdir={tmp_path}"]
  command += [f"--coordinator={free}", "--processes=2"]
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
  given = dict(cwd=ROOT, stderr=subprocess.PIPE, text=True)
  given["env"] = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
  with held(tmp_path):
    started = [subprocess.Popen([*command, f"--process={index}"], **given) for index in (0, 1)]
    errors = [process.communicate()[1].splitlines() for process in started]
  assert [process.returncode for process in started] == [2, 2]
  assert errors[0][-1].startswith(f"error: {tmp_path} is in use by process {os.getpid()} on ")
  assert errors[1] == [errors[0][-1].replace("error: ", "error: process 0 of 2 failed: ")]


# ---- who is there -------------------------------------------------------------------------------


@pytest.fixture
def address(monkeypatch):
  """A free port; JAX is not asked to join."""
  monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **_: joined.append(args[:3]))
  monkeypatch.setattr(processes.logging, "set_verbosity", lambda _: None)
  joined = []
  with socket.create_server(("", 0)) as server:
    free = f"localhost:{server.getsockname()[1]}"
  return free, joined


def port(address):
  return int(address.rpartition(":")[2])


def has_ipv6():
  with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
    return True
  return False


@pytest.mark.parametrize(
  "host",
  ["localhost", pytest.param("[::1]", marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6"))],
)
def test_all_go_on_once_all_are_there(address, host):
  free, joined = address
  free = f"{host}:{port(free)}"
  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    for index in (2, 0):
      pool.submit(join, Place(index, 3, free), 20)
    for _ in range(100):  # a stranger, as soon as process 0 is there
      with contextlib.suppress(OSError), socket.create_connection(("localhost", port(free))):
        break
      time.sleep(0.05)
    pool.submit(join, Place(1, 3, free), 20)
  assert sorted(joined) == [(free, 3, index) for index in range(3)]


def test_missing_processes_are_named(address):
  free, joined = address
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    first, last = (pool.submit(join, Place(index, 4, free), 2) for index in (0, 3))
  with pytest.raises(ConfigError, match=f"^process 1, 2 of 4 did not come to {free} in time: "):
    first.result()
  with pytest.raises(ConfigError, match=f"coordinator {free} .the others did not all come"):
    last.result()
  assert not joined


def test_a_missing_coordinator_ends_the_command_with_one_sentence(address, tmp_path):
  free, _ = address
  flags = (f"--coordinator={free}", "--processes=2", "--process=1", "--join_seconds=1")
  error = call(tmp_path, "train.py", *flags, code=2).stderr
  assert f"error: process 1 of 2 waited in vain at the coordinator {free} " in error


SLURM = {
  "SLURM_STEP_NUM_TASKS": "16",
  "SLURM_PROCID": "9",
  "SLURM_LOCALID": "1",
  "SLURM_JOB_ID": "4098",
  "SLURM_STEP_NODELIST": "n7",
}
OPEN_MPI = {
  "OMPI_COMM_WORLD_SIZE": "4",
  "OMPI_COMM_WORLD_RANK": "2",
  "OMPI_COMM_WORLD_LOCAL_RANK": "0",
  "OMPI_MCA_orte_hnp_uri": "308215808.0;tcp://10.77.0.1,10.78.0.1:47277;tcp6://[fd00::1]:59179",
}
OPEN_MPI_6 = {"OMPI_MCA_orte_hnp_uri": "308215808.0;tcp6://[fd00::1,fd00::2]:59179"}


@pytest.fixture
def launched(monkeypatch):
  """Sets a launcher's variables, and no others."""

  def setting(environment):
    for name in os.environ:
      if name.startswith(("SLURM_", "OMPI_", "CUDA_VISIBLE_")):
        monkeypatch.delenv(name)
    for name, value in environment.items():
      monkeypatch.setenv(name, value)

  return setting


@pytest.mark.parametrize(
  "environment, flags, wanted",
  [
    ({}, (None, None, None), None),
    (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, (None, None, None), None),
    (SLURM | OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, (None, None, None), None),
    ({}, ("a:1", 2, 1), Place(1, 2, "a:1")),
    (SLURM, ("a:1", 2, 1), Place(1, 2, "a:1")),
    (OPEN_MPI, (None, None, None), Place(2, 4, "10.77.0.1:62960", 0)),
    (OPEN_MPI | OPEN_MPI_6, (None, None, None), Place(2, 4, "[fd00::1]:62960", 0)),
    (OPEN_MPI, ("a:1", None, None), Place(2, 4, "a:1", 0)),
    # mpirun in a job of SLURM: each host's daemon is a task of its own
    (SLURM | OPEN_MPI, ("a:1", None, None), Place(2, 4, "a:1", 0)),
    # srun --gpus-per-task=1
    (SLURM | {"CUDA_VISIBLE_DEVICES": "1"}, ("a:1", None, None), Place(9, 16, "a:1", 0)),
    (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1"}, ("a:1", None, None), Place(9, 16, "a:1", 1)),
    *(
      (SLURM | {"SLURM_STEP_NODELIST": nodes}, (None,) * 3, Place(9, 16, f"{first}:61442", 1))
      for nodes, first in {"n7": "n7", "n-a,n9": "n-a", "n[07-12,15],m": "n07"}.items()
    ),
  ],
)
def test_place(launched, environment, flags, wanted):
  launched(environment)
  assert place(*flags) == wanted


def test_a_launcher_without_an_address_needs_a_coordinator(launched):
  """As mpirun of Open MPI 5."""
  launched({name: value for name, value in OPEN_MPI.items() if name.startswith("OMPI_COMM")})
  assert place("a:1", None, None) == Place(2, 4, "a:1", 0)
  with pytest.raises(ConfigError, match="where mpirun is .* give --coordinator=HOST:PORT"):
    place(None, None, None)


@pytest.mark.parametrize(
  "flags, text",
  [
    (("a:1", 2, None), "go together; give all three"),
    ((None, 2, 1), "go together; give all three"),
    (("a:1", None, None), "--coordinator=a:1 needs --processes and --process"),
    (("a:1", 2, 2), "--process=2 must be a number from 0 to 1"),
    (("a", 2, 1), "--coordinator=a must be HOST:PORT"),
  ],
)
def test_refused_flags(flags, text):
  with pytest.raises(ConfigError, match=text):
    place(*flags)


# ---- what they agree on -------------------------------------------------------------------------


@pytest.fixture
def several(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)


def test_all_devices_are_used(several, monkeypatch):
  monkeypatch.setattr(mesh, "all_devices", lambda: [None] * 4)
  with pytest.raises(ConfigError, match="takes 2 of the 4 devices of 2 processes.*mesh.data=-1"):
    mesh.make_mesh(mesh.MeshConfig(2, 1), 4)


def test_all_stop_at_the_same_call(several, monkeypatch):
  sent = []

  def agreed(call):
    return bool(sent) and call == 3

  monkeypatch.setattr(preemption.multihost_utils, "reached_preemption_sync_point", agreed)
  terminated = signal.signal(signal.SIGTERM, lambda *_: sent.append("SIGTERM"))
  with preemption.StopRequest() as stop:
    assert not stop()
    signal.raise_signal(signal.SIGINT)  # becomes the signal that JAX watches
    assert sent == ["SIGTERM"]
    assert [stop() for _ in range(4)] == [False, True, True, True]
  signal.signal(signal.SIGTERM, terminated)


@pytest.mark.parametrize(
  "of_each, code",
  [("exit 0", 0), ("exit 4", 4), ('[[ "$*" == *process=1* ]] && exit 3; sleep 60', 3)],
)
def test_the_launcher_ends_with_its_processes(tmp_path, of_each, code):
  """By a stand-in for python: also where all have ended before one is waited for."""
  stand_in = tmp_path / "python"
  stand_in.write_text(f'#!/bin/bash\n[[ "$1" == -c ]] && {{ echo 4321; exit; }}\n{of_each}\n')
  stand_in.chmod(0o755)
  path = f"{tmp_path}:{os.environ['PATH']}"
  command = [ROOT / "scripts" / "local_cluster.sh", "3"]
  done = subprocess.run(command, env=os.environ | {"PATH": path}, timeout=20)
  assert done.returncode == code


def test_the_template_for_slurm_gives_each_task_its_cpus(tmp_path):
  """By a stand-in for srun, which has not read SLURM_CPUS_PER_TASK since SLURM 22.05."""
  stand_in = tmp_path / "srun"
  stand_in.write_text('#!/bin/bash\necho "$SRUN_CPUS_PER_TASK: $*"\n')
  stand_in.chmod(0o755)
  env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "8"}
  command = [ROOT / "scripts" / "slurm.sh", "--config=a b.py", "--dry_run"]
  done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=20)
  assert done.stdout == "8: --kill-on-bad-exit=1 python train.py --config=a b.py --dry_run\n"
