"""Counts of how the code is written, to compare two states of the repository by one yardstick.

  python tools/house.py [DIR]     this checkout, or another one, e.g. of an older commit

Only files that git tracks are counted. Rates are per 1,000 lines of the code without tests.
"""

import ast
import collections
import io
import pathlib
import statistics
import subprocess
import sys
import tokenize

WIDTH = 100  # columns


def tracked(root: pathlib.Path) -> list[pathlib.Path]:
  """Returns the paths, relative to `root`, of all tracked Python files."""
  command = ["git", "-C", str(root), "ls-files", "--", "*.py"]
  listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
  return [pathlib.Path(line) for line in listed.splitlines() if (root / line).exists()]


def _words(text: str, tree: ast.Module) -> int:
  """Returns how many lines of a file hold docstrings, comments or nothing."""
  tokens = tokenize.generate_tokens(io.StringIO(text).readline)
  lines = {t.start[0] for t in tokens if t.type == tokenize.COMMENT and t.line.lstrip()[0] == "#"}
  lines |= {i for i, line in enumerate(text.splitlines(), 1) if not line.strip()}
  for node in ast.walk(tree):
    documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    if documented and ast.get_docstring(node) is not None:
      lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
  return len(lines)


def _unpacks(node: ast.Assign) -> bool:
  """Returns True for `a, b = x, y`: a tuple on both sides."""
  return isinstance(node.value, ast.Tuple) and any(isinstance(t, ast.Tuple) for t in node.targets)


def count(root: pathlib.Path) -> dict[str, float]:
  """Returns all counts of a checkout."""
  texts = {path: (root / path).read_text() for path in tracked(root)}
  lines = {path: len(text.splitlines()) for path, text in texts.items()}
  parts = collections.Counter()
  for path, number in lines.items():
    parts[path.parts[0] if len(path.parts) > 1 else "top level"] += number
  product = [path for path in texts if path.parts[0] != "tests"]
  trees = {path: ast.parse(texts[path]) for path in product}
  nodes = [node for tree in trees.values() for node in ast.walk(tree)]
  assigned = [node for node in nodes if isinstance(node, ast.Assign)]
  lengths = [n.end_lineno - n.lineno + 1 for n in nodes if isinstance(n, ast.FunctionDef)]
  total = sum(lines[path] for path in product)
  prose = [root / "README.md", *(root / "docs").glob("*.md")]
  return {
    **{f"{name} [lines]": parts[name] for name in sorted(parts)},
    "without tests [lines]": total,
    "of them code [lines]": total - sum(_words(texts[path], trees[path]) for path in product),
    "median file [lines]": statistics.median(lines[path] for path in product),
    "median function [lines]": statistics.median(lengths),
    "largest function [lines]": max(lengths),
    "named lambdas": sum(isinstance(node.value, ast.Lambda) for node in assigned),
    "tuple-assignments per 1,000 lines": 1000 * sum(map(_unpacks, assigned)) / total,
    f"lines over {WIDTH} columns": sum(
      len(line) > WIDTH for path in product for line in texts[path].splitlines()
    ),
    "words of README and docs": sum(len(path.read_text().split()) for path in prose),
  }


if __name__ == "__main__":
  given = sys.argv[1:] or [pathlib.Path(__file__).parent.parent]
  for name, number in count(pathlib.Path(given[0])).items():
    print(f"{name:40s} {number:>9,.4g}" if number % 1 else f"{name:40s} {number:>9,.0f}")
