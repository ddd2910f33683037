"""The table of methods trained from scratch: its runs, its order, and what is missing."""

from benchmarks.trained import methods_train


def test_trials_are_the_configs_own():
  assert methods_train.trials()[0] == "dense" and "sparseflow" in methods_train.trials()


def row(method, loss, soft=None):
  fields = {"name": method, "method": method, "steps": 7, "val_loss": loss, "val_soft_loss": soft}
  return fields | {"linear_buckets": [1.0, 2.0]}


def test_table_ranks_and_names_what_is_missing():
  rows = [row("dense", 0.9), row("radial", 0.7, 0.6), row("left_out", 0.1)]
  text = methods_train.ranked(rows, ["dense", "radial", "sparseflow"])
  assert text.index("radial") < text.index("dense")
  assert "missing: sparseflow" in text and "left_out" not in text
  assert "1.5000" in text and "0.6000" in text
  assert "missing" not in methods_train.ranked([row("dense", 0.9)], ["dense"])
