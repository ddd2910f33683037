"""Writes what `tools/kill_loop.py` did as a row: runs that were killed, and kills.

  python -m benchmarks.cpu.kill_loop --rounds=20   # results/kill_loop.json

The figures are counts, and `seconds` with whatever else ran on the machine.
"""

import sys

from benchmarks.rows import write_rows
from tools import kill_loop

NAME = "kill_loop"

if __name__ == "__main__":
  command = " ".join(["python -m benchmarks.cpu.kill_loop", *sys.argv[1:]])
  write_rows(NAME, [{"name": NAME, **kill_loop.main()}], command)
