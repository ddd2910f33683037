"""A ridge classifier on latents: do samples show the class that was asked for?

It is cheap, has a closed form and is fitted on real data only. Not a published metric: a check that
class conditioning works where no pretrained video network is at hand. Its accuracy on samples is
always reported together with its accuracy on real validation clips.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

_FLOOR = 1e-3  # added to powers before the logarithm


def features(latents: np.ndarray) -> np.ndarray:
  """Returns texture, colour and motion of each clip: `[n, t, y, x, c] -> [n, 3 c]`.

  Per channel the mean, the log variance over the clip, and the log power of differences between
  neighbouring frames.
  """
  x = np.asarray(latents, np.float64)
  motion = np.diff(x, axis=1) if x.shape[1] > 1 else np.zeros_like(x)
  powers = [x.var((1, 2, 3)), (motion**2).mean((1, 2, 3))]
  return np.concatenate([x.mean((1, 2, 3)), *(np.log(p + _FLOOR) for p in powers)], -1)


@dataclasses.dataclass(frozen=True)
class Ridge:
  """One-against-all least squares on standardised features.

  Attributes:
    mean: of the training features, `[features]`.
    std: of the training features, `[features]`.
    weights: `[features + 1, classes]`; the last row is the bias.
  """

  mean: np.ndarray
  std: np.ndarray
  weights: np.ndarray

  @classmethod
  def fit(cls, x: np.ndarray, labels: np.ndarray, classes: int, strength: float = 1.0) -> "Ridge":
    """Fits a classifier.

    Args:
      x: features, `[n, features]`.
      labels: int `[n]`.
      classes: number of classes.
      strength: the ridge, in units of one sample.
    """
    ridge = cls(x.mean(0), x.std(0) + 1e-6, np.empty(0))
    z = ridge._standardised(x)
    target = 2.0 * np.eye(classes)[labels] - 1
    weights = np.linalg.solve(z.T @ z + strength * np.eye(z.shape[1]), z.T @ target)
    return dataclasses.replace(ridge, weights=weights)

  def accuracy(self, x: np.ndarray, labels: np.ndarray) -> float:
    """Returns the share of rows whose largest score is their label."""
    return float(((self._standardised(x) @ self.weights).argmax(-1) == labels).mean())

  def _standardised(self, x: np.ndarray) -> np.ndarray:
    """Returns standardised features with a column of ones."""
    return np.concatenate([(x - self.mean) / self.std, np.ones((len(x), 1))], 1)


def class_accuracy(
  train: Sequence[Mapping], val: Sequence[Mapping], latents: np.ndarray, labels: np.ndarray
) -> dict:
  """Returns accuracies on samples and on real clips of a classifier fitted on real latents.

  Args:
    train: cache of training latents (of dicts latent, label), which the classifier is fitted on.
    val: cache of validation latents.
    latents: samples `[n, t, y, x, c]`, normalised as the caches are.
    labels: the classes that the samples were asked for, int `[n]`.
  """
  x, y = _read(train)
  x_val, y_val = _read(val)
  classes = int(max(y.max(), y_val.max(), labels.max())) + 1
  ridge = Ridge.fit(x, y, classes)
  return {
    "samples": ridge.accuracy(features(latents), labels),
    "real_val": ridge.accuracy(x_val, y_val),
    "real_train": ridge.accuracy(x, y),
    "chance": 1 / classes,
    "count": len(labels),
  }


def _read(cache: Sequence[Mapping]) -> tuple[np.ndarray, np.ndarray]:
  """Returns features and labels of all clips."""
  items = [cache[i] for i in range(len(cache))]
  labels = np.array([int(item["label"]) for item in items])
  return features(np.stack([item["latent"] for item in items])), labels
