"""Other clips for a trained model: which of them, and what they may not change."""

import pytest

from freqformer.config import ConfigError
from freqformer.data.fields import FieldsConfig
from freqformer.data.sources import data_keys, other_clips
from tests.data.helpers import config

FIELDS = FieldsConfig(grid=(2, 8, 8))


@pytest.fixture
def own(tmp_path):
  """Data that a run was trained on."""
  return config(tmp_path / "own", tmp_path / "cache")


def test_other_clips_are_as_in_training_but_for_what_is_given(own):
  assert other_clips(own, {}) == (own, "val")
  given = {"frames": "9", "resolution": "(32, 8)", "flip": "true", "short": "pad", "cache": "7"}
  other, split = other_clips(own, given)
  assert (other.frames, other.resolution, other.flip, other.cache) == (9, (32, 8), True, "7")
  assert (other.short, other.codec, other.stride, split) == ("pad", own.codec, own.stride, "val")
  fields, split = other_clips(FIELDS, {"grid": "4,8,8", "seed": "3", "decorrelation": "2"})
  assert (fields.grid, fields.seed, fields.decorrelation, split) == ((4, 8, 8), 3, 2.0, "val")
  assert {"root", "codec.factor", "grid", "speed"} < set(data_keys())


@pytest.mark.parametrize(
  "given, split",
  [
    ({}, "all"),
    ({"val_fraction": "0.1"}, "val"),  # the same clips in another place
    ({"source": "ucf101"}, "val"),  # its lists say what is trained on
  ],
)
def test_another_folder_is_taken_whole(own, given, split):
  assert other_clips(own, {"root": "elsewhere", **given})[1] == split
  assert other_clips(own, {"root": f"{own.root}/../own"})[1] == "val"


@pytest.mark.parametrize(
  "given, message",
  [
    ({"codec.channels": "8"}, "takes latents of the codec that it was trained with"),
    ({"codec.factor": "(2,8,8)"}, r"codec.factor=\(2, 4, 4\)"),
    ({"source": "fields"}, "cannot stand in for each other"),
    ({"source": "folders"}, "did you mean 'folder'"),
    ({"frames": "many"}, "config.data.frames must be int, got 'many'"),
    ({"grid": "2,8,8"}, "no key 'grid'"),
    ({"seed": "1"}, "config.data.seed decides which clips of .* was not trained on"),
    ({"source": "ucf101"}, "config.data.source decides"),
  ],
)
def test_what_a_model_cannot_take(own, given, message):
  with pytest.raises(ConfigError, match=message):
    other_clips(own, given)


def test_fields_keep_their_channels():
  with pytest.raises(ConfigError, match="the clips have 3 channels, the model takes 4"):
    other_clips(FIELDS, {"channels": "3"})
