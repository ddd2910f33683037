"""Learns a method's routers, gates or level weights on a pretrained model, from prompts alone.

  python -m freqformer.distil --pretrained=DIR --prompts=prompts.txt --method=freqformer \\
    --out=routers.safetensors --size=480x832 --frames=81 --steps=50
  python eval.py --pretrained=DIR --prompts=prompts.txt --learned=routers.safetensors

The dense model samples for every prompt; each evaluation is an optimizer step (docs/pretrained.md,
"Learned routers"). The weights of the model stay as they are. The file holds what was learned, the
method, and a hash of the model, on which alone it can be used.
"""

import time

import numpy as np
from absl import flags

from freqformer.command import cli, pretrained
from freqformer.config import refusing
from freqformer.disk import size_text
from freqformer.evaluate.draw import MAX_SEED
from freqformer.evaluate.learned import check_path
from freqformer.evaluate.pretrained import Pretrained
from freqformer.evaluate.resize import parse_size
from freqformer.train.distil import DistilConfig


def main(_):
  clock = time.monotonic()
  out = check_path(_OUT.value).absolute()
  with refusing("learning"):
    config = DistilConfig(_PASSES.value, _LR.value, _DECAY.value, _SEED.value)
  pipe = Pretrained(_PRETRAINED.value, block=_BLOCK.value)
  guided = any(pipe.sampling(_STEPS.value, _GUIDANCE.value, _SHIFT.value).guided())
  pipe.config(_METHOD.value)  # an unknown one is refused before prompts are encoded
  texts = pretrained.embeddings(pipe, _PROMPTS.value, _NEGATIVE.value, guided)
  learned = pipe.distil(
    texts,
    _METHOD.value,
    frames=_FRAMES.value,
    size=None if _SIZE.value is None else parse_size(_SIZE.value),
    steps=_STEPS.value,
    guidance=_GUIDANCE.value,
    shift=_SHIFT.value,
    config=config,
  )
  learned.write(out)
  first, last = (np.mean(learned.facts[name]) for name in ("first_error", "last_error"))
  seconds = time.monotonic() - clock
  print(
    f"{out}: {len(learned.arrays)} arrays, {size_text(out.stat().st_size)}; error over the first "
    f"trajectory {first:.3f}, over the last {last:.3f}; {learned.facts['steps']} steps, "
    f"{seconds:.0f} s"
  )


if __name__ == "__main__":
  # Not at import: other commands have flags of the same names.
  _PRETRAINED = cli.define_path("pretrained", None, "Folder of a downloaded model.", required=True)
  _PROMPTS = flags.DEFINE_string(
    "prompts", None, "Texts, separated by ';', or a .txt or .npz file.", required=True
  )
  _METHOD = flags.DEFINE_string("method", "freqformer", "Method whose own leaves learn.")
  _OUT = cli.define_path("out", None, "The file, *.safetensors.", required=True)
  _NEGATIVE = flags.DEFINE_string("negative", "", "Prompt that guidance leads away from.")
  _SIZE = flags.DEFINE_string("size", None, "ROWSxCOLS in pixels; default as usual for the model.")
  _FRAMES = flags.DEFINE_integer("frames", None, "Frames; default as usual for the model.")
  _STEPS = flags.DEFINE_integer("steps", None, "Denoising steps of a trajectory; default 50.")
  _GUIDANCE = flags.DEFINE_float("guidance", None, "Guidance scale; 1 is none; default 5.")
  _SHIFT = flags.DEFINE_float("shift", None, "Shift of the noise levels; default the model's.")
  _PASSES = flags.DEFINE_integer("passes", DistilConfig.passes, "How often each prompt is sampled.")
  _LR = flags.DEFINE_float("lr", DistilConfig.lr, "Learning rate of AdamW at the start.")
  _DECAY = flags.DEFINE_float("weight_decay", DistilConfig.weight_decay, "Weight decay of AdamW.")
  _SEED = flags.DEFINE_integer("seed", DistilConfig.seed, "Seed of the noise.", 0, MAX_SEED)
  _BLOCK = flags.DEFINE_integer("block", 128, "Rows of a tile.", lower_bound=1)
  cli.run(main)
