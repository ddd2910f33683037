"""The readable oracle of the package is held to the suite's own, like every backend."""

from tests.kernels.block_sparse.suite import AttentionSuite


class TestReference(AttentionSuite):
  implementation = "reference"
