"""From clips to latents, side by side in threads, in order.

Threads, not processes: PyAV, Pillow and NumPy release the GIL in decoding, resizing and matmuls.
On a busy 2-core machine 2 threads encoded 20 clips of 320x240 a second and 2 spawned processes,
their start included, 17; many cores were not measured.
"""

import collections
import concurrent.futures
import os
from collections.abc import Iterator

import numpy as np

from freqformer.data.codec import Codec
from freqformer.data.decode import decode_clip
from freqformer.data.embedder import make_embedder
from freqformer.data.embedding import read_embedding
from freqformer.data.files import fingerprint, stat
from freqformer.data.latents import read_latent
from freqformer.data.protocol import BrokenClip, Clip, DataConfig


def encode_clip(
  config: DataConfig, codec: Codec, split: str, clip: Clip
) -> tuple[np.ndarray, dict, np.ndarray]:
  """Decodes and encodes the views of a clip, or reads latents that are made already.

  Returns:
    Latents float16 `[views, t, y, x, c]`, un-normalised, what they show, of `decode_clip`, and the
    clip's embedding, of `read_embedding`.

  Raises:
    BrokenClip: it cannot be decoded, `config.short` leaves it out, or it has no embedding.
    ValueError: the codec's latents do not fit into a float16.
  """
  embedding = read_embedding(config, clip)  # before what takes long
  if config.source == "latents":
    latents, drawn = read_latent(config, codec, clip)
  else:
    pixels, drawn = decode_clip(config, split, clip)
    latents = codec.encode(pixels)
  if np.abs(latents).max() > np.finfo(np.float16).max:
    raise ValueError(
      f"The codec gives latents beyond float16 (65504) for {clip.key}; scale them in the codec."
    )
  return latents.astype(np.float16), drawn, embedding


def encode_all(
  config: DataConfig, codec: Codec, split: str, clips: list[Clip]
) -> Iterator[tuple[Clip, dict, tuple[np.ndarray, dict, np.ndarray] | BrokenClip]]:
  """Yields every clip in order, what its file is, and its latents or the reason why it has none.

  Whatever is wrong with one file costs this clip alone.
  """
  # A container often has fewer CPUs than the machine; only Linux tells.
  allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
  workers = config.workers or len(allowed(0))

  def encode(clip: Clip):
    entry = {"key": clip.key, "label": clip.label}
    if clip.caption:
      entry["caption"] = clip.caption
    try:
      entry["bytes"], entry["mtime_ns"] = stat(*clip.files)
      entry["fingerprint"] = fingerprint(*clip.files)
      return clip, entry, encode_clip(config, codec, split, clip)
    except BrokenClip as error:
      return clip, entry, error
    except OSError as error:
      return clip, entry, BrokenClip(clip.key, f"it cannot be read ({error.strerror})")

  if config.embedder:
    make_embedder(config.embedder, config.embedder_path)  # once, not by several threads at a time
  pool = concurrent.futures.ThreadPoolExecutor(workers)
  try:
    # A bounded window: finished clips wait in memory for a slow one, but not the whole data set.
    waiting = collections.deque()
    for clip in clips:
      waiting.append(pool.submit(encode, clip))
      if len(waiting) > 3 * workers:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()
  finally:
    pool.shutdown(cancel_futures=True)
