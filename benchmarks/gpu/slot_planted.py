"""Steps that misbehave, for the rehearsal of a slot: what it must survive, without GPU or jax.

python -m benchmarks.gpu.slot_planted --kind=stubborn
"""

import argparse
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

KINDS = ("stubborn", "aborting", "failing", "garbage", "wrong")
# The field that repairs the planted wrong case; the rehearsal's bisect must name it.
REPAIRED_BY = "take_turns=False"
CASE = "planted, seed 0"
BEHIND = "behind the stubborn one"
ROW = "before it hung"


def stubborn(out: pathlib.Path):
  """Ignores SIGTERM and sleeps, and so does its child; has written a row, and half of a file."""
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  print(f"wanted stubborn\nwanted {BEHIND}\nbegin stubborn", flush=True)
  child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
  (out / "cut_off.json").write_text('[{"name": "half')
  (out / "planted.json").write_text(
    json.dumps([{"name": ROW, "correct": True, "child": child.pid}])
  )
  time.sleep(600)


def aborting(out: pathlib.Path):
  """Ends as Mosaic's runtime does when a launch fails."""
  del out
  print("wanted aborting\nbegin aborting", flush=True)
  os.abort()


def failing(out: pathlib.Path):
  """Ends with an exit status."""
  del out
  sys.exit(3)


def garbage(out: pathlib.Path):
  """Prints bytes that are no text, and is right."""
  del out
  sys.stdout.buffer.write(b"\xff\xfe\x00 begin\n\x80ok   nothing\nok    garbage\n")


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--kind", choices=KINDS)
  parser.add_argument("--only", default="$^", help="given for the cases behind one that hung")
  parser.add_argument("--config", help="given by a bisect of the wrong case")
  parser.add_argument("--out", type=pathlib.Path, required=True)
  options, _ = parser.parse_known_args()
  if re.search(options.only, BEHIND):
    print(f"ok    {BEHIND}")  # asked for once more, without the case that hung
    return
  if options.kind not in (None, "wrong"):
    globals()[options.kind](options.out)
    return
  right = options.config == REPAIRED_BY
  print(f"wanted {CASE}\nbegin {CASE}\n{'ok   ' if right else 'WRONG'} {CASE}  out 1.0e+00")
  (options.out / "planted.json").write_text(json.dumps([{"name": CASE, "correct": right}]))
  sys.exit(0 if right else 1)


if __name__ == "__main__":
  main()
