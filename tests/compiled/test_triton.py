"""The Triton kernels compile for every class of GPU without spills, to known numbers.

python -m tests.compiled.test_triton        writes the table anew; look at its diff
"""

import dataclasses
import functools
import json
import typing

import jax
import jax.numpy as jnp
import pytest
from freqformer.kernels.around.prepare import Cells, prepare
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.block_sparse.table import BlockMask
from freqformer.kernels.core.target import current_target
from freqformer.kernels.triton.machine import SHARED_BYTES, device_class
from jax.sharding import PartitionSpec as P

from tests import golden
from tools import offline

TABLE = golden.path("triton_resources")
ROWS = 1024
HEADS = 2
LISTED = 4
# Another ptxas may give a kernel a few registers more or less.
REGISTER_SLACK = 8
_spec = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Config:
  """One way to call attention on one GPU."""

  kernels: typing.ClassVar = {"attention_forward", "attention_dq", "attention_dkv"}
  device: str
  head_dim: int
  block_q: int
  block_kv: int
  bias: bool = False
  dtype: str = "bfloat16"

  def lower(self) -> jax.stages.Lowered:
    return offline.lower_for(both_ways, *arguments(self), device=self.device)

  def __str__(self):
    words = ["bias"] * self.bias + [self.dtype] * (self.dtype != "bfloat16")
    sizes = f"d{self.head_dim} q{self.block_q} kv{self.block_kv}"
    return " ".join([self.device, sizes, *words])


@dataclasses.dataclass(frozen=True)
class Around:
  """One way to call `prepare` on one GPU; `cells` are the coarse tokens of a tile."""

  kernels: typing.ClassVar = {"prepare"}
  device: str
  head_dim: int
  block: int
  cells: int = 0
  filtered: str = ""
  pooled: bool = True
  over_heads: bool = False
  dtype: str = "bfloat16"

  def __str__(self):
    words = [f"filters {self.filtered}"] * bool(self.filtered) + ["means"] * self.pooled
    words += ["over heads"] * self.over_heads + [self.dtype] * (self.dtype != "bfloat16")
    sizes = f"around d{self.head_dim} tile{self.block} cells{self.cells}"
    return " ".join([self.device, sizes, *words])

  def run(self, *args, implementation="triton"):
    options = dict(filtered=self.filtered, pooled=self.pooled, over_heads=self.over_heads)
    return prepare(*args, **options, implementation=implementation)

  def lower(self) -> jax.stages.Lowered:
    return offline.lower_for(self.run, *self.arguments(), device=self.device)

  def arguments(self, samples: int = 1, rows: int = ROWS, heads: int = HEADS) -> tuple:
    """Returns the shapes of what `run` takes; some tile has fewer cells than the others."""
    f32 = functools.partial(_spec, dtype=jnp.float32)
    i32 = functools.partial(_spec, dtype=jnp.int32)
    d, tiles = self.head_dim, rows // self.block
    gain = f32((heads, d) if self.over_heads else (d,))
    joint = _spec((samples, rows, 3, heads, d), self.dtype)
    tables = (f32((rows, d // 2)),) * 2
    cells = None
    if self.cells:
      count = tiles * self.cells - 1
      angles = (f32((count, d // 2)),) * 2
      front = -(-count // self.block) * self.block
      filters = f32((2, 2, self.block, self.block)) if self.filtered else None
      matrices = f32((2, self.cells, self.block))
      cells = Cells(matrices, i32((tiles,)), i32((count,)), *angles, front, filters)
    bands = i32((samples, heads)) if self.filtered else None
    return joint, f32((3, heads, d)), (gain, gain), tables, i32((tiles,)), cells, bands


# What models have, on every class; the others where registers and shared memory are scarcest.
_USUAL = ((128, 128, 128), (128, 64, 64), (64, 128, 128), (64, 64, 64), (256, 64, 64))
_OTHERS = ((128, 64, 128), (128, 128, 64), (256, 128, 16), (32, 128, 128), (16, 16, 16))
_DEVICES = ("a100", "rtx4090", "h100", "b200", "rtx5090")
CONFIGS = (
  *(Config(d, *sizes) for d in _DEVICES for sizes in _USUAL),
  *(Config(d, *sizes) for d in ("a100", "rtx4090") for sizes in _OTHERS),
  *(Config(d, 128, 128, 128, bias=True) for d in ("a100", "rtx4090", "rtx5090")),
  Config("a100", 128, 128, 128, dtype="float16"),
  Config("rtx3090", 128, 128, 128),
)
_AROUND = (
  dict(head_dim=128, block=128, pooled=False),
  dict(head_dim=128, block=128, pooled=False, over_heads=True),
  dict(head_dim=128, block=128, cells=16),
  dict(head_dim=128, block=128, cells=64, filtered="qkv"),
  dict(head_dim=64, block=64, cells=8, filtered="v", over_heads=True),
  dict(head_dim=256, block=128, cells=64, filtered="qkv"),
)
AROUND = (
  *(Around(device, **sizes) for device in _DEVICES for sizes in _AROUND),
  Around("a100", 32, 16, cells=4),
  Around("a100", 128, 128, cells=16, filtered="qkv", dtype="float16"),
  Around("rtx3090", 128, 64, cells=8, filtered="qkv"),
)


def both_ways(q, k, v, mask, d_out, d_lse):
  """Returns out, LSE and all gradients."""
  found, pull = jax.vjp(lambda *x: attention(*x, mask, implementation="triton"), q, k, v)
  return found, pull((d_out, d_lse))


def arguments(config: Config, samples: int = 1) -> tuple:
  """Returns the shapes of what `both_ways` takes."""
  x = _spec((samples, ROWS, HEADS, config.head_dim), config.dtype)
  tiles, kv_tiles = ROWS // config.block_q, ROWS // config.block_kv
  mask = BlockMask(
    _spec((1, HEADS, tiles, LISTED), jnp.int32),
    _spec((1, HEADS, tiles), jnp.int32),
    _spec((kv_tiles,), jnp.int32),
    _spec((kv_tiles,), jnp.float32) if config.bias else None,
    config.block_q,
    config.block_kv,
  )
  return x, x, x, mask, x, _spec((samples, HEADS, ROWS), jnp.float32)


def resources(config: Config | Around) -> dict[str, dict[str, int]]:
  """Returns resources by kernel, compiled now."""
  found = {}
  for kernel in offline.triton_resources(config.lower()):
    numbers = dataclasses.asdict(kernel)
    name = numbers.pop("name").rpartition("_")[0]
    del numbers["ptx"]
    found[name] = numbers
  return found


@pytest.mark.parametrize("config", (*CONFIGS, *AROUND), ids=str)
def test_resources(config):
  found = resources(config)
  known = json.loads(TABLE.read_text())[str(config)]
  assert set(found) == config.kernels == set(known)
  with jax.sharding.use_abstract_mesh(offline.mesh(1, config.device).abstract_mesh):
    limit = SHARED_BYTES[device_class(current_target().capability)]
  for name, numbers in found.items():
    assert numbers["spill_stores"] == numbers["spill_loads"] == 0, name
    assert numbers["shared_bytes"] <= limit, name
    assert numbers["shared_bytes"] == known[name]["shared_bytes"], name
    assert abs(numbers["registers"] - known[name]["registers"]) <= REGISTER_SLACK, name


def test_the_table_has_no_other_rows():
  assert set(json.loads(TABLE.read_text())) == set(map(str, (*CONFIGS, *AROUND)))


def test_temporary_memory_is_that_of_what_the_kernels_read():
  """LSE and delta, twice each; no score is ever stored."""
  config = Config("a100", 128, 128, 128)
  found = offline.compile_for(both_ways, *arguments(config), device="a100")
  numbers = 4 * HEADS * ROWS  # bytes of one float32 per row and head
  rows = 2 * HEADS * ROWS * config.head_dim  # bytes of an array of rows
  scores = 4 * HEADS * ROWS * LISTED * config.block_kv
  assert numbers <= found.temp_bytes <= 2 * rows < scores
  assert [kernel.name.rpartition("_")[0] for kernel in found.kernels] == [
    "attention_forward",
    "attention_dq",
    "attention_dkv",
  ]


def test_devices_gather_nothing():
  """Samples over two GPUs: each one's kernels run on its own."""
  config = Config("a100", 64, 64, 64)
  own, none = P("data"), P()
  shardings = (own, own, own, none, own, own)
  args = arguments(config, samples=2)
  found = offline.compile_for(both_ways, *args, devices=2, device="a100", shardings=shardings)
  text = found.compiled.as_text()
  assert text.count('custom_call_target="triton_kernel_call_ffi"') == 3
  for collective in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
    assert collective not in text


def test_prepared_arrays_need_no_others():
  """The plain form keeps as many arrays as it has heads with filters; the kernel keeps none."""
  rows, heads, d = 16384, 12, 128
  array = 2 * rows * heads * d  # bytes of q
  for options, plain in (
    (dict(over_heads=True), 2),
    (dict(cells=16), 1.5),
    (dict(cells=16, filtered="qkv"), 10),
  ):
    config = Around("a100", d, 128, **options)
    args = config.arguments(rows=rows, heads=heads)

    def temporary(implementation, config=config, args=args):
      run = functools.partial(config.run, implementation=implementation)
      found = offline.compile_for(run, *args, device="a100", options=offline.NO_AUTOTUNING)
      return found.temp_bytes

    assert temporary("triton") < 1e-3 * array
    assert temporary("xla") >= plain * array


def test_devices_prepare_their_own_samples_and_heads():
  config = Around("a100", 64, 64, cells=8, filtered="qkv")
  args = config.arguments(samples=2)
  for shardings in (
    (P("data"), P(), P(), P(), P(), P(), P("data")),
    (P(None, None, None, "data"), P(None, "data"), P(), P(), P(), P(), P(None, "data")),
  ):
    found = offline.compile_for(config.run, *args, devices=2, device="a100", shardings=shardings)
    text = found.compiled.as_text()
    assert text.count('custom_call_target="triton_kernel_call_ffi"') == 1
    for collective in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
      assert collective not in text


def main():
  table = {}
  for config in (*CONFIGS, *AROUND):
    table[str(config)] = resources(config)
    print(config, table[str(config)], flush=True)
  TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
  main()
