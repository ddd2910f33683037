"""Settings of the GPU benchmark's tests."""

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def what_is_there_is_no_garbage():
  """A benchmark looks for garbage behind every row; a process of many tests has much to look at."""
  gc.collect()
  gc.freeze()
  yield
  gc.unfreeze()
