"""Counts the instructions between the products of the forward's loop, in both of its forms.

  python -m benchmarks.compiled.listing            # anywhere; writes results/listing.json

The tensor cores have nothing queued by a warpgroup between the values of one stage and the scores
of the next. Needs nvdisasm on PATH (`pip install nvidia-cuda-nvdisasm`) and what `tools.offline`
needs. Instructions are counted, not timed.
"""

import argparse
import dataclasses
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

from freqformer.kernels.block_sparse import tuning

from benchmarks import rows
from benchmarks.gpu import facts
from benchmarks.gpu.device import open_device
from benchmarks.gpu.tune_trials import compile_kernel

KEY = tuning.Key("h100", 128, 128, 128, "forward")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_x_\d+):")


def loop_of(listing: str) -> list[str]:
  """Returns the instructions of the loop that has both products, from its label to its branch back.

  Args:
    listing: of nvdisasm.

  Raises:
    ValueError: if there is no such loop.
  """
  found = []
  labels = {}
  for line in listing.splitlines():
    if label := _LABEL.match(line):
      labels[label.group(1)] = len(found)
    if instruction := _INSTRUCTION.search(line):
      found.append(instruction.group(1))
      target = re.search(r"\bBRA .*?(\.L_x_\d+)", found[-1])
      start = labels.get(target.group(1)) if target else None
      body = found[start:] if start is not None else []
      if {_product(x) for x in body} >= {"scores", "values"}:
        return body
  raise ValueError("the listing has no loop with the products of scores and of values")


def _product(instruction: str) -> str:
  """Returns "scores" or "values" for an instruction of either product, else ""."""
  if not instruction.startswith("HGMMA"):
    return ""
  return "values" if ".tnspB" in instruction else "scores"


def between(body: list[str]) -> int:
  """Returns the instructions between the products of a stage's values and the next stage's scores.

  The shorter way round the loop: the other one holds the softmax.
  """
  places = {
    kind: [i for i, x in enumerate(body) if _product(x) == kind] for kind in ("scores", "values")
  }
  first, second = sorted(places.values())
  return min(second[0] - first[-1], first[0] + len(body) - second[-1]) - 1


def conversions(body: list[str]) -> int:
  """Returns the conversions to 16 bits that stand among the products of the scores."""
  places = [i for i, x in enumerate(body) if _product(x) == "scores"]
  return sum(x.startswith("F2FP") for x in body[places[0] : places[-1]])


def disassembled(ptx: str, ptxas: str, nvdisasm: str) -> str:
  """Returns the machine code of a kernel for sm_90a."""
  with tempfile.TemporaryDirectory() as folder:
    source = pathlib.Path(folder) / "kernel.ptx"
    binary = source.with_suffix(".cubin")
    source.write_text(ptx)
    subprocess.run([ptxas, "-arch=sm_90a", "-O3", str(source), "-o", str(binary)], check=True)
    command = [nvdisasm, "-c", str(binary)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", type=pathlib.Path, default=rows.RESULTS, help="folder of the rows")
  options = parser.parse_args()
  open_device(True)
  ptxas = shutil.which("ptxas") or facts.wheel_ptxas()
  nvdisasm = shutil.which("nvdisasm")
  if nvdisasm is None or ptxas is None:
    sys.exit("needs ptxas and nvdisasm on PATH; pip install nvidia-cuda-nvcc nvidia-cuda-nvdisasm")
  found = []
  for scores_ahead in (True, False):
    config = dataclasses.replace(tuning.default(KEY), scores_ahead=scores_ahead)
    kernel = compile_kernel(KEY, config)
    body = loop_of(disassembled(kernel.ptx, ptxas, nvdisasm))
    row = {
      "name": f"between products: d=128 128x128 scores_ahead={scores_ahead}",
      "instructions": between(body),
      "loop": len(body),
      "conversions_among_scores": conversions(body),
      "registers": kernel.registers,
      "ptxas_of_listing": facts.described_ptxas(ptxas),
    }
    print(f"{row['name']}: {row['instructions']} instructions of {row['loop']}")
    found.append(row)
  command = "python -m benchmarks.compiled.listing"
  print(f"rows: {rows.write_rows('listing', found, command, options.out)}")


if __name__ == "__main__":
  main()
