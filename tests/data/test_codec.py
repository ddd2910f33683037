"""Codecs lose nothing that they have room for; statistics normalise what they were taken from."""

import json

import numpy as np
import pytest

from freqformer.data.codec import (
  CodecConfig,
  LatentStatistics,
  StatisticsAccumulator,
  dct_order,
  make_codec,
)
from freqformer.data.render import render_clip
from tests.data.helpers import moving_square, psnr
from tests.kernels.block_sparse.suite import relative_error


def _noise(*shape):
  return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("factor", [(1, 1, 1), (2, 4, 4), (3, 5, 2), (1, 8, 8)])
def test_all_channels_decode_exactly_at_any_size(factor):
  codec = make_codec(CodecConfig(factor=factor, channels=3 * int(np.prod(factor))))
  video = _noise(2, 5, 9, 7, 3)
  latents = codec.encode(video)
  assert latents.dtype == np.float32 and latents.shape == (2, *codec.latent_shape(5, 9, 7))
  np.testing.assert_array_equal(codec.decode(latents, (5, 9, 7)), video)


def test_order_is_a_permutation_that_starts_with_luma_and_keeps_prefixes():
  order = dct_order((2, 8, 8))
  assert len(np.unique(order, axis=0)) == len(order) == 3 * 2 * 8 * 8
  assert order[0].tolist() == [0, 0, 0, 0] and (order[:, 0] == 0)[:16].sum() > 8
  video = _noise(1, 2, 8, 8, 3)
  few, many = (make_codec(CodecConfig(factor=(2, 8, 8), channels=c)).encode(video) for c in (5, 9))
  assert relative_error(few, many[..., :5]) < 3e-6


def test_more_channels_never_hurt_and_a_constant_needs_only_three():
  video = moving_square(6, 16, 24)[None]
  codecs = [make_codec(CodecConfig(factor=(2, 8, 8), channels=c)) for c in (3, 8, 16, 48)]
  quality = [psnr(video, c.decode(c.encode(video), (6, 16, 24))) for c in codecs]
  assert quality == sorted(quality)
  flat = np.full((1, 2, 8, 8, 3), (10, 200, 90), np.uint8)
  # The three constants are among the first six.
  kept = make_codec(CodecConfig(factor=(2, 8, 8), channels=6))
  np.testing.assert_array_equal(kept.decode(kept.encode(flat), (2, 8, 8)), flat)


def test_lowpass_keeps_slow_waves_at_any_size_and_their_mean():
  codec = make_codec(CodecConfig(name="lowpass", factor=(2, 3, 3), channels=3))
  t, y, x = np.ogrid[:8, :24, :18]
  wave = np.cos(np.pi * (t + 0.5) / 8) * np.cos(np.pi * 5 * (y + 0.5) / 24)
  wave = wave * np.cos(np.pi * 3 * (x + 0.5) / 18)
  video = np.rint(128 + 90 * wave[..., None] * (1, -0.5, 0.25)).astype(np.uint8)[None]
  latents = codec.encode(video)
  assert latents.shape == (1, *codec.latent_shape(8, 24, 18)) == (1, 4, 8, 6, 3)
  # The wave itself comes back. Grey levels are whole, here and there: rounding the wave adds other
  # frequencies, which are lost, so that some values end on the other side of a half.
  np.testing.assert_allclose(codec.decode(latents, (8, 24, 18)), video, atol=1)
  luma = (video / 127.5 - 1).sum(-1).mean() / np.sqrt(3)
  assert abs(latents[..., 0].mean() - luma) < 1e-5
  # Frames, rows and columns that the edge cuts.
  flat = np.full((1, 7, 23, 17, 3), (10, 200, 90), np.uint8)
  np.testing.assert_array_equal(codec.decode(codec.encode(flat), (7, 23, 17)), flat)


def test_lowpass_needs_half_the_numbers_of_blocks_on_a_smooth_clip():
  video = render_clip("RotatingPetals", 1, 1, 16, 48, 64)[None]
  found = {}
  for name, factor, channels in (("lowpass", (2, 4, 4), 3), ("dct", (2, 8, 8), 24)):
    codec = make_codec(CodecConfig(name=name, factor=factor, channels=channels))
    latents = codec.encode(video)
    found[name] = latents.size, psnr(video, codec.decode(latents, (16, 48, 64)))
  assert found["lowpass"][0] * 2 == found["dct"][0]
  assert found["lowpass"][1] > found["dct"][1]


def test_a_codec_says_how_many_channels_it_can_have():
  with pytest.raises(
    ValueError, match=r"codec lowpass with factor \(2, 4, 4\) has 1 to 3 channels"
  ):
    CodecConfig(name="lowpass", factor=(2, 4, 4), channels=4)


def test_statistics_normalise():
  rng = np.random.default_rng(0)
  latents = rng.normal((1, -2, 0.5), (3, 0.1, 1), (10, 3, 4, 5, 3)).astype(np.float32)
  latents[..., 2] = 0.5  # a channel that never varies
  total = StatisticsAccumulator()
  for x in latents:
    total.add(x)
  stats = total.result()
  exact = latents.astype(np.float64)
  np.testing.assert_allclose(stats.mean, exact.mean((0, 1, 2, 3)), rtol=1e-6)
  np.testing.assert_allclose(stats.std[:2], exact.std((0, 1, 2, 3))[:2], rtol=1e-6)
  normal = stats.normalise(latents)
  assert stats.std[2] == 1 and np.abs(normal[..., 2]).max() < 1e-5
  np.testing.assert_allclose(normal[..., :2].std((0, 1, 2, 3)), 1, rtol=1e-4)
  assert relative_error(stats.denormalise(normal), latents) < 3e-6
  joint = total.result(joint=True)
  np.testing.assert_array_equal(joint.mean, stats.mean)
  whole = exact - exact.mean((0, 1, 2, 3))
  np.testing.assert_allclose(joint.std, np.sqrt(np.square(whole).mean()), rtol=1e-6)
  again = LatentStatistics.from_json(json.loads(json.dumps(stats.to_json())))
  np.testing.assert_array_equal(again.mean, stats.mean)
  np.testing.assert_array_equal(again.std, stats.std)


def test_other_arrays_are_refused():
  codec = make_codec(CodecConfig(factor=(2, 4, 4), channels=8))
  with pytest.raises(ValueError, match="has latents"):
    codec.decode(np.zeros((1, 2, 1, 1, 8), np.float32), (2, 4, 4))
