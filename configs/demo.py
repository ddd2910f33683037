"""The demo: eight rendered classes, 1,152 tokens, a 0.74 M-parameter DiT, about four minutes of training on 2 CPU cores.

  make demo                                                      renders the data, trains, samples, writes the report
  python train.py --config=configs/demo.py --workdir=runs/demo   the training alone, once the data are there

The very path of configs/ucf101.py, only smaller. Sizes and learning rates are ours.
"""

from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  config.seed = 0

  config.data = ConfigDict(
    dict(
      source="ucf101",
      root="data/demo",
      split=1,
      cache="data/cache",
      resolution=(96, 96),
      frames=16,
      stride=2,
      crop="center",
      flip=False,
      views=2,
      short="clamp",
      seed=0,
      val_fraction=0.1,
      max_clips=0,
      workers=0,
      codec=dict(name="dct", factor=(2, 8, 8), channels=16),  # -> latents 8 x 12 x 12 x 16
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
      remat=False,
      attention=dict(
        method="freqformer",
        layers=(),
        block=64,
        tile=(4, 4, 4),
        qk_gain=1.5,
        implementation="xla",
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
        # The other methods run when `method` or `layers` names them; budgets near FreqFormer's density on 2x3x3 tiles.
        sparseflow=dict(
          schedule=dict(frames=(1, 2), direction="sparse_early", shape="linear"),
          around=(1, 2),
          anchors=0,
          feature_map="elu",
          allocation="routed",
          router=dict(
            mode="soft",
            hidden=32,
            statistics=True,
            prior=(0.6, 0.4),
            prior_slope=0.0,
            temperature=(1.0, 0.25),
            budget=0.1,  # 60 % of sparse heads: at 0.2 nothing holds the router back, and it makes every head sparse
            penalty=0.05,
            noise=0.5,
          ),
        ),
        sparse_linear=dict(critical=0.15, negligible=0.1, feature_map="softmax"),
      ),
    )
  )

  config.train = ConfigDict(
    dict(
      steps=480,
      batch_size=4,
      lr=2e-3,
      warmup=50,
      schedule="cosine",
      weight_decay=0.01,
      beta2=0.99,
      clip=1.0,
      ema=0.99,
      label_dropout=0.1,
      time_sampling="uniform",
      log_every=10,
      val_every=250,
      val_batches=4,
      val_soft=True,
      checkpoint_every=250,
      keep=2,
    )
  )
  config.sample = ConfigDict(dict(steps=24, guidance=2.0, batch_size=8, shift=1.0, soft=False))
  return config


def sweep():
  """Routing hyper-parameters worth trying: flat overrides of the config, one trial each."""
  for budget in (0.1, 0.2, 0.4):
    yield {"model.attention.freqformer.router.budget": budget}
  for mode in ("straight_through", "sampled"):
    yield {"model.attention.freqformer.router.mode": mode}
  yield {"model.attention.freqformer.allocation": (2, 2, 2)}
