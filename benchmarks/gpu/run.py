"""Runs the GPU benchmark: its cases one by one, then the gates and the plot.

`python -m benchmarks.attention --device=gpu` runs it (docs/benchmarks.md).
"""

import re
from collections.abc import Sequence

from absl import logging
from freqformer.kernels.block_sparse import tuning
from freqformer.kernels.block_sparse.api import ATTENTION

from benchmarks.gpu import cases, config, gates
from benchmarks.gpu.attempt import attempts
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.cases import Case
from benchmarks.gpu.device import Deadline, open_device, open_store
from benchmarks.gpu.sizes import FULL, TINY

# First part of the names of rows that measure other people's kernels.
PEERS = "torch"


class Run:
  """One pass over the cases.

  Attributes:
    skipped: names of the rows for which there was no time.
    troubles: names of our own rows that failed or are wrong in this run.
  """

  def __init__(self, bench: Bench):
    self.bench = bench
    self.store = bench.store
    self.skipped: list[str] = []
    self.troubles: list[str] = []

  def rows(self, found: Sequence[Case]):
    """Measures the cases that have no right row yet, and judges the gates after each."""
    # A run that is killed must have named all that it wanted.
    print("\n".join(f"wanted {case.name}" for case in found), flush=True)
    jobs = [case.job(self.bench) for case in found]
    for name, row in attempts(self.store, jobs, self.bench.deadline):
      if row is None:
        self.skipped.append(name)
      elif not row.get("correct", True) and not name.startswith(PEERS):
        self.troubles.append(name)
      for gate in gates.gate_rows(self.store.all()):
        # Tiny shapes pass or miss nothing.
        unjudged = {"passed": None, "record_met": None} if self.store.rehearsal else {}
        self.store.add(gate | unjudged)

  def report(self) -> str:
    """Returns the gates, what failed and what there was no time for, for people."""
    found = self.store.all()
    title = f"{self.store.context['device']}, code {self.store.context['code']}"
    title += "  REHEARSAL: no measurement" if self.store.rehearsal else ""
    judged = gates.table([row for row in found if row["name"].startswith("gate: ")])
    skipped = f"no time for: {', '.join(self.skipped)}" if self.skipped else "nothing skipped"
    wrong = f"failed or wrong: {', '.join(self.troubles)}" if self.troubles else "nothing wrong"
    return "\n".join([title, judged, wrong, skipped])


def main(
  minutes: float,
  out: str | None,
  implementation: str | None,
  rehearse: bool,
  parts: Sequence[str] = (),
  only: str = "",
  configuration: str = "",
) -> Run:
  """Runs the benchmark as the command line asks for.

  Args:
    minutes: stop by then, with what there is.
    out: folder for results; default `$OUT`, else benchmarks/results (refused for a rehearsal).
    implementation: backend under test; default Hopper's. A rehearsal's stand-in is "xla".
    rehearse: tiny shapes on any device; rows are marked and say nothing about speed.
    parts: names of parts; none: all but `cases.ON_REQUEST`.
    only: a regular expression that finds the rows by name.
    configuration: fields of the kernels' configuration to change wherever that fits (config.py).

  Raises:
    ValueError: for an unknown part, an `only` that finds nothing, an invalid `configuration`, or a
      rehearsal among measured rows.
    RuntimeError: if there is no GPU to measure on.
  """
  sizes = TINY if rehearse else FULL
  found = [case for case in cases.chosen(sizes, parts) if re.search(only, case.name)]
  if not found:
    names = "; ".join(case.name for case in cases.chosen(sizes, parts))
    raise ValueError(f"--only={only!r} finds no case; cases are {names}.")
  configs = config.everywhere(config.parse(configuration)) if configuration else {}
  open_device(rehearse)
  command = f"python -m benchmarks.attention --device=gpu --minutes={minutes:g}"
  for option, value in (("parts", ",".join(parts)), ("only", only)):
    command += f" --{option}='{value}'" if value else ""
  # Checks of another configuration are no rows of the one that is shipped.
  otherwise = "_otherwise" if configuration and tuple(parts) == ("checks",) else ""
  # Rows of other implementations have the same names: they lie in a file of their own.
  named = f"_{implementation}" if implementation else ""
  command += f" --implementation={implementation}" if implementation else ""
  name = f"attention_gpu{named}{otherwise}_{{device}}"
  store = open_store(name, command, out, rehearse, configuration)
  if implementation is None or (rehearse and ATTENTION.is_for_gpu(implementation)):
    implementation = "xla" if rehearse else "pallas_mgpu"
  run = Run(Bench(sizes, store, Deadline(60 * minutes), implementation))
  with tuning.override(configs):
    run.rows(found)
  print(run.report())
  if not parts and not only:
    _draw(run)
  print(f"rows: {store.path}")
  return run


def _draw(run: Run):
  """Draws the plot into the rows' folder; a machine without matplotlib keeps its rows."""
  try:
    from benchmarks.gpu.plot import draw

    print(f"plot: {draw(run.store.all(), run.store.path.with_suffix('.png'))}")
  except Exception as error:  # whatever a plotting library raises, the rows are there and count
    logging.warning("no plot: %s", error)
