"""Batches of every size are cut from one stream of records."""

import numpy as np
import pytest

from freqformer.data.loader import train_iterator

RECORDS = 3


class Records:
  """A split whose latents are their own numbers."""

  def __len__(self):
    return RECORDS

  def __getitem__(self, index):
    return {"latent": np.float32(index), "index": np.int32(index)}


@pytest.mark.parametrize("batch_size", range(1, 2 * RECORDS + 1))
def test_batches_of_every_size_are_cut_from_one_stream(batch_size):
  """From one record to two epochs; each epoch has every record once, and a state resumes."""
  single = train_iterator(Records(), 2, seed=5)
  want = np.concatenate([next(single)["index"] for _ in range(6 * RECORDS)])
  batches = train_iterator(Records(), batch_size, seed=5)
  first = next(batches)["index"]
  state = batches.get_state()
  second = next(batches)["index"]
  assert len(first) == len(second) == batch_size
  np.testing.assert_array_equal([*first, *second], want[: 2 * batch_size])
  for epoch in want.reshape(-1, RECORDS):
    assert sorted(epoch) == list(range(RECORDS))
  resumed = train_iterator(Records(), batch_size, seed=5)
  resumed.set_state(state)
  np.testing.assert_array_equal(next(resumed)["index"], second)


def test_processes_read_the_rows_of_one_stream():
  """Together they have its batches, in order, and each goes on from the state of any other."""
  whole = train_iterator(Records(), 4, seed=5)
  parts = [train_iterator(Records(), 4, seed=5, rows=rows) for rows in ([0, 3], [1, 2])]
  for _ in range(2 * RECORDS):
    batch = next(whole)["index"]
    first, second = (next(part)["index"] for part in parts)
    np.testing.assert_array_equal(batch, [first[0], *second, first[1]])
  state = parts[0].get_state()
  assert state == whole.get_state()
  batch = next(whole)["index"]
  parts[1].set_state(state)
  np.testing.assert_array_equal(next(parts[1])["index"], batch[1:3])
