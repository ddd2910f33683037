"""What must agree between a checkpoint and the data it meets again: the commonest silent bug is another normalisation."""

import numpy as np

from freqformer.config import ConfigError


def check_same_data(old: dict, new: dict):
  """Compares two checkpoint records.

  Raises:
    ConfigError: if the latents' shape, their statistics or the class map differ.
  """
  if list(old["latent_shape"]) != list(new["latent_shape"]):
    raise ConfigError(
      f"the checkpoint was trained on latents {tuple(old['latent_shape'])}, the cache holds "
      f"{tuple(new['latent_shape'])}; use the same data protocol or a new --workdir."
    )
  for name in ("mean", "std"):
    before, now = (np.asarray(r["statistics"][name]) for r in (old, new))
    # Not bit-equal: a machine that computes the statistics anew adds in another order. Another protocol moves them far more.
    if before.shape != now.shape or not np.allclose(before, now, rtol=1e-6, atol=1e-8):
      gap = "another number of channels" if before.shape != now.shape else f"by up to {np.abs(before - now).max():.3g}"
      raise ConfigError(
        f"latent statistics differ between checkpoint and cache ({name}: {gap}); the cache was encoded by "
        "another protocol or from other clips: restore that cache or start a new --workdir."
      )
  if old["class_names"] != new["class_names"]:
    pairs = zip(old["class_names"], new["class_names"], strict=False)
    changed = [f"{i}: {a} -> {b}" for i, (a, b) in enumerate(pairs) if a != b]
    raise ConfigError(
      f"the class map differs between checkpoint and cache ({len(old['class_names'])} against "
      f"{len(new['class_names'])} classes; {', '.join(changed[:3])}); use the same data or a new --workdir."
    )
