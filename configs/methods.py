"""Every trainable method on rendered clips, at about the same density of attention.

  python -m freqformer.data.render data/comparison
  python -m freqformer.sweep --config=configs/methods.py --study=runs/methods
  ... --override=train.steps=800                                     longer runs

The sweep trains one run per method, each some minutes, and ends with a table. Model,
codec, schedule, batches and seeds are those of configs/comparison.py, so that runs differ in their
attention alone. Densities are 0.19 to 0.24, and 1 for dense: with 36 tiles of 32 tokens they come
in steps of 1/36, so read a loss together with the density that ran. What the routed methods spend
is up to their routers; the range holds for the expected density of their priors. The training-free
methods (adaspa, spatial_temporal) sample the dense model:
`python eval.py --workdir=runs/methods/<dense> --method=adaspa`.
"""

from configs import comparison

TRAINABLE = (
  "dense",
  "freqformer",
  "octaves",
  "sparseflow",
  "sliding_tile",
  "radial",
  "block_topk",
  "sparse_linear",
)


def get_config():
  config = comparison.get_config()
  attention = config.model.attention
  # 4x3x3 tiles: methods that are sparse in time need several along it.
  attention.tile = (2, 4, 4)
  attention.block = 32
  window = dict(window=(3, 2, 2), border="clip", deal="octant")
  # At 11 tiles the prior expects 0.19, as sliding_tile has.
  attention.freqformer.update(mid_tiles=11, **window)
  attention.octaves.update(**window)
  attention.sliding_tile = dict(unit="tiles", **window)
  # Without sink tiles: a layer of tiles would be a quarter of all keys.
  attention.radial = dict(decay=0.4, sink=0)
  attention.block_topk = dict(density=8 / 36)
  attention.sparse_linear = dict(critical=8 / 36)
  attention.sparseflow.update(schedule=dict(frames=(1, 2)), around=(3, 3))
  attention.sparseflow.router.budget = 0.2  # as FreqFormer's
  return config


def sweep():
  """Yields one trial per method."""
  for method in TRAINABLE:
    yield {"model.attention.method": method}
