"""Eight H100 that share the tokens of one sample: what they exchange and hold, without one.

A model of the size of Wan 2.1's smaller one, 1.3 billion parameters, at 64K tokens.

python -m tests.compiled.test_context        writes the golden table anew; look at its diff
"""

import json

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from freqformer.analysis.hlo_bytes import collectives
from freqformer.config import numbers
from freqformer.methods.base import Cond
from freqformer.methods.dense import Dense
from freqformer.methods.octaves import Octaves
from freqformer.model.attention import SpectralAttention
from freqformer.model.config import AttentionConfig, ModelConfig
from freqformer.model.dit import VideoDiT, make_tables
from freqformer.placement import split
from freqformer.train.step import TrainConfig, init_state, make_train_step
from tests import golden
from tools.offline import NO_AUTOTUNING, Compilation, compile_for

TABLE = golden.path("context")
SLACK = 0.1
GPUS = 8
LATENT = (16, 64, 64, 16)
WIDTH = 1536
MODEL = ModelConfig(
  AttentionConfig((("octaves", Octaves(levels=4)),), block=128, implementation="hopper"),
  dtype="bfloat16",
  size="custom",
  width=WIDTH,
  depth=30,
  heads=24,
  patch=(1, 1, 1),
)
ROWS = MODEL.layout(LATENT).n_buffer
# A device's part of the projected q, k and v, and of attention's output, in bytes.
JOINT = 2 * 3 * WIDTH * ROWS // GPUS
OUT = JOINT // 3

_spec = jax.ShapeDtypeStruct


def _mesh(context: int) -> dict[str, int]:
  return {"data": 1, "fsdp": 1, "context": context}


def compile_train_step(gpus: int = GPUS) -> Compilation:
  """Compiles an optimisation step on one sample."""
  model = nnx.eval_shape(lambda: VideoDiT(MODEL, LATENT, 10, nnx.Rngs(0)))
  graphdef, params = nnx.split(model)
  train = TrainConfig(steps=100, batch_size=1)
  state = jax.eval_shape(lambda p: init_state(p, train, 0), params)
  batch = {"latent": _spec((1, *LATENT), jnp.float32), "label": _spec((1,), jnp.int32)}
  tables = make_tables(MODEL, LATENT)
  args = (state, batch, tables, numbers(train))
  step = make_train_step(graphdef, train)
  return compile_for(step, *args, devices=_mesh(gpus), options=NO_AUTOTUNING)


def compile_layer(method, context: int, unless: str | None = None) -> Compilation | None:
  """Compiles forward and backward of an attention layer."""
  layout = MODEL.layout(LATENT)

  def build():
    return SpectralAttention(
      MODEL.dims, method, layout, nnx.Rngs(0), dtype=jnp.bfloat16, implementation="hopper"
    )

  graphdef, params = nnx.split(nnx.eval_shape(build))

  def both(params, x, d_out, arrays, tables):
    def run(params, x):
      cond = Cond(jnp.full(1, 0.5), jnp.ones((1, WIDTH)), train=True)
      layer = nnx.merge(graphdef, params)
      return split(layer(split(x, context=1), cond, arrays, tables, {})[0], context=1)

    out, pull = jax.vjp(run, params, x)
    return out, pull(split(d_out, context=1))

  x = _spec((1, ROWS, WIDTH), jnp.bfloat16)
  return compile_for(
    both,
    params,
    x,
    x,
    layout.arrays(),
    method.tables(layout),
    devices=_mesh(context),
    shardings=(P(), *[P(None, "context")] * 2, P(), P()),
    options=NO_AUTOTUNING,
    unless=unless,
  )


METHODS = {"dense": Dense(), "octaves": Octaves(levels=4)}


def one_gpu(name: str, known: dict | None = None) -> dict:
  """Returns what the golden table holds of a layer on one GPU, `known` if it is that."""
  alone = compile_layer(METHODS[name], 1, unless=known and known["program"])
  if alone is None:
    return known
  return {
    "program": alone.fingerprint,
    "temporary_bytes": alone.temp_bytes,
    "kernels": len(alone.kernels),
  }


@pytest.mark.parametrize("name", METHODS)
def test_a_layer_takes_a_sixth_of_the_memory(name):
  alone = one_gpu(name, json.loads(TABLE.read_text())["layers_of_one_gpu"][name])
  together = compile_layer(METHODS[name], GPUS)
  assert 6 * together.temp_bytes <= alone["temporary_bytes"]
  assert len(together.kernels) == alone["kernels"] >= 2
  moved = collectives(together.compiled.as_text())
  assert moved["all-to-all"][1] <= 2 * JOINT + 3 * OUT  # forward and backward; one more of dense
  assert moved.get("all-gather", (0, 0))[1] < 1e6


def found() -> dict:
  """Returns what the golden table holds of the training step, for one device."""
  step = compile_train_step()
  moved = collectives(step.compiled.as_text())
  return {
    "temporary_bytes": step.temp_bytes,
    "exchanged_bytes": {kind: int(bytes) for kind, (_, bytes) in moved.items()},
  }


def test_a_training_step_stays_as_it_was():
  now = found()
  known = json.loads(TABLE.read_text())
  text = "if meant: python -m tests.compiled.test_context"
  assert now["temporary_bytes"] == pytest.approx(known["temporary_bytes"], rel=SLACK), text
  assert now["exchanged_bytes"] == pytest.approx(known["exchanged_bytes"], rel=SLACK), text
  # Forward, forward again (rematerialisation) and backward of each layer, and nothing else.
  exchanged = MODEL.depth * 3 * (JOINT + OUT)
  assert now["exchanged_bytes"]["all-to-all"] == pytest.approx(exchanged, rel=0.01)


if __name__ == "__main__":
  alone = {
    "temporary_bytes_of_one_gpu": compile_train_step(1).temp_bytes,
    "layers_of_one_gpu": {name: one_gpu(name) for name in METHODS},
  }
  TABLE.write_text(json.dumps(found() | alone, indent=1) + "\n")
