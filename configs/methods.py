"""Every trainable method on the demo's data, at about the same density of attention: 0.19 to 0.24, beside dense.

  python -m freqformer.demo --workdir=runs/demo                                          renders the data (and trains the demo)
  python -m freqformer.sweep --config=configs/methods.py --study=runs/methods            one run per method, a table at the end
  python -m freqformer.sweep --config=configs/methods.py --study=runs/methods --override=train.steps=800

The demo's model, codec and schedule (configs/demo.py), 1,152 tokens in 18 tiles of 64; steps, batches and seeds are equal, so
runs differ in their attention alone. With 18 tiles, densities come in steps of 1/18: read a loss beside the density that ran.
What the routed methods spend is up to their routers; the range holds for the expected density of their priors. A run takes
about as long as the demo's training. The training-free methods (adaspa, spatial_temporal) need none: sample the dense model
with them (`python eval.py --workdir=runs/methods/<dense> --method=adaspa`).
"""

from ml_collections import ConfigDict

from configs import demo

TRAINABLE = (
  "dense",
  "freqformer",
  "sparseflow",
  "sliding_tile",
  "radial",
  "block_topk",
  "sparse_linear",
)


def get_config():
  config = demo.get_config()
  attention = config.model.attention
  attention.freqformer.mid_tiles = 4
  attention.sliding_tile = ConfigDict(dict(window=(1, 2, 2), unit="tiles"))
  attention.radial = ConfigDict(
    dict(decay=0.4, sink=0)
  )  # two frames of tiles: a sink would be half of all keys
  attention.block_topk = ConfigDict(dict(density=4 / 18, coarse="gated"))
  attention.sparse_linear = ConfigDict(dict(critical=4 / 18, negligible=0.1))
  attention.sparseflow = ConfigDict(
    dict(
      schedule=dict(frames=(1, 2), direction="sparse_early", shape="linear"),
      around=(2, 2),
      anchors=1,
      router=dict(attention.freqformer.router, prior=(0.6, 0.4), prior_slope=0.0),
    )
  )
  return config


def sweep():
  """One trial per method."""
  for method in TRAINABLE:
    yield {"model.attention.method": method}
