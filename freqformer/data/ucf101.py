"""UCF-101 as its authors lay it out.

Videos are `UCF-101/<Class>/v_<Class>_gXX_cYY.avi`; `ucfTrainTestlist/` holds `classInd.txt`,
`trainlist0N.txt` and `testlist0N.txt`.

Class ids come from classInd.txt, never from sorted folders: sorting by case swaps
Hammering/HammerThrow and JumpRope/JumpingJack. Files are found regardless of case, because the
folder HandstandPushups holds v_HandStandPushups_*.
"""

import pathlib

from freqformer.config import ConfigError, did_you_mean
from freqformer.data.protocol import Clip, DataConfig, Listing

VIDEOS, LISTS = "UCF-101", "ucfTrainTestlist"
REMEDY = (
  "get UCF101.rar and UCF101TrainTestSplits-RecognitionTask.zip (the recognition splits, not the "
  "detection ones) from the dataset's home at crcv.ucf.edu and unpack both there, or run "
  "`make demo`, which renders a small stand-in data set."
)


def list_ucf101(config: DataConfig, split: str) -> Listing:
  """Lists the clips of an official split, "train" or "val" (= the test list).

  Raises:
    ConfigError: the data set is not there, empty, ambiguous, or contradicts its own lists.
  """
  root = pathlib.Path(config.root)
  if not root.is_dir():
    raise ConfigError(f"data.root {config.root!r} is not a folder: {REMEDY}")
  lists = _find(root, LISTS, lambda folder: (folder / "classInd.txt").is_file(), "classInd.txt")
  videos = _find(
    root, VIDEOS, lambda folder: any(_class_folders(folder)), "a class folder with .avi files"
  )
  names = _read_classes(lists / "classInd.txt")
  files = {
    f"{folder.name}/{p.name}".lower(): p
    for folder in _class_folders(videos)
    for p in folder.glob("*.avi")
  }
  entries = {}
  for file in _list_files(config.split, split):
    entries |= _read_list(lists / file, names)
  clips = []
  missing = {}
  for key, (label, file) in entries.items():
    path = files.get(key.lower())
    if path is None:
      missing[key] = f"it is listed in {file} but not on disk"
    else:
      clips.append(Clip(key, str(path), label))
  if not clips:
    raise ConfigError(
      f"None of the {len(missing)} clips listed for {split} is under {str(videos)!r}: {REMEDY}"
    )
  return Listing(clips, names, missing)


def _read_classes(path: pathlib.Path) -> list[str]:
  """Reads classInd.txt, lines "<id> <name>" with ids 1, 2, ...; returns the names by id.

  Raises:
    ConfigError: for a line of another form, a doubled or a missing id.
  """
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


def _list_files(number: int, split: str) -> list[str]:
  """Returns the lists of a split.

  Split 0 trains on everything and validates on split 1's test list, which training then has seen.
  """
  if number == 0:
    return ["trainlist01.txt", "testlist01.txt"] if split == "train" else ["testlist01.txt"]
  return [f"{'train' if split == 'train' else 'test'}list0{number}.txt"]


def _read_list(path: pathlib.Path, names: list[str]) -> dict[str, tuple[int, str]]:
  """Returns `{"<Class>/<file>.avi": (label, list file)}`.

  Lines of a training list end in a class id, which must agree with classInd.txt.
  """
  if not path.is_file():
    raise ConfigError(f"The split file {str(path)!r} is missing: {REMEDY}")
  labels = {name.lower(): i for i, name in enumerate(names)}
  entries = {}
  for number, line in _lines(path):
    key, *rest = line.replace("\\", "/").split()
    name, _, file = key.partition("/")
    if not file or len(rest) > 1:
      raise ConfigError(
        f"{path}, line {number}: expected '<Class>/<file>.avi' and perhaps a class id, got "
        f"{line!r}."
      )
    if name.lower() not in labels:
      raise ConfigError(
        f"{path}, line {number}: class {name!r} is not in classInd.txt; {did_you_mean(name, names)}"
      )
    label = labels[name.lower()]
    if rest and rest[0] != str(label + 1):
      raise ConfigError(
        f"{path}, line {number}: {key} has class id {rest[0]}, but classInd.txt gives "
        f"{names[label]} {label + 1}."
      )
    entries[key] = (label, path.name)
  if not entries:
    raise ConfigError(f"The split file {str(path)!r} lists no clip: {REMEDY}")
  return entries


def _lines(path: pathlib.Path) -> list[tuple[int, str]]:
  """Returns (number, stripped line) of the non-empty lines."""
  text = path.read_text(encoding="utf-8-sig")
  return [(i, line.strip()) for i, line in enumerate(text.splitlines(), 1) if line.strip()]


def _class_folders(folder: pathlib.Path):
  """Yields the subfolders that hold .avi files."""
  return (f for f in sorted(folder.iterdir()) if f.is_dir() and next(f.glob("*.avi"), None))


def _find(root: pathlib.Path, name: str, complete, what: str) -> pathlib.Path:
  """Returns the one folder called `name` that is complete, which is to hold `what`.

  It may be in root, root itself, beside it, or one level further down.
  """
  places = [root / name, root / name / name, *sorted(root.glob(f"*/{name}"))]
  if root.name in (VIDEOS, LISTS):
    places += [root, root.parent / name]
  found = list(dict.fromkeys(p for p in places if p.name == name and p.is_dir() and complete(p)))
  if not found:
    raise ConfigError(f"data.root {str(root)!r} holds no folder {name} with {what}: {REMEDY}")
  if len(found) > 1:
    raise ConfigError(
      f"data.root {str(root)!r} holds several folders {name}: {', '.join(map(str, found))}; name "
      "one's parent."
    )
  return found[0]
