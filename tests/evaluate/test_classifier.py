"""The ridge classifier tells texture and motion apart, and fails where there is nothing to tell."""

import numpy as np

from freqformer.evaluate.classifier import class_accuracy


def clips(n, seed, tell=True):
  """Three classes of equal mean: still, moving, and coarse-grained noise."""
  rng, items = np.random.default_rng(seed), []
  for i in range(n):
    label = i % 3
    still = np.repeat(rng.standard_normal((1, 4, 4, 2)), 6, 0)
    x = [still, rng.standard_normal((6, 4, 4, 2)), 3 * still][label if tell else 0]
    items.append({"latent": x, "label": np.int32(label)})
  return items


def test_accuracy():
  samples = np.stack([clip["latent"] for clip in clips(30, 2)])
  labels = np.arange(30) % 3
  result = class_accuracy(clips(60, 0), clips(30, 1), samples, labels)
  assert result["samples"] > 0.9 and result["real_val"] > 0.9 and result["count"] == 30
  wrong = class_accuracy(clips(60, 0), clips(30, 1), samples, (labels + 1) % 3)
  assert wrong["samples"] < 0.1
  blind = class_accuracy(clips(300, 0, False), clips(300, 1, False), samples, labels)
  assert blind["real_val"] < 0.5
