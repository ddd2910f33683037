"""The wheel, installed outside the checkout, has all that the checkout has."""

import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
pytestmark = pytest.mark.xdist_group("packaging")

# Without PyAV: attention with gradients, a method's layer under jit, no module from the checkout;
# the commands are there, and one that needs PyAV says how to get it.
USE = """
import importlib.metadata, pathlib, sys
sys.modules["av"] = None
import freqformer, jax, numpy as np
from flax import nnx
from freqformer import VideoDiT, entries, load_run, sample
from freqformer.kernels import BlockMask, attention
from freqformer.evaluate import motion_net
from freqformer.model.architectures import model_config

q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 32, 2, 8))
grads = jax.grad(lambda q, k, v: attention(q, k, v)[0].sum(), argnums=(0, 1, 2))(q, k, v)
assert all(np.isfinite(g).all() and g.any() for g in grads)

attention_config = dict(method="sliding_tile(window=(3, 3, 3))", block=16)
sizes = dict(size="custom", width=16, depth=1, heads=2, patch=(1, 1, 1))
config = model_config(sizes | dict(attention=attention_config))
shape = (2, 8, 8, 4)
model = nnx.jit(lambda: VideoDiT(config, shape, 3, nnx.Rngs(0)))()
x = np.ones((1, *shape), np.float32)
run = nnx.jit(lambda model, *args: model(*args))
out, _, aux = run(model, x, np.ones(1, np.float32), np.zeros(1, int), model.tables(shape))
assert out.shape == x.shape and 0 < aux[0]["density"].mean() < 1

ours = [m for n, m in sys.modules.items() if n.split(".")[0] in ("freqformer", "kernels")]
for module in ours:
  assert pathlib.Path(module.__file__).is_relative_to(sys.prefix), module
assert freqformer.CHECKOUT is None and len(ours) > 20

assert motion_net.load()["head"].shape == (motion_net.FEATURES, len(motion_net.TARGETS))

commands = importlib.metadata.entry_points(group="console_scripts", module="freqformer.entries")
assert all(callable(command.load()) for command in commands)
print(*sorted({command.name for command in commands}))
sys.argv = ["freqformer-train"]
entries.evaluate()
"""


def run(*command, code=0):
  """Runs a command away from the checkout, and returns what it wrote."""
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
  }
  environment.pop("PYTHONPATH", None)
  command = [str(part) for part in command]
  done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment)
  assert done.returncode == code, done.stderr[-3000:]
  return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """The wheel, built from a copy: building leaves files beside the sources."""
  place = tmp_path_factory.mktemp("build")
  for name in ("freqformer", "kernels"):
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / name, place / "source" / name, ignore=ignored)
  for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, place / "source" / name)
  offline = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation")
  run(sys.executable, "-m", "pip", "wheel", *offline, "-w", place / "dist", place / "source")
  (path,) = (place / "dist").glob("*.whl")
  return path


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
  """A fresh environment that sees this one's packages, with the wheel installed."""
  place = tmp_path_factory.mktemp("environment")
  run(sys.executable, "-m", "venv", "--without-pip", place)
  python = place / "bin" / "python"
  own = sysconfig.get_path("purelib", "venv", {"base": str(place)})
  pathlib.Path(own, "packages.pth").write_text(sysconfig.get_path("purelib"))
  offline = ("--quiet", "--no-index", "--no-deps")
  run(sys.executable, "-m", "pip", "--python", python, "install", *offline, wheel)
  return place


def test_the_wheel_has_every_file_under_one_name(wheel):
  found = set(zipfile.ZipFile(wheel).namelist())
  for part, place in (("freqformer", ""), ("kernels", "freqformer/")):
    for path in (ROOT / part).rglob("*"):
      if path.suffix in (".py", ".json"):
        assert place + str(path.relative_to(ROOT)) in found
  tops = {name.split("/")[0] for name in found if ".dist-info/" not in name}
  assert tops == {"freqformer"}


def test_names_and_commands_without_the_extra(environment):
  said = run(environment / "bin" / "python", "-c", USE, code=2)
  assert "freqformer-eval freqformer-simulate freqformer-sweep freqformer-train\n" in said
  assert "pip install 'freqformer[video]'" in said


def test_simulate_runs(environment):
  arguments = ("--model=wan2.1-1.3b", "--method=radial", "--compare=dense", "--grid=4,8,8")
  text = run(environment / "bin" / "freqformer-simulate", *arguments)
  assert "radial" in text and "dense" in text


def test_train_takes_a_config_from_anywhere(environment, tmp_path):
  """The file's own error is answered: it was found, read and completed with defaults."""
  path = tmp_path / "mine.py"
  path.write_text(
    "from ml_collections import ConfigDict\n\ndef get_config():\n  return ConfigDict()"
  )
  command = (environment / "bin" / "freqformer-train", f"--config={path}", "--dry_run")
  assert "config.data lacks source, root" in run(*command, code=2)


@pytest.mark.parametrize(
  "name, extras",
  [
    ("requirements.txt", ["video"]),
    ("requirements-gpu.txt", ["video", "gpu"]),
    ("requirements-dev.txt", ["video", "search", "tensorboard", "wandb", "pretrained", "dev"]),
  ],
)
def test_pinned_files_follow_the_project(name, extras):
  """Each file has the project's dependencies, in versions that the project allows."""

  def by_name(lines):
    found = [Requirement(line) for line in lines if line and line[0] not in "#-"]
    return {canonicalize_name(requirement.name): requirement for requirement in found}

  extra = sum((PROJECT["optional-dependencies"][e] for e in extras), [])
  wanted = by_name(PROJECT["dependencies"] + extra)
  wanted.pop("freqformer", None)
  files = dict.fromkeys(("requirements.txt", name))  # which the others include
  pinned = by_name(sum(((ROOT / file).read_text().splitlines() for file in files), []))
  assert pinned.keys() - {"jaxlib"} == wanted.keys()  # jaxlib comes with jax
  for key, requirement in wanted.items():
    for version in re.findall(r"==([\d.]+)", str(pinned[key].specifier)):
      assert version in requirement.specifier
    if requirement.name != "jax" or not requirement.extras:
      assert importlib.metadata.version(requirement.name) in requirement.specifier
