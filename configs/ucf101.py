"""UCF-101 at 128x128, 16 frames, stride 2: FreqFormer-S, class-conditional.

  python train.py --config=configs/ucf101.py --workdir=runs/ucf101
  python eval.py --workdir=runs/ucf101 --classes=Basketball,Biking

Data: `config.data.root` holds UCF-101/ and ucfTrainTestlist/ (the README says where they come from). Train list of split 1.
Hardware: written for one GPU; `--dry_run` prints tokens, parameters, memory and FLOPs on any machine. No full run of this
config has been measured yet, so none is quoted here. Sizes follow DiT-S; the codec, window and router constants are ours.
"""

from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  config.seed = 0

  config.data = ConfigDict(
    dict(
      source="ucf101",
      root="data/ucf101",
      split=1,
      cache="data/cache",
      resolution=(128, 128),
      frames=16,
      stride=2,
      crop="random",
      flip=True,
      views=4,
      short="clamp",
      seed=0,
      val_fraction=0.1,
      max_clips=0,
      workers=0,
      codec=dict(name="dct", factor=(2, 8, 8), channels=32),  # -> latents 8 x 16 x 16 x 32
    )
  )

  config.model = ConfigDict(
    dict(
      size="S",
      width=0,
      depth=0,
      heads=0,
      patch=(1, 1, 1),
      mlp_ratio=4.0,
      dtype="bfloat16",
      remat=True,
      attention=dict(
        method="freqformer",
        layers=(),
        block=64,
        tile=(4, 4, 4),
        qk_gain=1.5,
        implementation=None,
        dense=dict(),
        freqformer=dict(
          basis=dict(kind="block_dct", low=(0.5, 0.5, 0.5), mid=(0.75, 0.75, 0.75)),
          allocation="routed",
          mid_tiles=4,
          sink=0,
          anchors=1,
          window=(1, 3, 3),
          border="clamp",
          filter="none",
          low_op="dense",
          low_shared=False,
          summary=0,
          router=dict(
            mode="soft",
            hidden=64,
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
      steps=400_000,
      batch_size=32,
      lr=2e-4,
      warmup=2_000,
      schedule="cosine",
      weight_decay=0.01,
      beta2=0.99,
      clip=1.0,
      ema=0.9999,
      label_dropout=0.1,
      time_sampling="logit_normal",
      log_every=50,
      val_every=5_000,
      val_batches=8,
      val_soft=True,
      checkpoint_every=5_000,
      keep=3,
    )
  )
  config.sample = ConfigDict(dict(steps=50, guidance=4.0, batch_size=8, shift=1.0, soft=False))
  return config


def sweep():
  """Routing hyper-parameters worth trying: flat overrides of the config, one trial each."""
  for slope in (0.0, 2.0, 4.0):
    for budget in (0.1, 0.2, 0.4):
      yield {
        "model.attention.freqformer.router.prior_slope": slope,
        "model.attention.freqformer.router.budget": budget,
      }
  for kind in ("dct", "haar"):
    yield {"model.attention.freqformer.basis.kind": kind}
