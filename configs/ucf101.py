"""UCF-101 at 128x128, 16 frames, stride 2: a DiT-S with octaves, class-conditional.

  python train.py --config=configs/ucf101.py --workdir=runs/ucf101
  python eval.py --workdir=runs/ucf101 --classes=Basketball,Biking

Data: `config.data.root` holds UCF-101/ and ucfTrainTestlist/ (the README says where they come
from). Train list of split 1. Hardware: written for one GPU; `--dry_run` prints tokens, parameters,
memory and FLOPs on any machine. No full run has been measured yet, so none is quoted here.
"""

from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  config.data = dict(
    source="ucf101",
    root="data/ucf101",
    resolution=(128, 128),
    frames=16,
    stride=2,
    crop="random",
    flip=True,
    views=4,
    codec=dict(factor=(2, 8, 8), channels=32),  # latents 8 x 16 x 16 x 32
  )
  # Sizes follow DiT-S. choice: codec, window and router.
  config.model = dict(size="S", patch=(1, 1, 1), dtype="bfloat16")
  router = dict(prior=(0.15, 0.25, 0.6), prior_slope=2.0, temperature=(1.0, 0.25), penalty=0.05)
  config.model.attention = dict(
    method="octaves",  # docs/evidence.md: H2; one low level, of a cell per tile: H11
    tile=(4, 4, 4),
    # Both tiles along t, and a quarter of the nearest ones of a frame to each head in turn.
    octaves=dict(levels=2, factor=4, window=(3, 2, 2), deal="octant"),
    freqformer=dict(anchors=1, window=(2, 2, 2), deal="octant", router=router),
  )
  config.train = dict(
    steps=400_000,
    batch_size=32,
    lr=2e-4,
    warmup=2_000,
    ema=0.9999,
    time_sampling="logit_normal",
    log_every=50,
    val_every=5_000,
    val_batches=8,
    checkpoint_every=5_000,
    keep=3,
  )
  return config


def sweep():
  """Yields routing hyper-parameters worth trying: flat overrides of the config, one trial each."""
  for levels, factor in ((2, 4), (3, 2)):
    for slope in (0.0, 4.0, 8.0):
      yield {
        "model.attention.octaves.levels": levels,
        "model.attention.octaves.factor": factor,
        "model.attention.octaves.router.prior_slope": slope,
      }
  yield {
    "model.attention.octaves.window": (3, 3, 3),
    "model.attention.octaves.deal": "centred",
    "model.attention.octaves.mid_tiles": 4,
  }
  for budget in (0.1, 0.2, 0.4):
    yield {
      "model.attention.method": "freqformer",
      "model.attention.freqformer.router.budget": budget,
    }
