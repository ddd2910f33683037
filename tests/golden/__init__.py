"""Golden tables: numbers that code is held to, kept as JSON so that a change shows in the diff."""

import pathlib


def path(name: str) -> pathlib.Path:
  return pathlib.Path(__file__).with_name(f"{name}.json")
