"""Every shipped kernel configuration compiles for an H100 without spilling; its resources are a golden table.

python -m tests.test_gpu_resources        writes the table anew; look at its diff before committing it
"""

import dataclasses
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from kernels import offline, pallas_mgpu, tuning
from kernels.attention import attention
from kernels.block_mask import BlockMask

GOLDEN = pathlib.Path(__file__).parent / "golden" / "gpu_resources.json"
ROWS, HEADS, LISTED = 1024, 4, 4


@dataclasses.dataclass(frozen=True)
class Config:
  """One way to call the backend."""

  head_dim: int
  block_q: int
  block_kv: int
  bias: bool = False
  listed: bool = True
  dtype: str = "bfloat16"
  by_lane: bool = False

  def __str__(self):
    words = {"bias": self.bias, "dense": not self.listed, self.dtype: self.dtype != "bfloat16", "by lane": self.by_lane}
    return " ".join([f"d{self.head_dim} q{self.block_q} kv{self.block_kv}", *(word for word, said in words.items() if said)])

  def tuning(self) -> dict:
    """The configurations that it runs with."""
    keys = [tuning.Key("h100", self.head_dim, self.block_q, self.block_kv, direction) for direction in tuning.DIRECTIONS]
    return {key: dataclasses.replace(tuning.lookup(key), by_lane=self.by_lane) for key in keys}


_SIZES = list(itertools.product(pallas_mgpu.HEAD_DIMS, pallas_mgpu.BLOCKS, pallas_mgpu.BLOCKS))
CONFIGS = (
  *(Config(*sizes) for sizes in _SIZES),
  *(Config(*sizes, bias=True) for sizes in _SIZES if sizes[0] > 32),
  *(Config(d, 128, 128, listed=False) for d in (64, 128)),
  *(Config(d, 128, 128, dtype="float16") for d in (64, 128)),
  *(Config(128, 128, 128, by_lane=True, bias=bias) for bias in (False, True)),
)


def resources(config: Config) -> dict[str, dict[str, int]]:
  """Registers, spills and shared memory of the forward and of both backward kernels."""
  array = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype)
  x = array(1, ROWS, HEADS, config.head_dim, dtype=config.dtype)
  tiles, kv_tiles = ROWS // config.block_q, ROWS // config.block_kv
  mask = BlockMask(
    array(1, HEADS, tiles, LISTED) if config.listed else None,
    array(1, HEADS, tiles),
    array(kv_tiles),
    array(kv_tiles, dtype=jnp.float32) if config.bias else None,
    config.block_q,
    config.block_kv,
  )

  def both(q, k, v, mask, d_out, d_lse):
    out, vjp = jax.vjp(lambda *a: attention(*a, mask, implementation="pallas_mgpu"), q, k, v)
    return out, vjp((d_out, d_lse))

  with tuning.override(config.tuning()):
    found = offline.compile_for(both, x, x, x, mask, x, array(1, HEADS, ROWS, dtype=jnp.float32)).kernels
  keep = ("registers", "spill_stores", "spill_loads", "shared_bytes")
  return {k.name.rsplit("_", 1)[0]: {name: getattr(k, name) for name in keep} for k in found}


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_resources(config):
  """No spills, within shared memory, and what the table says: a change is one to look at."""
  found = resources(config)
  assert set(found) == {"attention_forward", "attention_dq", "attention_dkv"}
  for name, kernel in found.items():
    assert kernel["spill_stores"] == kernel["spill_loads"] == 0, (name, kernel)
    assert kernel["shared_bytes"] <= offline.SHARED_LIMIT, (name, kernel)
  golden = json.loads(GOLDEN.read_text()).get(str(config))
  assert found == golden, "the kernels changed: run python -m tests.test_gpu_resources and look at the diff"


def test_predicted_shared_memory_is_enough():
  """What `TuningConfig` reckons is never less than what the kernel asks for, so a configuration that passes also launches."""
  golden = json.loads(GOLDEN.read_text())
  for config in CONFIGS:
    for key, chosen in config.tuning().items():
      assert golden[str(config)][f"attention_{key.direction}"]["shared_bytes"] <= chosen.shared_bytes(key)


if __name__ == "__main__":
  GOLDEN.write_text(json.dumps({str(c): resources(c) for c in CONFIGS}, indent=1) + "\n")
