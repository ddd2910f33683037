"""Batches of latents: endless and shuffled for training, in order for validation."""

from collections.abc import Iterator

import grain
import numpy as np

from freqformer.data.sources import Split

_THREADS = 4  # that read; never worker processes, whose state depends on their number


def train_iterator(split: Split, batch_size: int, seed: int) -> grain.DatasetIterator:
  """Returns endless batches `{"latent": [b, t, y, x, c], "label": [b], "index": [b]}`.

  Every epoch is shuffled anew from the seed. The records form one endless stream that is cut into
  batches, so a batch may span two epochs and may be larger than the data set. `get_state()` is a
  small JSON-able dict; `set_state` of it goes on with exactly the batches that would have come.
  """
  endless = grain.MapDataset.source(split).shuffle(seed=seed).repeat()
  # An endless stream has no remainder. Told so, grain counts batches in whole numbers; in floats
  # the count of batches of one record is beyond any length.
  stream = endless.batch(batch_size, drop_remainder=True)
  options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=2 * _THREADS)
  return iter(stream.to_iter_dataset(options))


def val_batches(split: Split, batch_size: int, limit: int = 0) -> Iterator[dict[str, np.ndarray]]:
  """Yields batches in the split's order, all of one size.

  A batch also has `weight`, float32 `[b]`: 1, or 0 where the last one is padded.

  Args:
    limit: most records, spread evenly over the split (whose order is often by class); 0 takes all.
  """
  count = min(len(split), limit or len(split))
  chosen = [i * len(split) // count for i in range(count)]
  for first in range(0, count, batch_size):
    part = chosen[first : first + batch_size]
    items = [split[i] for i in part] + [split[part[-1]]] * (batch_size - len(part))
    batch = {name: np.stack([item[name] for item in items]) for name in items[0]}
    yield {**batch, "weight": (np.arange(batch_size) < len(part)).astype(np.float32)}
