"""One-line mistakes in the kernels, and the test that must go red for each.

    python -m tests.mutants [NAME ...]

Every mutant is written into a copy of the tree, never into the checkout, and its one test runs
there. The exit status is 1 unless every mutant is caught. That the tests pass without the mutants
is not checked here: `make test` does that. `tests/test_mutants.py` keeps the list applicable.
"""

import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent
COPIED = ("benchmarks", "configs", "freqformer", "kernels", "tests", "pyproject.toml")
TIMEOUT = 300  # seconds of one test; each takes a few


@dataclasses.dataclass(frozen=True)
class Mutant:
  """One mistake.

  Attributes:
    name: what it gets wrong.
    file: where, from the root of the tree.
    old: text that occurs there once.
    new: text that takes its place.
    test: pytest's node id of the test that must fail.
  """

  name: str
  file: str
  old: str
  new: str
  test: str

  def apply(self, text: str) -> str | None:
    """The file's text with the mistake; None unless the old text occurs exactly once."""
    return text.replace(self.old, self.new) if text.count(self.old) == 1 else None


def _hopper(name, file, old, new, test):
  """A mutant whose test is one of the Hopper attention kernels'."""
  return Mutant(
    name, f"kernels/{file}", old, new, f"tests/kernels/block_sparse/test_hopper.py::{test}"
  )


_FORWARD = "block_sparse/hopper_forward.py"
_BACKWARD = "block_sparse/hopper_backward.py"
_PARTS = "hopper/parts.py"
_CASE = "TestPallasMgpu::test_case"
_CUT = "test_every_cut_of_tiles_into_stages"

MUTANTS = (
  # ---- forward
  _hopper(
    "forward: output not rescaled",
    _FORWARD,
    "acc = acc * parts.over_columns(shrink, d)",
    "acc = acc * 1.0",
    f"{_CASE}[plain]",
  ),
  _hopper(
    "forward: sum not rescaled",
    _FORWARD,
    "total = total * shrink + p.sum(axis=1)",
    "total = total + p.sum(axis=1)",
    f"{_CASE}[plain]",
  ),
  _hopper(
    "forward: maximum forgets earlier stages",
    _FORWARD,
    "new = jnp.maximum(top, x.max(axis=1) * unit)",
    "new = x.max(axis=1) * unit",
    "TestPallasMgpu::test_large_and_hidden_scores",
  ),
  _hopper(
    "forward: padding keys are seen",
    _FORWARD,
    "x = walk.hide(x * sign if sign != 1 else x, entries)",
    "x = x * sign if sign != 1 else x",
    f"{_CASE}[ragged_with_empty_rows]",
  ),
  _hopper(
    "forward: hidden under a scale that is not positive",
    _FORWARD,
    "walk.hide(x * sign if sign != 1 else x, entries)",
    "walk.hide(x, entries) * sign",
    "test_odd_scales[-0.3]",
  ),
  _hopper(
    "forward: LSE in log2 units", _FORWARD, "* (1 / parts.LOG2E)", "* 1.0", f"{_CASE}[plain]"
  ),
  _hopper(
    "forward: maximum starts among hidden scores",
    _FORWARD,
    "parts.rows_full(parts.DEAD)",
    "parts.rows_full(parts.HIDDEN)",
    "test_hidden_scores_have_no_probability_however_they_are_rounded[64]",
  ),
  _hopper(
    "forward: the next stage's keys are read before they arrive",
    _FORWARD,
    "k_ring.wait(following)",
    "pass",
    "test_no_races",
  ),
  Mutant(
    "xla: output not rescaled",
    "kernels/block_sparse/xla.py",
    "out = out * shrink[..., None] + ",
    "out = out + ",
    "tests/kernels/block_sparse/test_xla.py::TestXla::test_case[plain]",
  ),
  Mutant(
    "xla: sum not rescaled",
    "kernels/block_sparse/xla.py",
    "total * shrink + p.sum(-1)",
    "total + p.sum(-1)",
    "tests/kernels/block_sparse/test_xla.py::TestXla::test_case[plain]",
  ),
  Mutant(
    "xla: maximum forgets earlier chunks",
    "kernels/block_sparse/xla.py",
    "new = jnp.maximum(top, scores.max(-1))",
    "new = scores.max(-1)",
    "tests/kernels/block_sparse/test_xla.py::TestXla::test_large_and_hidden_scores",
  ),
  # ---- what forward and backward share
  _hopper(
    "two tiles: both sides have the first",
    _PARTS,
    "place * 2 + side",
    "place * 2",
    "test_two_tiles_in_a_block[True-64]",
  ),
  _hopper(
    "two tiles: their rows are those of a 128-row tile",
    _PARTS,
    "warpgroup if self.sides == 1 else _i32(0)",
    "warpgroup",
    "test_two_tiles_in_a_block[True-64]",
  ),
  Mutant(
    "order: samples count as heads",
    "kernels/core/lists.py",
    "order[:, None] + np.arange(b, dtype=np.int32) * h",
    "order[:, None] + np.arange(b, dtype=np.int32)",
    "tests/kernels/core/test_lists.py::test_order_of_a_call_falls[lead0]",
  ),
  _hopper(
    "ring: slots are refilled before they are read",
    _PARTS,
    "pl.when(s >= stages)(functools.partial(wait, ring, s))",
    "pass",
    "test_no_races",
  ),
  _hopper(
    "lists: the last tile counts twice where it shares no stage",
    _PARTS,
    "length if part == 0 else jnp.where(i < count, length, 0)",
    "length",
    f"{_CUT}[64-64-128]",
  ),
  _hopper(
    "lists: the second half of a long tile is as full as the whole",
    _PARTS,
    "length - first, _i32(self.step)",
    "length, _i32(self.step)",
    f"{_CUT}[64-128-64]",
  ),
  _hopper(
    "own rows: they are read before they arrive",
    _PARTS,
    "    plgpu.barrier_wait(barrier)",
    "    pass",
    "test_no_races",
  ),
  _hopper(
    "own rows: they are sent before every warp has written",
    _PARTS,
    "plgpu.commit_smem()",
    "pass",
    "test_no_races",
  ),
  # ---- backward
  Mutant(
    "backward: the gradient of the LSE has the wrong sign",
    "kernels/core/cotangents.py",
    "delta - d_log_sum",
    "delta + d_log_sum",
    "tests/kernels/block_sparse/test_xla.py::TestXla::test_case[plain]",
  ),
  _hopper(
    "dq: delta has the wrong sign",
    _BACKWARD,
    "dp - parts.over_columns(delta, config.step)",
    "dp + parts.over_columns(delta, config.step)",
    f"{_CASE}[plain]",
  ),
  _hopper(
    "dq: not scaled",
    _BACKWARD,
    "q_own[...] = (acc * scale)",
    "q_own[...] = (acc * 1.0)",
    f"{_CASE}[plain]",
  ),
  _hopper(
    "dq: values are read before they arrive",
    _BACKWARD,
    "v_ring.wait(slot)",
    "pass",
    "test_no_races",
  ),
  _hopper(
    "dkv: keys of padding get a gradient",
    _BACKWARD,
    "own_k[...] = jnp.where(seen, dk * scale, 0.0)",
    "own_k[...] = (dk * scale)",
    "TestPallasMgpu::test_padding_rows_change_nothing",
  ),
  _hopper(
    "dkv: values of padding get a gradient",
    _BACKWARD,
    "own_v[...] = jnp.where(seen, dv, 0.0)",
    "own_v[...] = dv",
    "TestPallasMgpu::test_padding_rows_change_nothing",
  ),
  _hopper(
    "dkv: padding counts from the first warpgroup's rows",
    _BACKWARD,
    "- deal.part(warpgroup) * ROWS",
    "",
    f"{_CUT}[64-128-64]",
  ),
  _hopper(
    "dkv: a query tile counts twice where it shares no stage",
    _BACKWARD,
    "x = walk.hide(x, listed.entries(s))",
    "pass",
    f"{_CUT}[64-64-128]",
  ),
  _hopper(
    "dkv: queries are read before they arrive",
    _BACKWARD,
    "q_ring.wait(slot)",
    "pass",
    "test_no_races",
  ),
  # ---- transposed lists
  Mutant(
    "transpose: entries behind the count are listed",
    "kernels/block_sparse/table.py",
    "kv = xnp.where(listed, ids, self.kv_tiles).reshape(*lead, -1)",
    "kv = ids.reshape(*lead, -1)",
    "tests/kernels/block_sparse/test_table.py::test_transpose[False-ragged_with_empty_rows]",
  ),
  _hopper(
    "transpose: a prefix of n tiles reads tile n too",
    "core/lists.py",
    'dtype=np.int32), "right")',
    'dtype=np.int32), "left")',
    f"{_CASE}[every_tile_in_order]",
  ),
  Mutant(
    "transpose: offsets are one key tile late",
    "kernels/block_sparse/table.py",
    'search(kv, edge, "left")',
    'search(kv, edge, "right")',
    "tests/kernels/block_sparse/test_table.py::test_transpose[False-plain]",
  ),
  # ---- select
  Mutant(
    "select: every head takes the first table's counts",
    "kernels/block_sparse/table.py",
    "xnp.where(pick == i, mask.kv_counts, counts)",
    "counts",
    "tests/kernels/block_sparse/test_table.py::test_select_takes_rows_per_head",
  ),
  Mutant(
    "select: the last table's ids win",
    "kernels/block_sparse/table.py",
    "xnp.where(pick[..., None] == i, own, ids)",
    "xnp.where(pick[..., None] >= 0, own, ids)",
    "tests/kernels/block_sparse/test_table.py::test_select_takes_rows_per_head",
  ),
  # ---- top-k
  Mutant(
    "top-k: -0 is less than 0",
    "kernels/selection/topk.py",
    "jnp.where(bits > sign, ~bits, bits | sign)",
    "jnp.where(bits >= sign, ~bits, bits | sign)",
    "tests/kernels/selection/test_topk.py::test_the_set_of_an_exact_top_k[1-both zeros]",
  ),
  Mutant(
    "top-k: ties of a word do not count in it",
    "kernels/selection/topk.py",
    "take = left - (jnp.cumsum(ties, -1) - ties)",
    "take = left - jnp.cumsum(ties, -1)",
    "tests/kernels/selection/test_topk.py::test_the_set_of_an_exact_top_k[1-few values]",
  ),
  Mutant(
    "top-k on Hopper: one halving is missing",
    "kernels/selection/hopper_topk.py",
    "lax.fori_loop(0, 32, halve",
    "lax.fori_loop(0, 31, halve",
    "tests/kernels/selection/test_topk.py::test_the_hopper_kernel_finds_the_same_sets",
  ),
  Mutant(
    "top-k on Hopper: what fills the last lanes counts",
    "kernels/selection/hopper_topk.py",
    "keys = jnp.where(place < m, keys, _LEAST)",
    "pass",
    "tests/kernels/selection/test_topk.py::test_the_hopper_kernel_finds_the_same_sets",
  ),
  Mutant(
    "top-k on Hopper: -0 is less than 0",
    "kernels/selection/hopper_topk.py",
    "jnp.where(keys == -1, 0, keys)",
    "keys",
    "tests/kernels/selection/test_topk.py::test_the_hopper_kernel_finds_the_same_sets",
  ),
  Mutant(
    "top-k on Hopper: fixed places take those before them along",
    "kernels/selection/hopper_topk.py",
    "place == always_gm",
    "place <= always_gm",
    "tests/kernels/selection/test_topk.py::test_the_hopper_kernel_finds_the_same_sets",
  ),
  # ---- around attention
  Mutant(
    "prepare: rotary turns backwards",
    "kernels/around/prepare.py",
    "[first * cos - second * sin, second * cos + first * sin]",
    "[first * cos + second * sin, second * cos - first * sin]",
    "tests/kernels/around/test_around.py::test_rotary_multiplies_complex_numbers",
  ),
  Mutant(
    "prepare: means count padding of a second piece",
    "kernels/around/hopper_prepare.py",
    "row < self.valid - part * ROWS",
    "row < self.valid",
    "tests/kernels/around/test_around.py::test_prepare_kernel[ragged, big]",
  ),
  Mutant(
    "prepare: means are those of the last piece",
    "kernels/around/hopper_prepare.py",
    "mean if pooled_part == 0 else before[half][i] + mean",
    "mean",
    "tests/kernels/around/test_around.py::test_prepare_kernel[alike]",
  ),
  Mutant(
    "prepare: matrices are rounded to 16 bits",
    "kernels/around/hopper_prepare_call.py",
    "jnp.stack([high, matrices - high], 1)",
    "jnp.stack([high, 0 * high], 1)",
    "tests/kernels/around/test_around.py::test_prepare_kernel[ragged]",
  ),
  Mutant(
    "prepare: a piece is read before it arrives",
    "kernels/around/hopper_prepare.py",
    "plgpu.barrier_wait(refs.full.at[piece % plan.slots])",
    "pass",
    "tests/kernels/around/test_around.py::test_prepare_kernel[alike]",
  ),
  Mutant(
    "lift: coarse rows from where the matrix does not begin",
    "kernels/around/hopper_lift_call.py",
    "+ starts % shifts",
    "+ 0 * starts",
    "tests/kernels/around/test_around.py::test_lift_kernel[ragged]",
  ),
  Mutant(
    "lift: matrices are rounded to 16 bits",
    "kernels/around/hopper_prepare_call.py",
    "jnp.stack([high, matrices - high], 1)",
    "jnp.stack([high, 0 * high], 1)",
    "tests/kernels/around/test_around.py::test_lift_kernel[ragged]",
  ),
  Mutant(
    "prepare: rows are sent before every warp has written",
    "kernels/around/hopper_prepare.py",
    "plgpu.commit_smem()",
    "pass",
    "tests/kernels/around/test_around.py::test_prepare_kernel[alike]",
  ),
  Mutant(
    "lift: coarse rows count in every head",
    "kernels/around/lift.py",
    "jnp.where(low[:, None, :, None], coarse, 0)",
    "coarse",
    "tests/kernels/around/test_around.py::test_lift_kernel[ragged]",
  ),
  Mutant(
    "lift: rows are sent before every warp has written",
    "kernels/around/hopper_lift.py",
    "plgpu.commit_smem()",
    "pass",
    "tests/kernels/around/test_around.py::test_lift_kernel[alike]",
  ),
  # ---- block scores
  Mutant(
    "block mass on Hopper: padding keys are seen",
    "kernels/selection/hopper_block_scores.py",
    "walk.hide(x * (scale * parts.LOG2E), entries)",
    "x * (scale * parts.LOG2E)",
    "tests/kernels/selection/test_block_scores.py::test_the_hopper_kernel_gives_the_same_masses[64-bfloat16]",
  ),
  Mutant(
    "block mass on Hopper: the last sums are not sent",
    "kernels/selection/hopper_block_scores.py",
    "s == every.steps - 1",
    "s == every.steps",
    "tests/kernels/selection/test_block_scores.py::test_sums_of_many_key_tiles",
  ),
  Mutant(
    "block mass on Hopper: exponents are not cut",
    "kernels/selection/hopper_block_scores.py",
    "jnp.minimum(x, largest * parts.LOG2E)",
    "x",
    "tests/kernels/selection/test_block_scores.py::test_the_hopper_kernel_gives_the_same_masses[64-bfloat16]",
  ),
  Mutant(
    "block mass on Hopper: sums are sent before every warp has written",
    "kernels/selection/hopper_block_scores.py",
    "plgpu.commit_smem()  # also",
    "pass  # also",
    "tests/kernels/selection/test_block_scores.py::test_sums_of_many_key_tiles",
  ),
  # ---- linear attention
  Mutant(
    "linear: sums of features are those of the last stage",
    "kernels/linear/hopper_kernels.py",
    "before + counted.sum(axis=0)",
    "counted.sum(axis=0)",
    "tests/kernels/linear/test_hopper.py::test_errs_no_more_than_xla[chunks]",
  ),
  Mutant(
    "linear: values of no segment get a gradient",
    "kernels/linear/hopper_kernels.py",
    "(dv * seen)",
    "dv",
    "tests/kernels/linear/test_hopper.py::test_rows_without_a_segment_and_repeats",
  ),
  Mutant(
    "linear: elu has the gradient of relu",
    "kernels/linear/hopper_kernels.py",
    "jnp.where(x > 0, 1.0, p)",
    "jnp.where(x > 0, 1.0, 0.0)",
    "tests/kernels/linear/test_hopper.py::test_errs_no_more_than_xla[mixed]",
  ),
  Mutant(
    "linear: keys have no gradient from the denominator",
    "kernels/linear/hopper_kernels.py",
    "g + parts.over_rows(total))",
    "g)",
    "tests/kernels/linear/test_hopper.py::test_errs_no_more_than_xla[mixed]",
  ),
)


def copy_tree(target: pathlib.Path):
  """Copies what the tests need, without caches."""
  for name in COPIED:
    if (ROOT / name).is_file():
      shutil.copy(ROOT / name, target / name)
    else:
      ignored = shutil.ignore_patterns("__pycache__")
      shutil.copytree(ROOT / name, target / name, ignore=ignored)


def verdict(mutant: Mutant, tree: pathlib.Path) -> tuple[str, str]:
  """Runs a mutant's test in a tree that has the mutant while it runs.

  Returns:
    "caught" or what went wrong, and a detail: the assertion that failed, or the error.
  """
  path = tree / mutant.file
  text = path.read_text()
  changed = mutant.apply(text)
  if changed is None:
    return "did not apply", f"{text.count(mutant.old)} occurrences"
  command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", mutant.test]
  # No byte code: Python would take a file of the same second and size for the one before.
  environment = {"JAX_PLATFORMS": "cpu", **os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
  path.write_text(changed)
  try:
    how = {"cwd": tree, "env": environment, "timeout": TIMEOUT}
    run = subprocess.run(command, capture_output=True, text=True, **how)
  except subprocess.TimeoutExpired:
    return "did not end", f"in {TIMEOUT} s"
  finally:
    path.write_text(text)
  errors = [line[1:].strip() for line in run.stdout.splitlines() if line.startswith("E ")]
  detail = next((line for line in errors if line.startswith("assert")), "".join(errors[:1]))
  if run.returncode > 1:  # the test is not there, or does not load
    return "did not run", detail
  return ("caught" if run.returncode else "SURVIVED"), detail


def main(names: list[str]) -> int:
  """Runs the named mutants, or all; the exit status."""
  unknown = set(names) - {mutant.name for mutant in MUTANTS}
  if unknown:
    print(f"unknown: {', '.join(sorted(unknown))}; choose from:")
    print("\n".join(mutant.name for mutant in MUTANTS))
    return 2
  chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
  missed = 0
  with tempfile.TemporaryDirectory() as directory:
    tree = pathlib.Path(directory)
    copy_tree(tree)
    for mutant in chosen:
      found, detail = verdict(mutant, tree)
      missed += found != "caught"
      print(f"{found}: {mutant.name}\n  {mutant.test}\n  {detail[:90]}", flush=True)
  print(f"{len(chosen) - missed} of {len(chosen)} mutants caught")
  return int(missed > 0)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
