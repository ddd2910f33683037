"""Imports flow one way: train.py, eval.py, benchmarks -> freqformer -> kernels -> jax (docs/design.md)."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
OURS = {"freqformer", "kernels", "benchmarks", "configs", "train", "eval", "tests"}
# What each part of the tree may import of ours.
ALLOWED = {
  "kernels": {"kernels"},
  "freqformer": {"freqformer", "kernels"},
  "configs": {"configs"},
  "benchmarks": {"benchmarks", "freqformer", "kernels"},
}
BACKENDS = {"reference", "xla", "pallas_mgpu", "triton"}


def _imports(path):
  """Every absolute module name that a file imports, also inside functions; `from a import b` yields a and a.b."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path.relative_to(ROOT)}: write absolute imports, so that this test can read them"
      yield node.module
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _files(folder):
  return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_direction(folder):
  for path in _files(folder):
    for name in _imports(path):
      top = name.split(".")[0]
      assert top not in OURS or top in ALLOWED[folder], f"{path.relative_to(ROOT)} imports {name}"


def test_configs_are_imported_by_nobody():
  for path in [*_files("freqformer"), *_files("kernels"), ROOT / "train.py", ROOT / "eval.py"]:
    if path.exists():
      assert not [n for n in _imports(path) if n.split(".")[0] == "configs"], path.relative_to(ROOT)


def test_no_backend_imports_another():
  for path in _files("kernels"):
    own = next((b for b in BACKENDS if path.stem.startswith(b)), None)
    if own is None:
      continue
    for name in _imports(path):
      parts = name.split(".")
      other = next((b for b in BACKENDS if len(parts) > 1 and parts[1].startswith(b)), own)
      assert other == own, f"{path.relative_to(ROOT)} imports {name}"


def test_heavy_packages_stay_behind_their_files():
  for path in [p for folder in ALLOWED for p in _files(folder)]:
    for name in _imports(path):
      top = name.split(".")[0]
      assert top not in {"tensorflow", "decord"}, f"{path.relative_to(ROOT)} imports {name}"
      if top in {"triton", "jax_triton"}:
        assert path.parent.name == "kernels" and path.stem.startswith("triton"), path.relative_to(ROOT)


def test_no_layer_names_a_method():
  """The seam: nothing outside methods/ compares against a method's name."""
  methods = {p.stem for p in _files("freqformer/methods")} - {"__init__", "base"}
  for path in [ROOT / "freqformer" / f for f in ("attention.py", "dit.py", "training.py", "sampling.py")]:
    if not path.exists():
      continue
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Compare):
        named = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)}
        assert not named & methods, f"{path.relative_to(ROOT)}:{node.lineno} names {named & methods}"
