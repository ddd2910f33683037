"""Writes the averaged weights of a checkpoint as one file, from which other runs can start.

  python -m freqformer.export --workdir=runs/demo --out=demo.safetensors
  python train.py --config=configs/demo.py --config.train.init_from=demo.safetensors

The file has one array per parameter and layer, and in its header what the starting run compares:
config, class map, statistics (docs/training.md, "From another checkpoint").
"""

import pathlib

from absl import flags

from freqformer.command import cli
from freqformer.disk import size_text
from freqformer.train.origin import Origin


def main(_):
  step = "" if _STEP.value is None else f":{_STEP.value}"
  origin = Origin.read(f"{_WORKDIR.value}{step}")
  path = pathlib.Path(_OUT.value).absolute()
  origin.write(path)
  size = size_text(path.stat().st_size)
  print(f"{path}: step {origin.record['step']}, {len(origin.arrays)} arrays, {size}")


if __name__ == "__main__":
  # Not at import: other commands have a --workdir of their own.
  _WORKDIR = cli.define_path("workdir", None, "Folder of the run.", required=True)
  _OUT = cli.define_path("out", None, "The file, *.safetensors.", required=True)
  _STEP = flags.DEFINE_integer("checkpoint", None, "Step of the checkpoint; default the newest.")
  cli.run(main)
