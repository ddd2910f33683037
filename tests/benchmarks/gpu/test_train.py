"""The training benchmark on a CPU: whole steps on rendered clips, and attention's share of them."""

import sys
import types

import numpy as np
import pytest

from benchmarks.gpu import facts, train
from benchmarks.gpu.code import ROOT
from benchmarks.gpu.device import Deadline
from freqformer.command.files import read_config
from freqformer.train.experiment import experiment


def _tiny():
  config = read_config(ROOT / "configs" / "ucf101.py")
  train.tiny(config)
  config.model.depth = 1
  config.model.remat = False
  return experiment(config)


def test_steps_are_timed_and_described():
  exp = _tiny()
  row = train.measure(exp, steps=2, deadline=Deadline(60))
  assert row["steps"] == 2 and row["correct"]
  assert row["steps_per_s"] == pytest.approx(1 / row["seconds"])
  assert row["dtype"] == "bfloat16" and row["attention_kernels"] == [] and row["tokens"] == 64
  batch = train.rendered_batch(exp)
  assert batch["latent"].shape == (2, *exp.latent_shape) and len(set(batch["label"])) == 2
  np.testing.assert_allclose(batch["latent"].mean((0, 1, 2, 3)), 0, atol=1e-5)


def test_the_model_that_is_timed_runs_the_kernels():
  """Head dimension, tile and type are what the Hopper kernels take; the demo's are not."""
  exp = experiment(read_config(ROOT / "configs" / "ucf101.py"))
  assert exp.model.width // exp.model.heads in (32, 64, 128) and exp.model.dtype == "bfloat16"
  assert exp.model.layout(exp.latent_shape).block in (64, 128)


def test_device_time_is_shared_out_by_the_kernels_names():

  def event(name, ms):
    return types.SimpleNamespace(name=name, duration_ns=3e6 * ms)

  streams = [
    types.SimpleNamespace(
      name="Stream #1", events=[event("attention_forward_0", 2), event("fusion_1", 3)]
    ),
    types.SimpleNamespace(
      name="Stream #2", events=[event("attention_dkv_1", 4), event("fusion_1", 1)]
    ),
    # The same again, by another name.
    types.SimpleNamespace(name="XLA Ops", events=[event("attention_forward_0", 100)]),
  ]
  host = types.SimpleNamespace(name="/host:CPU", lines=streams)
  profile = types.SimpleNamespace(
    planes=[types.SimpleNamespace(name="/device:GPU:0", lines=streams), host]
  )
  kernels = train.kernel_times(profile)
  assert kernels == pytest.approx({"attention_forward_0": 2, "fusion_1": 4, "attention_dkv_1": 4})
  assert train.attention_share(kernels)["attention_share"] == pytest.approx(0.6)


# ---- the machine's facts -------------------------------------------------------------------------


def test_missing_tools_are_absent(monkeypatch, tmp_path):
  """A machine without ptxas, driver and nvidia-smi still gets its rows."""
  monkeypatch.setenv("PATH", str(tmp_path))
  facts.toolchain.cache_clear()
  found = facts.toolchain()
  facts.toolchain.cache_clear()
  assert found["ptxas"] == found["driver"] == facts.of_gpu("name") == "absent"


def test_the_assembler_on_path_is_asked_for_its_version(tmp_path):
  tool = tmp_path / "ptxas"
  tool.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.1, V13.1.80'\n")
  tool.chmod(0o755)
  assert facts.described_ptxas(str(tool)) == f"{tool} 13.1.80"
  tool.write_text("#!/bin/sh\nexit 1\n")
  assert facts.described_ptxas(str(tool)) == f"{tool} of unknown version"


def test_rows_name_no_folder_of_this_machine(monkeypatch):
  """Paths in Python's own prefix or the home folder are shown from there on."""
  monkeypatch.setattr(sys, "prefix", "/somebodys/.venv")
  monkeypatch.setenv("HOME", "/home/somebody")
  assert facts.shown("/somebodys/.venv/bin/ptxas") == "bin/ptxas"
  assert facts.shown("/home/somebody/cuda/ptxas") == "cuda/ptxas"
  assert facts.shown("/usr/local/cuda/bin/ptxas") == "/usr/local/cuda/bin/ptxas"
