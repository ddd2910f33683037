"""Config dicts and command lines become dataclasses, or one sentence says why not."""

import dataclasses
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from freqformer.kernels.block_sparse.api import attention

from freqformer import entries
from freqformer.command import cli
from freqformer.command.files import define_config, read_config
from freqformer.config import ConfigError, build, require, with_defaults
from freqformer.methods.freqformer import FreqFormer
from freqformer.methods.head_profile import ProfileConfig
from freqformer.methods.registry import METHODS
from freqformer.train.experiment import experiment, home_expanded
from freqformer.train.resume import changes
from tests.tiny_config import get_config

ROOT = pathlib.Path(__file__).parents[2]
DEMO = str(ROOT / "configs" / "comparison.py")
TINY = ROOT / "tests" / "tiny_config.py"


@dataclasses.dataclass(frozen=True)
class Inner:
  rate: float = 0.5
  size: tuple[int, int] = (1, 2)


@dataclasses.dataclass(frozen=True)
class Outer:
  steps: int
  name: str = "a"
  inner: Inner = Inner()
  choice: str | tuple[int, ...] = "x"

  def __post_init__(self):
    if self.steps < 0:
      raise ValueError(f"{self.steps=} must be >= 0.")


def test_a_group_in_part_keeps_the_rest_of_its_fields_default():
  """`profile` of FreqFormer is not `ProfileConfig()`: what a config leaves out is FreqFormer's."""
  values = dict(steps=3, inner=dict(rate=1), choice=[1, 2])
  assert build(Outer, values) == Outer(3, "a", Inner(1.0, (1, 2)), (1, 2))
  profile = build(FreqFormer, dict(profile=dict(rows=8))).profile
  assert profile == dataclasses.replace(FreqFormer().profile, rows=8) != ProfileConfig(rows=8)
  full = with_defaults(FreqFormer, dict(profile=dict(rows=8), unknown=1))
  assert full["profile"] == vars(profile) and full["unknown"] == 1
  assert build(FreqFormer, with_defaults(FreqFormer, {})) == FreqFormer()


def test_a_read_config_has_every_key():
  """A file says what differs from the defaults; each other key is there for the command line."""
  config = read_config(DEMO)
  assert config.train.clip == 1.0 and isinstance(config.train.clip, float)
  assert config.model.attention.radial.decay == 1.0 and config.sample.shift == 1.0
  assert set(METHODS) < set(config.model.attention) and "methods" not in config.model.attention
  assert config.seed == 0 and config.data.codec.name == "dct"


@pytest.mark.parametrize(
  "values, message",
  [
    (dict(stesp=3), "config.Outer has no key 'stesp'; did you mean 'steps'"),
    (dict(), "lacks steps"),
    (dict(steps="3"), "config.steps must be int, got '3'"),
    (dict(steps=True), "config.steps must be int, got True"),
    (dict(steps=1, inner=dict(rat=1)), "config.inner has no key 'rat'; did you mean 'rate'"),
    (dict(steps=1, inner=dict(size=(1, 2, 3))), "config.inner.size must have 2 entries"),
    (dict(steps=1, inner=3), "config.inner must be a group of keys"),
    (dict(steps=1, choice=1.5), "config.choice must be str | tuple"),
    (dict(steps=-1), "config.Outer: steps=-1 must be >= 0"),
    (dict(steps=1, inner=dict(rate=float("nan"))), "config.inner.rate must be a finite number"),
  ],
)
def test_refusals(values, message):
  with pytest.raises(ConfigError) as error:
    build(Outer, values)
  assert message in str(error.value)


@pytest.mark.parametrize(
  "values, bounds, message",
  [
    (dict(rate=float("inf")), dict(above=0), "rate=inf must be above 0."),
    (dict(rate=float("nan")), dict(least=0, below=2), "rate=nan must be at least 0 and below 2."),
    (dict(size=(0, 2)), dict(least=0.5, most=2), "at least 0.5 and at most 2, in every entry."),
  ],
)
def test_bounds_name_one_field(values, bounds, message):
  require(Inner(), "rate size", least=0.5, most=2)
  with pytest.raises(ValueError, match=message):
    require(Inner(**values), "rate size", **bounds)


def test_filled_in_defaults_are_no_change_of_a_run():
  """A checkpoint that was written with the file's own keys goes on with the complete config."""
  assert changes(experiment(get_config()), experiment(read_config(TINY))) == {}


def experiment_of(*argv, everything=False):
  """Returns what train.py makes of a command line; each call has flags of its own.

  If `everything`, other flags come with it.
  """
  argv, values = ["train.py", *argv], flags.FlagValues()
  config = define_config(values, argv)
  flags.DEFINE_float("guidance", None, "", flag_values=values)
  flags.DEFINE_bool("dry_run", False, "", flag_values=values)
  samples = flags.DEFINE_integer("samples", 1, "", flag_values=values)
  cli.define_path("workdir", None, "", flag_values=values)
  cli.guarded(cli.parse)(argv, values)
  found = cli.guarded(lambda: experiment(config.value))()
  return (found, samples.value, values.workdir) if everything else found


# Arguments, "@" for "--config.model.attention.", and a part of the answer.
REFUSED = [
  ("--config.train.wandb=x", "config.train.wandb does not exist; config.train has accumulate, "),
  ("--config.train.mesh=2", "config.train.mesh does not exist; did you mean 'mesh'?"),
  ("--config.train.resume_from=x", "does not exist; config.train has accumulate, batch_size, "),
  ("--config.train.heads=2", "did you mean 'model.heads'?"),
  ("--config.trian.steps=2", "did you mean 'train.steps'?"),
  ("--config.steps=2", "did you mean "),
  ("--config.tensorboard=2", "does not exist; config has data, mesh, model, sample, seed, train."),
  ("--config.log.wandb=2", "does not exist; known: data, mesh, model, sample, seed, train."),
  ("--config.train.steps=1.5", "--config.train.steps=1.5 must be a whole number, e.g. 1000"),
  ("--config.train.steps=1e-1", "--config.train.steps=1e-1 must be a whole number"),
  ("--config.train.steps=1e99999999", "--config.train.steps=1e99999999 must be a whole number"),
  ("--samples=2.5", "--samples=2.5 must be a whole number"),
  ("--samples=two", "invalid literal for int() with base 10: 'two'"),
  ("--config.train.lr=abc", "could not convert string to float: 'abc'"),
  ("--config.train.lr=nan", "--config.train.lr=nan must be a finite number."),
  ("--config.train.lr=0", "config.train: lr=0.0 must be above 0."),
  ("--config.train.steps=0", "config.train: steps=0 must be at least 1."),
  ("--config.train.beta2=1.5", "beta2=1.5 must be at least 0 and below 1."),
  ("--config.train.schedule=cosin", "constant, cosine, trapezoid; did you mean 'cosine'?"),
  ("--config.train=3", "config.train is a group of keys; add one of them: .accumulate, "),
  ("@dense=3", "config.model.attention.dense is a group of keys; it has no keys"),
  (
    "--config.data.source=folders",
    "config.data.source='folders' is unknown; did you mean 'folder'?",
  ),
  ("--config.data.split=4", "split=4 must be at least 0 and at most 3"),
  ("--config.data.val_fraction=1.0", "val_fraction=1.0 must be above 0 and below 1"),
  ("--config.data.resolution=(0,4)", "resolution=(0, 4) must be at least 1, in every entry"),
  (
    "--config.data.codec.name=dtc",
    "one of dct, lowpass, none, wan_vae, module:Class; did you mean 'dct'",
  ),
  ("--config.data.codec.channels=999", "has 1 to 384 channels, got 999"),
  ("--config.data.codec.factor=(0,8,8)", "factor=(0, 8, 8) must be at least 1"),
  ("--config.model.heads=5", "not divisible by 5 heads"),
  ("--config.seed=-1", "seed=-1 must be at least 0"),
  ("--guidance=nan", "--guidance=nan must be a finite number."),
  ("train.steps=3", "'train.steps=3' belongs to no flag; did you mean --config.train.steps=3?"),
  ("lr=7", "did you mean --config.train.lr=7?"),
  ("sparse", "'sparse' belongs to no flag; flags begin with --"),
  ("@tile=(8,8,8)", "has 512 tokens, but a tile has only block=64 rows"),
  ("@tile=(0,4,4)", "config.model.attention: tile=(0, 4, 4) must be at least 1, in every entry."),
  ("@tile=(4,4)", "tile=(4, 4) must be empty or three extents"),
  ("@qk_gain=-1", "qk_gain=-1.0 must be at least 0."),
  ("@implementation=xl", "must be one of hopper, triton, xla, reference; did you mean 'xla'?"),
  ("@freqformer.window=(0,2,2)", "attention.freqformer: window=(0, 2, 2) must be at least 1"),
  ("@freqformer.filter=w", "freqformer: filter='w' must be one of"),
  ("@freqformer.router.budget=1.5", "router: budget=1.5 must be above 0 and at most 1."),
  ("@spatial_temporal.profile.row=8", "attention.spatial_temporal.profile.rows'?"),
  ("@radial.decay=0", "config.model.attention.radial: decay=0.0 must be above 0"),
  ("@method=radial(decay=0)", "config.model.attention.radial: decay=0.0 must be above 0"),
  ("@method=radial(deccay=1)", "attention.radial has no key 'deccay'; did you mean 'decay'?"),
  ("@method=freqfromer", "attention method 'freqfromer' is unknown; did you mean 'freqformer'?"),
  ("@method=radial(", "must read like radial, block_topk(density=0.2, coarse=none) or module:"),
  ("@layers=((0,2,'radial(decay=2)'),(2,None,'radial(decay=3)'))", "sets radial twice"),
]


@pytest.mark.parametrize("argument, answer", REFUSED, ids=[argument for argument, _ in REFUSED])
def test_command_lines_are_answered_in_one_sentence(argument, answer, capsys):
  with pytest.raises(SystemExit) as end:
    experiment_of("--config", DEMO, argument.replace("@", "--config.model.attention."))
  (line,) = capsys.readouterr().err.strip().split("\n")
  assert end.value.code == 2 and line.startswith("error: ")
  assert answer in line and "self." not in line


@pytest.mark.parametrize("text, value", [("1e5", 100_000), ("2E2", 200), ("7.0", 7), ("30", 30)])
def test_whole_numbers_may_be_written_as_floats(text, value):
  key, other = f"--config.train.steps={text}", f"--samples={text}"
  exp, samples, _ = experiment_of(f"--config={DEMO}", key, other, everything=True)
  apart = experiment_of(f"--config={DEMO}", "--config.train.steps", text, "--samples", text)
  assert exp.train.steps == samples == apart.train.steps == value
  assert build(Outer, dict(steps=float(text))).steps == value  # in a file
  assert experiment_of(f"--config={DEMO}", f"--config.train.lr={text}").train.lr == value


def test_the_home_folder_in_paths(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "mine.py").write_text(TINY.read_text())
  line = ("--config=~/mine.py", "--config.data.root=~/videos", "--config.data.cache=~/x/~")
  exp, _, workdir = experiment_of(*line, "--workdir=~/run", everything=True)
  assert (exp.data.root, exp.data.cache) == (f"{tmp_path}/videos", f"{tmp_path}/x/~")
  assert workdir == f"{tmp_path}/run"
  assert home_expanded(dict(root="a~", split=1)) == dict(root="a~", split=1)


PATH_WORDS = ("folder", "file", "picture", "has get_config")
# Flags whose help speaks of files, but which are not paths.
NO_PATHS = {"samples", "features", "compare", "config", "clips"}


@pytest.mark.parametrize("name", ["train", "eval", "measure", "sweep", "report", "demo"])
def test_every_flag_of_a_path_knows_the_home_folder(name):
  """None is declared as a plain string."""
  text = (ROOT / "freqformer" / "command" / f"{name}.py").read_text()
  plain = re.findall(r'flags\.DEFINE_string\(\s*"(\w+)",[^,]*,\s*f?"([^"]*)"', text)
  assert "cli.define_path(" in text
  for flag, about in plain:
    assert flag in NO_PATHS or not any(word in about.lower() for word in PATH_WORDS), flag


@pytest.mark.parametrize(
  "argument, want",
  [
    ("method=radial(decay=0.5)", [(4, "Radial(decay=0.5, sink=1)")]),
    (
      "layers=((0, 1, 'radial(sink=0)'), (1, None, 'dense'))",
      [(1, "Radial(decay=1.0, sink=0)"), (3, "Dense()")],
    ),
    # Of a method that the file does not name, too; its other fields stay.
    ("radial.decay=0.5", [(4, "Octaves(levels=2")]),
    ("method=freqformer(window=(3, 1, 1))", [(4, "mid_tiles=3, sink=0, anchors=0, window=(3, 1")]),
  ],
)
def test_fields_of_a_method_on_the_command_line(argument, want):
  flag = f"--config.model.attention.{argument}"
  runs = experiment_of(f"--config={DEMO}", flag, "--dry_run").model.runs()
  for (count, method), (expected, text) in zip(runs, want, strict=True):
    assert count == expected and text in str(method)


@pytest.mark.parametrize(
  "text, answer",
  [
    ("def get_config(:\n", "line 1: SyntaxError: "),
    ("\nimport no_such_module\n", "line 2: ModuleNotFoundError: No module named 'no_such_module'"),
    ("def get_config():\n  return lr\n", "line 2: NameError: name 'lr' is not defined"),
    ("def get_config():\n  pass\n", "returned None; let it return an ml_collections.ConfigDict"),
    ("", "has no get_config()"),
  ],
)
def test_a_config_file_that_does_not_run(tmp_path, text, answer):
  (tmp_path / "mine.py").write_text(text)
  with pytest.raises(ConfigError) as error:
    read_config(tmp_path / "mine.py")
  assert str(tmp_path / "mine.py") in str(error.value) and answer in str(error.value)


def test_what_else_ends_in_one_sentence(tmp_path, capsys):
  """A file in a folder's place, and a backend that this device does not have."""
  taken = tmp_path / "taken"
  taken.write_text("")
  q = np.zeros((1, 8, 1, 64), np.float32)
  in_the_way = "is a file where a folder is needed"
  for work, answer in (
    (lambda: taken.mkdir(), in_the_way),
    (lambda: (taken / "samples").mkdir(parents=True), in_the_way),
    (lambda: attention(q, q, q, implementation="pallas_mgpu"), "it runs on NVIDIA GPUs"),
  ):
    with pytest.raises(SystemExit):
      cli.guarded(work)()
    assert answer in capsys.readouterr().err


def test_a_reader_that_has_gone_is_no_error():
  """As with `| head -1`: a full pipe and then a closed one."""
  code = """
from freqformer.command import cli
def main(_):
  for _ in range(100_000):
    print("a line")
cli.guarded(main)(None)
"""
  line = [sys.executable, "-c", code]
  with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141


@pytest.mark.parametrize(
  "error, code, line",
  [
    (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
    (RuntimeError("Corrupted file\nat byte 7"), 1, "error: RuntimeError: Corrupted file (--verb"),
    (KeyError("x"), 1, "error: KeyError: 'x' (--verbosity=1 shows where it comes from.)"),
    (OSError("cannot"), 1, "error: OSError: cannot (--"),
    (FileNotFoundError(2, "No such file", "a/b"), 2, "error: a/b cannot be used: No such file."),
    (OSError(30, "Read-only file system", "a/b"), 2, "error: a/b cannot be used: Read-only file"),
    (RuntimeError("RESOURCE_EXHAUSTED: out of memory"), 2, "error: the device's memory is full"),
  ],
)
@pytest.mark.parametrize("verbose", [False, True])
def test_whatever_ends_a_command_is_one_line(error, code, line, verbose, monkeypatch, capsys):
  def main():
    raise error

  monkeypatch.setattr(cli.sys, "argv", ["x", *["--verbosity=1"] * verbose])
  with pytest.raises(SystemExit) as end:
    cli.guarded(main)()
  *trace, last = capsys.readouterr().err.strip().split("\n")
  assert end.value.code == code and last.startswith(line.split(" (--")[0] if verbose else line)
  assert bool(trace) == (verbose and code != 130)


def test_commands_of_argparse_know_the_verbosity(monkeypatch, capsys):
  seen = []

  def main(argv):
    seen.append(argv or list(cli.sys.argv))
    raise KeyError("x")

  monkeypatch.setattr(cli.sys, "argv", ["x", "--verbosity=1", "--grid=1"])
  before = cli.logging.get_verbosity()
  with pytest.raises(SystemExit):
    cli.run_plain(main)
  cli.logging.set_verbosity(before)
  assert seen == [["x", "--grid=1"]] and "Traceback" in capsys.readouterr().err


def test_an_interrupt_while_modules_are_imported(monkeypatch, capsys):
  def interrupted(*_, **__):
    raise KeyboardInterrupt

  monkeypatch.setattr(entries.runpy, "run_module", interrupted)
  with pytest.raises(SystemExit) as end:
    entries.train()
  assert end.value.code == cli.INTERRUPTED
  assert capsys.readouterr().err == "stopped by Ctrl-C\n"


@pytest.mark.parametrize(
  "wheel, driver, absent", [(True, False, True), (True, True, False), (False, False, False)]
)
def test_gpu_wheels_without_a_gpu_are_left_alone(monkeypatch, wheel, driver, absent):
  def load(name):
    if not driver:
      raise OSError(name)

  version = "1.0" if wheel else "absent"
  monkeypatch.setattr(cli, "versions", lambda names: dict.fromkeys(names, version))
  monkeypatch.setattr(cli.ctypes, "CDLL", load)
  assert cli.gpu_wheels_without_gpu() == absent
