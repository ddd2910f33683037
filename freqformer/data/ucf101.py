"""UCF-101 as its authors lay it out.

Videos are `UCF-101/<Class>/v_<Class>_gXX_cYY.avi`; `ucfTrainTestlist/` holds `classInd.txt`,
`trainlist0N.txt` and `testlist0N.txt`. Class ids come from classInd.txt, never from sorted folders:
sorting by case swaps Hammering/HammerThrow and JumpRope/JumpingJack. Files are found regardless of
case, because the folder HandstandPushups holds v_HandStandPushups_*, and of any ending, because
copies are often converted.
"""

import pathlib

from freqformer.config import ConfigError, did_you_mean
from freqformer.data.protocol import Clip, DataConfig, Listing

VIDEOS = "UCF-101"
LISTS = "ucfTrainTestlist"
REMEDY = (
  "get UCF101.rar and UCF101TrainTestSplits-RecognitionTask.zip (the recognition splits, not the "
  "detection ones) from the dataset's home at crcv.ucf.edu and unpack both there, or run "
  "`make demo`, which renders a small stand-in data set; any other folder of videos has "
  "data.source='folder'."
)


def list_ucf101(config: DataConfig, split: str) -> Listing:
  """Lists the clips of an official split, "train" or "val" (= the test list).

  Raises:
    ConfigError: the data set is not there, empty, ambiguous, or contradicts its own lists.
  """
  root = pathlib.Path(config.root)
  if not root.is_dir():
    raise ConfigError(f"data.root {config.root!r} is not a folder: {REMEDY}")
  lists = _find(root, LISTS, "classInd.txt")
  videos = _find(root, VIDEOS, "*/*.*")
  names = _read_classes(lists / "classInd.txt")
  files = {_name(path): path for path in videos.glob("*/*.*")}
  kind = "train" if split == "train" else "test"
  used = [f"{kind}list0{config.split or 1}.txt"]
  if config.split == 0 and split == "train":
    used.append("testlist01.txt")  # training on everything: validation has then been seen
  clips = []
  missing = {}
  for file in used:
    for key, label in _read_list(lists / file, names).items():
      path = files.get(_name(pathlib.PurePath(key)))
      if path is None:
        missing[key] = f"it is listed in {file} but not on disk"
      else:
        clips.append(Clip(key, str(path), label))
  if not clips:
    raise ConfigError(
      f"None of the {len(missing)} clips listed for {split} is under {str(videos)!r}: {REMEDY}"
    )
  return Listing(clips, names, missing)


def _name(path: pathlib.PurePath) -> str:
  """Returns `<class>/<clip>` in lower case, without the ending."""
  return f"{path.parent.name}/{path.stem}".lower()


def _read_classes(path: pathlib.Path) -> list[str]:
  """Reads classInd.txt, lines "<id> <name>" with ids 1, 2, ...; returns the names by id."""
  names = {}
  for number, line in _lines(path):
    parts = line.split()
    if len(parts) != 2 or not parts[0].isdigit() or int(parts[0]) in names:
      raise ConfigError(
        f"{path}, line {number}: expected '<id> <class>' with each id once, got {line!r}."
      )
    names[int(parts[0])] = parts[1]
  if sorted(names) != list(range(1, len(names) + 1)):
    raise ConfigError(f"{path} must number its classes 1, 2, ..., got the ids {sorted(names)}.")
  return [names[i] for i in sorted(names)]


def _read_list(path: pathlib.Path, names: list[str]) -> dict[str, int]:
  """Returns `{"<Class>/<file>.avi": label}`; a class id behind it must agree with classInd.txt."""
  if not path.is_file():
    raise ConfigError(f"The split file {str(path)!r} is missing: {REMEDY}")
  labels = {name.lower(): i for i, name in enumerate(names)}
  entries = {}
  for number, line in _lines(path):
    where = f"{path}, line {number}"
    key, *rest = line.replace("\\", "/").split()
    name, _, file = key.partition("/")
    if not file or len(rest) > 1:
      raise ConfigError(
        f"{where}: expected '<Class>/<file>.avi' and perhaps a class id, got {line!r}."
      )
    if name.lower() not in labels:
      raise ConfigError(
        f"{where}: class {name!r} is not in classInd.txt; {did_you_mean(name, names)}"
      )
    label = labels[name.lower()]
    if rest and rest[0] != str(label + 1):
      raise ConfigError(
        f"{where}: {key} has class id {rest[0]}, but classInd.txt gives {names[label]} {label + 1}."
      )
    entries[key] = label
  if not entries:
    raise ConfigError(f"The split file {str(path)!r} lists no clip: {REMEDY}")
  return entries


def _lines(path: pathlib.Path) -> list[tuple[int, str]]:
  """Returns (number, stripped line) of the non-empty lines."""
  text = path.read_text(encoding="utf-8-sig")
  return [(i, line.strip()) for i, line in enumerate(text.splitlines(), 1) if line.strip()]


def _find(root: pathlib.Path, name: str, content: str) -> pathlib.Path:
  """Returns the one folder called `name` that holds files of the pattern `content`.

  It may be in root, root itself, next to it, or one level further down.
  """
  places = [root / name, root / name / name, *root.glob(f"*/{name}")]
  if root.name in (VIDEOS, LISTS):
    places += [root, root.parent / name]
  found = sorted({p for p in places if p.name == name and any(p.glob(content))})
  if not found:
    raise ConfigError(f"data.root {str(root)!r} holds no folder {name} with {content}: {REMEDY}")
  if len(found) > 1:
    raise ConfigError(
      f"data.root {str(root)!r} holds several folders {name}: {', '.join(map(str, found))}; name "
      "one's parent."
    )
  return found[0]
