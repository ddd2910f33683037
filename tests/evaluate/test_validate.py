"""The labels of clips that a model was not trained on."""

import dataclasses
import types

import numpy as np
import pytest

from freqformer.config import ConfigError
from freqformer.data.fields import Fields, FieldsConfig
from freqformer.evaluate import validate

CLASSES = ["y+0x+0", "y-1x+0", "y+0x+1"]
SPLIT = Fields(FieldsConfig(grid=(1, 4, 4), labels="velocity", val_clips=9), "val")


@dataclasses.dataclass(frozen=True)
class Config:
  batch_size: int = 4
  label_dropout: float = 0.1
  time_range: tuple = (0.0, 1.0)


def run(names, **train):
  """A run of some class names, without a model."""
  return types.SimpleNamespace(
    class_names=names,
    experiment=types.SimpleNamespace(train=Config(**train)),
    model=types.SimpleNamespace(tables=lambda shape: shape),
    params=None,
  )


@pytest.fixture
def evaluated(monkeypatch):
  """Batches and reference of each evaluation, which gives no figures."""
  calls = []

  def evaluate(step, params, batches, power, tables, reference):
    calls.append((list(batches), reference, tables))
    return {"probs": np.full((2, 4, 3, 2), 0.5), "choice": None}

  monkeypatch.setattr(validate.nnx, "graphdef", lambda model: None)
  monkeypatch.setattr(validate, "make_eval_step", lambda *_, **__: None)
  monkeypatch.setattr(validate, "evaluate", evaluate)
  return calls


def test_classes_are_known_by_name_or_not_at_all(evaluated):
  found = validate.validate(run(CLASSES), SPLIT, clips=6)
  (batches, reference, tables), *_ = evaluated
  # Two batches, the last one padded.
  assert found["clips"] == 6 and [batch["weight"].sum() for batch in batches] == [4, 2]
  assert len(found["null_class"]) == 6 and not set(found["null_class"]) & set(CLASSES)
  assert found["weights"] == [[0.5, 0.5]] * 4 and "choice" not in found
  for batch in batches:
    for index, label in zip(batch["index"], batch["label"], strict=True):
      name = SPLIT.class_names[SPLIT[index]["label"]]
      assert label == (CLASSES.index(name) if name in CLASSES else len(CLASSES))
  assert {label for batch in batches for label in batch["label"]} > {len(CLASSES)}
  # The posterior's labels are the split's own.
  assert reference is None and tables == SPLIT.latent_shape


def test_the_runs_own_classes_are_as_they_are(evaluated):
  found = validate.validate(run(SPLIT.class_names), SPLIT)
  (batches, reference, _), *_ = evaluated
  assert found["clips"] == 9 and "null_class" not in found and reference is not None
  own = [SPLIT[index]["label"] for index in range(9)]
  assert np.concatenate([batch["label"] for batch in batches])[:9].tolist() == own


def test_a_model_of_one_class_knows_no_other():
  assert validate.labels_of(["videos"], ["a", "b"]).tolist() == [0, 0]


def test_a_null_class_that_was_never_trained_is_refused():
  with pytest.raises(ConfigError, match="'y-1x-1' is none of the checkpoint's.*label_dropout=0"):
    validate.validate(run(CLASSES, label_dropout=0.0), SPLIT)
