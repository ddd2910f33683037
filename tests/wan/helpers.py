"""Tiny models of Wan's shape for tests: weights by a formula, in folders as they are downloaded."""

import functools
import json
import pathlib

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from tests.golden import path
from tools.formula import weights

WEIGHTS = "diffusion_pytorch_model.safetensors"
PIECES = ("<pad>", "</s>", "<unk>", "\u2581", "\u2581a", "\u2581cat", "\u2581dog", "s")
_END = 1
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


def write_tokenizer(path, rule=True, end="</s>"):
  """Writes a `tokenizer.json` with the parts that UMT5's has, and limits that are not its own."""
  scores = [0.0, 0.0, -9.0, -3.0, -2.0, -1.0, -1.0, -2.0]
  pieces = [end if piece == "</s>" else piece for piece in PIECES]
  tokenizer = Tokenizer(models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=2))
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
  tokenizer.add_special_tokens([AddedToken(piece) for piece in ("<pad>", end)])
  if rule:
    tokenizer.post_processor = processors.TemplateProcessing(
      single=f"$A {end}", special_tokens=[(end, _END)]
    )
  tokenizer.enable_truncation(6)
  tokenizer.enable_padding(length=9)
  tokenizer.save(str(path))
  return path


TRANSFORMER = dict(
  _class_name="WanTransformer3DModel",
  num_attention_heads=3,
  attention_head_dim=16,
  num_layers=2,
  ffn_dim=72,
  in_channels=4,
  out_channels=4,
  patch_size=[1, 2, 2],
  text_dim=16,
  freq_dim=16,
  qk_norm="rms_norm_across_heads",
  cross_attn_norm=True,
)
TEXT_ENCODER = dict(
  model_type="umt5",
  feed_forward_proj="gated-gelu",
  vocab_size=40,
  d_model=16,
  d_kv=4,
  d_ff=24,
  num_layers=2,
  num_heads=4,
)
SCHEDULER = dict(
  _class_name="UniPCMultistepScheduler",
  prediction_type="flow_prediction",
  use_flow_sigmas=True,
  flow_shift=3.0,
)
_TEXT_IN = "condition_embedder.text_embedder.linear_1.weight"


def write_model(folder: pathlib.Path) -> pathlib.Path:
  """Writes a whole tiny model as it is downloaded; videos of 4 k + 1 frames, sides of 16 pixels."""
  shapes = names()["transformer"] | {_TEXT_IN: [48, TEXT_ENCODER["d_model"]]}
  parts = {
    "transformer": (TRANSFORMER, weights(shapes)),
    "text_encoder": (TEXT_ENCODER, weights(names()["text_encoder"])),
  }
  for name, (config, arrays) in parts.items():
    (folder / name).mkdir(parents=True)
    (folder / name / "config.json").write_text(json.dumps(config))
    save_file(arrays, folder / name / WEIGHTS)
  write_vae(folder / "vae", "vae21")
  (folder / "scheduler").mkdir()
  (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
  (folder / "tokenizer").mkdir()
  write_tokenizer(folder / "tokenizer" / "tokenizer.json")
  return folder
