"""Tables of plain text, for a terminal."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> str:
  """Returns lines whose cells begin below each other; all rows have equally many."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = []
  for row in rows:
    cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
    lines.append("  ".join(cells).rstrip())
  return "\n".join(lines)
