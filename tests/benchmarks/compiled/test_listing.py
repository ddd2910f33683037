"""Figures that are read off a listing of machine code; the listings here are made up."""

import pytest

from benchmarks.compiled import listing


def _listing(*instructions):
  lines = [x if x.startswith(".L") else f"  /*{i:04x}*/  {x} ;" for i, x in enumerate(instructions)]
  return "\n".join(lines)


SCORES, VALUES = (
  "HGMMA.64x128x16 R88, gdesc[UR16], R88",
  "HGMMA.64x128x16 R24, R4, gdesc[UR8].tnspB, R24",
)
BACK = "@P1 BRA `(.L_x_1)"
BEFORE = (SCORES, "BRA `(.L_x_9)", ".L_x_0:", "NOP", "@P0 BRA `(.L_x_0)")


def test_products_side_by_side():
  body = ("FMUL", SCORES, "F2FP", SCORES, "WARPGROUP.ARRIVE", VALUES, VALUES, "DEPBAR", BACK)
  found = listing.loop_of(_listing(*BEFORE, ".L_x_1:", *body, "EXIT"))
  assert found == list(body)
  assert listing.between(found) == 1 and listing.conversions(found) == 1


def test_products_round_the_loop():
  """The values end an iteration, the scores of the next stand behind its first two instructions."""
  body = ("LDG", "SYNCS", SCORES, SCORES, *["MUFU"] * 9, VALUES, "DEPBAR", BACK)
  found = listing.loop_of(_listing(*BEFORE, ".L_x_1:", *body))
  assert listing.between(found) == 4 and listing.conversions(found) == 0


def test_no_such_loop():
  with pytest.raises(ValueError, match="no loop with the products"):
    listing.loop_of(_listing(*BEFORE, VALUES))
