"""The list of `tests/mutants.py` stays applicable, and its runner tells what it saw."""

import dataclasses
import subprocess
import sys

import pytest

from tests.mutants import MUTANTS, ROOT, Mutant, verdict


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_its_text_occurs_once(mutant):
  text = (ROOT / mutant.file).read_text()
  assert text.count(mutant.old) == 1
  assert "\n" not in mutant.old + mutant.new
  assert mutant.apply(text) != text
  compile(mutant.apply(text), mutant.file, "exec")


def test_their_tests_exist(request):
  """Those that this run has not collected are looked for: pytest's status is 4 where one is not."""
  collected = {item.nodeid.partition("@")[0] for item in request.session.items}  # before the group
  collected |= {node.partition("[")[0] for node in collected}  # all parameters of a test
  nodes = sorted({mutant.test for mutant in MUTANTS} - collected)
  if not nodes:
    return
  command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", *nodes]
  run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert run.returncode == 0, run.stdout + run.stderr


def test_verdicts(tmp_path):
  """Each in a tree of one module and its test; the module is afterwards as it was."""
  (tmp_path / "double.py").write_text("def double(x):\n  return 2 * x + 0\n")
  test = "from double import double\n\n\ndef test_double():\n  assert double(3) == 6\n"
  (tmp_path / "test_double.py").write_text(test)
  mutant = Mutant("thrice", "double.py", "2 * x", "3 * x", "test_double.py::test_double")
  cases = {
    "caught": mutant,
    "SURVIVED": dataclasses.replace(mutant, new="x * 2"),
    "did not apply": dataclasses.replace(mutant, old="4 * x"),
    "did not run": dataclasses.replace(mutant, test="test_double.py::test_triple"),
  }
  for want, case in cases.items():
    assert verdict(case, tmp_path)[0] == want
  # The test itself does not load: nothing was caught.
  assert verdict(dataclasses.replace(mutant, new="2 x"), tmp_path)[0] == "did not run"
  assert "2 * x + 0" in (tmp_path / "double.py").read_text()
