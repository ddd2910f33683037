"""Checks a config's data set and encodes it, without training.

  python -m freqformer.data --config=configs/folder.py --config.data.root=$HOME/Videos

Prints what was taken for the data set, what looks wrong with it, which clips cannot be used and
where the latents lie; train.py with the same keys then begins at once. The same command goes on
after Ctrl-C, SIGTERM or a crash.
"""

from absl import flags

from freqformer.command import cli
from freqformer.command.files import define_config
from freqformer.config import ConfigError
from freqformer.data.cache import LatentCache
from freqformer.data.fields import FieldsConfig
from freqformer.data.sources import open_splits
from freqformer.train.experiment import experiment

_CONFIG = define_config()


def main(_):
  data = experiment(_CONFIG.value).data
  if isinstance(data, FieldsConfig):
    raise ConfigError("random fields are drawn while training: there is nothing to encode.")
  for split in open_splits(data):
    print(describe(split))


def describe(cache: LatentCache) -> str:
  """Returns a line about a cache: records, latents, size and place."""
  clips = cache.manifest["clips"]
  odd = sum(bool(clip["notes"]) for clip in clips)
  left_out = len(cache.manifest["skipped"])
  latents = "x".join(map(str, cache.latent_shape))
  size = sum(shard["bytes"] for shard in cache.manifest["shards"]) / 2**20
  return (
    f"{cache.manifest['split']}: {len(cache)} views of {len(clips)} clips ({odd} with a remark, "
    f"{left_out} left out), latents {latents}, {cache.fps:g} frames a second, {size:,.1f} MiB in "
    f"{cache.path}"
  )


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  cli.run(main)
