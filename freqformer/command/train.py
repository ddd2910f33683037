"""Trains a video diffusion transformer.

  python train.py --config=configs/ucf101.py --workdir=runs/ucf101
  python train.py --config=configs/ucf101.py --config.train.lr=3e-4 --dry_run

The same command resumes: after SIGTERM, Ctrl-C or a crash the run goes on from the newest
checkpoint in the workdir, bit for bit. A finished run goes on once train.steps is raised. Keys of
the config that changed meanwhile are logged and kept in run.json. Changes of data, model, seed or
train.batch_size stop the run unless --resume_changed is given.

With a config whose model is pretrained, as configs/wan.py, a method's routers or gates are learned
on a downloaded model (docs/pretrained.md) and written to <workdir>/learned.safetensors.

At every validation <workdir>/report.html is written anew: samples of train.samples classes, losses,
routing, costs. `python -m freqformer.report --compare RUN RUN` shows several runs side by side.
"""

import pathlib

from absl import flags

from freqformer.command import cli
from freqformer.command.dry_run import describe
from freqformer.command.files import define_config
from freqformer.command.learn import learn
from freqformer.config import ConfigError
from freqformer.pages.progress import Progress
from freqformer.train import processes
from freqformer.train.experiment import experiment
from freqformer.train.learning import is_learning
from freqformer.train.run import train
from freqformer.train.trace import Trace

_CONFIG = define_config()
_WORKDIR = cli.define_path("workdir", None, "Folder of this run; default runs/<config>.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print shapes, memory and FLOPs; touch no data.")
_RESUME_CHANGED = flags.DEFINE_bool(
  "resume_changed", False, "Go on though data, model, seed or train.batch_size have changed."
)
_PROFILE = flags.DEFINE_string(
  "profile", None, "Steps to trace for xprof, first:last, e.g. 10:20 (see docs/training.md)."
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "HOST:PORT of process 0, where several processes train together."
)
_PROCESSES = flags.DEFINE_integer("processes", None, "Number of them.", lower_bound=1)
_PROCESS = flags.DEFINE_integer("process", None, "Number of this one, from 0.", lower_bound=0)
_JOIN_SECONDS = flags.DEFINE_integer(
  "join_seconds", processes.JOIN_SECONDS, "How long they wait for each other.", lower_bound=1
)


def _refuse_flags():
  """Raises ConfigError for a flag that learning on a pretrained model would leave unread."""
  for flag in (_RESUME_CHANGED, _PROFILE, _COORDINATOR, _PROCESSES, _PROCESS):
    if flag.present:
      raise ConfigError(
        f"--{flag.name} is of training; learning on a pretrained model has none: leave it out."
      )


def main(_):
  name = pathlib.Path(flags.FLAGS["config"].config_filename.split(":")[0]).stem
  workdir = pathlib.Path(_WORKDIR.value or f"runs/{name}")
  if is_learning(_CONFIG.value):
    _refuse_flags()
    learn(_CONFIG.value, workdir, _DRY_RUN.value)
    return
  if _DRY_RUN.value:
    print(describe(experiment(_CONFIG.value)))
    return
  place = processes.place(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
  processes.join(place, _JOIN_SECONDS.value)
  with processes.ending_together(cli.told):
    train(_CONFIG.value, workdir, _RESUME_CHANGED.value, Progress(), Trace(_PROFILE.value))


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  cli.run(main)
