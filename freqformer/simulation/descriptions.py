"""GPUs and models as small JSON files: the ones here, or a user's own by path."""

import dataclasses
import itertools
import json
import math
import pathlib
import re

from freqformer.config import ConfigError, build, require, require_one_of
from freqformer.cost import BlockShape

_HERE = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Rates:
  """Rates that a device achieves; the free parameters of the model.

  Attributes:
    attention_flops: FLOP/s of the two matmuls inside attention, softmax not included.
    softmax_exposed: share of the exponentials' time that the matmuls do not hide.
    matmul_flops: FLOP/s of large matrix products.
    hbm: bytes/s of device memory.
    l2: bytes/s of L2 over all SMs.
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
    require(self, "attention_flops matmul_flops hbm l2", above=0)
    require(self, "softmax_exposed item_s launch_s", least=0)
    if not self.link > 0:  # may be infinite: one device, or nothing known of its peers
      raise ValueError(f"link={self.link!r} must be above 0.")


@dataclasses.dataclass(frozen=True)
class Gpu:
  """One device: facts of its data sheet, and rates that it achieves.

  Attributes:
    tensor_flops: dense bf16, FLOP/s.
    sms: multiprocessors (cores of a CPU).
    exp_per_sm_s: exponentials per second of one.
    fitted: names of the rates that were fitted to measurements; all others are assumed.
    fitted_to: number of measured rows, and their device.
    fit_warnings: reasons not to trust that fit.
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
  fitted: tuple[str, ...] = ()
  fitted_to: str = ""
  fit_warnings: tuple[str, ...] = ()
  itemsize: int = 2

  def __post_init__(self):
    require(
      self, "tensor_flops hbm_bytes_per_s memory_bytes l2_bytes sms exp_per_sm_s itemsize", above=0
    )
    limits = {
      "attention_flops": "tensor_flops",
      "matmul_flops": "tensor_flops",
      "hbm": "hbm_bytes_per_s",
    }
    for rate, sheet in limits.items():
      value = getattr(self.rates, rate)
      limit = getattr(self, sheet)
      if value > limit:
        raise ValueError(f"rates.{rate}={value:g} exceeds the data sheet's {sheet}={limit:g}.")
    if unknown := set(self.fitted) - {f.name for f in dataclasses.fields(Rates)}:
      raise ValueError(f"fitted={self.fitted} names no rates: {', '.join(sorted(unknown))}.")

  @property
  def assumed(self) -> tuple[str, ...]:
    """Names of the rates that no measurement stands behind."""
    return tuple(f.name for f in dataclasses.fields(Rates) if f.name not in self.fitted)

  @property
  def rates_note(self) -> str:
    """A line that names the fitted and the assumed rates."""
    if not self.fitted:
      return "all rates assumed"
    text = f"{', '.join(self.fitted)} fitted to {self.fitted_to}; {', '.join(self.assumed)} assumed"
    if self.fit_warnings:
      text += f"; DOUBTFUL FIT: {'; '.join(self.fit_warnings)}"
    return text


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelCard(BlockShape):
  """One video diffusion transformer: sizes of its blocks and of its videos.

  Attributes:
    patch_channels: channels of a patched token, in and out.
    patch: latent cells per token (t, y, x).
    compression: pixels per latent cell (t, y, x).
    fps: frames per second of its videos.
    grid: tokens (t, y, x) of its usual video.
    steps: denoising steps of its card.
    forwards: forwards per step (2 with classifier-free guidance).
    parameters: published.
    padded_latents: latent frames of the last token frame that hold no video.
    grids: tokens (t, y, x) of further videos.
  """

  name: str
  title: str
  layers: int
  patch_channels: int
  patch: tuple[int, int, int]
  compression: tuple[int, int, int]
  fps: float
  grid: tuple[int, int, int]
  steps: int
  forwards: int
  parameters: float
  sources: tuple[str, ...]
  padded_latents: int = 0
  grids: tuple[tuple[int, int, int], ...] = ()

  def __post_init__(self):
    require(
      self,
      "layers width heads mlp patch_channels patch compression fps grid steps forwards parameters",
      above=0,
    )
    require(self, "text modulation modulation_rows", least=0)
    require(self, "padded_latents", least=0, below=self.patch[0])
    require_one_of(self, "text_mode", ("none", "joint", "cross"))
    if self.width % self.heads:
      raise ValueError(f"heads={self.heads} must divide width={self.width}.")
    if (self.text > 0) != (self.text_mode != "none"):
      raise ValueError(
        f"text={self.text} and text_mode={self.text_mode!r} must both say whether there is text."
      )
    for grid in self.grids:
      if min(grid) < 1:
        raise ValueError(f"grids={self.grids!r} must be of positive token counts.")

  def grid_of(self, tokens: int) -> tuple[int, int, int] | None:
    """Returns the model's own grid with so many tokens, None if it has none."""
    return next((g for g in (self.grid, *self.grids) if math.prod(g) == tokens), None)

  def video_seconds(self, grid) -> float:
    """Returns seconds of video in a token grid.

    Causal video codecs hold one more frame than whole groups; padding holds none.
    """
    latent = grid[0] * self.patch[0] - self.padded_latents
    return (1 + (latent - 1) * self.compression[0]) / self.fps


def known(kind: str) -> list[str]:
  """Returns the names of the files of a kind, "gpus" or "models"."""
  return sorted(p.stem for p in (_HERE / kind).glob("*.json"))


def write_gpu(gpu: Gpu, path) -> None:
  """Writes the JSON file of a GPU; raises ConfigError where that cannot be done."""
  values = dataclasses.asdict(gpu)
  if math.isinf(gpu.rates.link):  # JSON has no infinite numbers: absent means infinite
    del values["rates"]["link"]
  try:
    pathlib.Path(path).write_text(json.dumps(values, indent=1, allow_nan=False) + "\n")
  except OSError as error:
    raise ConfigError(f"the GPU cannot be written to {path}: {error.strerror or error}.") from error


def load_gpu(name: str) -> Gpu:
  """Reads a GPU by name or by the path of a JSON file; raises ConfigError where there is none."""
  return _load(Gpu, "gpus", name)


def load_model(name: str) -> ModelCard:
  """Reads a model by name or by the path of a JSON file; raises ConfigError where there is none."""
  return _load(ModelCard, "models", name)


def gpu_named(device_kind: str) -> str | None:
  """Returns "h100" for a device that calls itself `NVIDIA H100 80GB HBM3`; None if unknown."""
  words = re.split(r"[^a-z0-9]+", device_kind.lower())
  words += [first + second for first, second in itertools.pairwise(words)]  # "rtx 4090"
  return next((name for name in known("gpus") if name in words), None)


def _load(cls, kind: str, name: str):
  path = pathlib.Path(name) if name.endswith(".json") else _HERE / kind / f"{name.lower()}.json"
  if not path.is_file():
    needed = ", ".join(f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING)
    raise ConfigError(
      f"{kind[:-1]} {name!r} is unknown; known: {', '.join(known(kind))}. Or give the path of a "
      f"JSON file with {needed} (freqformer/simulation/{kind}/{known(kind)[0]}.json is an example)."
    )
  try:
    values = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
  try:
    return build(cls, values, root="")
  except ConfigError as error:
    raise ConfigError(f"{path}: {error}") from error
