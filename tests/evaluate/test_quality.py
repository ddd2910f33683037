"""Quality measures against closed forms, and against the same formulas written as loops."""

import itertools

import numpy as np
import pytest

from freqformer.config import ConfigError
from freqformer.evaluate import quality
from freqformer.evaluate.lpips import SMALLEST, array_shapes, load_lpips

RNG = np.random.default_rng(0)


def clips(b=2, t=3, y=16, x=20):
  return RNG.integers(0, 256, (b, t, y, x, 3), dtype=np.uint8)


def test_equal_videos():
  a = clips()
  assert np.isinf(quality.psnr(a, a)).all()
  np.testing.assert_allclose(quality.ssim(a, a), 1, atol=1e-12)
  assert not quality.difference(a, a).any()


def test_psnr_of_a_known_error():
  a = np.full((1, 2, 8, 8, 3), 100, np.uint8)
  b = a.copy()
  b[:, 0] += 5  # MSE 25
  b[:, 1, :, :4] -= 10  # MSE 50: half of the pixels
  want = 10 * np.log10(255**2 / np.array([25, 50]))
  np.testing.assert_allclose(quality.psnr(b, a), want.mean())  # not of the mean error
  assert quality.psnr(b, a) == quality.psnr(a, b)
  np.testing.assert_allclose(quality.difference(b, a)[0, :, 0], 7.5)


def test_one_equal_frame_does_not_make_the_mean_infinite():
  a = np.full((1, 2, 8, 8, 3), 100, np.uint8)
  b, c = a.copy(), a.copy()
  b[:, 0] += 5
  c[:, 0] += 5
  c[0, 1, 0, 0, 0] += 1
  assert np.isfinite(quality.psnr(b, a)) and np.isclose(quality.psnr(b, a), quality.psnr(c, a))


def test_ssim_of_constant_frames():
  """No variance: only the luminance term (2 a b + c1) / (a^2 + b^2 + c1) is left."""
  a, b = (np.full((1, 1, 12, 15, 3), level, np.uint8) for level in (100, 140))
  c1 = (0.01 * 255) ** 2
  np.testing.assert_allclose(
    quality.ssim(a, b), (2 * 100 * 140 + c1) / (100**2 + 140**2 + c1), rtol=1e-9
  )


def test_ssim_against_its_formula_window_by_window():
  a = clips(1, 1, 13, 14)
  b = np.clip(a.astype(int) + RNG.integers(-40, 40, a.shape), 0, 255).astype(np.uint8)
  at = np.arange(quality.SSIM_WINDOW) - quality.SSIM_WINDOW // 2
  window = np.exp(-(at[:, None] ** 2 + at**2) / (2 * quality.SSIM_SIGMA**2))
  window /= window.sum()
  c1 = (0.01 * 255) ** 2
  c2 = (0.03 * 255) ** 2
  found = []
  for y, x, c in itertools.product(range(3), range(4), range(3)):
    p, q = (v[0, 0, y : y + len(at), x : x + len(at), c].astype(float) for v in (a, b))
    mp, mq = (window * p).sum(), (window * q).sum()
    variances = (window * ((p - mp) ** 2 + (q - mq) ** 2)).sum()
    cov = (window * (p - mp) * (q - mq)).sum()
    found.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (variances + c2)))
  np.testing.assert_allclose(quality.ssim(a, b), np.mean(found), rtol=1e-9)


def test_more_noise_is_worse():
  a = clips(1, 2, 24, 24)
  noisy = [np.clip(a + RNG.normal(0, s, a.shape), 0, 255).astype(np.uint8) for s in (2, 10, 40)]
  for measure in (quality.psnr, quality.ssim):
    values = [measure(n, a)[0] for n in noisy]
    assert values == sorted(values, reverse=True) and len(set(values)) == 3


@pytest.mark.parametrize(
  "a, b",
  [
    (clips(), clips(t=2)),
    (clips().astype(np.float32), clips()),
    (clips()[0], clips()[0]),
    (clips(t=0), clips(t=0)),
  ],
)
def test_refuses_what_are_not_two_videos(a, b):
  with pytest.raises(ValueError, match="of one shape"):
    quality.psnr(a, b)


def test_ssim_refuses_frames_smaller_than_its_window():
  with pytest.raises(ValueError, match="at least 11 x 11"):
    quality.ssim(clips(y=10), clips(y=10))


# ---- LPIPS, on made-up weights ------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  path = tmp_path_factory.mktemp("lpips") / "alex.npz"

  arrays = {}
  for name, shape in array_shapes().items():
    spread = np.sqrt(2 / np.prod(shape[1:])) if len(shape) == 4 else 0.1
    arrays[name] = RNG.normal(0, spread, shape)
    if "lin" in name:
      arrays[name] = np.abs(arrays[name])
  np.savez(path, **arrays)
  return path


def test_lpips_is_a_distance(weights):
  lpips = load_lpips(weights)
  a = clips(2, 2, 32, 40)
  near = np.clip(a.astype(int) + 3, 0, 255).astype(np.uint8)
  assert np.allclose(lpips(a, a), 0, atol=1e-6)
  assert (0 < lpips(near, a)).all() and (lpips(near, a) < lpips(clips(2, 2, 32, 40), a)).all()
  np.testing.assert_allclose(lpips(near, a), lpips(a, near), rtol=1e-4)


def test_lpips_against_loops(weights):
  """The whole sum, by a convolution and a pooling written as loops over places."""
  a, b = clips(1, 1, SMALLEST, SMALLEST), clips(1, 1, SMALLEST, SMALLEST)
  w = {k: v.astype(np.float64) for k, v in np.load(weights).items()}

  def walk(x, side, stride, work):
    rows, cols = ((s - side) // stride + 1 for s in x.shape[1:])
    places = itertools.product(range(0, rows * stride, stride), range(0, cols * stride, stride))
    found = [work(x[:, i : i + side, j : j + side]) for i, j in places]
    return np.transpose(found).reshape(-1, rows, cols)

  def features(frame):
    x = (frame / 127.5 - 1 - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450]
    x = x.transpose(2, 0, 1)
    for number, stride, pad in ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)):
      if number in (3, 6):
        x = walk(x, 3, 2, lambda part: part.max((1, 2)))
      x = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
      kernel = w[f"features.{number}.weight"]
      x = walk(x, kernel.shape[-1], stride, lambda part, k=kernel: np.tensordot(k, part, 3))
      x = np.maximum(x + w[f"features.{number}.bias"][:, None, None], 0)
      yield x / (np.sqrt((x**2).sum(0)) + 1e-10)

  want = 0
  for i, (x, y) in enumerate(zip(features(a[0, 0]), features(b[0, 0]), strict=True)):
    want += ((x - y) ** 2 * w[f"lin{i}.model.1.weight"][0]).sum(0).mean()
  np.testing.assert_allclose(load_lpips(weights)(a, b), want, rtol=1e-3)


def test_lpips_refuses(weights, tmp_path):
  with pytest.raises(ConfigError, match="nothing is downloaded"):
    load_lpips(tmp_path / "absent.npz")
  (tmp_path / "text.npz").write_text("no arrays")
  with pytest.raises(ConfigError, match="is not an .npz"):
    load_lpips(tmp_path / "text.npz")
  arrays = dict(np.load(weights))
  del arrays["lin2.model.1.weight"]
  np.savez(tmp_path / "part.npz", **arrays)
  with pytest.raises(ConfigError, match="lin2.model.1.weight"):
    load_lpips(tmp_path / "part.npz")
  with pytest.raises(ConfigError, match="at least 31 x 31"):
    load_lpips(weights)(clips(y=30, x=40), clips(y=30, x=40))
