"""FreqFormer: attention that gives each frequency its own operator, and the model around it."""

import pathlib

_CHECKOUT = pathlib.Path(__file__).parent.parent
if (_CHECKOUT / "kernels").is_dir() and not (_CHECKOUT / "freqformer" / "kernels").is_dir():
  __path__.append(str(_CHECKOUT))  # a checkout: its folder kernels/ is freqformer.kernels
