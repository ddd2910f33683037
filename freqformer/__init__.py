"""FreqFormer: attention that gives each frequency its own operator, and the model around it.

The public names below are loaded when they are first used, so that the import itself stays light.
`docs/api.md` shows each of them, and `attention` and `BlockMask` of `freqformer.kernels`.
"""

import importlib
import pathlib

# Public names and the modules that define them.
_PUBLIC = {
  "TileLayout": "grid.layout",
  "VideoDiT": "model.dit",
  "attach": "model.attached",
  "list_methods": "methods.registry",
  "load_pretrained": "evaluate.pretrained",
  "load_run": "evaluate.restore",
  "sample": "evaluate.draw",
  "sliding_tile": "tables.window",
  "tiles_where": "tables.where",
}
__all__ = ["CHECKOUT", *_PUBLIC]

_ROOT = pathlib.Path(__file__).parent.parent
_INSTALLED = (_ROOT / "freqformer" / "kernels").is_dir()
# The root of the checkout that this code runs from; None where a wheel was installed.
CHECKOUT = _ROOT if (_ROOT / "kernels").is_dir() and not _INSTALLED else None
if CHECKOUT is not None:
  __path__.append(str(CHECKOUT))  # its folder kernels/ is freqformer.kernels


def __getattr__(name: str):
  """Imports a public name when it is first asked for: JAX is slow to load."""
  if name not in _PUBLIC:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}.")
  return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
