"""Planners turn a layout (and, for some, the data) into `BlockMask` tables. They hold no parameters."""
