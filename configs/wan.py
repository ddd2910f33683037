"""FreqFormer's router, learned on a downloaded Wan model whose weights stay as they are.

  python train.py --config=configs/wan.py --config.model.pretrained=DIR --workdir=runs/wan
  python eval.py --pretrained=DIR --prompts=prompts.txt --learned=runs/wan/learned.safetensors

Nothing but prompts is needed (docs/pretrained.md, "Learned routers").
"""

from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  config.model = dict(pretrained="", method="freqformer(router=dict(budget=0.1))")
  config.data = dict(prompts="prompts.txt", size=(480, 832), frames=81)
  config.sample = dict(steps=50, guidance=5.0)
  config.train = dict(passes=1, lr=0.01)
  return config
