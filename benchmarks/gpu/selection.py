"""Selection on the GPU: are the sets those of an exact top-k?"""

import jax
import jax.numpy as jnp
import numpy as np
from freqformer.kernels.selection.topk import top_ids


def check(small: bool, implementation: str) -> dict:
  """Lists of rows of all lengths, with fixed places and many ties, against a stable sort in NumPy.

  The device decides who selects; `implementation` names the backend of attention and changes nothing.
  """
  del implementation
  rng, correct, rows = np.random.default_rng(0), True, 0
  for m, budget in (
    ((96, 7), (200, 67))
    if small
    else ((512, 26), (630, 126), (2048, 102), (8192, 409), (16384, 819))
  ):
    for draw in (rng.standard_normal, lambda shape: rng.integers(-9, 9, shape)):
      scores, always = (
        draw((1, 3, 64, m)).astype(np.float32),
        np.stack([np.arange(64), np.full(64, m - 1)], -1),
      )
      found = np.asarray(
        jax.jit(top_ids, static_argnums=1)(jnp.asarray(scores), budget, jnp.asarray(always))
      )
      scores[..., np.arange(64)[:, None], always] = np.inf
      exact = np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :budget], axis=-1)
      correct, rows = correct and np.array_equal(found, exact), rows + exact[..., 0].size
  return {"rows": rows, "correct": bool(correct)}
