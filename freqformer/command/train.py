"""Trains a video diffusion transformer.

  python train.py --config=configs/ucf101.py --workdir=runs/ucf101
  python train.py --config=configs/ucf101.py --config.train.lr=3e-4 --dry_run

The same command resumes: after SIGTERM, Ctrl-C or a crash the newest checkpoint in the workdir goes on bit for bit. A finished
run goes on once train.steps is raised. Another config on the same workdir is said, and refused where it would make a run of two
halves (data, model, seed, train.batch_size) unless --resume_changed is given; run.json keeps what was changed and when.
"""

import functools
import json
import pathlib
import time

import jax
import numpy as np
from absl import flags, logging
from flax import nnx
from ml_collections import config_flags
from tqdm import tqdm

from freqformer.command import cli
from freqformer.command.dry_run import describe
from freqformer.data.cache import prepare
from freqformer.data.loader import train_iterator, val_batches
from freqformer.model.dit import VideoDiT, make_tables
from freqformer.train.checkpoint import Checkpoints, git_revision, versions
from freqformer.train.experiment import experiment
from freqformer.train.metrics import Metrics, channel_power, write_routing
from freqformer.train.preemption import StopRequest
from freqformer.train.resume import check_same_config, check_same_data, with_seed
from freqformer.train.step import (
  SkippedSteps,
  evaluate,
  init_state,
  make_eval_step,
  make_train_step,
)
from freqformer.train.throughput import Throughput

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Configuration file, e.g. configs/ucf101.py.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of this run; default runs/<name of the config>."
)
_DRY_RUN = flags.DEFINE_bool(
  "dry_run", False, "Print shapes, parameters, memory and FLOPs; touch no data."
)
_RESUME_CHANGED = flags.DEFINE_bool(
  "resume_changed",
  False,
  "Go on from the checkpoint though data, model, seed or train.batch_size are no longer its own.",
)


def main(_):
  if _DRY_RUN.value:
    return print(describe(experiment(_CONFIG.value)))
  name = pathlib.Path(flags.FLAGS["config"].config_filename).stem
  train(_CONFIG.value, _WORKDIR.value or f"runs/{name}", _RESUME_CHANGED.value)


def train(config, workdir, resume_changed: bool = False, progress: bool = True) -> dict:
  """Trains until `config.train.steps`, or until asked to stop; returns `{"step", "finished", "val_loss"}`.

  Raises:
    ConfigError: for a config that cannot be run, or a checkpoint of another one (see `check_same_config`).
  """
  seconds, started = {}, time.monotonic()
  exp = experiment(config)
  workdir = pathlib.Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)

  # ---- 1. the newest checkpoint of this workdir: is it of this config, is anything left to do? ------------------------
  checkpoints, old, changed = Checkpoints(workdir, exp.train.keep), None, {}
  if checkpoints.latest() is not None:
    old = checkpoints.record()
    changed = check_same_config(old, exp, resume_changed)
    if old["step"] >= exp.train.steps:
      checkpoints.close()
      return _nothing_left(workdir, old["step"], exp.train.steps)

  # ---- 2. data: encoded once, then read from the cache --------------------------------------------------------------
  train_cache, val_cache = prepare(exp.data, "train"), prepare(exp.data, "val")
  seconds["encode"] = time.monotonic() - started
  shape, classes = tuple(train_cache.latent_shape), len(train_cache.class_names)
  batches = iter(train_iterator(train_cache, exp.train.batch_size, exp.seed))

  # ---- 3. model and state -------------------------------------------------------------------------------------------
  tables = make_tables(exp.model, shape)
  graphdef, params = nnx.split(VideoDiT(exp.model, shape, classes, nnx.Rngs(exp.seed)))
  state, record = init_state(params, exp.train, exp.seed), _record(config, train_cache)

  # ---- 4. resume: that checkpoint goes on, else start fresh ----------------------------------------------------------
  metrics = Metrics(workdir, Throughput.of(exp.model, shape, exp.train.batch_size))
  if old is not None:
    state = _resumed(checkpoints, old, record, state, changed)
    batches.set_state(json.loads(old["iterator"]))
  step = int(state.step)
  metrics.start(step, config, _facts(exp, params, record, tables["layout"].layout))

  # ---- 5. the steps -------------------------------------------------------------------------------------------------
  train_step, skips = make_train_step(graphdef, exp.train, classes), SkippedSteps(exp.train)
  validate = _validation(exp, graphdef, val_cache, tables)

  def save():
    skips.check(step)
    iterator = json.dumps(batches.get_state())
    checkpoints.save(step, state, {**record, "iterator": iterator})

  # ---- 6. the loop --------------------------------------------------------------------------------------------------
  result, compiled, loop_started = None, step, time.monotonic()
  with (
    StopRequest() as stop,
    tqdm(total=exp.train.steps, initial=step, desc="training", disable=not progress) as bar,
  ):
    while step < exp.train.steps and not stop():
      batch = next(batches)
      state, values = train_step(state, {k: batch[k] for k in ("latent", "label")}, tables)
      skips.add(values)
      step += 1
      if step == compiled + 1:  # the first step of this process compiles
        jax.block_until_ready(values)
        seconds["compile"], loop_started = time.monotonic() - loop_started, time.monotonic()
      bar.update()
      if step % exp.train.log_every == 0 or step == exp.train.steps:
        values = jax.device_get(values)
        metrics.train(step, values)
        skips.check(step)
        bar.set_postfix(loss=f"{values['loss']:.3f}")
      last = step == exp.train.steps
      if exp.train.val_every and (last or step % exp.train.val_every == 0) and not stop():
        result = validate(state.ema, stop, functools.partial(metrics.write, step))
        if result is not None:
          write_routing(workdir, result, exp.model)
      if last or stop() or step % exp.train.checkpoint_every == 0:
        save()
  seconds["train"] = time.monotonic() - loop_started
  metrics.finish(seconds, finished=step >= exp.train.steps)
  checkpoints.close()
  if step < exp.train.steps:
    logging.warning(
      "stopped at step %d of %d; the same command goes on from there", step, exp.train.steps
    )
  return {
    "step": step,
    "finished": step >= exp.train.steps,
    "val_loss": None if result is None else result["loss"],
  }


def _resumed(checkpoints, old, record, state, changed):
  """The checkpoint's state; `record` learns what changed on the way."""
  check_same_data(old, record)
  record["changes"] = old.get("changes", []) + (
    [{"step": old["step"], "keys": changed}] if changed else []
  )
  state = with_seed(checkpoints.restore(state), state, changed)
  logging.info("resumed at step %d from %s", int(state.step), checkpoints.path)
  return state


def _nothing_left(workdir, step: int, steps: int) -> dict:
  """Says that the run is over; also where it ended between its last checkpoint and the note that it had."""
  if step == steps and (workdir / "run.json").exists():
    Metrics(workdir).finish({}, finished=True)
  over = "finished at" if step == steps else "past the end, at"
  logging.info("already %s step %d of %d; raise train.steps to go on", over, step, steps)
  return {"step": step, "finished": True, "val_loss": None}


def _record(config, cache) -> dict:
  """What a checkpoint says of itself, and what must agree with the data it meets again."""
  return {
    "config": config.to_dict(),
    "class_names": list(cache.class_names),
    "latent_shape": tuple(cache.latent_shape),
    "statistics": {
      name: np.asarray(getattr(cache.statistics, name)).tolist() for name in ("mean", "std")
    },
    "video_shape": list(cache.video_shape),
    "cache": cache.manifest["hash"],
    "changes": [],
  }


def _facts(exp, params, record, layout) -> dict:
  """What the run's log starts with: the model, its data, code, machine and grid."""
  model = {"params": _count(params), "method": exp.model.attention.method}
  code = model | {"classes": record["class_names"], "changes": record["changes"]}
  code |= {
    "git": git_revision(),
    "versions": versions(),
    "device": str(jax.devices()[0].device_kind),
  }
  return code | {
    "tokens": layout.n,
    "tiles": layout.tiles,
    "grid": layout.grid,
    "tile": layout.tile,
  }


def _validation(exp, graphdef, cache, tables):
  """`(params, should_stop, write) -> results of the hard choice`, or None where it was stopped.

  `write(kind, **numbers)` gets them, and those of the soft mixture where heads are routed.
  """
  eval_steps = {"val": make_eval_step(graphdef)}
  if exp.train.val_soft and any(method.routed for _, method in exp.model.runs()):
    eval_steps["val_soft"] = make_eval_step(graphdef, soft=True)
  power, size = channel_power(cache), exp.train.batch_size

  def validate(params, should_stop, write):
    results = {}
    for kind, eval_step in eval_steps.items():
      data = val_batches(cache, size, limit=exp.train.val_batches * size)
      results[kind] = evaluate(eval_step, params, data, power, tables, should_stop=should_stop)
      if results[kind] is None:
        return None
      write(kind, **{k: v for k, v in results[kind].items() if k not in ("probs", "choice")})
    return results["val"]

  return validate


def _count(params) -> int:
  return sum(x.size for x in jax.tree.leaves(params))


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  cli.run(main)
