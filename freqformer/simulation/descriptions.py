"""GPUs and models as small JSON files: the ones here, or a user's own by path."""

import dataclasses
import functools
import json
import math
import pathlib

from freqformer.config import ConfigError, build
from freqformer.cost import BlockShape

_HERE = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Rates:
  """What a device achieves; the free parameters of the model.

  Attributes:
    attention_flops: FLOP/s of the two matmuls inside attention, softmax not included.
    softmax_exposed: share of the exponentials' time that the matmuls do not hide.
    matmul_flops: FLOP/s of large matrix products.
    hbm: bytes/s of device memory. l2: bytes/s of L2 over all SMs.
    item_s: start, first loads and end of one work item (a query tile on an SM).
    launch_s: gap between two kernels.
    link: bytes/s that a GPU sends to its peers in an all-to-all.
  """

  attention_flops: float
  softmax_exposed: float
  matmul_flops: float
  hbm: float
  l2: float
  item_s: float
  launch_s: float
  link: float = math.inf

  def __post_init__(self):
    if min(dataclasses.astuple(self)) < 0 or 0 in (self.attention_flops, self.matmul_flops, self.hbm, self.l2, self.link):
      raise ValueError(f"rates must be positive (softmax_exposed, item_s and launch_s may be 0), got {self}.")


@dataclasses.dataclass(frozen=True)
class Gpu:
  """One device.

  Attributes:
    name, title: short and long.
    tensor_flops: data sheet, dense bf16, FLOP/s.
    hbm_bytes_per_s, memory_bytes: data sheet.
    l2_bytes: capacity.
    sms: multiprocessors (cores of a CPU). exp_per_sm_s: exponentials per second of one.
    rates: achieved.
    rates_from: where the rates come from.
    calibrated: whether they were fitted to measurements of that device.
    sources: of the facts.
    itemsize: bytes per element that it computes attention in.
  """

  name: str
  title: str
  tensor_flops: float
  hbm_bytes_per_s: float
  memory_bytes: float
  l2_bytes: float
  sms: int
  exp_per_sm_s: float
  rates: Rates
  rates_from: str
  sources: tuple[str, ...]
  calibrated: bool = False
  itemsize: int = 2

  def __post_init__(self):
    if min(self.tensor_flops, self.hbm_bytes_per_s, self.memory_bytes, self.exp_per_sm_s) <= 0 or self.sms < 1:
      raise ValueError(f"{self.name}: every number of a GPU must be positive.")
    if self.rates.attention_flops > self.tensor_flops or self.rates.hbm > self.hbm_bytes_per_s:
      raise ValueError(f"{self.name}: an achieved rate exceeds the data sheet: {self.rates}.")


@dataclasses.dataclass(frozen=True)
class ModelCard:
  """One video diffusion transformer.

  Attributes:
    name, title: short and long.
    layers, width, heads, mlp: of the blocks (two-matrix MLP).
    text: text tokens; text_mode: "none", "joint" or "cross" (see `BlockShape`).
    modulation, modulation_rows: see `BlockShape`.
    patch_channels: channels of a patched token, in and out.
    patch: latent cells per token (t, y, x); compression: pixels per latent cell (t, y, x).
    fps: frames per second of its videos. grid: tokens (t, y, x) of its usual video.
    steps: denoising steps of its card; forwards: forwards per step (2 with classifier-free guidance).
    parameters: published; what weights occupy is 2 bytes each.
    sources: of the facts.
  """

  name: str
  title: str
  layers: int
  width: int
  heads: int
  mlp: int
  patch_channels: int
  patch: tuple[int, int, int]
  compression: tuple[int, int, int]
  fps: float
  grid: tuple[int, int, int]
  steps: int
  forwards: int
  parameters: float
  sources: tuple[str, ...]
  text: int = 0
  text_mode: str = "none"
  modulation: int = 6
  modulation_rows: int = 0

  def __post_init__(self):
    if min(self.layers, self.width, self.heads, self.mlp, self.steps, self.forwards) < 1 or self.width % self.heads:
      raise ValueError(f"{self.name}: layers, width, heads, mlp, steps, forwards >= 1 and heads must divide the width.")
    if self.text_mode not in ("none", "joint", "cross"):
      raise ValueError(f"{self.name}: text_mode={self.text_mode!r} must be none, joint or cross.")

  @property
  def block(self) -> BlockShape:
    """Its block's sizes."""
    return BlockShape(
      self.width, self.heads, self.mlp, self.text, self.text_mode, self.modulation, self.modulation_rows or self.width
    )

  def video_seconds(self, grid) -> float:
    """Seconds of video in a token grid: causal video codecs hold one more frame than whole groups."""
    latent = grid[0] * self.patch[0]
    return (1 + (latent - 1) * self.compression[0]) / self.fps


def known(kind: str) -> list[str]:
  """Names of the files of a kind, "gpus" or "models"."""
  return sorted(p.stem for p in (_HERE / kind).glob("*.json"))


def load_gpu(name: str) -> Gpu:
  """A GPU by name or by the path of a JSON file.

  Raises:
    ConfigError: for an unknown name (lists the known ones and the format) or a file that does not describe one.
  """
  return _load(Gpu, "gpus", name)


def load_model(name: str) -> ModelCard:
  """A model by name or by the path of a JSON file; raises ConfigError as `load_gpu` does."""
  return _load(ModelCard, "models", name)


def _load(cls, kind: str, name: str):
  path = pathlib.Path(name) if name.endswith(".json") else _HERE / kind / f"{name.lower()}.json"
  if not path.is_file():
    needed = ", ".join(f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING)
    raise ConfigError(
      f"{kind[:-1]} {name!r} is unknown; known: {', '.join(known(kind))}. Or give the path of a JSON file with {needed} "
      f"(freqformer/simulation/{kind}/{known(kind)[0]}.json is an example)."
    )
  return _read(cls, path)


@functools.lru_cache
def _read(cls, path: pathlib.Path):
  try:
    values = json.loads(path.read_text())
  except ValueError as error:
    raise ConfigError(f"{path} is not JSON: {error}") from error
  try:
    return build(cls, values)
  except ConfigError as error:
    raise ConfigError(f"{path}: {error}") from error
