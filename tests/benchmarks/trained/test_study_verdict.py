"""The hypotheses are judged by their own rules: what holds, what fails, and what stays open."""

import pytest

from benchmarks.trained.study_verdict import FAILS, HOLDS, OPEN, Claim, text, verdicts

PARTS = 8


def row(arm, seed, regret, flops=1.0, curve=None, soft=1.0, density=None, **more):
  """A row whose regret is `regret` in every part of t, or one value for t < .7 and one above."""
  parts = regret if isinstance(regret, tuple) else (regret, regret)
  values = [parts[0]] * 5 + [parts[1]] * 3
  final = judged(values) | {"density_buckets": density or [1.0] * PARTS}
  points = curve or [(300, flops, values)]
  return {
    "arm": arm,
    "seed": seed,
    "digest": arm,
    "steps": 300,
    "overrides": {"train.time_range": (0.3, 1.0)},
    "training_flops": flops,
    "curve": [{"step": step, "flops": at, **judged(v)} for step, at, v in points],
    "final": final | more,
    "final_soft": judged([soft] * PARTS) | {"density_buckets": [1.0] * PARTS},
  }


def judged(values):
  return {"regret": sum(values) / len(values), "regret_buckets": values, "buckets": values}


def state(name, rows, probes=(), stage="screen"):
  return next(v for v in verdicts({stage: rows}, probes) if v.name == name).state


def seeds(arm, values, **more):
  return [row(arm, seed, value, **more) for seed, value in enumerate(values)]


def test_a_claim_needs_an_interval_on_one_side():
  assert Claim("", [0.1, 0.12], 0).state == OPEN  # 12.7 standard errors: 0.11 +- 0.127
  assert Claim("", [0.1, 0.101], 0).state == FAILS
  assert Claim("", [0.1, 0.101], 0, above=True).state == HOLDS
  assert Claim("", [-0.4], 0).state == OPEN and Claim("", [], 0).state == OPEN
  noisy = [0.1, -0.1, 0.05]
  assert Claim("", noisy, 0).state == OPEN
  assert Claim("", noisy, 0, if_equal=FAILS).state == FAILS
  assert Claim("", noisy[:2], 0, if_equal=FAILS).state == OPEN


def test_octaves_against_the_window_at_equal_flops():
  """H1: at half of its training octaves had the window's FLOPs, and twice its own last regret."""
  window = seeds("window", [(0.5, 1.0), (0.5, 1.01), (0.5, 1.02)], flops=2.0)
  late = [1.2] * PARTS

  def octaves(high, half):
    curve = [(150, 2.0, half), (300, 4.0, [0.5] * 5 + [high] * 3)]
    return [row("octaves", seed, (0.5, high), flops=4.0, curve=curve) for seed in range(3)]

  assert state("H1", window + octaves(0.3, [0.5] * 5 + [0.4] * 3)) == HOLDS
  assert state("H1", window + octaves(0.3, late)) == FAILS
  assert state("H1", window + octaves(0.3, [0.6] * 5 + [0.4] * 3)) == FAILS  # more below .7
  assert state("H1", window[:1] + octaves(0.3, late)) == OPEN


def test_the_hard_choice_must_beat_both_weighed_arms():
  routed = seeds("freqformer", [0.5, 0.6])
  worse = seeds("low2", [0.55, 0.66]) + seeds("low4", [0.55, 0.66])
  assert state("H2", routed + worse) == HOLDS
  assert state("H2", routed + worse[:2] + seeds("low4", [0.501, 0.6012])) == FAILS
  assert state("H2", routed + worse[:2]) == OPEN  # low4 has not run


def test_dense_attention_has_four_times_the_steps():
  ends = [[0.4] * PARTS, [0.41] * PARTS]
  curves = [[(60, 1, [0.8] * PARTS), (75, 2, [0.2] * PARTS), (300, 4, end)] for end in ends]

  def arms(name):
    return [row(name, seed, 0.4, curve=curve) for seed, curve in enumerate(curves)]

  assert state("H3", arms("octaves") + arms("dense")) == HOLDS
  ends[0][:] = [0.19] * PARTS  # dense ends below what octaves had at step 75
  ends[1][:] = [0.19] * PARTS
  assert state("H3", arms("octaves") + arms("dense")) == FAILS


def test_arms_that_three_seeds_cannot_tell_apart_are_equal():
  octaves = seeds("octaves", [(0.5, 9.0), (0.6, 9.0), (0.7, 9.0)])
  same = seeds("low4", [(0.51, 1.0), (0.59, 1.0), (0.71, 1.0)])
  assert state("H4", octaves[:2] + same[:2]) == OPEN
  assert state("H4", octaves + same) == FAILS
  assert state("H4", octaves + seeds("low4", [(0.6, 1.0), (0.71, 1.0), (0.84, 1.0)])) == HOLDS


def test_content_must_help_the_router():
  assert state("H5", seeds("freqformer", [0.5, 0.6]) + seeds("freqformer_time", [1, 1.2])) == HOLDS
  assert (
    state("H5", seeds("freqformer", [0.5, 0.6]) + seeds("freqformer_time", [0.5, 0.6])) == FAILS
  )


def test_low_heads_are_found_or_given():
  rises = [[0.1, 0.9]] * 5 + [[0.5, 0.5]] * 3
  given = [row("freqformer_slope", seed, 1.0, weights=rises) for seed in range(2)]
  assert state("H6", given) == HOLDS
  falls = [row("freqformer_slope", seed, 1.0, weights=rises[::-1]) for seed in range(2)]
  assert state("H6", falls) == FAILS
  # Rows of before the key: a probe of the same run has the routing.
  rows = seeds("freqformer_slope", [1.0, 1.0])
  probes = [
    {
      "probe": "transfer",
      "arm": "freqformer_slope",
      "seed": seed,
      "digest": "freqformer_slope",
      "results": {"as trained": {"weights": rises}},
    }
    for seed in range(2)
  ]
  assert state("H6", rows) == OPEN and state("H6", rows, probes) == HOLDS
  assert state("H6", rows, [probe | {"digest": "other"} for probe in probes]) == OPEN


def test_mid_tiles_are_judged_by_copies_alone():
  plain = seeds("octaves_mid", [0.1, 0.1]) + seeds("octaves_prior", [1.0, 1.0])
  assert state("H7", plain) == OPEN
  assert state("H7", plain, stage="copies") == HOLDS
  assert state("H8", plain, stage="copies") == OPEN


def test_levels_between_are_judged_on_the_plane_at_equal_steps():
  octaves = seeds("octaves4_prior", [(0.5, 0.3), (0.5, 0.31), (0.5, 0.32)], flops=3.0)
  window = seeds("window", [(0.6, 0.6)] * 3)
  low = seeds("low8_prior", [(0.6, 0.3), (0.61, 0.3), (0.6, 0.3)])
  assert state("H13", octaves + window, stage="plane") == HOLDS
  assert state("H14", octaves + low, stage="plane") == HOLDS
  assert state("H14", octaves + low, stage="screen") == OPEN
  assert state("H14", low + seeds("octaves4_prior", [0.6, 0.6, 0.62]), stage="plane") == FAILS


def test_routing_must_beat_chance_and_the_timestep():
  ours = seeds("freqformer", [0.5, 0.6]) + seeds("octaves_prior", [0.4, 0.5])
  others = seeds("freqformer_random", [0.6, 0.7]) + seeds("vorta", [0.41, 0.51])
  assert state("H16", ours + others) == OPEN  # -16.7 % and -14.3 %: two seeds are too few
  others = seeds("freqformer_random", [0.6, 0.72]) + seeds("vorta", [0.44, 0.55])
  assert state("H16", ours + others) == HOLDS and state("H17", ours + others) == HOLDS
  assert state("H18", seeds("low2", [1.0, 1.0]) + seeds("joint", [0.9, 0.9])) == FAILS


@pytest.mark.parametrize(
  "regret, density, expected", [(1.001, 0.4, HOLDS), (1.02, 0.4, FAILS), (1.001, 0.6, FAILS)]
)
def test_leaving_levels_out(regret, density, expected):
  # Below t = .7 every level runs: only the last three parts count.
  run = [1.0] * 5 + [density] * 3
  assert state("H8", seeds("octaves", [regret, regret], density=run)) == expected
  plane = seeds("octaves4_prior", [regret, regret], density=run)
  assert state("H15", plane, stage="plane") == expected


def test_longer_runs_are_judged_by_their_own_rows():
  good = seeds("low4_prior", [0.2, 0.21])
  others = seeds("freqformer", [0.4, 0.42]) + seeds("dense", [0.3, 0.32])
  assert state("H21", good + others, stage="core") == FAILS  # as H2: the hard choice stays off
  assert state("H23", good + others, stage="core") == HOLDS
  assert state("H23", good + others, stage="screen") == OPEN
  low = seeds("low4_prior", [0.2, 0.21, 0.2])
  window = seeds("window", [0.5, 0.52, 0.5])
  better = seeds("octaves_prior", [0.1, 0.11, 0.1])
  assert state("H19", better + window, stage="core") == HOLDS
  assert state("H20", better + low, stage="core") == HOLDS
  assert state("H20", low + seeds("octaves_prior", [0.2, 0.21, 0.2]), stage="core") == FAILS
  assert state("H24", better + seeds("octaves", [0.2, 0.22, 0.2]), stage="core") == HOLDS
  assert state("H24", seeds("octaves", [0.1, 0.11, 0.1]) + better, stage="core") == FAILS
  curve = [(75, 1, [0.2] * PARTS), (300, 4, [0.1] * PARTS)]
  slow = [row("low4_prior", seed, 0.1, curve=curve) for seed in range(2)]
  dense = [row("dense", seed, 0.2, curve=[(300, 4, [0.2] * PARTS)]) for seed in range(2)]
  assert state("H22", slow + dense, stage="core") == HOLDS
  sooner = [row("dense", seed, 0.1, curve=[(300, 4, [0.1] * PARTS)]) for seed in range(2)]
  assert state("H22", slow + sooner, stage="core") == FAILS
  costly = seeds("low4_prior", [1.02, 1.02])
  assert state("H25", costly, stage="core") == FAILS
  assert state("H25", seeds("low4_prior", [1.001, 1.001]), stage="core") == HOLDS


def test_training_that_leaves_levels_out_is_judged_as_it_runs():
  plain = seeds("low4_prior", [9.0, 9.0], soft=0.2)  # all levels have a regret of .2
  half = [1.0] * 5 + [0.4] * 3
  for name, arm in (("H26", "low4_late"), ("H27", "low4_budget")):
    assert state(name, plain + seeds(arm, [0.2, 0.201], density=half), stage="core") == HOLDS
    assert state(name, plain + seeds(arm, [0.22, 0.221], density=half), stage="core") == FAILS
  dear = seeds("low4_budget", [0.2, 0.201])
  assert state("H27", plain + dear, stage="core") == FAILS


def test_the_text_names_bounds_seeds_and_consequences():
  lines = text(verdicts({"screen": seeds("octaves", [1.02, 1.02])})).splitlines()
  (eighth,) = (line for line in lines if line.startswith("H8"))
  assert "fails: the threshold is 0" in eighth
  assert "+2.0% +- 0.0%, should be below +0.5% (2 seeds)" in eighth
  assert any(line.startswith("H7") and "open with 0 seeds" in line for line in lines)


def test_the_default_has_four_times_the_steps_of_dense_attention():
  """H28: judged with all levels, `final_soft`, which evaluation of that arm leaves out."""
  dense = seeds("dense", [0.5, 0.505])

  def outcome(regret, steps=1200):
    long = [row("low4_prior", seed, 9.0, soft=regret) | {"steps": steps} for seed in range(2)]
    found = verdicts({"long": long, "core": dense + seeds("low4_prior", [0.1, 0.1])})
    return next(v for v in found if v.name == "H28").state

  assert outcome(0.4) == HOLDS
  assert outcome(1.6) == FAILS
  assert outcome(0.4, steps=600) == OPEN


def test_vorta_is_judged_on_all_its_seeds():
  """H17: its last three seeds have a stage of their own."""
  screen = seeds("octaves_prior", [0.5, 0.7]) + seeds("vorta", [0.6, 0.6])
  further = [
    row(arm, seed, value)
    for seed in (3, 4, 5)
    for arm, value in (("octaves_prior", 0.3 + 0.001 * seed), ("vorta", 0.6))
  ]
  found = verdicts({"screen": screen, "vorta": further})
  (claim,) = next(v for v in found if v.name == "H17").claims
  assert len(claim.values) == 5


@pytest.mark.parametrize("name, stage", [("H29", "core"), ("H30", "high")])
def test_no_finest_level_at_high_noise(name, stage):
  """The loss decides, not the regret, against all levels; in `core` the pairs at t > .7, too."""

  def outcome(loss, high):
    density = [1.0] * 5 + [high] * 3
    until = seeds("octaves_until", [9.0, 9.0], density=density, loss=loss)
    every = seeds("octaves_prior", [0.1, 0.1], loss=0.1)
    for each in every:
      each["final_soft"]["loss"] = 1.0
    return state(name, until + every, stage=stage)

  assert outcome(1.004, 0.4) == HOLDS
  assert outcome(1.006, 0.4) == FAILS
  assert outcome(1.004, 0.6) == (FAILS if stage == "core" else HOLDS)


def test_the_same_weights_with_and_without_the_finest_level():
  def outcome(loss, high):
    rows = seeds("octaves_either", [9.0, 9.0], density=[1.0] * 5 + [high] * 3, loss=loss)
    for each in rows:
      each["final_soft"]["loss"] = 1.0
    return state("H31", rows, stage="core")

  assert outcome(1.004, 0.4) == HOLDS
  assert outcome(1.006, 0.4) == FAILS
  assert outcome(1.004, 0.6) == FAILS
