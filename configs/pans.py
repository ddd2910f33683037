"""Camera moves over photographs, labelled by motion: 1,152 tokens, a DiT of 1.3 M parameters.

  python -m freqformer.pans --photos=FOLDER                          renders data/pans
  python train.py --config=configs/pans.py --workdir=runs/pans
  python eval.py --workdir=runs/pans --samples=4
  python -m freqformer.evaluate --workdir=runs/pans --samples=samples --metrics=motion

No photograph is in both splits, and every class has the same photographs: only motion tells classes
apart. docs/evidence.md says where photographs come from.
"""

from configs import comparison


def get_config():
  config = comparison.get_config()
  # Clips are 96 x 96 pixels. A mirrored one would move the wrong way: no flip.
  config.data = dict(
    source="folder",
    root="data/pans",
    resolution=(96, 96),
    frames=16,
    views=2,
    codec=dict(factor=(2, 8, 8), channels=16),  # latents 8 x 12 x 12 x 16
  )
  # Heads of 32, because rotary positions of three axes share a head's width; four of them, one for
  # each side of the window.
  config.model.update(width=128, heads=4)
  config.model.attention.octaves.threshold = 0.0  # longer runs than configs/comparison.py's
  config.train.update(steps=2000, val_every=500, checkpoint_every=500)
  return config


def sweep():
  """Yields one trial per method."""
  for method in ("dense", "sliding_tile", "freqformer", "octaves"):
    yield {"model.attention.method": method}
