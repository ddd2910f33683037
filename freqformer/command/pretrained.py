"""`eval.py --pretrained=DIR`: videos of a downloaded model, under one method or several.

  python eval.py --pretrained=DIR --prompts=prompts.txt --size=480x832 --frames=81 --steps=50
  python eval.py --pretrained=DIR --prompts="a cat;a dog" --method="adaspa(sparsity=0.8)"
  python eval.py --pretrained=DIR --prompts=prompts.txt \\
    --compare="dense,adaspa,freqformer(allocation=measured)"
  python eval.py --pretrained=random:wan2.1-1.3b --compare=dense,adaspa     speed only
  python eval.py --pretrained=DIR --prompts=prompts.txt --learned=routers.safetensors

The page and the videos go to --out, by default runs/pretrained/<name of the folder>.
"""

import dataclasses
import pathlib
import time

import jax
import numpy as np
from absl import logging

from freqformer.config import ConfigError
from freqformer.disk import size_text
from freqformer.evaluate import compare
from freqformer.evaluate.draw import FLOPS_ARE, attention_errors, draw
from freqformer.evaluate.learned import Learned
from freqformer.evaluate.predicted import add_speedups
from freqformer.evaluate.pretrained import Pretrained, RandomWeights, load_pretrained
from freqformer.pages.compare import slug, text_table, write_comparison, write_speed
from freqformer.pages.mp4 import grid_png
from freqformer.prompts import read_prompts, without_blank
from freqformer.train.mesh import all_devices
from freqformer.wan.prompts import PromptEmbeddings, read_embeddings

_LETTERS = 40  # of a prompt in a caption


@dataclasses.dataclass(frozen=True)
class Request:
  """A command line, read; None is as usual for the model.

  Attributes:
    folder: of the model.
    prompts: texts with ";" between them, or a file of them: text, or `.npz` of embeddings.
    methods: attention methods, the reference first; empty: that of `learned`, or dense attention.
    out: folder to write to.
    negative: prompt that guidance leads away from.
    frames: 4 k + 1.
    size: (rows, cols) in pixels.
    steps: of UniPC.
    guidance: scale.
    guidance_low: scale at low noise, of a model with two transformers.
    shift: of the noise levels.
    seed: of the noise.
    schedule: dense evaluations and layers.
    fps: of the mp4s; 0: the model's.
    metrics: by name, that methods are compared by.
    block: rows of a tile.
    honest: of a comparison: also draw the floor, and measure each method's error of attention.
    dtype: of matrices and activations.
    learned: file of a method's learned leaves, of `train.py --config=configs/wan.py`.
  """

  folder: str
  prompts: str | None
  methods: list[str]
  out: str | None
  negative: str
  frames: int | None
  size: tuple[int, int] | None
  steps: int | None
  guidance: float | None
  guidance_low: float | None
  shift: float | None
  seed: int
  schedule: str | None
  fps: float
  metrics: dict
  block: int
  honest: bool
  dtype: str | None = None
  learned: str | None = None


class Stages:
  """Seconds and memory of a command's stages, one after the other.

  Attributes:
    seconds: by stage.
    peak_bytes: by stage, the most that the device had in use up to its end; None where the device
      does not tell.
  """

  def __init__(self):
    self.seconds: dict[str, float] = {}
    self.peak_bytes: dict[str, int | None] = {}
    self._clock = time.monotonic()

  def end(self, name: str):
    """Ends a stage, which began where the one before ended."""
    now = time.monotonic()
    self.seconds[name] = now - self._clock
    self._clock = now
    stats = jax.local_devices()[0].memory_stats() or {}
    self.peak_bytes[name] = stats.get("peak_bytes_in_use")

  def split(self, name: str, part: str, seconds: float):
    """Counts some seconds of a stage as those of another one."""
    self.seconds[name] -= seconds
    self.seconds[part] = seconds

  def __str__(self) -> str:
    texts = []
    for name, seconds in self.seconds.items():
      peak = self.peak_bytes.get(name)
      texts.append(f"{name} {seconds:.1f} s" + (f" (peak {size_text(peak)})" if peak else ""))
    return "stages: " + ", ".join(texts)


def run(request: Request):
  """Writes videos and a page.

  Raises:
    ConfigError: the folder, a prompt, a number or a method cannot be used.
  """
  stages = Stages()
  pipe = load_pretrained(request.folder, block=request.block, dtype=request.dtype)
  config = pipe.sampling(request.steps, request.guidance, request.shift)
  evaluations = len(config.guided())
  frames = request.frames or pipe.frames
  size = request.size or pipe.size
  shape = pipe.latent_shape(frames, size)
  learned, methods = _methods(pipe, request)
  pipe.check_memory()
  for method in methods:  # refused before anything is loaded
    pipe.check(method, shape, evaluations, request.schedule)
  texts = embeddings(pipe, request.prompts, request.negative, any(config.guided()))
  stages.end("text")

  found = {
    method: pipe.at(
      method, frames, size, request.schedule, request.guidance_low, learned=learned.get(method)
    )
    for method in methods
  }
  compares = len(methods) > 1 and not isinstance(pipe, RandomWeights)
  if compares and request.honest:
    # The same numbers in another order: what differs is rounding, and no method can be nearer.
    block = request.block // 2 or 2
    first = methods[0]
    floor = pipe.at(
      first,
      frames,
      size,
      request.schedule,
      request.guidance_low,
      block=block,
      learned=learned.get(first),
    )
    found[f"{first} in tiles of {block}, the floor"] = floor
  stages.end("load")
  if isinstance(pipe, RandomWeights):
    _print_speed(pipe, found, texts, config, request, stages)
    return
  places = np.arange(len(texts.texts))
  rows, videos = compare.compare(
    found, texts.embeddings, places, request.seed, config, request.metrics, null=texts.negative
  )
  stages.end("sample")
  stages.split("sample", "decode", sum(row["decode_seconds"] for row in rows))
  if compares:
    add_speedups(rows, found.values(), evaluations, request.schedule)
    if request.honest:
      for row in rows[1:]:
        args = (found[row["method"]], texts.embeddings[:1], 0, request.seed, config)
        errors = attention_errors(*args, null=texts.negative)
        row["attention_error"] = float(errors.mean())
        row["attention_error_by_step_layer"] = np.round(errors, 6).tolist()
    stages.end("errors")

  out = _folder(pipe, request)
  captions = [text[:_LETTERS] for text in texts.texts]
  facts = {
    "pretrained": str(pipe.folder),
    "prompts": dict(enumerate(texts.texts)),
    "negative": request.negative,
    "samples": len(captions),
    **dataclasses.asdict(config),
    "schedule": request.schedule or "",
    "learned": {method: own.origin for method, own in learned.items()},
    "video_shape": (frames, *size),
    "latent_shape": shape,
    "dtype": pipe.dtype,
    "seed": request.seed,
    "seconds": {name: round(value, 3) for name, value in stages.seconds.items()},
    "peak_bytes": stages.peak_bytes,
    "device": all_devices()[0].device_kind,
    "flops_are": FLOPS_ARE,
    "density_is": "scored pairs / n^2 as run, of one sample",
  }
  page = write_comparison(out, facts | {"rows": rows}, videos, captions, request.fps or pipe.fps)
  for method, clips in videos.items():
    if method == methods[0]:
      grid_png(out / "grid.png", clips, captions)
  print(text_table(rows))
  print(stages)
  print(f"page: {page}")


def _print_speed(pipe: RandomWeights, found: dict, texts, config, request: Request, stages):
  """Prints and writes times, FLOPs and density of methods on random weights."""
  rows = []
  for method, own in found.items():
    logging.info("%s", method)
    places = np.arange(len(texts.texts))
    drawn = draw(own, texts.embeddings, places, request.seed, config, null=texts.negative)
    rows.append(compare.row(method, drawn, None, None, {}))
  stages.end("sample")
  add_speedups(rows, found.values(), len(config.guided()), request.schedule)
  facts = dataclasses.asdict(config) | {
    "pretrained": str(pipe.folder),
    "weights": "random: speed and memory only, attention over them is nearly uniform",
    "latent_shape": next(iter(found.values())).latent_shape,
    "dtype": pipe.dtype,
    "seconds": {name: round(value, 3) for name, value in stages.seconds.items()},
    "peak_bytes": stages.peak_bytes,
    "device": all_devices()[0].device_kind,
    "flops_are": FLOPS_ARE,
    "rows": rows,
  }
  page = write_speed(_folder(pipe, request), facts)
  print(text_table(rows))
  print(stages)
  print(f"random weights, speed only; page: {page}")


def _folder(pipe: Pretrained, request: Request) -> pathlib.Path:
  """Makes and returns the folder that is written to."""
  name = slug(pipe.folder.name) if isinstance(pipe, RandomWeights) else pipe.folder.resolve().name
  out = pathlib.Path(request.out or pathlib.Path("runs/pretrained") / name)
  out.mkdir(parents=True, exist_ok=True)
  return out


def _methods(pipe: Pretrained, request: Request) -> tuple[dict[str, Learned], list[str]]:
  """Returns learned leaves by the method that has them, and all methods.

  Raises:
    ConfigError: what was learned is of another model, or of none of the methods.
  """
  learned = pipe.opened(request.learned)
  methods = request.methods or [learned.method if learned else "dense"]
  if learned is None:
    return {}, methods
  own = {method: learned for method in methods if pipe.is_of(learned, method)}
  if not own:
    raise ConfigError(
      f"--learned={request.learned} was learned for {learned.method}, which is not among the "
      f"methods {', '.join(methods)}; leave --method out, or name the same."
    )
  return own, methods


def embeddings(
  pipe: Pretrained, given: str | None, negative: str, guided: bool
) -> PromptEmbeddings:
  """Returns embeddings of what `--prompts` gives.

  Args:
    given: texts with ";" between them, or a file of them: text, or `.npz` of embeddings.
    negative: prompt that guidance leads away from.
    guided: whether there is guidance.

  Raises:
    ConfigError: there is no prompt, or ready embeddings lack the negative one.
  """
  if isinstance(pipe, RandomWeights):
    return pipe.embed(["random"])
  if not given:
    raise ConfigError(
      '--pretrained needs --prompts: texts as "a cat;a dog", or a file with one in each line.'
    )
  path = pathlib.Path(given).expanduser()
  if path.suffix == ".npz":
    found = read_embeddings(path, pipe.config().text_width)
    if guided and found.negative is None:
      raise ConfigError(
        f"{path} has no array 'negative', which guidance needs; add one, or set --guidance=1."
      )
    return found
  lines = read_prompts(path) if path.suffix == ".txt" else given.split(";")
  return pipe.embed(without_blank(lines), negative if guided else None)
