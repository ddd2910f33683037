"""Batches of latents: endless and shuffled for training, in order for validation."""

from collections.abc import Iterator, Sequence

import grain
import numpy as np

from freqformer.data.sources import Split

_THREADS = 4  # that read; never worker processes, whose state depends on their number


class _Rows:
  """Some rows of every batch of an endless stream, as records by number."""

  def __init__(self, stream: grain.MapDataset, batch_size: int, rows: Sequence[int]):
    self._stream = stream
    self._batch_size = batch_size
    self._rows = rows

  def __len__(self) -> int:
    return len(self._stream) // self._batch_size * len(self._rows)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    batch, place = divmod(index, len(self._rows))
    return self._stream[batch * self._batch_size + self._rows[place]]


def train_iterator(
  split: Split, batch_size: int, seed: int, rows: Sequence[int] | None = None
) -> grain.DatasetIterator:
  """Returns endless batches `{"latent": [b, t, y, x, c], "label": [b], "index": [b]}`.

  Every epoch is shuffled anew from the seed. The records form one endless stream that is cut into
  batches, so a batch may span two epochs and may be larger than the data set. `get_state()` is a
  small JSON-able dict; `set_state` of it goes on with exactly the batches that would have come,
  whichever their `rows` are.

  Args:
    rows: numbers of the rows of each batch that are read, by one of several processes; None reads
      all.
  """
  rows = range(batch_size) if rows is None else rows
  endless = grain.MapDataset.source(split).shuffle(seed=seed).repeat()
  # An endless stream has no remainder. Told so, grain counts batches in whole numbers; in floats
  # the count of batches of one record is beyond any length.
  own = grain.MapDataset.source(_Rows(endless, batch_size, rows))
  stream = own.batch(len(rows), drop_remainder=True)
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
