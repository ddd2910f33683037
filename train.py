"""Trains a video diffusion transformer.

  python train.py --config=configs/ucf101.py --workdir=runs/ucf101
  python train.py --config=configs/ucf101.py --config.train.lr=3e-4 --dry_run

The same command resumes: after SIGTERM, Ctrl-C or a crash the newest checkpoint in the workdir goes on bit for bit.
"""

import json
import pathlib
import time

import jax
import numpy as np
from absl import flags, logging
from flax import nnx
from ml_collections import config_flags
from tqdm import tqdm

from freqformer import cli
from freqformer.checkpoint import Checkpoints, git_revision, versions
from freqformer.data.cache import prepare
from freqformer.data.loader import train_iterator, val_batches
from freqformer.dit import VideoDiT, make_tables
from freqformer.dry_run import describe
from freqformer.experiment import experiment
from freqformer.metrics import Metrics, channel_power, write_routing
from freqformer.preemption import StopRequest
from freqformer.resume import check_same_data
from freqformer.throughput import Throughput
from freqformer.training import evaluate, init_state, make_eval_step, make_train_step

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file, e.g. configs/ucf101.py.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run; default runs/<name of the config>.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print shapes, parameters, memory and FLOPs; touch no data.")


def main(_):
  if _DRY_RUN.value:
    return print(describe(experiment(_CONFIG.value)))
  name = pathlib.Path(flags.FLAGS["config"].config_filename).stem
  train(_CONFIG.value, _WORKDIR.value or f"runs/{name}")


def train(config, workdir, progress: bool = True) -> dict:
  """Trains until `config.train.steps`, or until asked to stop; returns `{"step", "finished", "val_loss"}`."""
  seconds, started = {}, time.monotonic()
  exp = experiment(config)
  workdir = pathlib.Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)

  # ---- 1. data: encoded once, then read from the cache --------------------------------------------------------------
  train_cache, val_cache = prepare(exp.data, "train"), prepare(exp.data, "val")
  seconds["encode"] = time.monotonic() - started
  shape, classes = tuple(train_cache.latent_shape), len(train_cache.class_names)
  batches = iter(train_iterator(train_cache, exp.train.batch_size, exp.seed))

  # ---- 2. model and state -------------------------------------------------------------------------------------------
  tables = make_tables(exp.model, shape)
  graphdef, params = nnx.split(VideoDiT(exp.model, shape, classes, nnx.Rngs(exp.seed)))
  state = init_state(params, exp.train, exp.seed)
  record = {
    "config": config.to_dict(),
    "class_names": list(train_cache.class_names),
    "latent_shape": shape,
    "statistics": {name: np.asarray(getattr(train_cache.statistics, name)).tolist() for name in ("mean", "std")},
    "video_shape": list(train_cache.video_shape),
    "cache": train_cache.manifest["hash"],
  }

  # ---- 3. resume: the newest checkpoint of this workdir wins, else start fresh -----------------------------------------
  checkpoints = Checkpoints(workdir, exp.train.keep)
  metrics = Metrics(workdir, Throughput.of(exp.model, shape, exp.train.batch_size))
  if checkpoints.latest() is not None:
    old = checkpoints.record()
    check_same_data(old, record)
    state = checkpoints.restore(state)
    batches.set_state(json.loads(old["iterator"]))
    logging.info("resumed at step %d from %s", int(state.step), checkpoints.path)
  step = int(state.step)
  metrics.start(
    step,
    config,
    {
      "git": git_revision(),
      "versions": versions(),
      "device": str(jax.devices()[0].device_kind),
      "params": _count(params),
      "tokens": tables["layout"].layout.n,
      "tiles": tables["layout"].layout.tiles,
      "grid": tables["layout"].layout.grid,
      "tile": tables["layout"].layout.tile,
      "method": exp.model.attention.method,
      "classes": list(train_cache.class_names),
    },
  )

  # ---- 4. the steps -------------------------------------------------------------------------------------------------
  train_step = make_train_step(graphdef, exp.train, classes)
  eval_steps = {"val": make_eval_step(graphdef)}
  if exp.train.val_soft and any(method.routed for _, method in exp.model.runs()):
    eval_steps["val_soft"] = make_eval_step(graphdef, soft=True)
  power = channel_power(val_cache)

  def validate(should_stop):
    results = {}
    for kind, eval_step in eval_steps.items():
      data = val_batches(val_cache, exp.train.batch_size, limit=exp.train.val_batches * exp.train.batch_size)
      results[kind] = evaluate(eval_step, state.ema, data, power, tables, should_stop=should_stop)
      if results[kind] is None:
        return None
      metrics.write(step, kind, **{k: v for k, v in results[kind].items() if k not in ("probs", "choice")})
    write_routing(workdir, results["val"], exp.model)
    return results["val"]

  def save():
    iterator = json.dumps(batches.get_state())
    checkpoints.save(step, state, {**record, "iterator": iterator})

  # ---- 5. the loop --------------------------------------------------------------------------------------------------
  result, compiled, loop_started = None, step, time.monotonic()
  with StopRequest() as stop, tqdm(total=exp.train.steps, initial=step, desc="training", disable=not progress) as bar:
    while step < exp.train.steps and not stop():
      batch = next(batches)
      state, values = train_step(state, {k: batch[k] for k in ("latent", "label")}, tables)
      step += 1
      if step == compiled + 1:  # the first step of this process compiles
        jax.block_until_ready(values)
        seconds["compile"], loop_started = time.monotonic() - loop_started, time.monotonic()
      bar.update()
      if step % exp.train.log_every == 0 or step == exp.train.steps:
        values = jax.device_get(values)
        metrics.train(step, values)
        bar.set_postfix(loss=f"{values['loss']:.3f}")
      last = step == exp.train.steps
      if exp.train.val_every and (last or step % exp.train.val_every == 0) and not stop():
        result = validate(stop)
      if last or stop() or step % exp.train.checkpoint_every == 0:
        save()
  seconds["train"] = time.monotonic() - loop_started
  metrics.finish(seconds, finished=step >= exp.train.steps)
  checkpoints.close()
  if step < exp.train.steps:
    logging.warning("stopped at step %d of %d; the same command goes on from there", step, exp.train.steps)
  return {"step": step, "finished": step >= exp.train.steps, "val_loss": None if result is None else result["loss"]}


def _count(params) -> int:
  return sum(x.size for x in jax.tree.leaves(params))


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  cli.run(main)
