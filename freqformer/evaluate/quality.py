"""Measures how close a video is to a reference: PSNR, SSIM, and where they differ.

Videos are uint8 `[b, t, y, x, 3]`. Every measure is taken per frame and then averaged over the
frames of a video, as papers on sparse video attention report it: the mean of the frames' PSNR, not
the PSNR of their mean error. Anything else than two videos of one shape is a ValueError.
"""

import numpy as np

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
