"""Attention kernels for any device: one table (`BlockMask`), one entry point (`attention`).

The installed package is `freqformer.kernels`; at the root of a checkout `import kernels` works too.

  block_sparse/, linear/   softmax attention over listed tiles, linear over segments of rows
  around/, selection/      the passes around FreqFormer's attention; top-k, mass of tiles
  hopper/, triton/         parts of all kernels of a kind: launch, interpretation, the machine
  core/                    op record, target, partitioning, lists, scores in powers of two
"""

import importlib
import importlib.abc
import importlib.util
import sys

_PUBLIC = {"attention": "block_sparse.api", "BlockMask": "block_sparse.table"}
_INSTALLED = "freqformer.kernels"


def __getattr__(name: str):
  """Imports a public name when it is first asked for: JAX is slow to load."""
  if name not in _PUBLIC:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}.")
  return getattr(importlib.import_module(f"{_INSTALLED}.{_PUBLIC[name]}"), name)


class _SameModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
  """Finds `kernels.x` as the module `freqformer.kernels.x`: a copy would have its own classes."""

  def find_spec(self, name, path=None, target=None):
    if name.startswith("kernels."):
      return importlib.util.spec_from_loader(name, self)
    return None

  def create_module(self, spec):
    module = importlib.import_module(f"freqformer.{spec.name}")
    self._spec = module.__spec__
    return module

  def exec_module(self, module):
    module.__spec__ = self._spec  # the import system has put the other name's there


if __name__ == "kernels":
  sys.meta_path.insert(0, _SameModules())
