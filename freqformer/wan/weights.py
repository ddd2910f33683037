"""Names of Wan's transformer in files, and what becomes of its arrays in a `WanDiT`.

Files are of two kinds: diffusers' names, and those of the authors, which are translated first.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping

import numpy as np

from freqformer.config import ConfigError

_LISTED = 12  # differences that a refusal names
# Leaves of a `WanDiT` outside its layers, by diffusers' names; with a dot both weight and bias.
_TOP = {
  "embed.": "patch_embedding.",
  "time_in.": "condition_embedder.time_embedder.linear_1.",
  "time_out.": "condition_embedder.time_embedder.linear_2.",
  "modulation.": "condition_embedder.time_proj.",
  "text_in.": "condition_embedder.text_embedder.linear_1.",
  "text_out.": "condition_embedder.text_embedder.linear_2.",
  "table": "scale_shift_table",
  "head.": "proj_out.",
}
# Those of layer i, behind "blocks.i.".
_LAYER = {
  "attention/out.": "attn1.to_out.0.",
  "attention/q_norm/scale": "attn1.norm_q.weight",
  "attention/k_norm/scale": "attn1.norm_k.weight",
  "text_norm.": "norm2.",
  "text/q.": "attn2.to_q.",
  "text/k.": "attn2.to_k.",
  "text/v.": "attn2.to_v.",
  "text/out.": "attn2.to_out.0.",
  "text/q_norm/scale": "attn2.norm_q.weight",
  "text/k_norm/scale": "attn2.norm_k.weight",
  "mlp_in.": "ffn.net.0.proj.",
  "mlp_out.": "ffn.net.2.",
  "table": "scale_shift_table",
}
_QKV = tuple(f"attn1.to_{name}." for name in "qkv")
# The authors' names, in the order in which they are replaced.
_AUTHORS = (
  (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
  (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
  (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
  (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
  (r"^time_projection\.1\.", "condition_embedder.time_proj."),
  (r"^head\.modulation$", "scale_shift_table"),
  (r"^head\.head\.", "proj_out."),
  (r"\.modulation$", ".scale_shift_table"),
  (r"\.self_attn\.([qkv])\.", r".attn1.to_\1."),
  (r"\.self_attn\.o\.", ".attn1.to_out.0."),
  (r"\.self_attn\.", ".attn1."),
  (r"\.cross_attn\.([qkv])\.", r".attn2.to_\1."),
  (r"\.cross_attn\.o\.", ".attn2.to_out.0."),
  (r"\.cross_attn\.", ".attn2."),
  (r"\.ffn\.0\.", ".ffn.net.0.proj."),
  (r"\.ffn\.2\.", ".ffn.net.2."),
  (r"\.norm3\.", ".norm2."),  # their first two norms have no parameters
)
# What only models that continue a picture have.
_OF_IMAGES = ("image_embedder", "add_k_proj", "k_img", "img_emb")


def diffusers_names(names: Iterable[str]) -> dict[str, str]:
  """Returns the name in the files by diffusers' name.

  Raises:
    ConfigError: they are of a model that continues a picture.
  """
  names = list(names)
  if found := next((name for name in names if any(part in name for part in _OF_IMAGES)), None):
    raise ConfigError(
      f"these weights are of an image-to-video model (they have {found}): name a folder of a "
      "text-to-video model, e.g. Wan2.1-T2V-1.3B-Diffusers."
    )
  if any(name.startswith("condition_embedder.") for name in names):
    return {name: name for name in names}
  found = {}
  for name in names:
    ours = name
    for pattern, replacement in _AUTHORS:
      ours = re.sub(pattern, replacement, ours)
    found[ours] = name
  return found


@dataclasses.dataclass
class WanWeights:
  """Gives the leaves of a `WanDiT` from the arrays of its files, each array once.

  An array is read when its leaf is asked for: 14 billion parameters are never there twice.

  Attributes:
    tensors: by diffusers' names or the authors'.
    heads: of attention.
    width: of the residual stream.
  """

  tensors: Mapping[str, np.ndarray]
  heads: int
  width: int

  def __post_init__(self):
    self._names = diffusers_names(self.tensors)
    self._unread = set(self._names)
    self._wrong: list[str] = []

  def leaf(self, name: str, shape: tuple[int, ...], layer: int | None = None) -> np.ndarray | None:
    """Returns an array for a leaf, None if files have no such leaf, as of a router.

    Args:
      name: of the leaf, in its layer if it is of one: "attention/qkv/kernel".
      shape: that the model wants; what differs is kept for `check`.
      layer: its number.
    """
    group, _, kind = name.rpartition("/")
    kind = {"kernel": "weight", "scale": "weight"}.get(kind, kind)
    prefix = "" if layer is None else f"blocks.{layer}."
    table = _TOP if layer is None else _LAYER
    if layer is not None and group == "attention/qkv":
      q, k, v = (self._take(f"{prefix}{part}{kind}") for part in _QKV)
      if q is None or k is None or v is None:
        return np.zeros(shape, np.float32)
      array = np.concatenate([self._paired(q), self._paired(k), v])
    elif name in table:
      array = self._take(prefix + table[name])
      if array is not None and name.startswith("attention/"):
        array = self._paired(array)
    elif f"{group}." in table:
      array = self._take(f"{prefix}{table[f'{group}.']}{kind}")
    else:
      return None
    if array is None:
      return np.zeros(shape, np.float32)
    if name == "embed/kernel":  # (c, t, y, x) of a patch become (t, y, x, c), as `patchify` has it
      array = np.moveaxis(array, 1, -1).reshape(len(array), -1)
    if name.endswith("kernel"):
      array = array.T
    if array.size != np.prod(shape, dtype=int):
      where = "" if layer is None else f"layer {layer}, "
      self._wrong.append(f"{where}{name}: {array.shape} in the files, the model wants {shape}")
      return np.zeros(shape, np.float32)
    return array.reshape(shape)

  def check(self):
    """Raises ConfigError if an array is missing, of another shape, or was never asked for."""
    wrong = [*self._wrong, *(f"{name}: unknown to the model" for name in sorted(self._unread))]
    if wrong:
      more = len(wrong) - _LISTED
      lines = wrong if more <= 0 else [*wrong[:_LISTED], f"... and {more} more"]
      raise ConfigError("the weights do not fit this model:\n  " + "\n  ".join(lines))

  def _take(self, name):
    self._unread.discard(name)
    if name not in self._names:
      self._wrong.append(f"{name}: missing in the files")
      return None
    return self.tensors[self._names[name]]

  def _paired(self, array):
    """Returns rows of q or k, or their gains, with pairs (2 i, 2 i + 1) at (i, i + d / 2)."""
    d = self.width // self.heads
    order = np.concatenate([np.arange(0, d, 2), np.arange(1, d, 2)])
    if len(array) != self.width:
      return array  # refused for its size
    return array.reshape(self.heads, d, *array.shape[1:])[:, order].reshape(array.shape)
