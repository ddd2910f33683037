"""Hashes of the code that a figure depends on; they ignore comments, docstrings and formatting.

Nothing here imports jax: the process that runs a slot must outlive whatever a kernel does.
"""

import ast
import functools
import hashlib
import json
import pathlib

ROOT = pathlib.Path(__file__).parents[2]
# A change to anything else leaves rows valid. The slot's own files only say what runs when: a plan
# that is changed between two calls must not make the rows of the first one void.
_CODE = (
  "kernels/**/*.py",
  "kernels/**/*.json",
  "benchmarks/gpu/*.py",
  "freqformer/grid/layout.py",
  "freqformer/tables/*.py",
)
_NOT_CODE = ("benchmarks/gpu/slot*.py", "benchmarks/gpu/facts.py")
# A compiled candidate depends on these, and not on the table of configurations.
_BOTH = ("kernels/core/lists.py", "kernels/core/log2.py", "kernels/block_sparse/operands.py")
_KERNELS = {
  "hopper": (
    *_BOTH,
    "kernels/block_sparse/hopper*.py",
    "kernels/hopper/*.py",
    "kernels/block_sparse/tuning.py",
  ),
  "triton": (*_BOTH, "kernels/block_sparse/triton*.py", "kernels/triton/*.py"),
}


def code_digest() -> str:
  """Returns a short hash of the code that figures depend on; it needs no git."""
  return _digest(_CODE)


def kernels_digest(implementation: str = "hopper") -> str:
  """Returns a short hash of the code of an implementation's attention kernels."""
  return _digest(_KERNELS[implementation])


@functools.cache
def _digest(patterns: tuple[str, ...]) -> str:
  left_out = {path for pattern in _NOT_CODE for path in ROOT.glob(pattern)}
  found = hashlib.sha256()
  for path in sorted({path for pattern in patterns for path in ROOT.glob(pattern)} - left_out):
    found.update(f"{path.relative_to(ROOT)} {meaning(path.read_text(), path.suffix)}".encode())
  return found.hexdigest()[:12]


def meaning(text: str, suffix: str = ".py") -> str:
  """Returns what of a Python or JSON file's text matters, the same for every version of Python."""
  if suffix == ".json":
    return json.dumps(json.loads(text), sort_keys=True)
  tree = ast.parse(text)
  for node in ast.walk(tree):
    documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    if documented and ast.get_docstring(node, clean=False) is not None:
      node.body = node.body[1:]
  return repr(_plain(tree))


def _plain(node) -> object:
  """Returns a syntax tree as nested lists; `ast.dump` writes empty fields in some versions only."""
  if isinstance(node, list):
    return [_plain(each) for each in node]
  if isinstance(node, ast.AST):
    fields = [(name, _plain(x)) for name, x in ast.iter_fields(node) if x not in (None, [])]
    return [type(node).__name__, fields]
  return node
