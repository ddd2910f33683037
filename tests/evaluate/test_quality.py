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


@pytest.mark.parametrize(
  "measure, a, b, message",
  [
    (quality.psnr, clips(), clips(t=2), "of one shape"),
    (quality.psnr, clips().astype(np.float32), clips(), "of one shape"),
    (quality.psnr, clips()[0], clips()[0], "of one shape"),
    (quality.psnr, clips(t=0), clips(t=0), "of one shape"),
    (quality.ssim, clips(y=10), clips(y=10), "at least 11 x 11"),
  ],
)
def test_refuses_what_cannot_be_compared(measure, a, b, message):
  with pytest.raises(ValueError, match=message):
    measure(a, b)


# ---- artefacts ----------------------------------------------------------------------------------


def test_seams_are_found_on_their_axis():
  """Steps of 1 everywhere, of 3 between columns 3|4 and 7|8; the last tile is ragged."""
  x = np.broadcast_to(np.arange(11.0), (2, 4, 6, 11))
  x = x + 2 * (np.arange(11) // 4)
  x = x + np.arange(4)[:, None, None] + np.arange(6)[:, None]
  np.testing.assert_allclose(quality.seam_ratio(x[..., None], (2, 3, 4)), [1, 1, 3])
  # One tile has no border, tiles of one cell have nothing else.
  ratios = quality.seam_ratio(x[..., None], (4, 1, 4))
  assert np.isnan(ratios[:2]).all() and ratios[2] == 3


def test_flicker_is_energy_of_fast_change_only():
  t = np.arange(16)[:, None, None, None]
  still = RNG.random((1, 1, 5, 6, 3)) * 100
  fast = np.cos(np.pi * 12 * (2 * t + 1) / 32)  # 12 / 16 of Nyquist
  slow = np.cos(np.pi * 7 * (2 * t + 1) / 32)
  real = still + fast
  assert quality.flicker(np.repeat(still + 3 * fast + 50 * slow, 2, 0), real) == pytest.approx(9)
  assert quality.flicker(still + slow, real) < 1e-20


def test_clips_are_spread_over_a_cache():
  cache = [{"latent": np.full((1, 1, 1, 1), i)} for i in range(9)]
  assert quality.spread(cache, 3).ravel().tolist() == [0, 4, 8]
  assert len(quality.spread(cache)) == 9


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


def test_lpips_against_loops(weights):
  """The second video's mean over frames, by convolution and pooling as loops over places."""
  a, b = clips(2, 2, SMALLEST, SMALLEST), clips(2, 2, SMALLEST, SMALLEST)
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
  for frames in zip(a[1], b[1], strict=True):
    for i, (x, y) in enumerate(zip(*map(features, frames), strict=True)):
      want += ((x - y) ** 2 * w[f"lin{i}.model.1.weight"][0]).sum(0).mean() / 2
  np.testing.assert_allclose(load_lpips(weights)(a, b)[1], want, rtol=1e-3)


def test_lpips_refuses(weights, tmp_path):
  (tmp_path / "text.npz").write_text("no arrays")
  arrays = dict(np.load(weights))
  del arrays["lin2.model.1.weight"]
  np.savez(tmp_path / "part.npz", **arrays)
  for name, message in (
    ("absent.npz", "nothing is downloaded"),
    ("text.npz", "is not an .npz"),
    ("part.npz", "lin2.model.1.weight"),
  ):
    with pytest.raises(ConfigError, match=message):
      load_lpips(tmp_path / name)
