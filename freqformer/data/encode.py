"""From clips to latents, side by side in threads, in order.

Threads, not processes: PyAV, Pillow and NumPy release the GIL in decoding, resizing and matmuls.
On a busy 2-core machine 2 threads encoded 20 clips of 320x240 a second and 2 spawned processes,
their start included, 17; many cores were not measured.
"""

import collections
import concurrent.futures
import dataclasses
import os
from collections.abc import Iterator

import numpy as np

from freqformer.data.codec import DctCodec, reconstruction_psnr
from freqformer.data.decode import decode_clip
from freqformer.data.protocol import BrokenClip, Clip, DataConfig

MEASURED = 32  # clips per split whose reconstruction is measured, spread over the list


@dataclasses.dataclass(frozen=True)
class EncodedClip:
  """The views of one clip, encoded.

  Attributes:
    latents: float16 `[views, t, y, x, c]`, un-normalised.
    drawn: the manifest's entry on what the latents show, of `decode_clip`.
    psnr: of the first view through the codec in dB, or None if it was not measured.
  """

  latents: np.ndarray
  drawn: dict
  psnr: float | None


def encode_clip(
  config: DataConfig, codec: DctCodec, split: str, clip: Clip, measure: bool
) -> EncodedClip:
  """Decodes and encodes the views of a clip.

  Raises:
    BrokenClip: it cannot be decoded, or `config.short` leaves it out.
  """
  pixels, drawn = decode_clip(config, split, clip)
  latents = codec.encode(pixels).astype(np.float16)
  psnr = None
  if measure:
    psnr = reconstruction_psnr(pixels[:1], codec.decode(latents[:1], config.video_shape))
  return EncodedClip(latents, drawn, psnr)


def encode_all(
  config: DataConfig, codec: DctCodec, split: str, clips: list[Clip]
) -> Iterator[tuple[Clip, EncodedClip | BrokenClip]]:
  """Yields every clip in order with its latents, or with the reason why it has none."""
  # A container often has fewer CPUs than the machine; only Linux tells.
  allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
  workers = config.workers or len(allowed(0))
  measured = {i * len(clips) // MEASURED for i in range(MEASURED)}

  def encode(index: int):
    clip = clips[index]
    try:
      return clip, encode_clip(config, codec, split, clip, index in measured)
    except BrokenClip as error:
      return clip, error

  pool = concurrent.futures.ThreadPoolExecutor(workers)
  try:
    # A bounded window: finished clips wait in memory for a slow one, but not the whole data set.
    waiting = collections.deque()
    for index in range(len(clips)):
      waiting.append(pool.submit(encode, index))
      if len(waiting) > 3 * workers:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()
  finally:
    pool.shutdown(cancel_futures=True)
