"""A codec of pretrained weights: an image autoencoder of diffusers, frame by frame.

  --config.data.codec.name=freqformer.data.vae:ImageVae --config.data.codec.path=FOLDER
  --config.data.codec.factor=1,8,8 --config.data.codec.channels=4

FOLDER is what `AutoencoderKL.save_pretrained` wrote, or the `vae` folder of a downloaded model.
Clips are encoded once, into the cache; sampling decodes. Needs torch and diffusers, which no other
part does: pip install torch diffusers.
"""

import numpy as np

from freqformer.config import ConfigError
from freqformer.data.codec import Codec, CodecConfig

_FRAMES = 8  # at once


class ImageVae(Codec):
  """diffusers' `AutoencoderKL` on every frame alone; a latent is its mean times scaling_factor."""

  def __init__(self, config: CodecConfig):
    """Loads the weights.

    Raises:
      ConfigError: packages or weights are missing, or these are of other sizes.
    """
    super().__init__(config)
    try:
      import torch
      from diffusers import AutoencoderKL
    except ModuleNotFoundError as error:
      raise ConfigError(
        f"data.codec.name={config.name!r} needs {error.name}: pip install torch diffusers."
      ) from error
    try:
      self._vae = AutoencoderKL.from_pretrained(
        config.path, local_files_only=True, low_cpu_mem_usage=False
      ).eval()
    except (OSError, ValueError) as error:
      raise ConfigError(
        f"data.codec.path={config.path!r} is no folder of an AutoencoderKL: name the one that "
        "holds its config.json and weights."
      ) from error
    self._torch = torch
    own = self._vae.config
    sizes = (1, *[2 ** (len(own.block_out_channels) - 1)] * 2), own.latent_channels
    if (config.factor, config.channels) != sizes:
      raise ConfigError(
        f"the autoencoder in {config.path!r} has factor {sizes[0]} and {sizes[1]} channels; "
        f"data.codec says {config.factor} and {config.channels}."
      )

  @staticmethod
  def most_channels(factor):
    return 1 << 16

  def _analyse(self, video):
    frames = video.reshape(-1, *video.shape[2:]).transpose(0, 3, 1, 2)
    found = self._each(frames, lambda x: self._vae.encode(x).latent_dist.mean)
    found = found * self._vae.config.scaling_factor
    return found.transpose(0, 2, 3, 1).reshape(*video.shape[:2], *found.shape[2:], found.shape[1])

  def _synthesise(self, latents):
    scaled = latents / self._vae.config.scaling_factor
    frames = scaled.reshape(-1, *latents.shape[2:]).transpose(0, 3, 1, 2)
    found = self._each(frames, lambda x: self._vae.decode(x).sample)
    return found.transpose(0, 2, 3, 1).reshape(*latents.shape[:2], *found.shape[2:], 3)

  def _each(self, frames: np.ndarray, function) -> np.ndarray:
    """Applies a function of torch tensors to some frames at a time, without gradients."""
    torch = self._torch
    parts = []
    with torch.inference_mode():
      for first in range(0, len(frames), _FRAMES):
        part = torch.from_numpy(np.ascontiguousarray(frames[first : first + _FRAMES]))
        parts.append(function(part.float()).float().cpu().numpy())
    return np.concatenate(parts)
