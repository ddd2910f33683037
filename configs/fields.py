"""Moving Gaussian fields with a known best answer: 2,048 tokens, a DiT of 0.27 M parameters.

  python train.py --config=configs/fields.py --workdir=runs/fields
  python eval.py --workdir=runs/fields
  python train.py --config=configs/fields.py --config.data.copies=8 \
    --config.data.target=velocity --workdir=runs/copies                 only retrieval helps

No data set is needed: clips are drawn on the fly and never repeat. Training regresses on the exact
posterior mean, so its loss is the regret, the distance from a perfect denoiser. Validation reports
regret and Bayes risk per quarter of t. `python -m benchmarks.study` compares methods on it.
"""

from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  # Slope and velocities as measured on real luma and as small as motion can be.
  config.data = dict(source="fields", grid=(8, 16, 16), channels=4, slope=3.8, speed=1)
  # choice: sizes, learning rate and router are the demo's or near them; heads of 32, because rotary
  # positions of three axes share a head's width.
  config.model = dict(
    size="custom",
    width=64,
    depth=4,
    heads=2,
    patch=(1, 1, 1),
    mlp_ratio=2.0,
    remat=False,
    skip=True,
  )
  # The best multiple of x_t is learned at once: what is left to learn is what attention is for.
  config.model.skip = True
  router = dict(
    hidden=32, prior=(0.15, 0.25, 0.6), prior_slope=2.0, temperature=(1.0, 0.25), penalty=0.05
  )
  window = dict(window=(3, 3, 3), border="clip")
  config.model.attention = dict(
    # 2 x 2 x 2 tiles: a window of 3 x 3 x 3 of them is 6 x 6 x 6 tokens, a twelfth of all.
    tile=(2, 2, 2),
    block=8,
    implementation="xla",
    qk_bias=1.0,
    octaves=window,
    freqformer=dict(mid_tiles=20, **window, router=router),
    sliding_tile=dict(unit="tiles", **window),
    block_topk=dict(density=20 / 256),
  )
  config.train = dict(
    steps=600, batch_size=4, lr=3e-3, warmup=50, ema=0.99, val_every=200, checkpoint_every=200
  )
  config.sample = dict(steps=24, guidance=1.0)
  return config


def sweep():
  """Yields one trial per method."""
  for method in ("dense", "sliding_tile", "block_topk", "freqformer", "octaves"):
    yield {"model.attention.method": method}
