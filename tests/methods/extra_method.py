"""Dilated attention, a static method as a user would write it."""

import dataclasses

import numpy as np

from freqformer.config import require
from freqformer.methods.static import StaticMethod
from freqformer.tables.where import tiles_where


@dataclasses.dataclass(frozen=True)
class Dilated(StaticMethod):
  """A query sees tiles at multiples of `stride` along every axis, and all up to `reach` away."""

  stride: int = 2
  reach: int = 0

  def __post_init__(self):
    require(self, "stride", least=1)
    require(self, "reach", least=0)

  def mask(self, layout):
    return tiles_where(layout, self._sees)

  def _sees(self, query, key):
    apart = np.abs(query - key)
    return (apart % self.stride == 0).all(0) | (apart.max(0) <= self.reach)
