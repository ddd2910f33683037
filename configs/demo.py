"""The demo: eight rendered classes, 64 tokens, a DiT of 1.3 M parameters, minutes on two CPU cores.

  make demo                                                      data, training, samples, report
  python train.py --config=configs/demo.py --workdir=runs/demo   the training alone, with the data

Few tokens, so that many clips are seen within minutes, which is what a model learns by.
Attention is sparse here to be shown, not to save time, for which 64 tokens are too few;
configs/comparison.py has more. docs/log.md has what was tried.
"""

from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  config.data = dict(
    source="ucf101",
    root="data/demo",
    resolution=(96, 96),
    frames=16,
    stride=2,
    views=8,
    codec=dict(name="lowpass", factor=(2, 6, 6), channels=3),  # latents 8 x 16 x 16 x 3
  )
  # choice: all numbers below.
  config.model = dict(
    size="custom",
    width=128,
    depth=4,
    heads=4,
    patch=(2, 4, 4),
    precondition=True,
    positions=True,
    remat=False,
  )
  # 4x4x4 tokens; a tile is all that is seen at a time. Windows reach the times before and after,
  # the coarse level of 2x2x2 cells sees everything. Each level has a gate of its own: of a
  # distribution the finest level takes all within 100 steps on so few tokens.
  config.model.attention = dict(
    method="octaves",
    block=16,
    tile=(1, 4, 4),
    implementation="xla",
    # Levels of little weight are left out at .15 % of the loss after 400 steps (demo_parts.json).
    octaves=dict(levels=2, factor=2, window=(3, 1, 1), threshold=0.05, router=dict(mode="gates")),
    freqformer=dict(mid_tiles=1, window=(3, 1, 1)),
  )
  # Muon needs fewer steps than AdamW here, and in so few of them a rate that falls early costs more
  # than it gives (docs/log.md).
  config.train = dict(
    steps=2000,
    batch_size=32,
    optimizer="muon",
    lr=2e-3,
    muon_lr=0.02,
    schedule="trapezoid",
    warmup=50,
    ema=0.995,
    val_every=500,
    checkpoint_every=500,
  )
  # Guided at every t, colours overshoot, dots fade, and samples flicker (docs/log.md).
  config.sample = dict(
    steps=16, guidance=4.0, guidance_interval=(0.5, 0.95), shift=2.0, sampler="unipc", batch_size=16
  )
  return config


def sweep():
  """Yields routing hyper-parameters worth trying: flat overrides of the config, one trial each."""
  for slope in (0.0, 4.0, 8.0):
    yield {"model.attention.octaves.router.prior_slope": slope}
  for mode in ("straight_through", "soft"):
    yield {"model.attention.octaves.router.mode": mode}
  for budget in (0.3, 0.5):
    yield {
      "model.attention.method": "freqformer",
      "model.attention.freqformer.router.budget": budget,
    }
