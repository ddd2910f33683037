"""Measures a golden table anew; see the package."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import argparse  # noqa: E402
import importlib  # noqa: E402

from tests import golden  # noqa: E402

# Table -> module with `CASES` (names) and `measure(name) -> number or dict`.
TABLES = {"memory": "tests.compiled.memory_cases"}


def main():
  parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
  parser.add_argument("table", choices=sorted(TABLES))
  parser.add_argument(
    "--write", action="store_true", help="write the table instead of only printing it"
  )
  parser.add_argument(
    "--only", default="", help="measure the cases whose name contains this, keep the others"
  )
  args = parser.parse_args()
  module, old = importlib.import_module(TABLES[args.table]), golden.read(args.table)
  new = {name: old[name] for name in module.CASES if name in old}
  for name in module.CASES:
    if args.only in name:
      new[name] = module.measure(name)
      print(f"{name:<48} {old.get(name)} -> {new[name]}", flush=True)
      if args.write:
        golden.write(args.table, new)


if __name__ == "__main__":
  main()
