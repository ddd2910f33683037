"""Measures of videos: how close they are to a reference (PSNR, SSIM), and artefacts of samples.

Videos are uint8 `[b, t, y, x, 3]`. PSNR and SSIM are taken per frame and then averaged over the
frames of a video, as papers on sparse video attention report them: the mean of the frames' PSNR,
not the PSNR of their mean error. Anything else than two videos of one shape is a ValueError.

Samples have no reference of their own. Artefacts are judged by statistics that real clips have,
too: seams between attention's tiles, and flicker.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from freqformer.evaluate.restore import Run
from freqformer.grid.transforms import dct

# Wang et al., "Image quality assessment: from error visibility to structural similarity" (2004).
# Windows that do not fit into the frame are left out.
SSIM_WINDOW = 11  # pixels a side
SSIM_SIGMA = 1.5  # standard deviation of the Gaussian window, pixels
SSIM_K = (0.01, 0.03)
_PEAK = 255.0  # grey levels
_UINT8 = np.dtype(np.uint8)


def psnr(videos: np.ndarray, reference: np.ndarray) -> np.ndarray:
  """Returns the mean over frames of `10 log10(255^2 / MSE)`, dB, `[b]`; inf for equal videos."""
  videos, reference = _checked(videos, reference)
  error = np.square(videos.astype(np.float64) - reference).mean((2, 3, 4))
  with np.errstate(divide="ignore"):
    frames = 10 * np.log10(_PEAK**2 / error)
  # choice: an equal frame among others counts as if one channel of one pixel were off by one, the
  # least that can differ. Otherwise a single equal frame would make the mean infinite.
  least = 10 * np.log10(_PEAK**2 * np.prod(np.shape(videos)[2:]))
  return np.where(np.isinf(frames).all(1), np.inf, np.minimum(frames, least).mean(1))


def ssim(videos: np.ndarray, reference: np.ndarray) -> np.ndarray:
  """Returns structural similarity, averaged over frames and colour channels, float64 `[b]`.

  Raises:
    ValueError: frames are smaller than the window.
  """
  videos, reference = _checked(videos, reference)
  b, t, y, x, _ = videos.shape
  if min(y, x) < SSIM_WINDOW:
    raise ValueError(f"SSIM needs frames of at least {SSIM_WINDOW} x {SSIM_WINDOW}, got {y} x {x}.")
  # One frame at a time, so that memory does not grow with the video.
  frames = [_ssim_of_frame(videos[at], reference[at]) for at in np.ndindex(b, t)]
  return np.reshape(frames, (b, t)).mean(1)


def _ssim_of_frame(a: np.ndarray, b: np.ndarray) -> float:
  """Returns the mean over windows and channels of frames `[y, x, 3]`."""
  c1, c2 = ((k * _PEAK) ** 2 for k in SSIM_K)
  a = a.astype(np.float64)
  b = b.astype(np.float64)
  mean_a = _blur(a)
  mean_b = _blur(b)
  variances = _blur(a * a) - mean_a**2 + _blur(b * b) - mean_b**2
  covariance = _blur(a * b) - mean_a * mean_b
  luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
  return (luminance * (2 * covariance + c2) / (variances + c2)).mean()


def difference(videos: np.ndarray, reference: np.ndarray) -> np.ndarray:
  """Returns the absolute difference, mean over frames and channels: grey levels, `[b, y, x]`."""
  videos, reference = _checked(videos, reference)
  return np.abs(videos.astype(np.float32) - reference).mean((1, 4))


# ---- artefacts of samples ------------------------------------------------------------------------


def seam_ratio(x: np.ndarray, period: Sequence[int]) -> np.ndarray:
  """Returns the mean |difference| of neighbours across tile borders over elsewhere, per axis.

  Real clips have about 1, because their content does not know where tiles end.

  Args:
    x: latents or videos `[b, t, y, x, c]`.
    period: cells from one border to the next per axis (t, y, x); the first tile begins at cell 0.

  Returns:
    float64 `[3]`; NaN for an axis on which all pairs of neighbours, or none, cross a border.
  """
  x = np.asarray(x, np.float64)
  ratios = []
  for axis, cells in enumerate(period, 1):
    others = tuple(a for a in range(x.ndim) if a != axis)
    steps = np.abs(np.diff(x, axis=axis)).mean(others)
    border = np.arange(1, len(steps) + 1) % cells == 0
    both = border.any() and not border.all()
    ratios.append(steps[border].mean() / steps[~border].mean() if both else np.nan)
  return np.array(ratios)


def flicker_energy(videos: np.ndarray) -> np.ndarray:
  """Returns each clip's mean squared coefficient above half the temporal Nyquist frequency, `[b]`.

  By an orthonormal DCT over the frames, whose coefficient k of n has the frequency k / n of
  Nyquist; unlike a Fourier transform it does not take a clip's end to be followed by its beginning.

  Args:
    videos: `[b, t, y, x, c]`.
  """
  frames = videos.shape[1]
  high = dct(frames)[frames // 2 + 1 :]
  return np.array([np.square(np.tensordot(high, clip, 1)).mean() for clip in videos])


def flicker(videos: np.ndarray, real: np.ndarray) -> float:
  """Returns the `flicker_energy` of videos over that of real clips of the same codec."""
  return float(flicker_energy(np.asarray(videos)).mean() / flicker_energy(np.asarray(real)).mean())


def artefacts(run: Run, latents: np.ndarray, real: np.ndarray) -> dict:
  """Returns seams and flicker of a run's samples as plain JSON.

  Seams are measured on latents, because decoded blocks have borders of the codec's own.

  Args:
    run: gives the tiles and the codec.
    latents: `[b, t, y, x, c]`, normalised.
    real: latents of real clips, which flicker is measured against.
  """
  config = run.model.config
  tile = config.layout(run.latent_shape).tile
  ratios = seam_ratio(latents, [e * p for e, p in zip(tile, config.patch, strict=True)])
  return {
    "seam_ratio": [None if np.isnan(ratio) else float(ratio) for ratio in ratios],
    "flicker": flicker(run.decode(latents), run.decode(real)),
  }


def spread(cache: Sequence[Mapping], most: int = 64) -> np.ndarray:
  """Returns latents of at most `most` clips, spread evenly over a cache: `[b, t, y, x, c]`."""
  places = np.linspace(0, len(cache) - 1, min(most, len(cache)))
  return np.stack([cache[round(place)]["latent"] for place in places])


def _blur(x: np.ndarray) -> np.ndarray:
  """Returns the Gaussian window's mean wherever it fits: `[y, x, c] -> [y - 10, x - 10, c]`."""
  place = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
  weights = np.exp(-(place**2) / (2 * SSIM_SIGMA**2))
  weights /= weights.sum()
  for axis in (0, 1):
    fits = x.shape[axis] - SSIM_WINDOW + 1
    x = sum(w * x.take(range(i, i + fits), axis) for i, w in enumerate(weights))
  return x


def _checked(videos, reference) -> tuple[np.ndarray, np.ndarray]:
  videos = np.asarray(videos)
  reference = np.asarray(reference)
  fine = videos.ndim == 5 and videos.shape[-1] == 3 and 0 not in videos.shape
  if not fine or videos.shape != reference.shape or {videos.dtype, reference.dtype} != {_UINT8}:
    raise ValueError(
      "quality compares videos uint8 [b, t, y, x, 3] of one shape; got "
      f"{videos.dtype} {list(videos.shape)} and {reference.dtype} {list(reference.shape)}."
    )
  return videos, reference
