"""Sources of q, k, v for `freqformer.analysis.bounds`: a trained model, or random numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from freqformer.analysis.bounds import bases, measure
from freqformer.grid.basis import SpectralTables
from freqformer.grid.layout import LayoutTables
from freqformer.methods.base import Method
from freqformer.model.architectures import make_model


@dataclasses.dataclass(frozen=True)
class Probe(Method):
  """Runs another method, with its parameters and checkpoints, and hands its q, k, v out in aux."""

  inner: Method

  def build(self, dims, layout, rngs):
    return self.inner.build(dims, layout, rngs)

  def tables(self, layout):
    return {
      "inner": self.inner.tables(layout),
      "bases": {n: b.fit(layout) for n, b in bases(self.inner).items()},
    }

  def __call__(self, module, qkv, cond, tables, state):
    out, state, aux = self.inner(module, qkv, cond, tables["inner"], state)
    return out, state, aux | {"probe": finished(qkv, tables["bases"])}


def finished(qkv, spectra: dict[str, SpectralTables]) -> dict:
  """Returns q and k as attention sees them, and each basis's tokens, normed after compression."""
  coarse = {
    name: (
      qkv.rotate_q(s.compress(qkv.q), s.centres),
      qkv.rotate_k(s.compress(qkv.k), s.centres),
      s.compress(qkv.v),
    )
    for name, s in spectra.items()
  }
  positions = qkv.layout.positions
  return {
    "q": qkv.rotate_q(qkv.q, positions),
    "k": qkv.rotate_k(qkv.k, positions),
    "v": qkv.v,
    "coarse": coarse,
  }


def measure_model(
  config,
  params,
  latent_shape,
  classes: int,
  latents,
  time: float,
  label: int | np.ndarray = 0,
  case: str = "model",
  embedding: int = 0,
):
  """Measures every layer of a trained model on one noisy latent, see `measure`.

  Args:
    config: the model's `ModelConfig`, all of its layers a `FreqFormer`.
    params: its parameters (of `load_run`).
    latent_shape: `(t, y, x, c)`.
    latents: `[t, y, x, c]`, normalised as in training; noise is added here,
      `x_t = (1 - t) x_0 + t eps`.
    label: of the latent, a class or an embedding `[embedding]`.
    case: name of the rows.
    embedding: as of `make_model`.
  """
  methods = tuple(
    (name, Probe(method)) for name, method in config.attention.methods if hasattr(method, "basis")
  )
  probed = dataclasses.replace(
    config, attention=dataclasses.replace(config.attention, methods=methods)
  )
  graphdef, _ = nnx.split(
    nnx.eval_shape(
      lambda: make_model(probed, latent_shape, nnx.Rngs(0), classes=classes, embedding=embedding)
    )
  )
  model = nnx.merge(graphdef, params)
  noise = jax.random.normal(jax.random.key(0), latents.shape)
  x = ((1 - time) * jnp.asarray(latents) + time * noise)[None]
  tables = jax.tree.map(jnp.asarray, model.tables(latent_shape))
  run = jax.jit(lambda model, *args: model(*args)[2])
  auxes = run(model, x, jnp.full(1, time), jnp.asarray(label)[None], tables)
  rows = []
  layer = 0
  for (count, method), aux in zip(probed.runs(), auxes, strict=True):
    for i in range(count):
      tensors = jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i, 0], np.float64), aux["probe"])
      rows += measure(tensors, config.layout(latent_shape), method.inner, case, layer)
      layer += 1
  return rows


def random_tensors(
  arrays: LayoutTables, method, heads: int, d: int, seed: int, smooth: float = 0.0
) -> dict:
  """Draws normal q, k, v and compresses them; a part `smooth` of their variance is shared."""
  rng = np.random.default_rng(seed)
  shared = np.sqrt(smooth) * rng.normal(size=(3, 1, heads, d))
  own = np.sqrt(1 - smooth) * rng.normal(size=(3, arrays.layout.n_buffer, heads, d))
  qkv = (own + shared).astype(np.float32)
  compress = jax.jit(lambda spectral, x: spectral.compress(x))
  coarse = {
    name: tuple(np.asarray(compress(basis.fit(arrays.layout), qkv)))
    for name, basis in bases(method).items()
  }
  q, k, v = qkv
  return {"q": q, "k": k, "v": v, "coarse": coarse}
