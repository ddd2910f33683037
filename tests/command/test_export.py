"""The command that makes a file of a run's weights."""

import pytest

from freqformer.train.origin import Origin
from freqformer.train.run import train
from tests.command.process import call
from tests.command.test_fields import small

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules")


def test_command_line(tmp_path):
  config = small(steps=2)
  config.train.update(checkpoint_every=1, val_every=0)
  train(config, tmp_path / "run")
  run = f"--workdir={tmp_path / 'run'}"
  done = call(tmp_path, "freqformer/export.py", run, "--out=a.safetensors", "--checkpoint=1")
  assert done.stdout.startswith(f"{tmp_path / 'a.safetensors'}: step 1, ")
  assert Origin.read(str(tmp_path / "a.safetensors")).record["step"] == 1
  done = call(tmp_path, "freqformer/export.py", run, "--out=b.bin", code=2)
  assert "b.bin must end in .safetensors" in done.stderr
