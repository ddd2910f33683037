"""The public names, as docs/api.md shows them: its code blocks run here."""

import pathlib
import re
import subprocess
import sys

import jax
import pytest
from flax import nnx

import freqformer
from freqformer.command.files import read_config
from freqformer.config import ConfigError
from freqformer.evaluate.draw import requests
from freqformer.methods.radial import Radial
from freqformer.methods.registry import METHODS
from freqformer.model.dit import VideoDiT
from freqformer.train.checkpoint import Checkpoints
from freqformer.train.experiment import experiment

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "api.md").read_text()
CLASSES = ["Basketball", "Biking", "Diving"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A run as training leaves it, at its first step."""
  workdir = tmp_path_factory.mktemp("api") / "runs" / "demo"
  config = read_config(ROOT / "tests" / "tiny_config.py")
  config.model.attention.method = "dense"  # which compiles fastest
  exp = experiment(config)
  shape = exp.latent_shape
  params = nnx.state(VideoDiT(exp.model, shape, len(CLASSES), nnx.Rngs(0)))
  record = {
    "config": config.to_dict(),
    "class_names": CLASSES,
    "latent_shape": shape,
    "statistics": {"mean": [0.0] * shape[-1], "std": [1.0] * shape[-1]},
    "video_shape": exp.data.video_shape,
  }
  checkpoints = Checkpoints(workdir)
  # Raw weights that differ from their average, to tell which of them was loaded.
  raw = jax.tree.map(lambda x: x + 1, params)
  checkpoints.save(3, {"ema": params, "params": raw}, record)
  checkpoints.close()
  return workdir


def test_the_page_runs(workdir, monkeypatch):
  monkeypatch.chdir(workdir.parents[1])
  blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
  names = {}
  for block in blocks:
    exec(compile(block, "docs/api.md", "exec"), names)
  used = " ".join(blocks)
  for name in freqformer.__all__:
    assert name == "CHECKOUT" or f"{name}(" in used
  assert names["videos"].shape == (4, 6, 24, 32, 3)


def test_a_run_has_what_a_notebook_needs(workdir):
  run = freqformer.load_run(workdir)
  assert run.step == 3 and run.class_names == CLASSES and run.latent_shape == (3, 3, 4, 3)
  raw = freqformer.load_run(workdir, raw=True)
  for averaged, own in zip(*(jax.tree.leaves(r.params) for r in (run, raw)), strict=True):
    assert (own == averaged + 1).all()
  other = freqformer.load_run(workdir, method="radial(decay=0.5)").model.config
  assert other.runs()[0][1] == Radial(decay=0.5)


def test_samples_are_of_the_classes_that_were_asked_for(workdir):
  run = freqformer.load_run(workdir)
  both = freqformer.sample(run, ["Diving", "Biking"], samples=2, steps=2)
  alone = freqformer.sample(run, "Biking", steps=2)
  assert both.shape == (4, 6, 24, 32, 3)
  assert abs(both[2].astype(int) - alone[0]).max() <= 1  # another batch size rounds otherwise
  assert (both[2] != both[3]).any()
  labels, indices = requests(run, None, 2)
  assert labels.tolist() == [0, 0, 1, 1, 2, 2] and len(set(indices.tolist())) == 6
  for wrong, answer in (
    (dict(classes=["Bikin"]), "did you mean 'Biking'"),
    (dict(samples=0), "samples=0"),
    (dict(steps=0), "steps=0 must be at least 1"),
  ):
    with pytest.raises(ConfigError, match=answer):
      freqformer.sample(run, **wrong)


def test_methods_are_listed():
  assert freqformer.list_methods() == list(METHODS)
  with pytest.raises(AttributeError, match="no attribute 'smaple'"):
    freqformer.smaple  # noqa: B018


def test_the_import_is_light():
  """Entry points and the watcher of the GPU queue import the package before they need JAX."""
  code = "import freqformer, sys; freqformer.list_methods(); print('jax' in sys.modules)"
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
  assert done.stdout.strip() == "False", done.stderr


def test_the_checkout_s_kernels_are_the_package_s():
  """A second copy of a module would have classes and caches of its own."""
  code = """
import kernels
from freqformer.kernels.block_sparse import table
from kernels.block_sparse.table import BlockMask as again
assert table.BlockMask is again is kernels.BlockMask
assert table.__spec__.name == "freqformer.kernels.block_sparse.table"
"""
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
  assert not done.returncode, done.stderr
