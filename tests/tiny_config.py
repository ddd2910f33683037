"""The smallest config that walks the whole path; tests override `data.root` and `data.cache`."""

from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  config.data = dict(
    source="ucf101",
    root="missing",
    cache="missing",
    resolution=(24, 32),
    frames=6,
    stride=2,
    flip=True,
    views=2,
    val_fraction=0.2,
    workers=1,
    codec=dict(name="lowpass", factor=(2, 8, 8), channels=3),
  )
  config.model = dict(size="custom", width=24, depth=2, heads=2, patch=(1, 1, 1), mlp_ratio=2.0)
  config.model.update(precondition=True, positions=True)
  router = dict(hidden=8, prior=(0.2, 0.3, 0.5), temperature=(1.0, 0.5))
  config.model.attention = dict(
    block=8, freqformer=dict(mid_tiles=2, window=(1, 1, 2), deal="octant", router=router)
  )
  config.train = dict(
    steps=40,
    batch_size=2,
    warmup=5,
    ema=0.9,
    log_every=1,
    val_every=20,
    val_batches=1,
    samples=3,
    checkpoint_every=1000,
  )
  # A batch of as many as train.samples: one program for samples in training and by eval.py.
  config.sample = dict(steps=3, guidance=2.0, batch_size=3)
  return config


def sweep():
  yield {"model.attention.freqformer.router.mode": "sampled"}
  yield {"model.attention.freqformer.allocation": (1, 0, 1)}
