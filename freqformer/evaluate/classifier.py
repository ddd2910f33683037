"""A ridge classifier on latents: do samples show the class that was asked for?

It is cheap, has a closed form and is fitted on real data only. Not a published metric: a check that
class conditioning works where no pretrained video network is at hand. Its accuracy on samples is
always reported together with its accuracy on real validation clips.
"""

from collections.abc import Mapping, Sequence

import numpy as np

_FLOOR = 1e-3  # added to powers before the logarithm
_RIDGE = 1.0  # strength, in units of one sample


def class_accuracy(
  train: Sequence[Mapping], val: Sequence[Mapping], latents: np.ndarray, labels: np.ndarray
) -> dict:
  """Returns accuracies on samples and on real clips of a classifier fitted on real latents.

  It is one-against-all least squares on standardised features.

  Args:
    train: cache of training latents (of dicts latent, label), which the classifier is fitted on.
    val: cache of validation latents.
    latents: samples `[n, t, y, x, c]`, normalised as the caches are.
    labels: the classes that the samples were asked for, int `[n]`.
  """
  x, y = _read(train)
  x_val, y_val = _read(val)
  classes = int(max(y.max(), y_val.max(), labels.max())) + 1
  mean = x.mean(0)
  std = x.std(0) + 1e-6

  def standardised(features: np.ndarray) -> np.ndarray:
    return np.pad((features - mean) / std, ((0, 0), (0, 1)), constant_values=1)  # ones: the bias

  z = standardised(x)
  target = 2.0 * np.eye(classes)[y] - 1
  weights = np.linalg.solve(z.T @ z + _RIDGE * np.eye(z.shape[1]), z.T @ target)

  def accuracy(features: np.ndarray, labels: np.ndarray) -> float:
    return float(((standardised(features) @ weights).argmax(-1) == labels).mean())

  return {
    "samples": accuracy(_features(latents), labels),
    "real_val": accuracy(x_val, y_val),
    "real_train": accuracy(x, y),
    "chance": 1 / classes,
    "count": len(labels),
  }


def _features(latents: np.ndarray) -> np.ndarray:
  """Returns colour, texture and motion of each clip: `[n, t, y, x, c] -> [n, 3 c]`."""
  x = np.asarray(latents, np.float64)
  motion = np.diff(x, axis=1) if x.shape[1] > 1 else np.zeros_like(x)
  powers = [x.var((1, 2, 3)), (motion**2).mean((1, 2, 3))]
  return np.concatenate([x.mean((1, 2, 3)), *(np.log(p + _FLOOR) for p in powers)], -1)


def _read(cache: Sequence[Mapping]) -> tuple[np.ndarray, np.ndarray]:
  """Returns features and labels of all clips."""
  items = [cache[i] for i in range(len(cache))]
  labels = np.array([int(item["label"]) for item in items])
  return _features(np.stack([item["latent"] for item in items])), labels
