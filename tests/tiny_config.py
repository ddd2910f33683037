"""The smallest config that walks the whole path; tests override `data.root` and `data.cache`."""

from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  config.seed = 0
  config.data = ConfigDict(
    dict(
      source="ucf101",
      root="missing",
      split=1,
      cache="missing",
      resolution=(24, 32),
      frames=6,
      stride=2,
      crop="center",
      flip=True,
      views=2,
      short="clamp",
      seed=0,
      val_fraction=0.2,
      max_clips=0,
      workers=1,
      codec=dict(name="dct", factor=(2, 8, 8), channels=4),
    )
  )
  config.model = ConfigDict(
    dict(
      size="custom",
      width=24,
      depth=2,
      heads=2,
      patch=(1, 1, 1),
      mlp_ratio=2.0,
      dtype="float32",
      remat=True,
      attention=dict(
        method="freqformer",
        layers=(),
        block=8,
        tile=(),
        qk_gain=1.0,
        implementation=None,
        dense=dict(),
        freqformer=dict(
          basis=dict(kind="block_dct", low=(0.5, 0.5, 0.5), mid=(0.75, 0.75, 0.75)),
          allocation="routed",
          mid_tiles=2,
          sink=0,
          anchors=0,
          window=(1, 1, 2),
          border="clamp",
          filter="none",
          low_op="dense",
          low_shared=False,
          summary=0,
          router=dict(
            mode="soft",
            hidden=8,
            statistics=True,
            prior=(0.2, 0.3, 0.5),
            prior_slope=1.0,
            temperature=(1.0, 0.5),
            budget=0.2,
            penalty=0.1,
            noise=0.5,
          ),
        ),
      ),
    )
  )
  config.train = ConfigDict(
    dict(
      steps=40,
      batch_size=2,
      lr=1e-3,
      warmup=5,
      schedule="cosine",
      weight_decay=0.01,
      beta2=0.99,
      clip=1.0,
      ema=0.9,
      label_dropout=0.1,
      time_sampling="uniform",
      log_every=1,
      val_every=20,
      val_batches=1,
      val_soft=True,
      checkpoint_every=1000,
      keep=2,
    )
  )
  config.sample = ConfigDict(dict(steps=3, guidance=2.0, batch_size=4, shift=1.0, soft=False))
  return config


def sweep():
  yield {"model.attention.freqformer.router.mode": "sampled"}
  yield {"model.attention.freqformer.allocation": (1, 0, 1)}
