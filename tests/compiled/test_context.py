"""Eight H100 that share the tokens of one sample: what they exchange and hold, without one.

A model of the size of Wan 2.1's smaller one, 1.3 billion parameters, at 64K tokens.

python -m tests.compiled.test_context        writes the golden table anew; look at its diff
"""

import functools
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


def compile_train_step(gpus: int = GPUS, unless: str | None = None) -> Compilation | None:
  """Compiles an optimisation step on one sample."""
  model = nnx.eval_shape(lambda: VideoDiT(MODEL, LATENT, 10, nnx.Rngs(0)))
  graphdef, params = nnx.split(model)
  train = TrainConfig(steps=100, batch_size=1)
  state = jax.eval_shape(lambda p: init_state(p, train, 0), params)
  batch = {"latent": _spec((1, *LATENT), jnp.float32), "label": _spec((1,), jnp.int32)}
  tables = make_tables(MODEL, LATENT)
  args = (state, batch, tables, numbers(train))
  step = make_train_step(graphdef, train)
  return compile_for(step, *args, devices=_mesh(gpus), options=NO_AUTOTUNING, unless=unless)


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


def measured(compile, known: dict | None = None) -> dict:
  """Returns what the golden table holds of a program, for one device; `known` if it is that.

  Args:
    compile: takes `unless` of `compile_for`.
  """
  compiled = compile(unless=known and known["program"])
  if compiled is None:
    return known
  moved = collectives(compiled.compiled.as_text())
  return {
    "program": compiled.fingerprint,
    "temporary_bytes": compiled.temp_bytes,
    "kernels": len(compiled.kernels),
    "exchanged_bytes": {kind: int(bytes) for kind, (_, bytes) in moved.items()},
  }


def layers(name: str, known: dict | None = None) -> dict:
  """Returns what the golden table holds of a layer on one GPU and on all."""
  return {
    word: measured(functools.partial(compile_layer, METHODS[name], gpus), known and known[word])
    for word, gpus in {"one_gpu": 1, "all_gpus": GPUS}.items()
  }


@pytest.mark.parametrize("name", METHODS)
def test_a_layer_takes_a_sixth_of_the_memory(name):
  found = layers(name, json.loads(TABLE.read_text())["layers"][name])
  alone, together = found["one_gpu"], found["all_gpus"]
  assert 6 * together["temporary_bytes"] <= alone["temporary_bytes"]
  assert together["kernels"] == alone["kernels"] >= 2
  moved = together["exchanged_bytes"]
  assert moved["all-to-all"] <= 2 * JOINT + 3 * OUT  # forward and backward; one more of dense
  assert moved.get("all-gather", 0) < 1e6


def test_a_training_step_stays_as_it_was():
  """The very program that the table is of, for the same compilers, is not compiled again."""
  known = json.loads(TABLE.read_text())["training_step"]
  now = measured(compile_train_step, known)
  text = "if meant: python -m tests.compiled.test_context"
  assert now["temporary_bytes"] == pytest.approx(known["temporary_bytes"], rel=SLACK), text
  assert now["exchanged_bytes"] == pytest.approx(known["exchanged_bytes"], rel=SLACK), text
  # Forward, forward again (rematerialisation) and backward of each layer, and nothing else.
  exchanged = MODEL.depth * 3 * (JOINT + OUT)
  assert now["exchanged_bytes"]["all-to-all"] == pytest.approx(exchanged, rel=0.01)


if __name__ == "__main__":
  found = {
    "training_step": measured(compile_train_step),
    "temporary_bytes_of_one_gpu": compile_train_step(1).temp_bytes,
    "layers": {name: layers(name) for name in METHODS},
  }
  TABLE.write_text(json.dumps(found, indent=1) + "\n")
