"""The byte count of compiled programs behind the linear attention rows."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.linear import program_bytes, type_bytes
from kernels import offline

HLO = """HloModule m

%fused (p: f32[8]) -> f32[8] {
  ROOT %n = f32[8]{0} negate(%p)
}

ENTRY %main (a: f32[8], b: bf16[4,2]) -> (f32[8], bf16[2]) {
  %a = f32[8]{0} parameter(0), metadata={op_name="a"}
  %b = bf16[4,2]{1,0} parameter(1)
  %c = f32[8]{0} fusion(%a), kind=kLoop, calls=%fused
  %pair = (f32[8]{0}, bf16[2]{0}) custom-call(%c, /*index=1*/%b), custom_call_target="x"
  %get-tuple-element.1 = f32[8]{0} get-tuple-element(%pair), index=0
  ROOT %out = (f32[8]{0}, bf16[2]{0}) tuple(%get-tuple-element.1, %b)
}
"""


@pytest.mark.parametrize("text, want", [("f32[]", 4), ("bf16[2,3]{1,0}", 12), ("(s32[4]{0}, pred[5], f32[])", 25)])
def test_type_bytes(text, want):
  assert type_bytes(text) == want


def test_program_bytes_counts_kernels_once_and_views_never():
  assert program_bytes(HLO) == ((32 + 32) + (32 + 16 + 32 + 4), 2)


def test_program_bytes_of_a_compiled_program():
  """One elementwise kernel reads two arrays and writes one."""
  x = jax.ShapeDtypeStruct((1 << 16,), jnp.float32)
  hlo = offline.compile_for(lambda a, b: jnp.sin(a) + b, x, x).compiled.as_text()
  assert program_bytes(hlo) == (3 * 4 * (1 << 16), 1)
