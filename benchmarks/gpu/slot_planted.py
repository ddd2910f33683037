"""Steps that misbehave, for the rehearsal of a slot, which must survive them; they need no jax.

python -m benchmarks.gpu.slot_planted --kind=stubborn
"""

import argparse
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

from benchmarks.rows import merge_rows

KINDS = ("stubborn", "aborting", "failing", "garbage", "wrong")
# The field that repairs the planted wrong case; the rehearsal's bisect must name it.
REPAIRED_BY = "take_turns=False"
CASE = "planted"
BEHIND = "behind the stubborn one"
ROW = "before it hung"


def misbehave(kind: str, out: pathlib.Path, configuration: str | None):
  """Ends, or does not end, as a kernel's process may.

  "stubborn" writes a row, ignores SIGTERM and sleeps, and so does its child; "aborting" ends as
  Mosaic's runtime does when a launch fails; "failing" has an exit status; "garbage" prints bytes
  that are no text, and is right; "wrong" is wrong, unless `configuration` repairs it.
  """
  path = out / "planted.json"
  if kind == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(f"wanted stubborn\nwanted {BEHIND}\nbegin stubborn", flush=True)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    merge_rows(path, [{"name": ROW, "correct": True, "child": child.pid}])
    time.sleep(600)
  elif kind == "aborting":
    print("wanted aborting\nbegin aborting", flush=True)
    os.abort()
  elif kind == "failing":
    sys.exit(3)
  elif kind == "garbage":
    sys.stdout.buffer.write(b"\xff\xfe\x00 begin\n\x80ok   nothing\nok    garbage\n")
  else:
    right = configuration == REPAIRED_BY
    print(f"wanted {CASE}\nbegin {CASE}\n{'ok   ' if right else 'WRONG'} {CASE}  out 1.0e+00")
    merge_rows(path, [{"name": CASE, "correct": right}])
    sys.exit(0 if right else 1)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--kind", choices=KINDS, default="wrong")
  parser.add_argument("--only", default="$^", help="given for the cases behind one that hung")
  parser.add_argument("--config", help="given by a bisect of the wrong case")
  parser.add_argument("--out", type=pathlib.Path, required=True)
  options, _ = parser.parse_known_args()
  if re.search(options.only, BEHIND):
    print(f"ok    {BEHIND}")  # asked for once more, without the case that hung
  else:
    misbehave(options.kind, options.out, options.config)


if __name__ == "__main__":
  main()
