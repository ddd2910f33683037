"""Block tables that several methods share: a layout (and data) in, a `BlockMask` out."""
