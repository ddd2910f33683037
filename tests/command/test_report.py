"""The report's command: which pages it is asked for."""

import pytest

from freqformer.command.report import folders, gathered
from tests.command.process import call


@pytest.mark.parametrize(
  "given, runs",
  [
    (["--compare", "a", "b,c", "--out=x"], ["--compare=a", "--compare=b,c", "--out=x"]),
    (["--out=x", "--compare=a,b"], ["--out=x", "--compare=a,b"]),
    (["--workdir", "a"], ["--workdir", "a"]),
  ],
)
def test_runs_behind_the_flag(given, runs):
  assert gathered(["report", *given]) == ["report", *runs]


def test_commas_part_runs_unless_a_folder_has_them(tmp_path):
  trial = tmp_path / "lr=1,steps=2"
  trial.mkdir()
  assert folders([str(trial), "a,b"]) == [str(trial), "a", "b"]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_command_line(tmp_path):
  done = call(tmp_path, "freqformer/report.py", f"--workdir={tmp_path}")
  assert done.stdout.strip() == str(tmp_path / "report.html")
  for args, says in (
    ((), "give --workdir"),
    ((f"--compare={tmp_path}",), "needs two runs at least, got 1"),
    (("--compare", str(tmp_path), "absent"), "no folder of a run: it has no metrics.jsonl"),
    ((f"--workdir={tmp_path}", "--out=x"), "--out goes with --compare"),
    ((f"--workdir={tmp_path}", "--time_dense"), "train first"),
  ):
    assert says in call(tmp_path, "freqformer/report.py", *args, code=2).stderr
