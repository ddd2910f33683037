"""Embeddings that samples are drawn for: those of prompts, or of validation clips."""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from freqformer.config import ConfigError
from freqformer.data.codec import LatentStatistics
from freqformer.data.embedding import embed
from freqformer.data.sources import Split, open_split
from freqformer.evaluate.restore import Conditions, Run
from freqformer.prompts import without_blank

CLIPS = 8  # choice: validation clips that are taken where nothing is asked for
_LETTERS = 48  # choice: of a caption in a folder's name


def conditioned(run: Run, prompts: Sequence[str] | None) -> Run:
  """Returns a run that knows what samples are drawn for; without embeddings it is as it was.

  Args:
    prompts: texts for the run's embedder; None takes some validation clips.

  Raises:
    ConfigError: prompts are given and the run has no embedder, or the clips are not there.
  """
  data = run.experiment.data
  if data.condition != "embedding":
    if prompts is not None:
      raise ConfigError(
        f"prompts: this run has data.condition={data.condition!r}; train one with "
        "data.condition='embedding' and data.embedder, or name classes."
      )
    return run
  if prompts is None:
    statistics = LatentStatistics.from_json(run.record["statistics"])
    split = open_split(data, "val", statistics)
    return dataclasses.replace(run, conditions=of_clips(split, some_clips(split, CLIPS)))
  if not data.embedder:
    raise ConfigError(
      "prompts: this run's embeddings were made elsewhere, and data.embedder is empty; leave "
      "prompts out to sample for validation clips, or train with data.embedder."
    )
  texts = without_blank(prompts)
  return dataclasses.replace(run, conditions=_named(texts, embed(data, texts)))


def some_clips(split: Split, count: int) -> list[int]:
  """Returns numbers of clips, the same first ones for every count."""
  return np.random.default_rng(0).permutation(len(split))[:count].tolist()


def of_clips(split: Split, numbers: Sequence[int]) -> Conditions:
  """Returns the captions, or names, and the embeddings of clips of a split with one view each."""
  entries = [split.manifest["clips"][number] for number in numbers]
  texts = [entry.get("caption") or entry["key"] for entry in entries]
  return _named(texts, np.stack([split[number]["label"] for number in numbers]))


def _named(texts: Sequence[str], embeddings: np.ndarray) -> Conditions:
  """Returns conditions; names are the texts' letters, with a number where one comes again."""
  names = []
  for text in texts:
    name = base = re.sub(r"\W+", "_", text)[:_LETTERS].strip("_") or "clip"
    count = 1
    while name in names:
      count += 1
      name = f"{base}_{count}"
    names.append(name)
  return Conditions(tuple(names), tuple(texts), embeddings)
