"""Validates a checkpoint on clips of its own data set, or on any others that its codec encodes.

Everything that training decided stays: weights, rotary base, gain, and the mean and deviation that
latents are normalised with. These belong to the model as its first weights do. By statistics of
their own, darker or calmer clips would look to it like those it knows, and the very difference that
is asked about would be gone.
"""

from collections.abc import Sequence

import numpy as np
from flax import nnx

from freqformer.config import ConfigError
from freqformer.data.loader import val_batches
from freqformer.data.sources import Split
from freqformer.diffusion.flow import BUCKETS
from freqformer.evaluate.restore import Run
from freqformer.train.validation import channel_power, evaluate, make_eval_step


def validate(
  run: Run,
  split: Split,
  *,
  soft: bool = False,
  buckets: int = BUCKETS,
  clips: int = 0,
  batch_size: int = 0,
) -> dict:
  """Returns the validation of a run on a split, on any grid, as plain JSON.

  Clips, timesteps and noise of the run's own split are those of validation while it trained. Clips
  of classes that the model does not know have its null class. A method whose sampling steps differ
  runs as it does in training.

  Args:
    soft: weigh all branches instead of the hard choice.
    buckets: equal parts of the run's range of t.
    clips: at most, spread over the split; 0 takes all.
    batch_size: that is evaluated together; 0: the run's own.

  Returns:
    `clips`, their number; the values of `evaluate`; of a router `weights` `[buckets, branches]`,
    its probabilities, the mean over layers, heads and clips; and `null_class`, names of the classes
    that the model does not know, if any. Where labels tell the best answer and classes are not the
    model's, there is no regret.

  Raises:
    ConfigError: a method cannot serve the grid, or the null class was never trained.
  """
  train = run.experiment.train
  labels = labels_of(run.class_names, split.class_names)
  null_class = [
    name
    for name, label in zip(split.class_names, labels, strict=True)
    if label == len(run.class_names)
  ]
  if null_class and not train.label_dropout:
    raise ConfigError(
      f"class {null_class[0]!r} is none of the checkpoint's, and it has no null class to take "
      "instead, because it was trained with train.label_dropout=0."
    )
  reference = split.reference
  if reference is not None and reference.labelled and split.class_names != run.class_names:
    reference = None
  count = min(clips or len(split), len(split))
  size = min(batch_size or train.batch_size, count)

  def known(label: np.ndarray) -> np.ndarray:
    return labels[label] if label.ndim == 1 else label  # embeddings are what they are

  batches = (
    {**batch, "label": known(batch["label"])} for batch in val_batches(split, size, limit=count)
  )
  graphdef = nnx.graphdef(run.model)
  step = make_eval_step(graphdef, soft=soft, buckets=buckets, time_range=train.time_range)
  tables = run.model.tables(split.latent_shape)
  power = channel_power(split)
  found = evaluate(step, run.params, batches, power, tables, reference=reference)
  found.pop("choice", None)
  if "probs" in found:
    found["weights"] = found.pop("probs").mean((0, 2)).tolist()
  if null_class:
    found["null_class"] = null_class
  return {"clips": count, **found}


def labels_of(known: Sequence[str], names: Sequence[str]) -> np.ndarray:
  """Returns a model's label of each name, int32: by the name, or its null class.

  A model of one class has only been told that there are clips, so that every clip is of it.
  """
  if len(known) == 1:
    return np.zeros(len(names), np.int32)
  places = {name: label for label, name in enumerate(known)}
  return np.array([places.get(name, len(known)) for name in names], np.int32)
