"""A ridge classifier on latents: do samples show the class that was asked for? Cheap, closed form, fitted on real data only.

Not a published metric: a check that class conditioning works where no pretrained video network is at hand. Its accuracy on
real validation clips always stands beside its accuracy on samples.
"""

import dataclasses

import numpy as np


def features(latents: np.ndarray) -> np.ndarray:
  """Texture, colour and motion of each clip: `[n, t, y, x, c] -> [n, 3 c]`.

  Per channel the mean, the log variance over the clip, and the log power of differences between neighbouring frames.
  """
  x = np.asarray(latents, np.float64)
  motion = np.diff(x, axis=1) if x.shape[1] > 1 else np.zeros_like(x)
  floor = 1e-3
  return np.concatenate(
    [
      x.mean((1, 2, 3)),
      np.log(x.var((1, 2, 3)) + floor),
      np.log((motion**2).mean((1, 2, 3)) + floor),
    ],
    -1,
  )


@dataclasses.dataclass(frozen=True)
class Ridge:
  """One-against-all least squares on standardised features."""

  mean: np.ndarray
  std: np.ndarray
  weights: np.ndarray  # [features + 1, classes]

  @classmethod
  def fit(cls, x: np.ndarray, labels: np.ndarray, classes: int, strength: float = 1.0) -> "Ridge":
    """`x` [n, features], int labels [n]; `strength` is the ridge in units of one sample."""
    mean, std = x.mean(0), x.std(0) + 1e-6
    z = np.concatenate([(x - mean) / std, np.ones((len(x), 1))], 1)
    target = 2.0 * np.eye(classes)[labels] - 1
    return cls(mean, std, np.linalg.solve(z.T @ z + strength * np.eye(z.shape[1]), z.T @ target))

  def accuracy(self, x: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows whose largest score is their label."""
    z = np.concatenate([(x - self.mean) / self.std, np.ones((len(x), 1))], 1)
    return float(((z @ self.weights).argmax(-1) == labels).mean())


def class_accuracy(train, val, latents: np.ndarray, labels: np.ndarray) -> dict:
  """Accuracies on samples and on real validation clips, of a classifier fitted on real training latents.

  Args:
    train, val: latent caches (sequences of dicts latent, label).
    latents: samples `[n, t, y, x, c]`, normalised like the caches; labels: the classes they were asked for.
  """

  def read(cache):
    items = [cache[i] for i in range(len(cache))]
    return features(np.stack([item["latent"] for item in items])), np.array(
      [int(item["label"]) for item in items]
    )

  (x, y), (x_val, y_val) = read(train), read(val)
  classes = int(max(y.max(), y_val.max(), labels.max())) + 1
  ridge = Ridge.fit(x, y, classes)
  return {
    "samples": ridge.accuracy(features(latents), labels),
    "real_val": ridge.accuracy(x_val, y_val),
    "real_train": ridge.accuracy(x, y),
    "chance": 1 / classes,
    "count": len(labels),
  }
