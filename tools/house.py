"""Counts of how the code is written, to compare two states of the repository by one yardstick.

  python tools/house.py                   this checkout
  python tools/house.py --root=DIR        another checkout, e.g. of an older commit

Only files that git tracks are counted. Rates are per 1,000 lines of the code without tests.
"""

import argparse
import ast
import io
import pathlib
import statistics
import subprocess
import tokenize

WIDTH = 100  # columns
MANY_PARAMETERS = 7
RIDDLES = ("What", "Of", "How", "Who", "Whether", "Where", "Whose", "Which")
PARTS = ("freqformer", "kernels", "benchmarks", "tools", "configs", "top level", "tests")
PRODUCT = PARTS[:-1]


def tracked(root: pathlib.Path) -> list[pathlib.Path]:
  """Returns the paths, relative to `root`, of all tracked Python files."""
  command = ["git", "-C", str(root), "ls-files", "--", "*.py"]
  listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
  return [pathlib.Path(line) for line in listed.splitlines() if (root / line).exists()]


def part(path: pathlib.Path) -> str:
  """Returns the name in `PARTS` that a relative path belongs to."""
  return path.parts[0] if len(path.parts) > 1 else "top level"


def _comment_lines(text: str) -> int:
  tokens = tokenize.generate_tokens(io.StringIO(text).readline)
  return len({t.start[0] for t in tokens if t.type == tokenize.COMMENT})


def _bare_lines(text: str) -> int:
  """Returns how many lines are blank or hold nothing but a comment."""
  return sum(not line.strip() or line.lstrip().startswith("#") for line in text.splitlines())


def _functions(tree: ast.AST) -> list[ast.FunctionDef]:
  return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def _parameters(function) -> list[ast.arg]:
  a = function.args
  named = [*a.posonlyargs, *a.args, *a.kwonlyargs]
  return [p for p in named if p.arg not in ("self", "cls")]


def _public(tree: ast.Module) -> list[ast.FunctionDef]:
  """Returns the module's functions and its classes' methods whose names have no underscore."""
  owners = [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef))]
  bodies = [node for owner in owners for node in owner.body]
  return [n for n in bodies if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]


def _docstrings(tree: ast.Module) -> list[tuple[str, int]]:
  """Returns each docstring with the number of lines that it takes."""
  kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
  found = []
  for node in ast.walk(tree):
    if isinstance(node, kinds) and ast.get_docstring(node) is not None:
      literal = node.body[0]
      found.append((ast.get_docstring(node), literal.end_lineno - literal.lineno + 1))
  return found


def _unpacked(tree: ast.AST) -> int:
  """Returns how many assignments `a, b = x, y` there are: a tuple on both sides."""
  pairs = [
    n for n in ast.walk(tree) if isinstance(n, ast.Assign) and isinstance(n.value, ast.Tuple)
  ]
  return sum(any(isinstance(t, ast.Tuple) for t in n.targets) for n in pairs)


def _named_lambdas(tree: ast.AST) -> int:
  assigned = [n for n in ast.walk(tree) if isinstance(n, ast.Assign | ast.AnnAssign)]
  return sum(isinstance(n.value, ast.Lambda) for n in assigned)


def _module_files(files: list[pathlib.Path]) -> dict[str, pathlib.Path]:
  """Returns {dotted module name: path}; `kernels` is known by its installed name, too."""
  found = {}
  for path in files:
    parts = list(path.with_suffix("").parts)
    if parts[-1] == "__init__":
      parts = parts[:-1]
    found[".".join(parts)] = path
    if parts[:1] == ["kernels"]:
      found["freqformer." + ".".join(parts)] = path
  return found


def pulled_in(root: pathlib.Path, entry: str, files: list[pathlib.Path]) -> list[pathlib.Path]:
  """Returns the repository's files that `entry` imports, directly or not, itself included."""
  modules = _module_files(files)
  todo = [pathlib.Path(entry)]
  seen = set()
  while todo:
    path = todo.pop()
    if path in seen:
      continue
    seen.add(path)
    for node in ast.walk(ast.parse((root / path).read_text())):
      names = []
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom) and node.level == 0:
        names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
      todo += [modules[name] for name in names if name in modules]
  return sorted(seen)


def count(root: pathlib.Path) -> dict:
  """Returns all counts of a checkout."""
  files = tracked(root)
  texts = {path: (root / path).read_text() for path in files}
  lines = {path: len(text.splitlines()) for path, text in texts.items()}
  report = {}
  for name in PARTS:
    own = [path for path in files if part(path) == name]
    report[f"{name}: files"] = len(own)
    report[f"{name}: lines"] = sum(lines[path] for path in own)
  product = [path for path in files if part(path) in PRODUCT]
  trees = [ast.parse(texts[path]) for path in product]
  functions = [f for tree in trees for f in _functions(tree)]
  lengths = sorted(f.end_lineno - f.lineno + 1 for f in functions)
  parameters = [p for f in functions for p in _parameters(f)]
  public = [f for tree in trees for f in _public(tree)]
  docstrings = [d for tree in trees for d in _docstrings(tree)]
  total = sum(lines[path] for path in product)
  nodes = [node for tree in trees for node in ast.walk(tree)]

  def per_thousand(number: int) -> float:
    return round(1000 * number / total, 1)

  def share(number: int, of: int) -> float:
    return round(100 * number / max(1, of), 1)

  bare = sum(_bare_lines(texts[path]) for path in product)
  inside = sum(_bare_lines(text) for text, _ in docstrings)  # counted as docstrings already
  wide = sum(len(line) > WIDTH for path in product for line in texts[path].splitlines())
  report |= {
    "without tests: files": len(product),
    "without tests: lines": total,
    "without tests: lines of statements": total - bare + inside - sum(n for _, n in docstrings),
    "median file [lines]": statistics.median(lines[path] for path in product),
    "median function [lines]": statistics.median(lengths),
    "90 % of functions up to [lines]": lengths[int(0.9 * len(lengths))],
    "largest function [lines]": lengths[-1],
    f"functions of more than {MANY_PARAMETERS} parameters": sum(
      len(_parameters(f)) > MANY_PARAMETERS for f in functions
    ),
    "comments [% of lines]": share(sum(_comment_lines(texts[p]) for p in product), total),
    "docstrings [% of lines]": share(sum(n for _, n in docstrings), total),
    "public functions with a docstring [%]": share(
      sum(ast.get_docstring(f) is not None for f in public), len(public)
    ),
    "parameters annotated [%]": share(
      sum(p.annotation is not None for p in parameters), len(parameters)
    ),
    "lambdas per 1,000 lines": per_thousand(sum(isinstance(n, ast.Lambda) for n in nodes)),
    "named lambdas": sum(_named_lambdas(tree) for tree in trees),
    "tuple-assignments per 1,000 lines": per_thousand(sum(_unpacked(tree) for tree in trees)),
    f"lines over {WIDTH} columns [%]": share(wide, total),
    "docstrings that open with What, Of, How, ... [%]": share(
      sum(text.split(maxsplit=1)[0].rstrip(",:") in RIDDLES for text, _ in docstrings if text),
      len(docstrings),
    ),
  }
  for entry in ("train.py", "eval.py"):
    inside = pathlib.Path("freqformer/command") / entry  # the script at the root runs it by name
    own = pulled_in(root, inside if inside in files else entry, files)
    report[f"{entry} pulls in: files"] = len(own)
    report[f"{entry} pulls in: lines"] = sum(lines[path] for path in own)
  prose = [
    root / p for p in ("README.md", *(f"docs/{d.name}" for d in (root / "docs").glob("*.md")))
  ]
  report["words of README and docs"] = sum(len(path.read_text().split()) for path in prose)
  return report


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--root", type=pathlib.Path, default=pathlib.Path(__file__).parent.parent)
  args = parser.parse_args()
  for name, number in count(args.root).items():
    print(f"{name:52s} {number:>9,}")


if __name__ == "__main__":
  main()
