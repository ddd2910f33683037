"""A judge that names the class of a clip by its motion and shape, with its colours removed.

It is fitted in closed form, in seconds, to features of training clips (`motion_net`): Gaussian
groups of one covariance. Its groups are the classes and, for its answer "none of these", controls
made of the same clips: noise in the clip's colours, its frames shuffled, one frame frozen. A clip
far from all groups is none of them, too. To find colours useless the judge is also shown clips
whose colours were mixed and whose tones were redrawn.

Fit it on decoded training clips; `Judge.report` tells first what it makes of real clips that it has
not seen and of their controls. Only where it names those and refuses these do samples count.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from freqformer.config import ConfigError
from freqformer.evaluate import motion_net

NONE = -1  # label of what is none of the classes
# choice: of colour noise, shares of the clip's length and of the frame's height.
_SMOOTHNESS = ((0, 0), (0, 0.03), (0, 0.1), (0.15, 0.03), (0.15, 0.1))
# choice: views of a training clip and of each of its controls: as it is, cropped, in other tones.
VIEWS = 6
CONTROL_VIEWS = 2
_CROP = 0.85  # least side of a crop, as a share of the frame's
# choice: part of the covariance that is taken from its diagonal. The demo has as many clips as
# features.
_SHRINKAGE = 0.1
_LEAST_CLIPS = 4  # of a class
# choice: a clip may lie so much farther, in squares, than all but 1 % of clips that were left out.
_FARTHER = 1.5


# ---- controls ------------------------------------------------------------------------------------


def colour_noise(videos: np.ndarray, seed: int = 0) -> np.ndarray:
  """Returns noise with each clip's mean and covariance of colours, uint8 `[b, t, y, x, 3]`.

  Clips in turn are white, smooth in space, and smooth in space and slow (`_SMOOTHNESS`).
  """
  noisy = []
  for i, video in enumerate(videos):
    rng = np.random.default_rng([seed, i])
    pixels = video.reshape(-1, 3).astype(np.float32)
    noise = _smooth(rng.standard_normal(video.shape, np.float32), *_SMOOTHNESS[i % 5])
    spread = np.linalg.cholesky(np.cov(pixels.T) + 1e-3 * np.eye(3)).astype(np.float32)
    noise = noise @ spread.T + pixels.mean(0)
    noisy.append(np.clip(np.rint(noise), 0, 255).astype(np.uint8))
  return np.stack(noisy)


def _smooth(noise: np.ndarray, time: float, space: float) -> np.ndarray:
  """Returns noise `[t, y, x, 3]` under Gaussians in time and in space; mean 0, deviation 1.

  Args:
    time: deviation of the Gaussian, as a share of the clip.
    space: the same, as a share of the frame's height.
  """
  t, rows, cols = noise.shape[:3]
  frequencies = [
    np.fft.fftfreq(t)[:, None, None] * time * t,
    np.fft.fftfreq(rows)[:, None] * space * rows,
    np.fft.rfftfreq(cols) * space * rows,
  ]
  envelope = np.exp(-2 * np.pi**2 * sum(f**2 for f in frequencies))[..., None]
  spectrum = np.fft.rfftn(noise, axes=(0, 1, 2)) * envelope
  smooth = np.fft.irfftn(spectrum, (t, rows, cols), axes=(0, 1, 2))
  smooth -= smooth.mean((0, 1, 2))
  return (smooth / smooth.std((0, 1, 2))).astype(np.float32)


def shuffled(videos: np.ndarray, seed: int = 0) -> np.ndarray:
  """Returns clips whose frames are in an order of chance, each clip in its own."""
  orders = [np.random.default_rng([seed, i]).permutation(len(v)) for i, v in enumerate(videos)]
  return np.stack([video[order] for video, order in zip(videos, orders, strict=True)])


def frozen(videos: np.ndarray, seed: int = 0) -> np.ndarray:
  """Returns clips that show one frame of chance all the time."""
  t = videos.shape[1]
  chosen = [np.random.default_rng([seed, i]).integers(t) for i in range(len(videos))]
  return np.stack([np.repeat(v[i][None], t, 0) for v, i in zip(videos, chosen, strict=True)])


CONTROLS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
  "colour_noise": colour_noise,
  "shuffled": shuffled,
  "frozen": frozen,
}


# ---- the judge -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Judge:
  """Groups of one covariance in the space of features.

  Attributes:
    class_names: index = label.
    whiten: `[features, features]`: makes the groups' covariance the identity.
    centers: whitened means of the groups, `[groups, features]`.
    labels: int `[groups]`, class of each group; NONE for controls.
    limit: squared distance from the nearest group beyond which a clip is like none of them.
  """

  class_names: tuple[str, ...]
  whiten: np.ndarray
  centers: np.ndarray
  labels: np.ndarray
  limit: float = np.inf

  def named(self, videos: np.ndarray) -> np.ndarray:
    """Returns the class of each video uint8 `[b, t, y, x, 3]`, int `[b]`; NONE for none of them."""
    squares = self._squares(motion_net.features([videos]))
    return np.where(squares.min(1) > self.limit, NONE, self.labels[squares.argmin(1)])

  def _squares(self, features: np.ndarray) -> np.ndarray:
    """Returns squared Mahalanobis distances `[b, groups]`."""
    x = features.astype(np.float64) @ self.whiten
    return np.square(x[:, None] - self.centers).sum(-1)

  def report(
    self, samples: np.ndarray, labels: np.ndarray, real: np.ndarray, real_labels: np.ndarray
  ) -> dict:
    """Judges samples beside real clips and controls made of these, as plain JSON.

    Args:
      samples: videos uint8 `[b, t, y, x, 3]`.
      labels: int `[b]`, the classes that were asked for.
      real: clips that the judge was not fitted to.
      real_labels: their classes.

    Returns:
      `real` and `samples`: `_verdict` of each; `controls`: of each the share of clips that is still
      given the name of the class that it was made of.
    """
    controls = {}
    for name, make in CONTROLS.items():
      answers = self.named(make(real, 1))
      controls[name] = float(np.mean(answers == real_labels))
    return {
      "real": self._verdict(self.named(real), real_labels),
      "controls": controls,
      "samples": self._verdict(self.named(samples), labels),
      "backbone": f"{motion_net.NAME} {motion_net.weights_hash()}",
    }

  def _verdict(self, answers: np.ndarray, labels: np.ndarray) -> dict:
    """Returns the count, the shares that are named right, over all and by class; the classes most
    of whose clips are; and the confusion: rows are classes, columns answers, the last one none.
    """
    classes = len(self.class_names)
    confusion = np.zeros((classes, classes + 1), int)
    np.add.at(confusion, (labels, answers), 1)  # NONE, -1, is the last column
    by_class = {}
    for label in np.unique(labels):
      by_class[self.class_names[label]] = float(np.mean(answers[labels == label] == label))
    return {
      "count": len(labels),
      "named": float(np.mean(answers == labels)),
      "none": float(np.mean(answers == NONE)),
      "by_class": by_class,
      "classes_named": sum(share > 0.5 for share in by_class.values()),
      "confusion": confusion.tolist(),
    }


def fit(videos: np.ndarray, labels: np.ndarray, class_names: Sequence[str], seed: int = 0) -> Judge:
  """Fits a judge to training clips, a function of its arguments.

  Args:
    videos: uint8 `[b, t, y, x, 3]`, decoded as samples are.
    labels: int `[b]`.
    class_names: index = label.
    seed: of views and controls.

  Raises:
    ConfigError: a class has less than four clips.
  """
  labels = np.asarray(labels)
  counts = np.bincount(labels, minlength=len(class_names))
  if counts.min() < _LEAST_CLIPS:
    raise ConfigError(
      f"class {class_names[counts.argmin()]!r} has {counts.min()} clips; a judge needs at least "
      f"{_LEAST_CLIPS} of every class."
    )
  sets = [(labels, _views(videos, VIEWS, seed))]
  for i, make in enumerate(CONTROLS.values()):
    # Controls of a class are a group of their own: stripes that stand still are like no noise.
    groups = (i + 1) * len(class_names) + labels
    sets.append((groups, _views(make(videos, seed), CONTROL_VIEWS, seed + 1)))
  groups = np.concatenate([np.tile(groups, len(x) // len(groups)) for groups, x in sets])
  found = motion_net.features_of(np.concatenate([x for _, x in sets])).astype(np.float64)
  clips = np.concatenate([np.arange(len(x)) % len(labels) for _, x in sets])
  far = []
  for half in (0, 1):
    seen = clips % 2 == half
    judge = _fitted(found[seen], groups[seen], class_names)
    unseen = ~seen & (groups < len(class_names))
    far.append(judge._squares(found[unseen]).min(1))
  limit = _FARTHER * float(np.quantile(np.concatenate(far), 0.99))
  return dataclasses.replace(_fitted(found, groups, class_names), limit=limit)


def _fitted(features: np.ndarray, groups: np.ndarray, class_names: Sequence[str]) -> Judge:
  """Returns a judge without a limit, from features `[n, f]` and the group of each, `[n]`."""
  present = np.unique(groups)
  means = np.stack([features[groups == group].mean(0) for group in present])
  rest = features - means[np.searchsorted(present, groups)]
  covariance = rest.T @ rest / (len(rest) - len(present))
  covariance += _SHRINKAGE * (np.diag(np.diag(covariance)) - covariance)
  values, vectors = np.linalg.eigh(covariance)
  whiten = vectors / np.sqrt(values)
  classes = np.where(present < len(class_names), present, NONE)
  return Judge(tuple(class_names), whiten, means @ whiten, classes)


def _views(videos: np.ndarray, count: int, seed: int) -> np.ndarray:
  """Returns views of each clip as the network's input; view by view, clips in order."""
  views = [motion_net.prepare(videos)]
  for view in range(1, count):
    found = [_view(clip, np.random.default_rng([seed, view, i])) for i, clip in enumerate(videos)]
    views.append(np.concatenate(found))
  return np.concatenate(views)


def _view(video: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Returns a crop of a clip in other tones, float32 `[1, FRAMES, SIDE, SIDE]`."""
  rows, cols = video.shape[1:3]
  height = round(rows * rng.uniform(_CROP, 1))
  width = round(cols * rng.uniform(_CROP, 1))
  top = rng.integers(rows - height + 1)
  left = rng.integers(cols - width + 1)
  crop = video[None, :, top : top + height, left : left + width]
  if rng.uniform() < 0.5:
    return motion_net.prepare(crop)
  clip = motion_net.prepare(crop, rng.standard_normal(3).astype(np.float32))
  low, high = np.quantile(clip, (0.01, 0.99))
  # As if its palette were another one: tones bent, turned over or folded.
  stops = rng.uniform(0, 1, 3)
  stops *= 255 / max(np.ptp(stops), 1e-3)
  return motion_net.standardised(np.interp(clip, (low, (low + high) / 2, high), stops))
