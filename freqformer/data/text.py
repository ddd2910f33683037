"""An embedder of pretrained weights: CLIP's text encoder, from transformers.

  --config.data.condition=embedding --config.data.embedder=freqformer.data.text:ClipText
  --config.data.embedder_path=FOLDER --config.data.embedding_size=512

FOLDER is what `CLIPModel.save_pretrained` and its tokenizer wrote, or a downloaded CLIP model; a
ViT-B/32 gives 512 numbers. Captions are embedded once, into the cache, and prompts when samples are
drawn. Needs torch and transformers: pip install torch transformers.
"""

import numpy as np

from freqformer.config import ConfigError
from freqformer.data.embedder import Embedder


class ClipText(Embedder):
  """CLIP's text features, those that it compares with images; long texts are cut at 77 tokens."""

  def __init__(self, path: str):
    """Loads the weights.

    Raises:
      ConfigError: packages or weights are missing.
    """
    try:
      import torch
      from transformers import AutoTokenizer, CLIPTextModelWithProjection
    except ModuleNotFoundError as error:
      raise ConfigError(
        f"data.embedder of CLIP needs {error.name}: pip install torch transformers."
      ) from error
    try:
      self._tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
      self._encoder = CLIPTextModelWithProjection.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
      raise ConfigError(
        f"data.embedder_path={path!r} is no folder of a CLIP model: name the one that holds its "
        "config.json, weights and tokenizer."
      ) from error
    self._encoder.eval()
    self._inference = torch.inference_mode

  def __call__(self, texts: list[str]) -> np.ndarray:
    tokens = self._tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    with self._inference():
      return self._encoder(**tokens).text_embeds.float().cpu().numpy()
