"""The table of docs/pretrained.md: what Wan 2.1 should take on an H100, before anybody measured it.

  JAX_PLATFORMS=cpu python -m benchmarks.pages.wan

Rows go to results/wan.json. Bytes and FLOPs are counted, seconds simulated, nothing is measured.
"""

import json
import math
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from absl import logging

from benchmarks import rows as row_files
from benchmarks.pages.complexity import fill, markdown
from freqformer.command import cli
from freqformer.evaluate.pretrained import RandomWeights
from freqformer.simulation.descriptions import load_gpu, load_model
from freqformer.simulation.forward import Plan, make_method
from freqformer.simulation.scaling import denoising_run, row
from freqformer.wan import vae
from freqformer.wan.text_encoder import TextEncoderConfig, parameter_shapes
from tools.program_cost import program_cost

ROOT = pathlib.Path(__file__).parents[2]
DOC = ROOT / "docs" / "pretrained.md"
ROWS = row_files.RESULTS / "wan.json"
_VAE = ROOT / "tests" / "golden" / "wan_vae_shapes.json"  # of the published files
COMMAND = "python -m benchmarks.pages.wan"
VIDEOS = {"wan2.1-1.3b": (480, 832), "wan2.1-14b": (720, 1280)}
FRAMES = 81
METHODS = ("dense", "adaspa", "sliding_tile", "freqformer")
NARROW = 2  # bytes of a number of 16 bits
# google/umt5-xxl, config.json.
TEXT_ENCODER = TextEncoderConfig(
  vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64
)


def decoding_flops(latent_shape) -> int:
  """Returns FLOPs of decoding a video with Wan 2.1's autoencoder, convolutions and products."""
  shapes = json.loads(_VAE.read_text())["2.1"]
  params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
  latents = jax.ShapeDtypeStruct((1, *latent_shape), jnp.float32)
  return program_cost(lambda params, x: vae.decode(params, x, 0.0, 1.0), params, latents).flops


def rows_of(name: str, size: tuple[int, int]) -> list[dict]:
  """Returns a row for each method at a size of video, with what is the same for all in each."""
  gpu = load_gpu("h100")
  card = load_model(name)
  pipe = RandomWeights(name, dtype="bfloat16")
  shape = pipe.latent_shape(FRAMES, size)
  grid = pipe.config().layout(shape).grid
  shared = {
    "model": name,
    "video": [FRAMES, *size],
    "weight_bytes": pipe.weight_bytes,
    "text_encoder_bytes": NARROW * sum(map(math.prod, parameter_shapes(TEXT_ENCODER).values())),
    "decoding_flops": decoding_flops(shape),
  }
  found = []
  for method in METHODS:
    plan = Plan(card, method, make_method(method), grid)
    forward = row(plan, gpu)
    run = denoising_run(plan, gpu)
    found.append(
      {
        "name": f"{name} {method}",
        "measured": False,
        "method": method,
        "gpu": gpu.name,
        "tokens": math.prod(grid),
        **shared,
        "forward_seconds": forward["seconds"],
        "attention_flops": forward["attention_flops"],
        "flops": forward["total_flops"],
        "steps": card.steps,
        "run_seconds": run["run_seconds"],
      }
    )
    logging.info("%s: %s", name, method)
  return found


def table(rows: Sequence[dict]) -> str:
  """Returns the page's table: a column for each model."""
  models = {name: [r for r in rows if r["model"] == name] for name in VIDEOS}

  def line(title: str, cell) -> list[str]:
    return [title, *(cell(own[0]) for own in models.values())]

  def by_method(title: str, cell) -> list[str]:
    return [title, *(" / ".join(map(cell, own)) for own in models.values())]

  def share(r):
    return f"{r['attention_flops'] / r['flops']:.0%}"

  methods = " / ".join(METHODS)
  return markdown(
    ["", *(f"{name}, {FRAMES} frames of {y}x{x}" for name, (y, x) in VIDEOS.items())],
    [
      line("tokens", lambda r: f"{r['tokens']:,}"),
      line("the transformer's weights", lambda r: f"{r['weight_bytes'] / 1e9:.2f} GB"),
      line("the text encoder's, alone", lambda r: f"{r['text_encoder_bytes'] / 1e9:.1f} GB"),
      line("attention's share of FLOPs, dense", share),
      by_method(f"a forward: {methods}", lambda r: f"{r['forward_seconds']:.2f}"),
      by_method("50 guided steps, seconds", lambda r: f"{r['run_seconds']:.0f}"),
      line("decoding the video", lambda r: f"{r['decoding_flops'] / 1e12:.0f} TFLOP"),
    ],
  )


def main(_):
  rows = [own for name, size in VIDEOS.items() for own in rows_of(name, size)]
  row_files.write_rows("wan", rows, COMMAND)
  DOC.write_text(fill(DOC.read_text(), {"expected": table(rows)}))
  print(table(rows))


if __name__ == "__main__":
  cli.run(main)
