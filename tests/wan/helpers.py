"""Tiny models of Wan's shape for tests: weights by a formula, in folders as they are downloaded."""

import functools
import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

from tests.golden import path
from tools.formula import weights

WEIGHTS = "diffusion_pytorch_model.safetensors"
_GOLDEN = path("wan").with_suffix(".npz")


@functools.cache
def names() -> dict[str, dict[str, list[int]]]:
  """Shapes by name of each tiny model, as diffusers and transformers name them."""
  return json.loads(path("wan_names").read_text())


def golden(name: str) -> np.ndarray:
  """Returns what diffusers or transformers gave, channels last where they are first there."""
  with np.load(_GOLDEN) as arrays:
    return arrays[name]


def channels_last(x: np.ndarray) -> np.ndarray:
  """Returns `[b, ..., c]` of `[b, c, ...]`."""
  return np.moveaxis(x, 1, -1)


def vae_weights(name: str) -> dict[str, np.ndarray]:
  """Returns the weights of the tiny "vae21" or "vae22"."""
  return weights(names()[name])


def write_vae(folder: pathlib.Path, name: str, **config) -> pathlib.Path:
  """Writes a tiny VAE's config and weights, with statistics that are not trivial."""
  folder.mkdir(parents=True)
  save_file(vae_weights(name), folder / WEIGHTS)
  known = dict(
    _class_name="AutoencoderKLWan",
    z_dim=4,
    latents_mean=[0.1, -0.2, 0.3, 0.0],
    latents_std=[1.0, 2.0, 3.0, 0.5],
  )
  (folder / "config.json").write_text(json.dumps(known | config))
  return folder
