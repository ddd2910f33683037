"""Any folder of video files: one subfolder per class, or all clips in one class. Fits a laptop.

  python train.py --config=configs/folder.py --config.data.root=$HOME/Videos --workdir=runs/videos
  python eval.py --workdir=runs/videos

Any format, size, length and frame rate, odd resolutions and frame counts too (docs/data.md).
"""

from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  config.data = dict(
    source="folder",
    root="videos",
    resolution=(90, 154),
    frames=17,
    fps=12.5,
    crop="random",
    flip=True,
    views=16,
    codec=dict(factor=(2, 8, 8), channels=16),  # latents 9 x 12 x 20 x 16
  )
  # choice: sizes and router are the demo's.
  config.model = dict(size="custom", width=96, depth=4, heads=6, patch=(1, 1, 1))
  router = dict(
    hidden=32, prior=(0.15, 0.25, 0.6), prior_slope=2.0, temperature=(1.0, 0.25), penalty=0.05
  )
  config.model.attention = dict(
    method="octaves",  # docs/evidence.md: H2; one low level: H11
    octaves=dict(levels=2, factor=4, window=(3, 2, 2), deal="octant"),
    freqformer=dict(mid_tiles=3, window=(3, 2, 2), border="clip", deal="octant", router=router),
  )
  config.train = dict(steps=2000, batch_size=4, ema=0.995, val_every=500)
  config.sample = dict(steps=32, guidance=1.0, batch_size=4)
  return config


def sweep():
  """Yields windows worth trying: flat overrides of the config, one trial each."""
  for window in ((3, 2, 2), (2, 3, 3), (3, 3, 3)):
    yield {"model.attention.octaves.window": window}
