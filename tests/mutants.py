"""One-line mistakes in the code, and the test that must go red for each: a table in mutants.txt.

    python -m tests.mutants [NAME ...]

Every mutant is written into a copy of the tree, never into the checkout, and its one test runs
there. The exit status is 1 unless every mutant is caught. That the tests pass without the mutants
is not checked here: `make test` does that. `tests/test_mutants.py` keeps the list applicable.
"""

import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent
TABLE = pathlib.Path(__file__).with_name("mutants.txt")
COPIED = (
  "benchmarks",
  "configs",
  "freqformer",
  "kernels",
  "tests",
  "tools",
  "pyproject.toml",
  "train.py",
  "eval.py",
)
TIMEOUT = 300  # seconds of one test; each takes a few


@dataclasses.dataclass(frozen=True)
class Mutant:
  """One mistake.

  Attributes:
    name: what it gets wrong.
    file: where, from the root of the tree.
    old: text that occurs there once.
    new: text that takes its place.
    test: pytest's node id of the test that must fail.
  """

  name: str
  file: str
  old: str
  new: str
  test: str

  def apply(self, text: str) -> str | None:
    """Returns the file's text with the mistake; None unless the old text occurs exactly once."""
    return text.replace(self.old, self.new) if text.count(self.old) == 1 else None


def read(table: str) -> tuple[Mutant, ...]:
  """Returns the mutants of a table, in the form that mutants.txt explains.

  Raises:
    ValueError: for a mistake that lacks one of its four lines.
  """
  _, *groups = table.split("\n@ ")
  found = []
  for group in groups:
    place, *lines = group.splitlines()
    file, tests = place.split()
    lines = [line for line in lines if line]
    for name, old, new, test in zip(*(lines[i::4] for i in range(4)), strict=True):
      if (old[:2], new[:1], test[:2]) != ("- ", "+", "! "):
        raise ValueError(f"the lines after {name!r} must begin with -, + and !.")
      found.append(Mutant(name, file, old[2:], new[2:], f"{tests}::{test[2:]}"))
  return tuple(found)


MUTANTS = read(TABLE.read_text())


def copy_tree(target: pathlib.Path):
  """Copies what the tests need, without caches."""
  for name in COPIED:
    if (ROOT / name).is_file():
      shutil.copy(ROOT / name, target / name)
    else:
      ignored = shutil.ignore_patterns("__pycache__")
      shutil.copytree(ROOT / name, target / name, ignore=ignored)


def verdict(mutant: Mutant, tree: pathlib.Path) -> tuple[str, str]:
  """Runs a mutant's test in a tree that has the mutant while it runs.

  Returns:
    "caught" or what went wrong, and a detail: the assertion that failed, or the error.
  """
  path = tree / mutant.file
  text = path.read_text()
  changed = mutant.apply(text)
  if changed is None:
    return "did not apply", f"{text.count(mutant.old)} occurrences"
  command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", mutant.test]
  # No byte code: Python would take a file of the same second and size for the one before.
  environment = {"JAX_PLATFORMS": "cpu", **os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
  path.write_text(changed)
  try:
    how = {"cwd": tree, "env": environment, "timeout": TIMEOUT}
    run = subprocess.run(command, capture_output=True, text=True, **how)
  except subprocess.TimeoutExpired:
    return "did not end", f"in {TIMEOUT} s"
  finally:
    path.write_text(text)
  errors = [line[1:].strip() for line in run.stdout.splitlines() if line.startswith("E ")]
  detail = next((line for line in errors if line.startswith("assert")), "".join(errors[:1]))
  if run.returncode > 1:  # the test is not there, or does not load
    return "did not run", detail
  return ("caught" if run.returncode else "SURVIVED"), detail


def main(names: list[str]) -> int:
  """Runs the named mutants, or all; the exit status."""
  unknown = set(names) - {mutant.name for mutant in MUTANTS}
  if unknown:
    print(f"unknown: {', '.join(sorted(unknown))}; choose from:")
    print("\n".join(mutant.name for mutant in MUTANTS))
    return 2
  chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
  missed = 0
  with tempfile.TemporaryDirectory() as directory:
    tree = pathlib.Path(directory)
    copy_tree(tree)
    for mutant in chosen:
      found, detail = verdict(mutant, tree)
      missed += found != "caught"
      print(f"{found}: {mutant.name}\n  {mutant.test}\n  {detail[:90]}", flush=True)
  print(f"{len(chosen) - missed} of {len(chosen)} mutants caught")
  return int(missed > 0)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
