"""A codec of pretrained weights: the video VAE of Wan 2.1 or 2.2, in JAX.

  --config.data.codec.name=wan_vae --config.data.codec.path=FOLDER
  --config.data.codec.factor=4,8,8 --config.data.codec.channels=16      (2.2: 4,16,16 and 48)

FOLDER is a model downloaded in diffusers' layout, or its folder `vae`. Clips have 4 k + 1 frames,
and the first latent frame shows the first frame alone. Latents are normalised as the published
models expect them, by the statistics in the VAE's config, and by nothing else.
"""

import threading

import jax
import numpy as np

from freqformer.config import ConfigError
from freqformer.data.codec import Codec, CodecConfig, LatentStatistics
from freqformer.wan import vae


class WanVae(Codec):
  """The posterior's mean of Wan's VAE, normalised; one clip at a time, on JAX's default device."""

  def __init__(self, config: CodecConfig):
    """Checks config and weights; these are read when a clip is first encoded or decoded.

    Raises:
      ConfigError: the folder holds no Wan VAE, or one of other sizes.
    """
    super().__init__(config)
    if not config.path:
      raise ConfigError(
        f"data.codec.name={config.name!r} needs data.codec.path, the folder of a Wan VAE or of a "
        "model with one in its folder vae."
      )
    try:
      self._vae = vae.open_vae(config.path)
    except ConfigError as error:
      raise ConfigError(f"data.codec.path: {error}") from error
    structure = self._vae.structure
    if (config.factor, config.channels) != (structure.factor, structure.channels):
      raise ConfigError(
        f"the VAE in {config.path!r} has factor {structure.factor} and {structure.channels} "
        f"channels; data.codec says {config.factor} and {config.channels}: set "
        f"data.codec.factor={','.join(map(str, structure.factor))} and "
        f"data.codec.channels={structure.channels}."
      )
    self._encode = jax.jit(vae.encode)
    self._decode = jax.jit(vae.decode)
    self._params = None
    # Clips take turns: each fills the device, and two would need the memory twice.
    self._turn = threading.Lock()

  @staticmethod
  def most_channels(factor):
    return 1 << 16

  @property
  def first_frames(self):
    return 1

  @property
  def statistics(self):
    channels = self.config.channels
    return LatentStatistics(np.zeros(channels, np.float32), np.ones(channels, np.float32))

  def latent_shape(self, frames, rows, cols):
    """Returns (t, y, x, c) of the latents of such a video.

    Raises:
      ConfigError: the sizes do not divide; names the nearest that do.
    """
    try:
      vae.check_video((frames, rows, cols), self.config.factor)
    except ConfigError as error:
      raise ConfigError(f"data.frames, data.resolution: {error}") from error
    return super().latent_shape(frames, rows, cols)

  def encode(self, video):
    self.latent_shape(*video.shape[1:4])  # nothing is padded: other sizes are refused
    return self._analyse(video.astype(np.float32) / 127.5 - 1)

  def _analyse(self, video):
    return self._each(self._encode, video)

  def _synthesise(self, latents):
    return self._each(self._decode, latents)

  def _each(self, function, arrays: np.ndarray) -> np.ndarray:
    """Applies a compiled function of the weights to one video, or its latents, at a time."""
    with self._turn:
      if self._params is None:
        self._params = jax.device_put(dict(self._vae.tensors))
      mean, std = self._vae.mean, self._vae.std
      found = [np.asarray(function(self._params, x[None], mean, std)) for x in arrays]
    return np.concatenate(found)
