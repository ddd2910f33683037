"""Attention kernels for any device: one table (`BlockMask`), one entry point (`attention`).

Installed, this package is `freqformer.kernels`, and all code names it so. From the root of a
checkout `import kernels` works as well and gives the same modules.

  block_sparse/   softmax attention over listed tiles
  linear/         linear attention over segments of rows
  around/         the passes before and after attention in FreqFormer's layer
  selection/      top-k of scores, attention mass of tiles
  hopper/         the parts of all Hopper kernels
  core/           the record of an op, target device, partitioning, list codes
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
