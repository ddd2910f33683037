"""A further static method is one file, and a line of the registry if it is to have a short name."""

import sys

import numpy as np
import pytest

from freqformer.config import ConfigError
from freqformer.grid.layout import TileLayout
from freqformer.methods.registry import METHODS
from freqformer.model.architectures import model_config
from freqformer.model.dit import make_tables
from tests.laws import test_methods as laws
from tests.methods import extra_method
from tests.methods.extra_method import Dilated

LAYOUT = TileLayout((6, 12, 12), (2, 4, 4), 32)  # 3 x 3 x 3 tiles


@pytest.fixture(autouse=True)
def registered(monkeypatch):
  """Does what the line in the registry and the file in freqformer/methods/ would do."""
  monkeypatch.setitem(sys.modules, "freqformer.methods.dilated", extra_method)
  monkeypatch.setitem(METHODS, "dilated", "Dilated")
  monkeypatch.setitem(laws.WIDE, "dilated", dict(stride=1))


def model_of(**fields):
  attention = dict(method="dilated", block=8, dilated=fields)
  return model_config(dict(size="custom", width=16, depth=2, heads=2, attention=attention))


def test_it_meets_the_laws():
  """Each is what another static method obeys, too; here they are called as for a registered one."""
  laws.test_density_one_is_dense("dilated", laws.WAN_DIMS)
  laws.test_cost_is_what_runs(Dilated(), laws.WAN_DIMS)


def test_a_rule_that_lists_nothing_is_refused(monkeypatch):
  monkeypatch.setattr(Dilated, "_sees", lambda self, query, key: np.abs(query - key).max(0) < 0)
  message = "attention method Dilated: query tile 0 of grid .* lists no key tile"
  with pytest.raises(ConfigError, match=message):
    make_tables(model_of(), (2, 4, 4, 3))


@pytest.mark.parametrize("name", ["dilated", "tests.methods.extra_method:Dilated"])
def test_it_is_configured_and_counted(name):
  attention = dict(method=f"{name}(stride=3)", block=8)
  model = model_config(dict(size="custom", width=16, depth=2, heads=2, attention=attention))
  ((_, method),) = model.runs()
  assert model.with_method("dense").with_method(f"{name}(stride=3)").runs() == model.runs()
  assert method == Dilated(3)
  assert method.pairs(LAYOUT, 2).pairs == 2 * LAYOUT.n**2 / 27  # a stride of 3 leaves the own tile
