"""Tests that share a costly fixture run on one worker: `make test` would take minutes longer otherwise, and say nothing."""

import pytest

pytestmark = pytest.mark.xdist_group("workers")


def test_groups_reach_the_scheduler(request):
  """xdist 3.8 tells the scheduler by the test's name, which pytest 9.2 does not let it change."""
  if getattr(request.config.option, "loadgroup", False):
    assert request.node.nodeid.endswith("@workers"), (
      "install a pytest that requirements-dev.txt allows"
    )
