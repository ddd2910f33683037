"""Runs conditioned on captions, or on nothing, as a user walks them."""

import dataclasses
import json
import re

import numpy as np
import pytest

from freqformer.config import ConfigError
from freqformer.evaluate.draw import sample
from freqformer.evaluate.restore import load_run
from freqformer.train.checkpoint import Checkpoints
from freqformer.train.metrics import read
from tests.command.process import call
from tests.data.test_files import pack

pytestmark = pytest.mark.xdist_group("conditions")

FLAGS = [
  f"--config.{key}"
  for key in (
    "data.source=latents",
    "data.views=1",
    "data.flip=False",
    "model.attention.method=dense",  # which compiles fastest
    "model.depth=1",
    "model.precondition=False",
    "train.label_dropout=0.5",
    "train.lr=0.03",
  )
]
LETTERS = ("condition=embedding", "embedding_size=4", "embedder=tests.data.test_embedding:Letters")
EMBEDDED = [f"--config.data.{key}" for key in LETTERS]
EVALUATE = "freqformer/evaluate/__main__.py"


def train(place, workdir, *flags):
  """Trains on the shard; of a flag that is given twice the last one counts."""
  data = (f"--config.data.root={place / 'latents'}", f"--workdir={workdir}")
  return call(place, "train.py", *FLAGS, *data, *flags)


def arrays(workdir):
  checkpoints = Checkpoints(workdir, create=False)
  found = checkpoints._manager.restore(checkpoints.latest())["arrays"]
  return {name: np.asarray(array) for name, array in found.items()}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A shard of latents with captions."""
  place = tmp_path_factory.mktemp("captioned")
  folder = place / "unpacked"
  folder.mkdir()
  rng = np.random.default_rng(0)
  for i in range(12):
    np.save(folder / f"{i:02d}.npy", rng.standard_normal((3, 3, 4, 3)).astype(np.float32))
    (folder / f"{i:02d}.txt").write_text("a cat: " + i * "o")
  pack(folder, place / "latents" / "0.tar")
  return place


@pytest.fixture(scope="module")
def captioned(place):
  """The folder of a run of two steps and two more, and its parameters in between and at the end."""
  found = []
  for steps in (2, 4):
    given = [f"--config.train.steps={steps}", "--config.data.val_fraction=0.3"]
    given += ["--config.train.val_every=0"] if steps == 2 else []
    done = train(place, place / "run", *EMBEDDED, *given)
    found.append(arrays(place / "run"))
  assert "resumed at step 2" in done.stderr
  return place / "run", *found


def test_training_moves_the_map_and_the_null(place, captioned):
  workdir, before, after = captioned
  for name in ("linear/kernel", "nothing"):
    assert np.abs(after[f"params/label/{name}"] - before[f"params/label/{name}"]).max() > 0, name
  assert after["params/label/linear/kernel"].shape == (4, 24)
  rows = [row for row in read(workdir / "metrics.jsonl") if row["kind"] == "train"]
  assert [row["step"] for row in rows] == [1, 2, 3, 4]
  # The report shows validation clips and samples for them under their captions.
  about = json.loads((workdir / "samples-in-training" / "about.json").read_text())
  assert about["classes"] and all(text.startswith("a cat: ") for text in about["classes"])
  assert {path.stem[:5] for path in (workdir / "real").glob("*.mp4")} == {"a_cat"}
  assert f"<span>{about['classes'][0]}</span>" in (workdir / "report.html").read_text()


def test_samples_are_drawn_for_prompts_or_for_validation_clips(place, captioned):
  workdir, *_ = captioned

  def drawn(*flags):
    call(place, "eval.py", f"--workdir={workdir}", "--steps=1", *flags)
    videos = sorted(p.relative_to(workdir / "samples") for p in workdir.glob("samples/*/*.mp4"))
    return [path.as_posix() for path in videos], np.load(workdir / "samples/latents.npz")["latents"]

  names, first = drawn("--prompts=a cat;dogs/toads; a cat ", "--samples=1")
  assert names == ["a_cat/00000.mp4", "a_cat_2/00000.mp4", "dogs_toads/00000.mp4"]
  assert np.abs(first[0] - first[1]).max() > 0.01
  (place / "prompts.txt").write_text("a cat\n\ndogs/toads\na cat\n")
  names, again = drawn("--prompts_file=prompts.txt")
  np.testing.assert_array_equal(first, again)
  page = (workdir / "report.html").read_text()
  assert "<b>dogs/toads</b>" in page and len(re.findall("<b>a cat</b>", page)) == 2
  names, _ = drawn()
  told = json.loads((workdir / "samples" / "sampling.json").read_text())["prompts"]
  assert names == sorted(f"{name}/00000.mp4" for name in told)
  assert {*told} == {path.stem for path in (workdir / "real").glob("*.mp4")}
  # In Python, too; another prompt is another video from the same noise.
  run = load_run(workdir)
  cat, dog = (sample(run, text, steps=1, guidance=1.0)[0] for text in ("a cat", "o"))
  assert cat.shape == (6, 24, 32, 3) and (cat != dog).any()
  with pytest.raises(ConfigError, match="conditioned on embeddings: name prompts or clips"):
    run.inputs(np.zeros(1, np.int32))


def test_samples_for_validation_clips_are_measured(place, captioned):
  line = (f"--workdir={captioned[0]}", "--n=5", "--metrics=flicker", "--steps=1")
  call(place, EVALUATE, *line)
  (row,) = json.loads((captioned[0] / "evaluation.json").read_text())
  assert row["counts"]["samples"] == 5 and len(row["protocol"]["clips"]) == 12
  assert len(list(captioned[0].glob("evaluation/samples/*/*.mp4"))) == 5
  done = call(place, "eval.py", f"--workdir={captioned[0]}", "--validate")
  own = json.loads((captioned[0] / "validation" / "own.json").read_text())
  last = [row for row in read(captioned[0] / "metrics.jsonl") if row["kind"] == "val"][-1]
  np.testing.assert_allclose(own["buckets"], last["buckets"], rtol=1e-5)
  assert "of the validation split" in done.stdout


def test_a_run_without_a_condition_has_the_null_alone(place):
  nothing = ("--config.data.condition=none", "--config.train.val_every=0")
  refused = call(place, "train.py", *FLAGS, *nothing, code=2)
  assert "guidance=2 needs a condition that can be left out" in refused.stderr
  given = ("--config.sample.guidance=1", "--config.train.steps=1")
  train(place, place / "nothing", *nothing, *given)
  assert arrays(place / "nothing")["params/label/embedding"].shape == (1, 24)
  call(place, "eval.py", f"--workdir={place / 'nothing'}", "--steps=1")
  assert [*place.glob("nothing/samples/*/*.mp4")] == [place / "nothing/samples/clips/00000.mp4"]
  for script, flag, message in (
    (
      "eval.py",
      "--guidance=2",
      "needs a condition that can be left out, and data.condition='none'",
    ),
    ("eval.py", "--prompts=a", "prompts: this run has data.condition='none'"),
    (EVALUATE, "--metrics=judge", "judge asks samples for their class, and this run has data.cond"),
  ):
    done = call(place, script, f"--workdir={place / 'nothing'}", flag, code=2)
    assert message in done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
  "script, flags, message",
  [
    ("eval.py", "--prompts=; ", "prompts: there is no text among them"),
    ("eval.py", "--prompts=a --prompts_file=b", "--prompts and --prompts_file say the same"),
    ("eval.py", "--prompts_file=nowhere.txt", "nowhere.txt cannot be used: No such file"),
    ("eval.py", "--classes=a", "--classes: this run is conditioned on embeddings; give --prompts"),
    ("eval.py", "--validate --prompts=a", "--prompts cannot be given with --validate"),
    (
      "eval.py",
      "--validate --config.data.embedder=tests.data.test_embedding:Tokens",
      "the model was trained with 'tests.data.test_embedding:Letters'; leave config.data.embedder",
    ),
    (
      EVALUATE,
      "--metrics=motion",
      "motion asks samples for their class, and this run has data.con",
    ),
  ],
)
def test_refusals_are_one_sentence(place, captioned, script, flags, message):
  given = (f"--{flag}" for flag in flags.removeprefix("--").split(" --"))
  done = call(place, script, f"--workdir={captioned[0]}", *given, code=2)
  assert re.fullmatch(f"error: .*{re.escape(message)}.*", done.stderr.strip().splitlines()[-1])


def test_ready_embeddings_have_no_prompts(captioned):
  run = load_run(captioned[0])
  data = dataclasses.replace(run.experiment.data, embedder="")
  run = dataclasses.replace(run, experiment=dataclasses.replace(run.experiment, data=data))
  with pytest.raises(ConfigError, match="made elsewhere, and data.embedder is empty"):
    sample(run, "a cat")
