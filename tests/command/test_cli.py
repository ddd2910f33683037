"""Lines that other packages log reach a user only if they are worth reading."""

import logging

import pytest

from freqformer.command import cli


@pytest.mark.parametrize(
  "name, level, shown",
  [
    ("jax._src.xla_bridge", logging.WARNING, True),
    ("jax._src.xla_bridge", logging.INFO, False),
    ("orbax", logging.WARNING, False),
    ("orbax", logging.ERROR, True),
  ],
)
def test_warnings_of_others_are_about_devices(name, level, shown):
  record = logging.LogRecord(name, level, "/site-packages/x.py", 1, "", None, None)
  assert cli._worth_reading(record) == shown


def test_errors_that_others_log_are_one_line():
  error = RuntimeError("Unable to load cuDNN.")
  trace = (RuntimeError, error, None)
  record = logging.LogRecord("jax", logging.ERROR, "/site-packages/x.py", 1, "%s", ("Bad",), trace)
  assert cli._worth_reading(record)
  assert logging.Formatter().format(record) == "Bad (Unable to load cuDNN.)"
