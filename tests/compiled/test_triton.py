"""The Triton kernels compile for every class of GPU without spills, to known numbers.

python -m tests.compiled.test_triton        writes the table anew; look at its diff
python -m tests.compiled.test_triton all    prints which kernel of any size spills, 10 minutes
"""

import dataclasses
import functools
import itertools
import json
import re
import sys
import typing

import jax
import jax.numpy as jnp
import pytest
import triton
from flax import nnx
from freqformer.kernels.around.prepare import Cells, prepare
from freqformer.kernels.block_sparse import triton_kernels
from freqformer.kernels.block_sparse.api import attention
from freqformer.kernels.block_sparse.table import BlockMask
from freqformer.kernels.block_sparse.triton import BLOCKS, HEAD_DIMS
from freqformer.kernels.core.target import current_target
from freqformer.kernels.triton.machine import SHARED_BYTES, device_class
from jax.sharding import PartitionSpec as P
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from freqformer.config import numbers
from freqformer.model.config import AttentionConfig, ModelConfig
from freqformer.model.dit import VideoDiT, make_tables
from freqformer.train.step import TrainConfig, init_state, make_train_step
from tests import golden
from tools import offline
from tools.triton_kernels import embedded_kernels

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
_OTHERS = ((128, 64, 128), (128, 128, 64), (128, 32, 32), (256, 128, 16), (16, 16, 16))
_DEVICES = ("a100", "rtx4090", "h100", "b200", "rtx5090")
CONFIGS = (
  *(Config(d, *sizes) for d in _DEVICES for sizes in _USUAL),
  *(Config(d, *sizes) for d in ("a100", "rtx4090") for sizes in _OTHERS),
  *(Config(d, 128, 128, 128, bias=True) for d in ("a100", "rtx4090", "rtx5090")),
  Config("a100", 128, 128, 128, dtype="float16"),
  Config("rtx3090", 128, 128, 128),
  Config("rtx5090", 32, 32, 16),
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
# The first of each GPU, and the largest kernel around attention.
ALWAYS = (
  *(Config(device, *_USUAL[0]) for device in _DEVICES),
  Around("a100", 256, 128, cells=64, filtered="qkv"),
)
_SOURCES = (
  "kernels/triton/*.py",
  "kernels/*/triton*.py",
  "kernels/core/*.py",
  "kernels/block_sparse/operands.py",
  "kernels/block_sparse/api.py",
  "kernels/around/prepare.py",
)


def both_ways(q, k, v, mask, d_out, d_lse):
  """Returns out, LSE and all gradients."""
  found, pull = jax.vjp(lambda *x: attention(*x, mask, implementation="triton"), q, k, v)
  return found, pull((d_out, d_lse))


def arguments(config: Config, samples: int = 1, rows: int = ROWS) -> tuple:
  """Returns the shapes of what `both_ways` takes."""
  x = _spec((samples, rows, HEADS, config.head_dim), config.dtype)
  tiles, kv_tiles = rows // config.block_q, rows // config.block_kv
  mask = BlockMask(
    _spec((1, HEADS, tiles, LISTED), jnp.int32),
    _spec((1, HEADS, tiles), jnp.int32),
    _spec((kv_tiles,), jnp.int32),
    _spec((kv_tiles,), jnp.float32) if config.bias else None,
    config.block_q,
    config.block_kv,
  )
  return x, x, x, mask, x, _spec((samples, HEADS, rows), jnp.float32)


def resources(config: Config | Around) -> dict[str, dict[str, int]]:
  """Returns resources by kernel, compiled now."""
  found = {}
  for kernel in offline.triton_resources(config.lower()):
    numbers = dataclasses.asdict(kernel)
    name = numbers.pop("name").rpartition("_")[0]
    del numbers["ptx"]
    found[name] = numbers
  return found


def made_by() -> str:
  """Returns the hash of `golden.made_by` for Triton's kernels.

  Triton compiles as it lowers: to know a program by itself would take as long as to compile it.
  """
  packages = ("jax", "jax-triton", "triton")
  return golden.made_by(packages, _SOURCES, Config, Around, both_ways, arguments)


@pytest.mark.parametrize("config", (*CONFIGS, *AROUND), ids=str)
def test_resources(config):
  """Those that the same compilers made of the same code are known; one per GPU is made anew."""
  table = json.loads(TABLE.read_text())
  known = table["kernels"][str(config)]
  is_known = table["made_by"] == made_by() and config not in ALWAYS
  found = known if is_known else resources(config)
  assert set(found) == config.kernels == set(known)
  with jax.sharding.use_abstract_mesh(offline.mesh(1, config.device).abstract_mesh):
    limit = SHARED_BYTES[device_class(current_target().capability)]
  for name, has in found.items():
    assert has["spill_stores"] == has["spill_loads"] == 0, name
    assert has["shared_bytes"] <= limit, name
    assert has["shared_bytes"] == known[name]["shared_bytes"], name
    assert abs(has["registers"] - known[name]["registers"]) <= REGISTER_SLACK, name


def test_the_table_has_no_other_rows():
  table = json.loads(TABLE.read_text())
  assert set(table["kernels"]) == set(map(str, (*CONFIGS, *AROUND)))
  assert table["made_by"] == made_by(), "run: python -m tests.compiled.test_triton"


def test_temporary_memory_is_one_array_of_rows_and_some_numbers():
  """At 64K tokens: the cotangent of valid rows, LSE and delta; no score is ever stored."""
  config = Config("a100", 128, 128, 128)
  tokens = 1 << 16
  found = offline.compile_for(both_ways, *arguments(config, rows=tokens), device="a100")
  rows = 2 * HEADS * tokens * config.head_dim  # bytes of an array of rows
  assert found.temp_bytes <= 1.1 * rows
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
  rows = 16_384
  heads = 12
  d = 128
  array = 2 * rows * heads * d  # bytes of q
  for options, plain in ((dict(over_heads=True), 2), (dict(cells=16, filtered="qkv"), 10)):
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


def test_a_training_step_runs_them_where_nothing_is_said():
  """On an RTX 4090: once each, though attention's layer is rematerialised."""
  attention_config = AttentionConfig((), method="sliding_tile", block=64)
  config = ModelConfig(
    attention_config, size="custom", width=128, heads=2, depth=2, dtype="bfloat16"
  )
  assert config.remat
  shape = (4, 16, 16, 4)
  model = nnx.eval_shape(lambda: VideoDiT(config, shape, 10, nnx.Rngs(0)))
  graphdef, params = nnx.split(model)
  train = TrainConfig(steps=10, batch_size=2)
  state = jax.eval_shape(lambda p: init_state(p, train, 0), params)
  batch = {"latent": _spec((2, *shape), jnp.float32), "label": _spec((2,), jnp.int32)}
  step = make_train_step(graphdef, train)
  args = (state, batch, make_tables(config, shape), numbers(train))
  kernels = embedded_kernels(offline.lower_for(step, *args, device="rtx4090"))
  found = [each.name for each in kernels if each.name.startswith("attention")]
  assert sorted(found) == ["attention_dkv", "attention_dq", "attention_forward"]
  assert {each.capability for each in kernels} == {89}


def test_the_forward_compiles_for_an_amd_gpu():
  """By Triton alone: jax-triton asks the device that it lowers for, and there is none."""
  kernel = triton_kernels.attention_forward
  arrays = {"codes": "*i32", "counts": "*i32", "order": "*i32", "bias": "*fp32", "lse": "*fp32"}
  arrays |= dict.fromkeys(("q", "k", "v", "out"), "*bf16")
  constants = dict(
    factor=0.1,
    sign=1.0,
    BIASED=False,
    ORDERED=True,
    h=HEADS,
    n_q=ROWS,
    n_kv=ROWS,
    D=128,
    block_q=128,
    block_kv=128,
    ROWS=128,
    STEP=64,
    HALVES=1,
    codes_b=0,
    codes_h=32,
    codes_tile=LISTED,
    counts_b=0,
    counts_h=8,
  )
  names = kernel.arg_names
  source = ASTSource(
    kernel,
    {name: arrays.get(name, "constexpr") for name in names},
    {(names.index(name),): value for name, value in constants.items()},
    {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in arrays},
  )
  options = {"num_warps": 8, "num_stages": 2}
  code = triton.compile(source, GPUTarget("hip", "gfx942", 64), options).asm["amdgcn"]
  assert "v_mfma" in code and re.search(r"\.vgpr_spill_count:\s+0\b", code)


def all_configs() -> list[Config]:
  """Returns every size that the kernels take, on every class."""
  sizes = itertools.product(_DEVICES, HEAD_DIMS, BLOCKS, BLOCKS)
  return [Config(*size) for size in sizes]


def main():
  if sys.argv[1:] == ["all"]:
    for config in all_configs():
      bad = {name: has for name, has in resources(config).items() if has["spill_stores"]}
      print(config, bad or "ok", flush=True)
    return
  table = {}
  for config in (*CONFIGS, *AROUND):
    table[str(config)] = resources(config)
    print(config, table[str(config)], flush=True)
  TABLE.write_text(json.dumps({"made_by": made_by(), "kernels": table}, indent=1) + "\n")


if __name__ == "__main__":
  main()
