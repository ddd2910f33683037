"""A further static method is one file and one line of the registry: it meets the laws, trains, samples and is counted."""

import pathlib
import sys

import numpy as np
import pytest

from freqformer.config import ConfigError
from freqformer.grid.layout import TileLayout
from freqformer.methods import registry
from freqformer.methods.registry import method_class
from freqformer.model.config import model_config
from freqformer.model.dit import make_tables
from tests.laws import test_methods as laws
from tests.methods import extra_method
from tests.methods.extra_method import Dilated
from tests.methods.method_training import trains


@pytest.fixture(autouse=True)
def registered(monkeypatch):
  """What the line in the registry and the file in freqformer/methods/ would do."""
  monkeypatch.setitem(sys.modules, "freqformer.methods.dilated", extra_method)
  monkeypatch.setitem(registry.METHODS, "dilated", "Dilated")
  monkeypatch.setitem(laws.WIDE, "dilated", dict(stride=1))


LAWS = (
  laws.test_masks_come_only_when_asked_for,
  laws.test_bfloat16,
  laws.test_a_sample_does_not_see_its_batch,
  laws.test_both_halves_of_guidance_share_masks,
  laws.test_cost_is_what_runs,
  laws.test_one_compile_for_two_inputs,
)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_it_meets_the_laws(law):
  law(method_class("dilated")())


def test_it_meets_the_laws_of_grids():
  laws.test_density_one_is_dense("dilated", laws.RAGGED)
  for layout in (laws.RAGGED, laws.SMALL):
    laws.test_shapes_densities_and_masks(Dilated(), layout)
    laws.test_padding_rows_change_nothing(Dilated(), layout)


def test_it_trains():
  trains("dilated", dict(stride=2))


def test_a_rule_that_lists_nothing_is_refused(monkeypatch):
  monkeypatch.setattr(Dilated, "_sees", lambda self, query, key: np.abs(query - key).max(0) < 0)
  model = model_config(
    dict(size="custom", width=16, depth=2, heads=2, attention=dict(method="dilated", block=8))
  )
  with pytest.raises(
    ConfigError, match="attention method Dilated: query tile 0 of grid .* lists no key tile"
  ):
    make_tables(model, (2, 4, 4, 3))


def test_it_is_configured_counted_and_small():
  attention = dict(method="dilated", block=32, dilated=dict(stride=3))
  ((_, method),) = model_config(
    dict(size="custom", width=16, depth=2, heads=2, attention=attention)
  ).runs()
  layout = TileLayout(
    (6, 12, 12), (2, 4, 4), 32
  )  # 3 x 3 x 3 tiles: a stride of 3 leaves the own one
  assert method == Dilated(3) and method.pairs(layout, 2).pairs == 2 * layout.n**2 / 27
  lines = [
    line for line in pathlib.Path(extra_method.__file__).read_text().splitlines() if line.strip()
  ]
  assert len(lines) <= 20
