"""One HTML file that shows a run: samples beside real clips, losses, routing, cost. It needs no network and no second file.

  python -m freqformer.report --workdir=runs/demo

Each section reads one file of the run and says which; a section whose file is absent says so and the rest goes on.
"""

import base64
import html
import json
import pathlib

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from freqformer.command import cli
from freqformer.config import ConfigError
from freqformer.pages.files import Absent, metric_rows, missing, read_json, read_routing, series
from freqformer.pages.html import STYLE, facts, image, panels, table
from freqformer.train.resume import change_text

_COLOURS = ("#3b6fb6", "#e0a030", "#b5483f", "#4f8f5b", "#7a5ca8", "#6b7280")
_MAX_CLASSES = (
  24  # Videos are embedded: all of UCF-101's classes would make a page of tens of megabytes.
)


def write_report(workdir) -> pathlib.Path:
  """Writes `<workdir>/report.html` from what the run has written so far and returns its path.

  Reads run.json, samples/, real/, metrics.jsonl, routing.json, cost.json, evaluation.json, config.json; each may be missing.

  Raises:
    ConfigError: if `workdir` is no folder.
  """
  workdir = pathlib.Path(workdir)
  if not workdir.is_dir():
    raise ConfigError(f"{workdir} is no folder; give --workdir the folder of a run.")
  sections = "\n".join(_section(workdir, *row) for row in _SECTIONS)
  name = html.escape(workdir.resolve().name)
  page = (
    f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title><style>{STYLE}</style></head>'
    f"<body><h1>FreqFormer run: {name}</h1>\n{sections}\n</body></html>\n"
  )
  path = workdir / "report.html"
  path.write_text(page, encoding="utf-8")
  return path


def _section(workdir, title, source, intro, body) -> str:
  """A heading, one sentence, the file it comes from, and the body or why there is none."""
  try:
    inner = body(workdir)
  except Absent as reason:
    inner = f'<p class="absent">Not shown: {html.escape(str(reason))}</p>'
  return (
    f'<section><h2>{title}</h2><p>{intro}</p>{inner}<p class="file">From {source}.</p></section>'
  )


_RUN = {
  **dict.fromkeys(("method?", "device?", "git?"), str),
  **dict.fromkeys(("params?", "tokens?", "tiles?"), int),
  **dict.fromkeys(("grid?", "tile?"), [int]),
  "seconds?": {str: float},
  "versions?": {str: str},
  "finished?": bool,
  "changes?": [{"step": int, "keys": {str: list}}],
}


def _run_table(workdir) -> str:
  run = {
    key: value for key, value in read_json(workdir, "run.json", _RUN).items() if value is not None
  }
  names = {"method": "attention method", "device": "device", "git": "git revision"}
  names |= {"params": "parameters", "tokens": "tokens per clip", "tiles": "tiles"}
  rows = [(name, run[key]) for key, name in names.items() if key in run]
  rows += [
    (f"{n}, t × y × x tokens", " × ".join(map(str, run[n]))) for n in ("grid", "tile") if n in run
  ]
  rows += [(f"{name}, seconds", float(value)) for name, value in run.get("seconds", {}).items()]
  if "versions" in run:
    rows += [("versions", ", ".join(f"{k} {v}" for k, v in run["versions"].items()))]
  for change in run.get("changes", ()):
    rows.append((f"config changed at step {change['step']}", change_text(change["keys"])))
  if run.get("finished") is False:
    rows.insert(0, ("state", "training has not finished"))
  return facts(rows)


def _samples(workdir) -> str:
  names = sorted(p.stem for p in (workdir / "samples").glob("*.mp4"))
  if not names:
    raise missing("samples/*.mp4")

  def video(folder, name, caption):
    path = workdir / folder / f"{name}.mp4"
    if not path.exists():
      return '<span class="absent">no clip</span>'
    data = base64.b64encode(path.read_bytes()).decode()
    clip = f'<video autoplay loop muted playsinline src="data:video/mp4;base64,{data}"></video>'
    return f"<figure>{clip}<figcaption>{caption}</figcaption></figure>"

  cards = "".join(
    f'<div><b>{html.escape(n)}</b><div class="pair">{video("samples", n, "generated")}{video("real", n, "real")}</div></div>'
    for n in names[:_MAX_CLASSES]
  )
  more = (
    f"<p>{len(names) - _MAX_CLASSES} further classes are in samples/.</p>"
    if len(names) > _MAX_CLASSES
    else ""
  )
  known = (workdir / "samples" / "sampling.json").exists()
  plain = (
    [(k.replace("_", " "), v) for k, v in read_json(workdir, "samples/sampling.json").items()]
    if known
    else []
  )
  plain = [(k, v) for k, v in plain if isinstance(v, int | float | str)]
  details = (
    f"<details><summary>How they were sampled</summary>{facts(plain)}</details>" if plain else ""
  )
  return f'<div class="clips">{cards}</div>{more}{details}'


def _smooth(values, span: float):
  """Exponential mean over about `span` values, free of the bias towards the first."""
  total = weight = 0.0
  out = []
  for value in values:
    total, weight = total + (value - total) / span, weight + (1 - weight) / span
    out.append(total / weight)
  return out


def _losses(workdir) -> str:
  train = metric_rows(workdir, "train")
  if not train:
    raise Absent("metrics.jsonl has no training line yet.")
  figure, (left, right) = panels(2)
  steps, loss = series(train, "loss")
  left.plot(steps, loss, color=_COLOURS[0], alpha=0.3, lw=0.8, label="train")
  left.plot(
    steps, _smooth(loss, max(1, len(loss) / 15)), color=_COLOURS[0], label="train, smoothed"
  )
  for kind, label, colour in (
    ("val", "validation", _COLOURS[2]),
    ("val_soft", "validation, soft routing", _COLOURS[1]),
  ):
    if len(series(metric_rows(workdir, kind), "loss")[0]):
      left.plot(*series(metric_rows(workdir, kind), "loss"), "o-", ms=4, color=colour, label=label)
  left.set(xlabel="step", ylabel="velocity loss (mean square)")
  left.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
  right.plot(*series(train, "grad_norm"), color=_COLOURS[5], lw=0.9)
  right.set(xlabel="step", ylabel="gradient norm", yscale="log")
  for axis in (left, right):
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
  last = {
    k: float(series(train, k)[1][-1])
    for k in ("loss", "lr", "steps_per_s")
    if len(series(train, k)[1])
  }
  units = {
    "loss": "last training loss",
    "lr": "last learning rate",
    "steps_per_s": "steps per second",
  }
  return image(figure, "loss over steps") + facts((units[k], v) for k, v in last.items())


def _buckets(workdir) -> str:
  rows = [r for r in metric_rows(workdir, "val") if r.get("buckets")]
  if not rows:
    raise Absent("metrics.jsonl has no validation line with buckets yet.")
  last, count = rows[-1], len(rows[-1]["buckets"])
  soft = [r["buckets"] for r in metric_rows(workdir, "val_soft") if r["step"] == last["step"]]
  bars = {"model": last["buckets"], "model, soft routing": soft[0] if soft else None}
  bars = {
    k: v
    for k, v in {**bars, "best per-channel linear predictor": last.get("linear_buckets")}.items()
    if v
  }
  figure, (axis,) = panels(1, 8.5)
  for i, (name, values) in enumerate(bars.items()):
    colour = _COLOURS[5] if "linear" in name else _COLOURS[i]
    axis.bar(
      np.arange(count) + (i - (len(bars) - 1) / 2) * 0.27, values, 0.25, label=name, color=colour
    )
  labels = [f"{i / count:g} – {(i + 1) / count:g}" for i in range(count)]
  axis.set_xticks(range(count), labels)
  axis.set(
    xlabel="t (1 is noise)", ylabel="velocity loss", title=f"validation at step {last['step']}"
  )
  axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
  head = ["mean-square velocity error", *(f"t {t}" for t in labels)]
  return image(figure, "loss by timestep") + table(
    head, [(k, *map(float, v)) for k, v in bars.items()]
  )


def _router(workdir) -> str:
  rows = metric_rows(workdir, "train")
  keys = {
    "router_entropy": "router entropy (nats)",
    "density": "density (scored pairs / n²)",
    "cost": "cost (computed pairs / n²)",
  }
  keys = {k: label for k, label in keys.items() if len(series(rows, k)[0])}
  if not keys:
    raise Absent("no training line has router_entropy, density or cost.")
  figure, axes = panels(len(keys), 3.3 * len(keys), 2.7)
  for axis, (key, label), colour in zip(axes, keys.items(), _COLOURS, strict=False):
    axis.plot(*series(rows, key), color=colour, lw=1.2)
    axis.set(xlabel="step", title=label)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.set_ylim(0, 1.08 * series(rows, key)[1].max() or None)
  return image(figure, "router entropy, density and cost over steps")


def _heatmap(routing: dict) -> Figure:
  """A panel per quarter of t, a row per layer.head, a column per branch."""
  probs = routing["probs"]  # [layers, buckets, heads, branches]
  layers, buckets, heads, branches = probs.shape
  figure, axes = panels(buckets, 1.2 + 1.9 * buckets, min(14, 1.3 + 0.17 * layers * heads))
  every = -(-layers * heads // 64)  # Beyond 64 rows only some can carry a name.
  ticks = range(0, layers * heads, every)
  for i, axis in enumerate(axes):
    flat = probs[:, i].reshape(-1, branches)
    image = axis.imshow(
      flat, vmin=0, vmax=1, aspect="auto", cmap="viridis", interpolation="nearest"
    )
    axis.hlines(np.arange(1, layers) * heads - 0.5, -0.5, branches - 0.5, color="white", lw=1.5)
    axis.set_xticks(range(branches), routing["branches"])
    axis.set_yticks(
      ticks, [f"{r // heads}.{r % heads}" for r in ticks] if i == 0 else [], fontsize=7
    )
    axis.set_title("t {:g} – {:g}".format(*routing["bucket_edges"][i : i + 2]), fontsize=10)
  axes[0].set_ylabel("layer.head")
  figure.colorbar(image, ax=list(axes), label="mean probability", fraction=0.03, pad=0.01)
  return figure


def _routing(workdir) -> str:
  routing = read_routing(workdir)
  edges, names = routing["bucket_edges"], routing["branches"]
  labels = [f"{a:g} – {b:g}" for a, b in zip(edges, edges[1:], strict=False)]
  kinds = {"mean soft probability": "probs", "share of heads by hard choice": "choice"}
  figure, axes = panels(2, 8.5, 2.8)
  for axis, (title, key) in zip(axes, kinds.items(), strict=True):
    share = routing[key].mean((0, 2))  # [buckets, branches]
    below = np.zeros(len(share))
    for branch, name in enumerate(names):
      axis.bar(
        labels,
        share[:, branch],
        0.7,
        bottom=below,
        label=name,
        color=_COLOURS[branch % len(_COLOURS)],
      )
      below = below + share[:, branch]
    axis.set(xlabel="t (1 is noise)", title=title, ylim=(0, 1))
  axes[1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
  rows = [
    (f"t {t}", *map(float, s)) for t, s in zip(labels, routing["probs"].mean((0, 2)), strict=True)
  ]
  heat = image(_heatmap(routing), "routing heatmap")
  return (
    heat + image(figure, "allocation over timesteps") + table(["mean probability", *names], rows)
  )


_COST = {"method": str, **dict.fromkeys(("attention_flops", "linear_flops", "density"), float)}
_COST |= {"layer_ms?": float, "attention_ms?": float, "note?": str}


def _cost(workdir) -> str:
  rows = read_json(workdir, "cost.json", [_COST])
  if not rows:
    raise Absent("cost.json has no rows.")
  most = max(r["attention_flops"] + r["linear_flops"] for r in rows)
  scale, unit = next(
    ((s, u) for s, u in ((1e12, "TFLOP"), (1e9, "GFLOP")) if most >= s), (1e6, "MFLOP")
  )
  head = [
    "method",
    f"attention, {unit}",
    f"linear, {unit}",
    "density",
    "sparsity",
    "layer, ms",
    "attention, ms",
    "note",
  ]
  numbers = table(
    head,
    [
      (
        r["method"],
        r["attention_flops"] / scale,
        r["linear_flops"] / scale,
        float(r["density"]),
        1 - float(r["density"]),
      )
      + (r.get("layer_ms"), r.get("attention_ms"), r.get("note") or "")
      for r in rows
    ],
  )
  dense = next((r for r in rows if r["method"] == "dense"), None)
  if dense is None:
    return (
      numbers + '<p class="absent">No chart: cost.json has no row named dense to compare with.</p>'
    )
  kinds = {
    "attention_flops": "attention FLOPs",
    "layer_ms": "layer time",
    "attention_ms": "attention time",
  }
  kinds = {k: label for k, label in kinds.items() if dense.get(k)}
  figure, (axis,) = panels(1, 7.5, 1.1 + 0.55 * len(rows))
  for i, (key, label) in enumerate(kinds.items()):
    at = np.arange(len(rows)) + (i - (len(kinds) - 1) / 2) * 0.27
    bars = axis.barh(
      at, [(r.get(key) or 0) / dense[key] for r in rows], 0.25, label=label, color=_COLOURS[i]
    )
    axis.bar_label(
      bars,
      [f"{r[key] / dense[key]:.2f}" if r.get(key) else "not timed" for r in rows],
      padding=3,
      fontsize=8,
    )
  axis.set_yticks(range(len(rows)), [r["method"] for r in rows])
  axis.axvline(1, color=_COLOURS[5], lw=0.8, ls="--")
  axis.invert_yaxis()
  axis.set(xlabel="relative to dense (less is cheaper)")
  axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
  return image(figure, "cost relative to dense") + numbers


def _evaluation(workdir) -> str:
  names = {"samples": "samples", "real_val": "real validation clips", "chance": "chance"}
  form = {"classifier": {**dict.fromkeys(names, float), "count": int}}
  result = read_json(workdir, "evaluation.json", form)["classifier"]
  rows = [(label, float(result[k])) for k, label in names.items()]
  return (
    table(["clips", "accuracy, share"], rows)
    + f"<p>{int(result['count'])} samples were classified.</p>"
  )


def _config(workdir) -> str:
  text = json.dumps(read_json(workdir, "config.json"), indent=2)
  return f"<details><summary>Show the full config</summary><pre>{html.escape(text)}</pre></details>"


_SECTIONS = (  # title, file, one sentence, body
  ("Run", "run.json", "What ran, on what, and how long each part took.", _run_table),
  (
    "Samples",
    "samples/ and real/",
    "Generated | a real training clip of the class (through the codec).",
    _samples,
  ),
  ("Losses", "metrics.jsonl", "The velocity error in training and on held-out clips.", _losses),
  (
    "Loss by timestep",
    "metrics.jsonl",
    "A model no better than the linear predictor has learned only channel statistics.",
    _buckets,
  ),
  (
    "Router in training",
    "metrics.jsonl",
    "Entropy 0: heads are decided. Density is the chosen branches, cost all that ran.",
    _router,
  ),
  (
    "Routing",
    "routing.json",
    "Which branch each head is given, by timestep: t near 1 is noise, t near 0 is video.",
    _routing,
  ),
  (
    "Cost",
    "cost.json",
    "What attention costs, counted and, where a time is given, measured.",
    _cost,
  ),
  (
    "Evaluation",
    "evaluation.json",
    "How often a classifier of real clips recognises the class asked for.",
    _evaluation,
  ),
  ("Config", "config.json", "Every setting of the run.", _config),
)


if __name__ == "__main__":
  # Not at import: train.py, eval.py and the demo have a --workdir of their own.
  from absl import flags

  _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
  cli.run(lambda _: print(write_report(_WORKDIR.value)))
