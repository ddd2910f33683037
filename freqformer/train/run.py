"""A run: data, model, steps, validation, checkpoints. It goes on from the newest checkpoint."""

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from freqformer import disk
from freqformer.config import ConfigError, numbers
from freqformer.data.loader import train_iterator, val_batches
from freqformer.data.sources import Split, open_splits
from freqformer.model.architectures import make_model
from freqformer.placement import everywhere, own_rows, share, split_batch
from freqformer.train.alarm import KIND, Alarm
from freqformer.train.checkpoint import PACKAGES, Checkpoints
from freqformer.train.diagnosis import first_not_finite
from freqformer.train.experiment import Experiment, experiment, recorded
from freqformer.train.mesh import describe
from freqformer.train.metrics import Metrics, finite, read, write_routing
from freqformer.train.origin import Origin
from freqformer.train.preemption import StopRequest
from freqformer.train.processes import records
from freqformer.train.resume import (
  check_same_config,
  check_same_data,
  order_seed,
  with_other_noise,
  with_seed,
)
from freqformer.train.step import NotFinite, SkippedSteps, TrainConfig, init_state, make_train_step
from freqformer.train.throughput import Throughput
from freqformer.train.trace import Trace
from freqformer.train.trackers import Trackers
from freqformer.train.validation import channel_power, evaluate, make_eval_step, some_latents
from freqformer.versions import git_revision, versions


@dataclasses.dataclass(frozen=True)
class Training:
  """A run as those see it who look on.

  Attributes:
    experiment: its configuration.
    workdir: its folder.
    data: training clips.
    val: validation clips.
    graphdef: of the model.
    params: shapes of its parameters; the arrays change hands at every step.
    tables: of the grid.
    trackers: show pictures elsewhere.
    should_stop: returns True once the run has been asked to stop.
  """

  experiment: Experiment
  workdir: pathlib.Path
  data: Split
  val: Split
  graphdef: nnx.GraphDef
  params: Any
  tables: Any
  trackers: Trackers = dataclasses.field(default_factory=Trackers)
  should_stop: Callable[[], bool] = lambda: False


class Watch:
  """Looks on while a run trains, outside its seconds, and changes nothing in it; this one sleeps.

  Training must not depend on pictures: what a watcher cannot do is not raised.
  """

  def begin(self, run: Training, step: int):
    """Is called before the first step after `step`."""

  def validated(self, step: int, params):
    """Is called behind each validation, with the averaged weights."""

  def end(self):
    """Is called when a run has ended, also one that was asked to stop."""


def train(
  config: ConfigDict,
  workdir: pathlib.Path,
  resume_changed: bool = False,
  watch: Watch | None = None,
  trace: Trace | None = None,
):
  """Trains until `config.train.steps`, or until asked to stop.

  Raises:
    ConfigError: the config or the steps to trace cannot be run, or the checkpoint is of another one
      and `resume_changed` does not allow that (see `check_same_config`), another process trains in
      `workdir`, or the disk is full.
  """
  exp = experiment(config)
  mesh = exp.make_mesh()
  logging.info("%s", describe(mesh))
  workdir.mkdir(parents=True, exist_ok=True)
  with disk.space_for("the run's records", workdir), records(workdir) as own:
    checkpoints = Checkpoints(
      workdir,
      exp.train.keep,
      keep_best=exp.train.keep_best,
      in_background=exp.train.save_in_background,
    )
    checkpoints.remove_unfinished()
    space = disk.space_for("the run's records", workdir, intact=checkpoints.intact)
    with space, jax.set_mesh(mesh):
      watch = watch or Watch()
      trace = trace or Trace()
      _train(config, exp, mesh, own, checkpoints, resume_changed, watch, trace)
    checkpoints.close()


def _train(
  config: ConfigDict,
  exp: Experiment,
  mesh: Mesh,
  workdir: pathlib.Path,
  checkpoints: Checkpoints,
  resume_changed: bool,
  watch: Watch,
  trace: Trace,
):
  """Goes on from the newest of the checkpoints; arguments and errors as of `train`."""
  started = time.monotonic()
  seconds = {}

  # ---- 1. the newest checkpoint: is it of this config, is anything left to do? ----------------
  old = None
  changed = {}
  cut_short = False
  if checkpoints.latest() is not None:
    old = checkpoints.record()
    exp = experiment(config, old["config"])
    changed = check_same_config(old, exp, resume_changed)
    cut_short = _is_cut_short(workdir, exp.train, old["step"])
    if old["step"] >= exp.train.steps and not cut_short:
      over = "past the end, at"
      if old["step"] == exp.train.steps:
        over = "finished at"
        # A run may have ended between its last checkpoint and the note that it had finished.
        if (workdir / "run.json").exists():
          Metrics(workdir).finish({}, finished=True)
      text = "already %s step %d of %d; raise train.steps to go on"
      logging.info(text, over, old["step"], exp.train.steps)
      return

  trace.check(old["step"] if old else 0, exp.train.steps)
  origin = None
  started_from = old and old.get("init_from")
  if old is None and exp.train.init_from:
    origin = Origin.read(exp.train.init_from)
    exp, started_from = origin.fitted(config)

  # ---- 2. data: encoded once, then read from the cache; or drawn on the fly -------------------
  train_data, val_data = open_splits(exp.data)
  if origin is not None:
    origin.check_statistics(train_data.statistics.to_json())
  exp = exp.with_spectrum(some_latents(train_data))
  seconds["encode"] = time.monotonic() - started
  rollbacks = old.get("rollbacks", []) if old else []
  rows = own_rows(exp.train.batch_size)

  def begin_batches():
    """Begins them in the order of a run that was rolled back so often."""
    seed = order_seed(exp.seed, len(rollbacks))
    return iter(train_iterator(train_data, exp.train.batch_size, seed, rows))

  batches = begin_batches()

  # ---- 3. model and state ---------------------------------------------------------------------
  shape = tuple(train_data.latent_shape)
  condition = exp.conditioned_on(train_data.class_names)
  model = make_model(exp.model, shape, nnx.Rngs(exp.seed), **condition)
  tables = model.tables(shape, with_dense=exp.train.attends_densely)
  graphdef, params = nnx.split(model)
  del model  # its arrays
  if origin is not None:
    params = origin.into(params, exp)
  state = init_state(params, exp.train, exp.seed)
  config = recorded(config, exp)
  provenance = {"rollbacks": rollbacks, "init_from": started_from}
  record = _record(config, train_data) | provenance

  # ---- 4. resume: that checkpoint goes on, else start fresh -----------------------------------
  depth = exp.model.depth
  run_by = (exp.train.batch_size, list(mesh.devices.flat), exp.train)
  # By the number of layers that attend densely, which changes at a few steps of a run.
  throughputs = {
    layers: Throughput.of(exp.model, shape, *run_by, layers)
    for _, layers in exp.train.stages(depth)
  }
  dense = exp.train.dense_layers(min(old["step"], exp.train.steps - 1) if old else 0, depth)
  metrics = Metrics(workdir, throughputs[dense])
  if old is not None:
    check_same_data(old, record)
    record["changes"] = old.get("changes", [])
    if changed:
      record["changes"].append({"step": old["step"], "keys": changed})
    placed = share(jax.eval_shape(lambda: state))
    state = with_seed(checkpoints.restore(placed), state, changed)
    batches.set_state(json.loads(old["iterator"]))
    logging.info("resumed at step %d from %s", int(state.step), checkpoints.path)
  step = int(state.step)
  state = share(state)
  tables = everywhere(tables)
  checkpoints.check_space(state)
  layout = tables["layout"].layout
  facts = {
    "params": sum(x.size for x in jax.tree.leaves(params)),
    "method": exp.model.attention.method,
    "classes": record["class_names"],
    "changes": record["changes"],
    **provenance,
    "git": git_revision(),
    "versions": versions(PACKAGES),
    "device": mesh.devices.flat[0].device_kind,
    "mesh": dict(mesh.shape),
    "tokens": layout.n,
    "tiles": layout.tiles,
    "grid": layout.grid,
    "tile": layout.tile,
  }
  trackers = () if jax.process_index() else exp.train.trackers
  metrics.start(step, config, facts, old and old.get("totals"), trackers)
  alarm = Alarm(exp.train, read(metrics.path))
  is_routed = any(method.routed for _, method in exp.model.runs())

  # ---- 5. the steps ---------------------------------------------------------------------------
  train_steps = {layers: make_train_step(graphdef, exp.train, layers) for layers in throughputs}
  compiled = set()
  own_numbers = everywhere(numbers(exp.train))
  target = everywhere(train_data.target)
  validate = _validation(exp, graphdef, val_data, tables)
  skips = SkippedSteps(exp.train)
  shapes = jax.eval_shape(lambda: params)
  stop = StopRequest()
  seen = Training(
    exp, workdir, train_data, val_data, graphdef, shapes, tables, metrics.trackers, stop
  )
  watch.begin(seen, step)

  def warn(found: dict[str, str] | None):
    if found is not None:
      logging.warning("%s", found["text"])
      metrics.write(step, KIND, **found)

  def save(val_loss: float | None):
    skips.check(step)  # no checkpoint of a run whose steps were all skipped
    iterator = json.dumps(batches.get_state())
    totals = metrics.totals(step)
    progress = {"iterator": iterator, "totals": totals, "val_loss": finite(val_loss)}
    checkpoints.save(step, state, record | progress)

  def look() -> float | None:
    """Validates; returns the loss, or None if the run was asked to stop."""
    with metrics.paused():
      result = validate(state.ema, stop, functools.partial(metrics.write, step))
      if result is None:
        return None
      warn(alarm.validated(step, result["loss"], float(np.mean(result["linear_buckets"]))))
      if is_routed:
        warn(alarm.routed(step, result["probs"], exp.model))
      write_routing(workdir, result, exp.model, exp.train.time_range)
      watch.validated(step, state.ema)
      return result["loss"]

  def roll_back(lost: NotFinite):
    """Goes back to the last checkpoint before the lost steps, on with other batches and noise."""
    nonlocal state, step, batches, skips
    found = first_not_finite(graphdef, exp.train, state, inputs, tables, own_numbers, target, dense)
    text = f"{lost} In step {step}, {found}."
    back = checkpoints.newest_before(lost.first)
    if back is None or rollbacks or not exp.train.rollback:
      raise ConfigError(f"training stopped: {text}")
    checkpoints.delete_after(back)
    there = checkpoints.record(back)
    rollbacks.append({"from": step, "to": back})
    placed = share(jax.eval_shape(lambda: state))
    state = share(with_other_noise(checkpoints.restore(placed, back)))
    batches = begin_batches()
    batches.set_state(json.loads(there["iterator"]))
    skips = SkippedSteps(exp.train)
    text = f"rolled back to step {back}, and on with other batches and noise: {text}"
    logging.warning("%s", text)
    metrics.start(back, config, facts, there.get("totals"))
    # Of the next step: a process that goes on from this very checkpoint finds it out again.
    metrics.write(back + 1, KIND, about="rollback", text=text)
    metrics.start_clock(back)
    step = back

  # ---- 6. the loop ----------------------------------------------------------------------------
  loop_started = time.monotonic()
  bar = tqdm(total=exp.train.steps, initial=step, desc="training", disable=jax.process_index() > 0)
  with stop, bar:
    if cut_short:
      look()
    while step < exp.train.steps and not stop():
      with metrics.timed("data_wait"):
        batch = next(batches)
      inputs = split_batch({k: batch[k] for k in ("latent", "label")}, exp.train.batch_size)
      now = exp.train.dense_layers(step, depth)
      if now != dense:
        dense = now
        metrics.change(step, throughputs[dense])
      begins = dense not in compiled
      if begins:
        where = f", {dense} of {depth} layers dense" if len(throughputs) > 1 else ""
        logging.info("compiling the training step%s ...", where)
        compile_started = time.monotonic()
      trace.before(step + 1, workdir)
      with metrics.paused() if begins else metrics.timed("step"):
        state, values = train_steps[dense](state, inputs, tables, own_numbers, target)
        if begins:
          jax.block_until_ready(values)
      skips.add(values)
      checkpoints.poll()
      step += 1
      trace.after(step, values)
      last = step == exp.train.steps
      if begins:
        compiled.add(dense)
        taken = time.monotonic() - compile_started
        logging.info("compiled, and run once, in %.1f s", taken)
        seconds["compile"] = seconds.get("compile", 0.0) + taken
        metrics.start_clock(step)
      bar.update()
      if last or step % exp.train.log_every == 0:
        with metrics.timed("step"):
          values = jax.device_get(values)
        if len(throughputs) > 1:
          values["dense_layers"] = dense
        metrics.train(step, values)
        warn(alarm.trained(step, float(values["loss"])))
        bar.set_postfix(loss=f"{values['loss']:.3f}")
      saves = last or stop() or step % exp.train.checkpoint_every == 0
      if saves or step % exp.train.log_every == 0:
        try:
          skips.check(step)
        except NotFinite as lost:
          roll_back(lost)
          bar.n = step
          continue
      val_loss = None  # of this very step
      if exp.train.val_every and (last or step % exp.train.val_every == 0) and not stop():
        with metrics.timed("step"):
          jax.block_until_ready(values)  # steps still running are no part of validation
        val_loss = look()
      if saves or stop():
        save(val_loss)
  checkpoints.wait()  # a run has finished when its last checkpoint is on disk
  seconds["train"] = time.monotonic() - loop_started - seconds.get("compile", 0.0)
  best = checkpoints.best()
  metrics.finish(seconds, finished=step >= exp.train.steps, best=best)
  watch.end()
  if best is not None and best["step"] < step:
    logging.info(
      "validation was best at step %d (%.4g): eval.py --checkpoint=%d takes it, by default the "
      "newest is taken",
      best["step"],
      best["val_loss"],
      best["step"],
    )
  if step < exp.train.steps:
    logging.warning(
      "stopped at step %d of %d; the same command goes on from there", step, exp.train.steps
    )


def _is_cut_short(workdir: pathlib.Path, config: TrainConfig, step: int) -> bool:
  """Tells whether a process was asked to stop while it validated at a step, and saved without."""
  due = config.val_every and (step == config.steps or step % config.val_every == 0)
  return bool(due) and not any(
    row["kind"] == "val" and row["step"] == step for row in read(workdir / "metrics.jsonl")
  )


def _record(config: ConfigDict, data: Split) -> dict:
  """Returns a checkpoint's record: the config, and what a resumed run's data must agree with."""
  return {
    "config": config.to_dict(),
    "class_names": list(data.class_names),
    "class_counts": data.class_counts,
    "fps": data.fps,
    "latent_shape": tuple(data.latent_shape),
    "statistics": data.statistics.to_json(),
    "video_shape": list(data.video_shape),
    "cache": data.hash,
    "changes": [],
  }


def _validation(exp: Experiment, graphdef: nnx.GraphDef, data: Split, tables) -> Callable:
  """Returns `validate(params, stop, write)`, which writes `kind, **numbers` of each kind.

  It returns the results of the hard choice, or None if it was stopped.
  """
  make = functools.partial(make_eval_step, graphdef, time_range=exp.train.time_range)
  eval_steps = {"val": make()}
  if exp.train.val_soft and any(method.routed for _, method in exp.model.runs()):
    eval_steps["val_soft"] = make(soft=True)
  power = everywhere(channel_power(data))
  reference = everywhere(data.reference)
  size = exp.train.batch_size // exp.train.accumulate
  limit = exp.train.val_batches * exp.train.batch_size

  def validate(params, stop, write):
    results = {}
    for kind, eval_step in eval_steps.items():
      batches = val_batches(data, size, limit)
      results[kind] = evaluate(eval_step, params, batches, power, tables, stop, reference)
      if results[kind] is None:
        return None
    for kind in results:
      values = {k: v for k, v in results[kind].items() if k not in ("probs", "choice")}
      write(kind, **values, time_range=exp.train.time_range)
    return results["val"]

  return validate
