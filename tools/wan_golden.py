"""Writes what diffusers and transformers compute with weights by a formula, for tests to match.

  python -m tools.wan_golden             checks: compares with tests/golden, writes nothing
  python -m tools.wan_golden --write     writes tests/golden/wan.npz and wan_names.json

Run by hand, in an environment of its own: pip install torch diffusers transformers ftfy numpy. The
tests read the two files alone. Everything is tiny, in float32, and on the CPU.
"""

import argparse
import json
import os
import pathlib
import sys

import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from tools.formula import values, weight

ROOT = pathlib.Path(__file__).parent.parent
ARRAYS = ROOT / "tests" / "golden" / "wan.npz"
NAMES = ROOT / "tests" / "golden" / "wan_names.json"
_THREADS = 2
_SAME = 1e-6  # relative: other processors sum in other orders

TRANSFORMER = dict(
  patch_size=(1, 2, 2),
  num_attention_heads=3,
  attention_head_dim=16,
  in_channels=4,
  out_channels=4,
  text_dim=12,
  freq_dim=16,
  ffn_dim=72,
  num_layers=2,
  cross_attn_norm=True,
  qk_norm="rms_norm_across_heads",
  eps=1e-6,
  rope_max_seq_len=64,
)
VAE21 = dict(
  base_dim=4,
  z_dim=4,
  dim_mult=[1, 2, 2, 2],
  num_res_blocks=1,
  temperal_downsample=[False, True, True],
)
VAE22 = VAE21 | dict(
  decoder_base_dim=6,
  in_channels=12,
  out_channels=12,
  is_residual=True,
  patch_size=2,
  scale_factor_spatial=16,
)
PLAIN = dict(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
SHIFTED = dict(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 3.0, 0.5])
TEXT_ENCODER = dict(
  vocab_size=40,
  d_model=16,
  d_kv=4,
  d_ff=24,
  num_layers=2,
  num_heads=4,
  feed_forward_proj="gated-gelu",
)
SCHEDULER = dict(
  prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
)


def tensor(name: str, *shape: int) -> torch.Tensor:
  """Returns an input by its name."""
  return torch.from_numpy(values(name, shape))


def filled(model: torch.nn.Module) -> tuple[torch.nn.Module, dict[str, list[int]]]:
  """Gives each parameter its formula's values; returns the model, and shapes by name."""
  shapes = {}
  for name, parameter in model.named_parameters():
    shapes[name] = list(parameter.shape)
    parameter.copy_(torch.from_numpy(weight(name, tuple(parameter.shape))))
  return model.eval(), shapes


def transformer_outputs(model: WanTransformer3DModel) -> dict[str, np.ndarray]:
  """Runs the transformer with a time per sample, and with one per token as TI2V does."""
  x = tensor("x", 2, 4, 3, 6, 10)
  text = tensor("text", 2, 5, 12)
  per_sample = torch.tensor([737, 12])
  per_token = (tensor("t", 2, 45).abs() * 500).long()
  return {
    "dit": model(x, per_sample, text, return_dict=False)[0].numpy(),
    "dit_tokens": model(x, per_token, text, return_dict=False)[0].numpy(),
  }


def vae_outputs(name: str, model: AutoencoderKLWan, side: int) -> dict[str, np.ndarray]:
  """Encodes and decodes 2 x 2 latent cells of `side` pixels: raw means, and pixels."""
  video = torch.tanh(tensor("video", 1, 3, 9, 2 * side, 2 * side))
  latents = tensor("z", 1, 4, 3, 2, 2)
  return {
    f"{name}_mean": model.encode(video).latent_dist.mean.numpy(),
    f"{name}_video": model.decode(latents, return_dict=False)[0].numpy(),
  }


def text_output(model: UMT5EncoderModel) -> np.ndarray:
  """Encodes two texts, one of them padded: every ninth row, zeros behind the text."""
  ids = (tensor("ids", 2, 160).abs() * 20).long()
  mask = torch.ones(2, 160, dtype=torch.long)
  mask[0, 90:] = 0
  rows = model(ids, mask).last_hidden_state * mask[..., None]
  return rows[:, ::9].numpy()


def pipeline_output(transformer: WanTransformer3DModel) -> np.ndarray:
  """Draws a guided sample in eight steps of UniPC: its normalised latents."""
  vae, _ = filled(AutoencoderKLWan(**VAE21, **SHIFTED))
  scheduler = UniPCMultistepScheduler(**SCHEDULER)
  pipeline = WanPipeline(
    tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=scheduler
  )
  pipeline.set_progress_bar_config(disable=True)
  drawn = pipeline(
    prompt_embeds=tensor("text", 1, 5, 12),
    negative_prompt_embeds=tensor("negative", 1, 5, 12),
    latents=tensor("noise", 1, 4, 3, 4, 6),
    height=32,
    width=48,
    num_frames=9,
    num_inference_steps=8,
    guidance_scale=5.0,
    output_type="latent",
  )
  return drawn.frames.numpy()


def golden() -> tuple[dict[str, np.ndarray], dict[str, dict[str, list[int]]]]:
  """Returns outputs by name, and of each model the shapes of its parameters by name."""
  names = {}
  transformer, names["transformer"] = filled(WanTransformer3DModel(**TRANSFORMER))
  arrays = transformer_outputs(transformer)
  vae, names["vae21"] = filled(AutoencoderKLWan(**VAE21, **PLAIN))
  arrays |= vae_outputs("vae21", vae, 8)
  vae, names["vae22"] = filled(AutoencoderKLWan(**VAE22, **PLAIN))
  arrays |= vae_outputs("vae22", vae, 16)
  encoder, names["text_encoder"] = filled(UMT5EncoderModel(UMT5Config(**TEXT_ENCODER)))
  arrays["umt5"] = text_output(encoder)
  arrays["pipe"] = pipeline_output(transformer)
  return arrays, names


def difference(found: np.ndarray, kept: np.ndarray) -> float:
  """Returns the norm of the difference over the norm of what is kept; infinity if shapes differ."""
  if found.shape != kept.shape:
    return float("inf")
  return float(np.linalg.norm(found - kept) / np.linalg.norm(kept))


def main() -> int:
  """Writes or compares; the exit status is 1 if something differs."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--write", action="store_true", help="replace the files in tests/golden")
  write = parser.parse_args().write
  torch.set_grad_enabled(False)
  torch.set_num_threads(_THREADS)
  torch.backends.mkldnn.enabled = False  # plain float32 convolutions, as the files were made with
  arrays, names = golden()
  if write:
    np.savez_compressed(ARRAYS, **arrays)
    NAMES.write_text(json.dumps(names))
    print(f"wrote {os.path.relpath(ARRAYS)} and {os.path.relpath(NAMES)}")
    return 0
  kept = np.load(ARRAYS)
  worst = 0.0
  for name in sorted({*arrays, *kept.files}):
    present = name in arrays and name in kept.files
    error = difference(arrays[name], kept[name]) if present else float("inf")
    worst = max(worst, error)
    print(f"{name:12s} {error:.1e}")
  same = names == json.loads(NAMES.read_text())
  print(f"names and shapes: {'equal' if same else 'DIFFERENT'}")
  return 0 if same and worst <= _SAME else 1


if __name__ == "__main__":
  sys.exit(main())
