"""Any folder of video files: one subfolder per class, or all clips flat in one class. Small enough for a laptop.

  python train.py --config=configs/folder.py --config.data.root=$HOME/Videos --workdir=runs/videos
  python eval.py --workdir=runs/videos

mp4, avi, mov, mkv, webm, any size, length and frame rate; odd resolutions and frame counts are fine. Sizes are ours.
"""

from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  config.seed = 0

  config.data = ConfigDict(
    dict(
      source="folder",
      root="videos",
      split=1,
      cache="data/cache",
      resolution=(90, 154),
      frames=17,
      stride=2,
      crop="random",
      flip=True,
      views=16,
      short="clamp",
      seed=0,
      val_fraction=0.1,
      max_clips=0,
      workers=0,
      codec=dict(name="dct", factor=(2, 8, 8), channels=16),  # -> latents 9 x 12 x 20 x 16
    )
  )

  config.model = ConfigDict(
    dict(
      size="custom",
      width=96,
      depth=4,
      heads=6,
      patch=(1, 1, 1),
      mlp_ratio=4.0,
      dtype="float32",
      remat=True,
      attention=dict(
        method="freqformer",
        layers=(),
        block=64,
        tile=(),
        qk_gain=1.5,
        implementation=None,
        dense=dict(),
        freqformer=dict(
          basis=dict(kind="block_dct", low=(0.5, 0.5, 0.5), mid=(0.75, 0.75, 0.75)),
          allocation="routed",
          mid_tiles=3,
          sink=0,
          anchors=0,
          window=(1, 2, 2),
          border="clamp",
          filter="none",
          low_op="dense",
          low_shared=False,
          summary=0,
          router=dict(
            mode="soft",
            hidden=32,
            statistics=True,
            prior=(0.15, 0.25, 0.6),
            prior_slope=2.0,
            temperature=(1.0, 0.25),
            budget=0.2,
            penalty=0.05,
            noise=0.5,
          ),
        ),
      ),
    )
  )

  config.train = ConfigDict(
    dict(
      steps=2000,
      batch_size=4,
      lr=1e-3,
      warmup=100,
      schedule="cosine",
      weight_decay=0.01,
      beta2=0.99,
      clip=1.0,
      ema=0.995,
      label_dropout=0.1,
      time_sampling="uniform",
      log_every=10,
      val_every=500,
      val_batches=4,
      val_soft=True,
      checkpoint_every=500,
      keep=2,
    )
  )
  config.sample = ConfigDict(dict(steps=32, guidance=1.0, batch_size=4, shift=1.0, soft=False))
  return config


def sweep():
  """Routing hyper-parameters worth trying: flat overrides of the config, one trial each."""
  for window in ((1, 2, 2), (3, 1, 1), (2, 2, 2)):
    yield {"model.attention.freqformer.window": window}
