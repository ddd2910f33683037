"""docs/evidence.md shows what the study's rows say, whatever arms and seeds there are."""

import json

import numpy as np
import pytest

from benchmarks import rows as row_files
from benchmarks.pages import evidence, evidence_figures, evidence_theory
from benchmarks.pages.complexity import fill
from benchmarks.rows import measured_rows
from benchmarks.trained.study_verdict import verdicts
from freqformer.analysis.contexts import queries
from freqformer.simulation import plots

PARTS = 8


def judged(regret, density=1.0):
  return {
    "loss": regret + 0.1,
    "regret": regret,
    "buckets": [regret + 0.1] * PARTS,
    "regret_buckets": [regret] * PARTS,
    "bayes_buckets": [0.1] * PARTS,
    "density": density,
    "density_buckets": [density] * PARTS,
  }


def row(arm, seed, regret):
  points = [
    {"step": step, "flops": 1e12 * step, "seconds": step, **judged(regret * 300 / step)}
    for step in (30, 75, 300)
  ]
  return {
    "name": f"{arm}/seed{seed}",
    "arm": arm,
    "seed": seed,
    "digest": arm,
    "steps": 300,
    "overrides": {"train.time_range": [0.3, 1.0]},
    "training_flops": 3e14,
    "training_seconds": 300,
    "curve": points,
    "final": judged(regret, 0.01),
    "final_soft": judged(regret * 0.9, 0.1),
  }


def probe(name, arm, results):
  return row(arm, 0, 1.0) | {"name": f"{name}/{arm}/seed0", "probe": name, "results": results}


ROWS = [row("octaves", 0, 0.2), row("octaves", 1, 0.4), row("window", 0, 0.4)]
LEVELS = [[0.2, 0.3, 0.5]] * PARTS
SEAMS = {"clips": 16, "seam_ratio": [1.0, 1.25, 1.5], "seam_ratio_twice": [1, 1, 1], "flicker": 2.0}
SHELLS = [[0.2, 0.3, 0.5]] * PARTS
MASS = {
  # Of one layer's two heads one is as theory has it, one is nowhere near.
  "trained": {
    "mass": [[SHELLS, [[0.0, 0.0, 1.0]] * PARTS]],
    "bands": [[[[0.5, 0.1, 0.2, 0.2]] * PARTS, [[0.9, 0.0, 0.0, 0.1]] * PARTS]],
  },
  "untrained": {
    "mass": [[[[0.1, 0.7, 0.2]] * PARTS] * 2],
    "bands": [[[[0.4, 0.1, 0.2, 0.3]] * PARTS] * 2],
  },
  "wiener": {"mass": SHELLS, "bands": [[0.9, 0.0, 0.0, 0.1]] * PARTS},
  "uniform": {"mass": [0.1, 0.6, 0.3], "farthest": [1, 3, 4]},
}
PROBES = [
  probe("transfer", "octaves", {"as trained": judged(0.2) | {"weights": LEVELS}}),
  probe("threshold", "octaves", {"0": judged(0.2, 0.08), "0.05": judged(0.21, 0.004)}),
  probe("windows", "dense", {"all tokens": judged(0.2, 1.0), "3x3x3 tiles": judged(0.4, 0.074)}),
  probe("mass", "dense", MASS),
  probe("samples", "window", {"model": SEAMS, "exact": SEAMS | {"flicker": 0.25}}),
]


@pytest.fixture(scope="module")
def predicted():
  return row_files.read_rows(row_files.RESULTS / "study_theory.json")


@pytest.fixture(scope="module")
def on_screen(predicted):
  return [r for r in predicted if r["stage"] == "screen"]


def test_the_page_shows_the_rows():
  page = evidence.DOC.read_text()
  shown, drawn = evidence.contents(evidence.Rows.read(row_files.RESULTS))
  assert fill(page, shown) == page
  for name in drawn:
    assert (evidence.FIGURES / f"evidence_{name}.png").exists()


def test_tables_of_some_arms_and_seeds():
  found = evidence.tables({"screen": ROWS}, PROBES)
  assert "| octaves | 0.3000 | 2 | -0.2000 (-50.0%, 1 seed) |" in found["study screen"]
  assert (
    found["study screen over t"].splitlines()[0].startswith("| regret at t | all | 0.34 | 0.43 |")
  )
  assert "| octaves | 1 | 0.2000 (0.08) | 0.2100 (0.004) |" in found["study thresholds"]
  assert "| window | 1 | 1.00, 1.25, 1.50 | 1.00, 1.00, 1.00 | 2.00 |" in found["study samples"]
  assert (
    "| exact velocity | - | 1.00, 1.25, 1.50 | 1.00, 1.00, 1.00 | 0.25 |"
    in (found["study samples"])
  )
  assert found["study oracle"] == found["study statistics"] == "No rows yet."
  local = found["study windows"].splitlines()
  assert local[0].startswith("| regret at t | density | all | 0.34 | 0.43 |")
  assert local[3].startswith("| seed 0, 3x3x3 tiles | 0.074 | 0.400 | 0.400 |")
  mass = found["study mass"].splitlines()
  assert mass[0].startswith("| % at 0-1 / 2-3 / 4 tokens, t = | 0.34 | 0.43 |")
  assert mass[2].startswith("| layer 1 | 10 / 15 / 75 |")
  assert mass[3].startswith("| untrained | 10 / 70 / 20 |")
  assert mass[4].startswith("| Wiener | 20 / 30 / 50 |")
  assert mass[5].startswith("| uniform | 10 / 60 / 30 |") and mass[5].count("10 / 60") == PARTS
  bands = found["study bands"].splitlines()
  assert bands[2].startswith("| layer 1 | 85 (15) |")
  assert bands[3].startswith("| untrained | 70 (30) |")
  assert bands[4].startswith("| Wiener | 100 (10) |")
  outcome = found["study outcome"].splitlines()
  eighth = outcome[2 + 7]
  assert len(outcome) == 2 + len(verdicts({})) and "+11.1%" in eighth and "threshold is 0" in eighth


def test_levels_that_were_left_out_are_shown_beside_all_of_them():
  found = evidence.tables({"core": LONG}, [])
  assert "| low4_prior | 0.1000 | 0.1000 |" in found["study core over t"]
  assert "| low4_prior | 0.0900 | 0.0900 |" in found["study core all levels"]
  assert "| window | 0.2000 | 0.2000 |" in found["study core all levels"]
  # What was trained to leave out is judged as it runs.
  assert "| low4_late | 0.1000 | 0.1000 |" in found["study core all levels"]


def test_stages_without_a_window_have_their_own_reference():
  high = [row("octaves_prior", 0, 0.2), row("octaves_until", 0, 0.3)]
  found = evidence.tables({"high": high}, [])
  assert "| octaves_until | 0.3000 | 1 | +0.1000 (+50.0%, 1 seed) |" in found["study high"]
  assert found["study vorta"] == found["study long"] == "No rows yet."


def test_long_runs_of_all_levels_stand_beside_dense_attention_of_a_quarter():
  core = [*LONG, row("dense", 0, 0.3)]
  found = evidence.tables({"long": [row("low4_prior", 0, 0.1)], "core": core}, [])
  lines = found["study long"].splitlines()[2:]
  assert [line[:22] for line in lines] == ["| low4_prior | 0.0900 ", "| dense | 0.3000 | 0.3"]


def test_gains_of_forced_heads():
  forced = np.full((2, 2, 3, 4), 0.5)
  forced[0, 1, 2] = 0.7  # of the first layer one of two heads has a branch that is worse by .2
  heads = {"regret_buckets": [0.5] * 4, "gain": [0.01] * 4, "best_gain": 0.02}
  heads["forced"] = forced.tolist()
  found = evidence.tables({}, [probe("oracle", "freqformer", {"heads": heads})])
  assert "| freqformer | 1 | +0.0100 of 0.5000 |" in found["study oracle"]
  assert found["study oracle"].endswith("| +0.0200 | 0.1000, 0.0000 |")
  assert found["study screen"] == "No rows yet."


def test_what_was_rehearsed_or_failed_is_not_shown(tmp_path):
  rows = [row("octaves", 0, 1.0), row("window", 0, 1.0), row("dense", 0, 1.0)]
  rows[1] |= {"rehearsal": True}
  rows[2] |= {"error": "killed"}
  (tmp_path / "study_screen.json").write_text(json.dumps(rows))
  assert [r["arm"] for r in measured_rows(tmp_path / "study_screen.json")] == ["octaves"]


PLANE = [row("octaves4_prior", 0, 0.2), row("window", 0, 0.4)]
PLANE[0]["final"]["weights"] = [[0.1, 0.2, 0.3, 0.4]] * PARTS
LONG = [row("low4_prior", 0, 0.1), row("window", 0, 0.2), row("low4_late", 0, 0.1)]
LONG[2]["overrides"] |= {"model.attention.octaves.threshold_from": 0.5}
LONG[0]["final"]["weights"] = [[0.4, 0.6]] * PARTS
STAGES = {"screen": ROWS, "plane": PLANE, "core": LONG}


def lines_of(axis):
  return {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}


def test_a_prediction_is_in_units_of_the_regret(on_screen):
  figure = evidence_figures.regret(ROWS, on_screen)
  trained, theory = map(lines_of, figure.axes)
  assert set(trained) == {"octaves", "window", "Bayes risk"}
  np.testing.assert_allclose(trained["octaves"].get_ydata(), 0.3)
  window = next(r for r in on_screen if r["arm"] == "window")
  np.testing.assert_allclose(theory["window"].get_ydata(), 1e-3 * np.array(window["excess"]))
  assert theory["window"].get_linestyle() == "--" and trained["window"].get_linestyle() == "-"
  _, theory = map(lines_of, evidence_figures.regret(LONG, on_screen).axes)
  assert set(theory) == {"low4", "window", "Bayes risk"}  # of arms that were trained alone


def test_figures_of_weights_levels_and_transfer(on_screen):
  weights = evidence_figures.weights(ROWS, PROBES, on_screen)
  levels = lines_of(weights.axes[0])
  np.testing.assert_allclose(levels["cells of 4: learned"].get_ydata(), 0.5)
  assert "cells of 4: theory" in levels and len(weights.axes) == 1  # no row of freqformer
  assert evidence_figures.weights(ROWS, [], on_screen) is None
  rows = [row(arm, 0, 1.0) for arm in ("low4", "freqformer")]
  for each in rows:
    each["final"]["weights"] = LEVELS
  window, low = map(lines_of, evidence_figures.weights(rows, [], on_screen).axes)
  assert set(window) == {"low4", "theory"} and set(low) == {"freqformer"}
  np.testing.assert_allclose(window["low4"].get_ydata(), 0.2)
  density, change = evidence_figures.left_out(ROWS, PROBES).axes
  np.testing.assert_allclose(lines_of(density)["octaves"].get_ydata(), 0.01)
  np.testing.assert_allclose(lines_of(change)["octaves"].get_ydata(), 100 / 9, rtol=1e-5)
  np.testing.assert_allclose(lines_of(change)["octaves, below 0.05"].get_ydata(), 5, rtol=1e-5)
  assert evidence_figures.left_out(ROWS[2:], []) is None
  (axis,) = evidence_figures.transfer(PROBES).axes
  np.testing.assert_allclose(lines_of(axis)["octaves"].get_ydata(), [0.2])
  assert evidence_figures.transfer([]) is None


def test_a_figure_of_where_attention_lies():
  (axis,) = evidence_figures.mass(PROBES).axes
  np.testing.assert_allclose(lines_of(axis)["2-3 tokens"].get_ydata(), 0.15)
  dashed = [line for line in axis.lines if line.get_linestyle() == "--"]
  assert [line.get_ydata()[0] for line in dashed] == [0.2, 0.3, 0.5]
  assert evidence_figures.mass(PROBES[:2]) is None


def test_more_tokens_beside_theory(predicted):
  (axis,) = evidence_figures.scale(
    {576: [row("window", 0, 0.2), row("window", 1, 0.4)], 2048: []},
    {576: [r for r in predicted if r["stage"] == "scale_576"], 2048: []},
    ("octaves_prior", "window"),
  ).axes
  lines = lines_of(axis)
  np.testing.assert_allclose(lines["window"].get_ydata(), [0.3])
  excess = next(r["excess"] for r in predicted if r["name"] == "scale_576/window")
  # Of eight parts of t the last three lie above .7; the Bayes risk is .1.
  np.testing.assert_allclose(lines["window, theory"].get_ydata(), np.mean(excess[-3:]) / 1000)
  assert evidence_figures.scale({576: []}, {576: []}, ("window",)) is None


def test_a_page_shows_the_figures_that_there_are(predicted, tmp_path):
  found = evidence.Rows(STAGES, PROBES, predicted)
  assert {r["arm"] for r in found.of_theory("scale_576")} == {"octaves_prior", "window"}
  shown, drawn = evidence.contents(found)
  assert set(drawn) == set(evidence.CAPTIONS)
  assert shown["study figure regret"].endswith("(figures/evidence_regret.png)")
  plots.save(drawn["curves"], tmp_path / "curves.png")
  assert (tmp_path / "curves.png").stat().st_size > 10_000
  shown, drawn = evidence.contents(evidence.Rows({}, PROBES[:1], predicted))
  assert set(drawn) == {"transfer"} and shown["study figure regret"] == "No rows yet."


@pytest.mark.parametrize(
  "stage, arm", [(stage, arm) for stage, arms in evidence_theory.ARMS.items() for arm in arms]
)
def test_predictions_are_of_the_arms_own_tables(stage, arm, predicted):
  """The whole excess takes seconds an arm; the keys that its queries see take none."""
  stored = next(r for r in predicted if (r["stage"], r["arm"]) == (stage, arm))
  exp = evidence_theory.experiment_of(arm, stage)
  ((_, method),) = exp.model.runs()
  grid = exp.latent_shape[:3]
  context = evidence_theory.context_of(method, exp.model.layout(exp.latent_shape))
  keys = [len(context.boxes(grid, query)) for query in queries(context, grid)]
  assert np.mean(keys) == pytest.approx(stored["keys"])
  assert stored["times"] == pytest.approx(evidence_theory.times(stage))


def test_lists_that_depend_on_the_clip_have_no_prediction():
  exp = evidence_theory.experiment_of("block_topk")
  ((_, method),) = exp.model.runs()
  with pytest.raises(ValueError, match="BlockTopK has lists that depend on the clip"):
    evidence_theory.context_of(method, exp.model.layout(exp.latent_shape))
