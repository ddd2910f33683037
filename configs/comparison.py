"""The model that methods are compared on: eight rendered classes, 1,152 tokens, 0.74 M parameters.

  python -m benchmarks.trained.demo_compare     renders data/comparison, trains three methods

Its latents are those of configs/ucf101.py, and its grid has enough tiles for methods to differ.
Samples after minutes show colours and no shapes: configs/demo.py is the one to look at.
"""

from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  config.data = dict(
    source="ucf101",
    root="data/comparison",
    resolution=(96, 96),
    frames=16,
    stride=2,
    views=2,
    codec=dict(factor=(2, 8, 8), channels=16),  # latents 8 x 12 x 12 x 16
  )
  config.model = dict(size="custom", width=96, depth=4, heads=6, patch=(1, 1, 1), remat=False)
  # choice: sizes, FreqFormer's router and learning rate; docs/log.md has what was tried.
  router = dict(
    hidden=32, prior=(0.15, 0.25, 0.6), prior_slope=2.0, temperature=(1.0, 0.25), penalty=0.05
  )
  # 1x6x3 tiles, whole in time. Windows of two by two, dealt to the heads: together they see all
  # neighbours at 4/18 of the pairs.
  config.model.attention = dict(
    method="octaves",  # docs/evidence.md: H2; one low level: H11
    tile=(8, 2, 4),
    implementation="xla",
    # Levels of little weight are left out at .02 % of the loss after 800 steps (demo_compare.json).
    octaves=dict(levels=2, factor=4, window=(1, 2, 2), deal="octant", threshold=0.05),
    # Other methods that `method` or `layers` can name, near the same density.
    freqformer=dict(mid_tiles=3, window=(1, 2, 2), deal="octant", router=router),
    # Sparse in space alone with one layer of tiles; configs/methods.py has tiles of two frames.
    sparseflow=dict(
      schedule=dict(frames=(1, 1)),
      around=(1, 3),
      anchors=0,
      # 60 % of heads are sparse by the prior; at a budget of 0.2 the router makes all of them so.
      router=router | dict(prior=(0.6, 0.4), prior_slope=0.0, budget=0.1),
    ),
    sparse_linear=dict(critical=0.15),
  )
  config.train = dict(
    steps=480, batch_size=4, lr=2e-3, warmup=50, ema=0.99, val_every=250, checkpoint_every=250
  )
  config.sample = dict(steps=24, guidance=2.0)
  return config


def sweep():
  """Yields routing hyper-parameters worth trying: flat overrides of the config, one trial each."""
  for slope in (0.0, 4.0, 8.0):
    yield {"model.attention.octaves.router.prior_slope": slope}
  yield {"model.attention.octaves.levels": 3, "model.attention.octaves.factor": 2}
  for mode in ("straight_through", "gates"):
    yield {"model.attention.octaves.router.mode": mode}
  for budget in (0.1, 0.2):
    yield {
      "model.attention.method": "freqformer",
      "model.attention.freqformer.router.budget": budget,
    }
