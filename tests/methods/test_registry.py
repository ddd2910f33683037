"""Methods by name, as configs and command lines give them."""

import pytest

from freqformer.config import ConfigError
from freqformer.methods.head_profile import ProfileConfig
from freqformer.methods.registry import METHODS, method_class, parse_method, with_fields
from freqformer.methods.spatial_temporal import SpatialTemporal
from freqformer.model.architectures import model_config


@pytest.mark.parametrize(
  "text, want",
  [
    ("radial", ("radial", {})),
    (" radial() ", ("radial", {})),
    ("block_topk(density=0.2, coarse=none)", ("block_topk", dict(density=0.2, coarse="none"))),
    (
      "sliding_tile(window=(1, 2, 3), unit='tiles')",
      ("sliding_tile", dict(window=(1, 2, 3), unit="tiles")),
    ),
    (
      "spatial_temporal(profile=dict(warmup=-0.1))",
      ("spatial_temporal", dict(profile=dict(warmup=-0.1))),
    ),
    (
      "tests.methods.extra_method:Dilated(stride=3)",
      ("tests.methods.extra_method:Dilated", dict(stride=3)),
    ),
  ],
)
def test_methods_as_text(text, want):
  assert parse_method(text) == want


@pytest.mark.parametrize(
  "text",
  [
    *("", "3", "a b", "radial.x", "block_topk(", "block_topk(0.2)"),
    *("block_topk(**a)", "block_topk(density=a.b)"),
  ],
)
def test_unreadable_text(text):
  with pytest.raises(ConfigError, match="must read like"):
    parse_method(text)


def test_fields_replace_the_configured_ones_within_groups_too():
  base = SpatialTemporal(frames=2, profile=ProfileConfig(rows=7))
  method = with_fields(base, dict(places=0, profile=dict(warmup=0.5)), "here")
  assert method == SpatialTemporal(frames=2, places=0, profile=ProfileConfig(rows=7, warmup=0.5))
  for fields, message in [
    (dict(place=1), "config.here has no key 'place'; did you mean 'places'"),
    (dict(profile=dict(warmup=1.5)), "warmup=1.5 must be"),
    (dict(frames="two"), "config.here.frames must be int"),
  ]:
    with pytest.raises(ConfigError, match=message):
      with_fields(base, fields, "here")


@pytest.mark.parametrize(
  "line, message",
  [
    (("radial", "Radail"), "has no such class; did you mean 'Radial'?"),
    (("checkerboard", "Checkerboard"), "there is no freqformer/methods/checkerboard.py"),
  ],
)
def test_a_line_of_the_registry_that_names_nothing(monkeypatch, line, message):
  monkeypatch.setitem(METHODS, *line)
  with pytest.raises(ConfigError) as error:
    method_class(line[0])
  assert message in str(error.value)


@pytest.mark.parametrize(
  "name, message",
  [
    ("nowhere:Dilated", "there is no module 'nowhere'"),
    ("tests.methods.extra_method:Diluted", "has no class 'Diluted'"),
    ("json:JSONEncoder", "must be a dataclass that inherits Method"),
    ("freqformer.data.codec:CodecConfig", "must be a dataclass that inherits Method"),
  ],
)
def test_a_method_of_ones_own_that_is_none(name, message):
  with pytest.raises(ConfigError, match=message):
    parse_method(f"{name}(stride=3)")


def test_a_model_with_another_method():
  attention = dict(
    method="dense", layers=((0, 1, "dense"), (1, None, "radial")), radial=dict(decay=0.5)
  )
  model = model_config(dict(size="custom", width=24, depth=3, heads=2, attention=attention))
  other = model.with_method("radial(sink=0)")
  assert other.runs() == ((1, method_class("radial")(0.5, 0)), (2, method_class("radial")(0.5, 0)))
  with pytest.raises(ConfigError, match="did you mean 'radial'"):
    model.with_method("radical")
