"""Batches from a latent cache: endless and shuffled for training, in order for validation."""

import grain
import numpy as np

from freqformer.config import ConfigError
from freqformer.data.cache import LatentCache


def train_iterator(
  cache: LatentCache,
  batch_size: int,
  seed: int,
  start: int = 0,
  shard: tuple[int, int] = (0, 1),
  threads: int = 4,
) -> grain.DatasetIterator:
  """Endless batches `{"latent": [b, t, y, x, c], "label": [b], "index": [b]}`; every epoch is shuffled anew from the seed.

  The records form one endless stream that is cut into batches, so a batch may span two epochs and may be larger than the
  data set. `get_state()` is a small JSON-able dict; `set_state` of it goes on with exactly the batches that would have come.

  Args:
    cache: anything with `len` and `[i]` that gives the dicts above.
    batch_size: records per batch, of this process.
    start: batches to pass over, without reading them.
    shard: (process, processes): each process takes every so-manieth record of the one stream.
    threads: reading threads; never worker processes, whose state depends on their number.

  Raises:
    ConfigError: for an empty cache or a batch size below 1.
  """
  _check(cache, batch_size)
  stream = grain.MapDataset.source(cache).shuffle(seed=seed).repeat()
  if shard != (0, 1):
    stream = stream.slice(slice(shard[0], None, shard[1]))
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2 * threads, 2))
  iterator = iter(stream.batch(batch_size).to_iter_dataset(options))
  if start:
    iterator.set_state({"next_index": start})
  return iterator


def val_batches(cache: LatentCache, batch_size: int, limit: int | None = None):
  """Yields batches in the cache's order, all of one size, with a `weight` `[b]` float32: 1, or 0 where the last is padded.

  Args:
    limit: at most so many records, spread evenly over the cache (whose order is often by class); None or 0 takes all.
  """
  _check(cache, batch_size)
  count = min(len(cache), limit) if limit else len(cache)
  chosen = [i * len(cache) // count for i in range(count)]
  for first in range(0, count, batch_size):
    part = chosen[first : first + batch_size]
    items = [cache[i] for i in part] + [cache[part[-1]]] * (batch_size - len(part))
    batch = {name: np.stack([item[name] for item in items]) for name in items[0]}
    yield {**batch, "weight": (np.arange(batch_size) < len(part)).astype(np.float32)}


def _check(cache, batch_size):
  if batch_size < 1:
    raise ConfigError(f"The batch size must be at least 1, got {batch_size}.")
  if not len(cache):
    raise ConfigError(
      "The data cache holds no record; encode it again from a data set with usable clips."
    )
