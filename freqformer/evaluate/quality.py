"""How close a video is to a reference: PSNR, SSIM and, with weights that the user brings, LPIPS.

Videos are uint8 `[b, t, y, x, 3]`. Every measure is taken per frame and then averaged over a video's frames: the mean of the
frames' PSNR, not the PSNR of their mean error, as papers on sparse video attention report it.
"""

import numpy as np

# Wang et al., "Image quality assessment: from error visibility to structural similarity" (2004): an 11 x 11 Gaussian window
# of standard deviation 1.5, K1 = 0.01, K2 = 0.03, range 255; windows that do not fit into the frame are left out.
SSIM_WINDOW, SSIM_SIGMA, SSIM_K = 11, 1.5, (0.01, 0.03)
_PEAK = 255.0


def psnr_frames(videos, reference) -> np.ndarray:
  """`10 log10(255^2 / MSE)` of every frame over its pixels and channels, dB, float64 `[b, t]`; inf where frames are equal.

  Raises:
    ValueError: if the videos are not uint8 `[b, t, y, x, 3]` of one shape.
  """
  videos, reference = _checked(videos, reference)
  error = np.square(videos.astype(np.float64) - reference).mean((2, 3, 4))
  with np.errstate(divide="ignore"):
    return 10 * np.log10(_PEAK**2 / error)


def psnr(videos, reference) -> np.ndarray:
  """Mean over frames of `psnr_frames`, `[b]`; inf if a whole video is equal.

  Ours: an equal frame among others counts as if one channel of one pixel were off by one, the least that can differ: a single
  equal frame would make the mean infinite.
  """
  frames = psnr_frames(videos, reference)
  least = 10 * np.log10(_PEAK**2 * np.prod(np.shape(videos)[2:]))
  return np.where(np.isinf(frames).all(1), np.inf, np.minimum(frames, least).mean(1))


def ssim(videos, reference) -> np.ndarray:
  """Structural similarity (see the constants above) of every frame and colour channel, averaged over both, float64 `[b]`.

  Raises:
    ValueError: for other shapes than `psnr_frames` takes, or frames smaller than the window.
  """
  videos, reference = _checked(videos, reference)
  if min(videos.shape[2:4]) < SSIM_WINDOW:
    raise ValueError(
      f"SSIM needs frames of at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, got {videos.shape[2:4]}."
    )
  c1, c2 = ((k * _PEAK) ** 2 for k in SSIM_K)

  def frame(a, b):  # [y, x, 3]; one at a time, so that memory does not grow with the video
    a, b = a.astype(np.float64), b.astype(np.float64)
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b, both = (
      _blur(a * a) - mean_a**2,
      _blur(b * b) - mean_b**2,
      _blur(a * b) - mean_a * mean_b,
    )
    same = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return (same * (2 * both + c2) / (var_a + var_b + c2)).mean()

  return np.array(
    [
      np.mean([frame(a, b) for a, b in zip(*pair, strict=True)])
      for pair in zip(videos, reference, strict=True)
    ]
  )


def difference(videos, reference) -> np.ndarray:
  """Where videos differ: absolute difference, mean over frames and channels, grey levels, float32 `[b, y, x]`."""
  videos, reference = _checked(videos, reference)
  return np.abs(videos.astype(np.float32) - reference).mean((1, 4))


def _blur(x: np.ndarray) -> np.ndarray:
  """The Gaussian window's weighted mean wherever it fits: `[y, x, c] -> [y - 10, x - 10, c]`."""
  place = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
  weights = np.exp(-(place**2) / (2 * SSIM_SIGMA**2))
  weights /= weights.sum()
  for axis in (0, 1):
    fits = x.shape[axis] - SSIM_WINDOW + 1
    x = sum(w * x.take(range(i, i + fits), axis) for i, w in enumerate(weights))
  return x


def _checked(videos, reference):
  videos, reference = np.asarray(videos), np.asarray(reference)
  for x in (videos, reference):
    if (
      x.dtype != np.uint8
      or x.ndim != 5
      or x.shape[-1] != 3
      or x.shape != videos.shape
      or 0 in x.shape
    ):
      raise ValueError(
        f"quality compares videos uint8 [b, t, y, x, 3] of one shape; got {videos.dtype} {list(videos.shape)} and "
        f"{reference.dtype} {list(reference.shape)}."
      )
  return videos, reference
