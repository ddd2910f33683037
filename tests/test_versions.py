"""Records name the commit that made them, and whether files had changed since."""

import subprocess

from freqformer import versions


def test_the_revision_tells_a_changed_tree(tmp_path, monkeypatch):
  def git(*arguments):
    identity = ("-c", "user.name=n", "-c", "user.email=e")
    subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

  (tmp_path / "file").write_text("a")
  git("init")
  git("add", "file")
  git("commit", "-m", "first")
  monkeypatch.setattr(versions, "CHECKOUT", tmp_path)
  clean = versions.git_revision()
  (tmp_path / "file").write_text("b")
  assert versions.git_revision() == f"{clean}+" and "+" not in clean
  monkeypatch.setattr(versions, "CHECKOUT", None)
  assert versions.git_revision() == "unknown"


def test_absent_packages_are_named():
  assert versions.versions(["numpy", "no-such-distribution"])["no-such-distribution"] == "absent"
