"""Imports flow one way: train.py, eval.py, benchmarks -> freqformer -> kernels -> jax.

Within a part, no room (a folder, docs/design.md) imports another one back.
"""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# What each part of the tree may import of ours.
ALLOWED = {
  "kernels": {"kernels"},
  "freqformer": {"freqformer", "kernels"},
  "configs": {"configs"},
  "tools": {"tools", "freqformer", "kernels"},
  "benchmarks": {"benchmarks", "freqformer", "kernels", "tools"},
}
OURS = {*ALLOWED, "train", "eval", "tests"}
# Commands call what they show, and some of that is a command of its own.
BACK_AND_FORTH = {
  ("freqformer/command", "freqformer/pages"),
  ("freqformer/command", "freqformer/analysis"),
  ("benchmarks", "benchmarks/gpu"),
  ("benchmarks", "benchmarks/cpu"),
  ("benchmarks", "benchmarks/trained"),
}
# Files of one kernel implementation begin with its name.
IMPLEMENTATIONS = ("reference", "xla", "hopper", "triton")


def _imports(path):
  """Yields every module that a file imports, also inside functions; `from a import b` is a and a.b.

  Our kernels are called `kernels`, as their folder is.
  """
  for node in ast.walk(ast.parse(path.read_text())):
    names = []
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path.relative_to(ROOT)}: write absolute imports"
      names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    yield from (
      name.removeprefix("freqformer.") if "freqformer.kernels" in name else name for name in names
    )


def _files(folder):
  return sorted((ROOT / folder).rglob("*.py"))


def _room(path):
  """Returns the folder of a file or module, from the root of the tree."""
  return path.relative_to(ROOT).parent.as_posix()


def _arrows(part):
  """Returns {(room, imported room): one file that does it} within a part of the tree."""
  found = {}
  for path in _files(part):
    for name in _imports(path):
      place = ROOT.joinpath(*name.split("."))
      if name.split(".")[0] == part and place.with_suffix(".py").exists():
        found[_room(path), _room(place)] = path.relative_to(ROOT)
  return found


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_direction(folder):
  for path in _files(folder):
    for name in _imports(path):
      top = name.split(".")[0]
      assert top not in OURS or top in ALLOWED[folder], f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("part", ["kernels", "freqformer", "benchmarks"])
def test_no_room_imports_another_back(part):
  arrows = _arrows(part)
  assert arrows
  for (room, other), path in arrows.items():
    if (
      room != other and (room, other) not in BACK_AND_FORTH and (other, room) not in BACK_AND_FORTH
    ):
      assert (other, room) not in arrows, f"{path} imports {other}, {arrows[other, room]} {room}"


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_every_folder_says_what_it_is_for(part):
  for folder in {path.parent for path in _files(part)}:
    init = folder / "__init__.py"
    assert init.exists() and ast.get_docstring(ast.parse(init.read_text())), init.relative_to(ROOT)


def test_configs_are_imported_by_nobody():
  for path in [*_files("freqformer"), *_files("kernels"), ROOT / "train.py", ROOT / "eval.py"]:
    assert not [n for n in _imports(path) if n.split(".")[0] == "configs"], path.relative_to(ROOT)


def test_no_implementation_imports_another():
  for path in _files("kernels"):
    own = next((name for name in IMPLEMENTATIONS if path.stem.startswith(name)), None)
    for name in _imports(path) if own else ():
      stem = name.split(".")[2] if name.count(".") > 1 else ""
      other = next((known for known in IMPLEMENTATIONS if stem.startswith(known)), own)
      assert other == own, f"{path.relative_to(ROOT)} imports {name}"


def test_heavy_packages_stay_behind_their_files():
  for path in [p for folder in ALLOWED for p in _files(folder)]:
    for name in _imports(path):
      top = name.split(".")[0]
      assert top not in {"tensorflow", "decord"}, f"{path.relative_to(ROOT)} imports {name}"
      if top in {"triton", "jax_triton"}:
        assert path.stem.startswith("triton"), path.relative_to(ROOT)


def test_no_layer_names_a_method():
  """The seam: nothing outside methods/ compares against a method's name."""
  methods = {p.stem for p in _files("freqformer/methods")} - {"__init__", "base"}
  rooms = ("freqformer/model", "freqformer/train", "freqformer/diffusion")
  for path in [path for room in rooms for path in _files(room)]:
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Compare):
        constants = [c.value for c in ast.walk(node) if isinstance(c, ast.Constant)]
        named = {value for value in constants if isinstance(value, str)}
        assert not named & methods, (
          f"{path.relative_to(ROOT)}:{node.lineno} names {named & methods}"
        )
