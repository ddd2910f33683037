"""The list of a split's clips, from any source."""

import collections
import csv
import dataclasses
import io
import os
import pathlib
import re
from collections.abc import Mapping

from absl import logging

from freqformer.config import ConfigError
from freqformer.data.files import Path, fingerprint, members, read, stat
from freqformer.data.protocol import EMBEDDING, Clip, DataConfig, Listing, uniforms
from freqformer.data.ucf101 import list_ucf101

EXTENSIONS = tuple(
  ".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .gif .ts .mts .m2ts .wmv .asf .flv .3gp .3g2 .ogv "
  ".vob .mxf .dv .divx .y4m".split()
)
LATENTS = (".npy", ".npz", ".safetensors")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # videos of one frame
_KINDS = {"folder": "video file", "latents": "array"}
# Names of folders that hold a split, the preferred one first.
_TRAIN = ("train", "training")
_VAL = ("val", "valid", "validation", "test")
_UCF101 = re.compile(r"v_\w+_g\d\d_c\d\d$")
_CAPTIONS = "captions.csv"
_COLUMNS = ("file", "caption")  # of it
_UNNAMED = "clips"  # the one class where classes condition nothing
_NAMED = 5  # examples in a message


def list_clips(config: DataConfig, split: str) -> Listing:
  """Lists the clips of a split, class names, and clips listed but missing.

  Args:
    split: "train", "val", or of a folder "all", for models that were trained on other clips.

  Raises:
    ConfigError: the data set is missing, empty or contradicts itself.
  """
  list_source = list_ucf101 if config.source == "ucf101" else list_folder
  listing = list_source(config, split)
  if config.condition != "class":
    clips = [dataclasses.replace(clip, label=0) for clip in listing.clips]
    listing = dataclasses.replace(listing, clips=clips, class_names=[_UNNAMED])
  if not config.max_clips:
    return listing
  # Round-robin over the classes, by hash inside each: a small set still has every class that fits.
  shuffled = sorted(listing.clips, key=lambda clip: uniforms(f"{config.seed}|max|{clip.key}"))
  rounds = {}
  seen = collections.Counter()
  for clip in shuffled:
    rounds[clip] = seen[clip.label]
    seen[clip.label] += 1
  kept = set(sorted(shuffled, key=rounds.get)[: config.max_clips])
  return dataclasses.replace(listing, clips=[clip for clip in listing.clips if clip in kept])


def list_folder(config: DataConfig, split: str) -> Listing:
  """Lists the clips of any tree of video files; the first-level subfolder is the class.

  Files at the top belong to a class named after the root, and a .cls beside a clip goes before its
  subfolder. Classes are in alphabetical order. Pictures count where a view has one frame. Arrays of
  latents are listed alike, and .tar files as what they unpack to.

  If all clips lie below root/train and root/val, and both have some, these are the splits, and
  classes are the folders below them; other usual names of such folders will do (`_TRAIN`, `_VAL`).
  Otherwise a clip's split follows from the hash of its path inside root, so new clips move no old
  one. Both splits get at least one clip; a single clip serves both, which then show different views
  of it.

  The split "all" has every clip, but of root/train and root/val only the latter's: somebody trains
  on the former.

  Raises:
    ConfigError: the folder is missing, cannot be read, or holds no video file, or captions.csv is
      none.
  """
  root = pathlib.Path(config.root)
  if not root.is_dir():
    raise ConfigError(
      f"data.root {config.root!r} is not a folder: name one that holds video files, one subfolder "
      "per class, or run `make demo`, which renders a small data set."
    )
  endings = EXTENSIONS + (PICTURES if config.frames == 1 else ())
  if config.source == "latents":
    endings = LATENTS
  files = _files(root)
  keys = [key for key in sorted(files) if _is_clip(key, endings)]
  others = _others(config, files, keys)
  if not keys:
    found = f", only others ({_counts(others)})" if others else ""
    raise ConfigError(
      f"data.root {config.root!r} holds no {_KINDS[config.source]}{found}; known endings are "
      f"{', '.join(endings)}."
    )
  top = root.resolve().name or "videos"
  folders = _split_folders(keys)
  inside = {key: key.partition("/")[2] if folders else key for key in keys}
  classes = {key: path.split("/")[0] if "/" in path else top for key, path in inside.items()}
  classes |= {key: _class(files[path]) for key in keys if (path := _beside(key, ".cls")) in files}
  if folders:
    unused = [key for key in keys if key.split("/")[0] not in folders]
    if unused:
      others[f"below {unused[0].split('/')[0]}/"] += len(unused)
    keys = [key for key in keys if key.split("/")[0] in folders]
  captions = _table(files, keys) if config.condition == "embedding" else {}
  names = sorted({classes[key] for key in keys})
  if folders:
    own = folders[0] if split == "train" else folders[1]
    keys = [key for key in keys if key.split("/")[0] == own]
  elif len(keys) > 1 and split != "all":
    # The lowest hashes are validation.
    places = {key: uniforms(f"{config.seed}|split|{key}")[0] for key in keys}
    count = sum(place < config.val_fraction for place in places.values())
    val = set(sorted(keys, key=places.get)[: min(max(count, 1), len(keys) - 1)])
    keys = [key for key in keys if (key in val) == (split == "val")]
  clips = [Clip(key, files[key], names.index(classes[key])) for key in keys]
  if config.condition == "embedding":
    clips = _described(clips, files, captions)
  return Listing(clips, names, others=dict(others))


def _split_folders(keys: list[str]) -> tuple[str, str] | None:
  """Returns the folders of the two splits, if all clips lie in folders with names of splits."""
  tops = {key.split("/")[0].lower(): key.split("/")[0] for key in keys if "/" in key}
  if any("/" not in key for key in keys) or tops.keys() - {*_TRAIN, *_VAL}:
    return None
  found = [next((tops[name] for name in names if name in tops), None) for names in (_TRAIN, _VAL)]
  return tuple(found) if all(found) else None


def _files(root: pathlib.Path) -> dict[str, Path]:
  """Returns all files below root by their paths inside it, what is in .tar files among them.

  Links to folders are followed once, hidden names are left out.
  """

  def refuse(error: OSError):
    raise ConfigError(
      f"{error.filename} below data.root {str(root)!r} cannot be read ({error.strerror}): make it "
      "readable, or move it away."
    ) from error

  found = {}
  seen = set()
  for folder, subfolders, names in os.walk(root, followlinks=True, onerror=refuse):
    real = os.path.realpath(folder)
    if real in seen:
      subfolders.clear()
      continue
    seen.add(real)
    subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
    for name in sorted(names):
      path = os.path.join(folder, name)
      inside = members(path) if name.lower().endswith(".tar") else {name: path}
      for member, own in inside.items():
        if member.startswith(".") or "/." in member:
          continue
        key = pathlib.Path(folder, member).relative_to(root).as_posix()
        if key in found:
          raise ConfigError(
            f"{key!r} below data.root {str(root)!r} is there twice, the second time in {path}: a "
            ".tar file counts as what it unpacks to; rename one, or move it away."
          )
        found[key] = own
  return found


def _is_clip(key: str, endings: tuple[str, ...]) -> bool:
  return key.lower().endswith(endings) and not key.lower().endswith(EMBEDDING)


def _beside(key: str, ending: str) -> str:
  """Returns the path of a clip with another ending."""
  return os.path.splitext(key)[0] + ending


def _others(config: DataConfig, files: Mapping[str, Path], keys: list[str]) -> collections.Counter:
  """Returns counts of files that are not used, by ending."""
  used = {*keys, *(_beside(key, ".cls") for key in keys)}
  if config.condition == "embedding":
    used |= {_CAPTIONS, *(_beside(key, ending) for key in keys for ending in (".txt", EMBEDDING))}
  endings = (os.path.splitext(key)[1].lower() for key in sorted(files.keys() - used))
  return collections.Counter(ending or "without an ending" for ending in endings)


def _class(path: Path) -> str:
  """Returns the class that a .cls file names."""
  name = read(path).decode(errors="replace").strip()
  if not name or "/" in name or "\n" in name or name.startswith("."):
    raise ConfigError(f"{path} must hold the name or number of a class, got {name[:40]!r}.")
  return name


def _described(
  clips: list[Clip], files: Mapping[str, Path], captions: Mapping[str, str]
) -> list[Clip]:
  """Returns clips with their captions, of the table or beside them, and ready embeddings."""
  found = []
  for clip in clips:
    caption = captions.get(clip.key, "")
    beside = files.get(_beside(clip.key, ".txt"))
    if not caption and beside is not None:
      caption = read(beside).decode(errors="replace").strip()
    embedding = files.get(_beside(clip.key, EMBEDDING))
    found.append(dataclasses.replace(clip, caption=caption, embedding=embedding))
  return found


def _table(files: Mapping[str, Path], keys: list[str]) -> dict[str, str]:
  """Returns the captions of captions.csv by the clips' keys; none if it is not there.

  Raises:
    ConfigError: it is no such table, names a clip twice, or none that is there.
  """
  if _CAPTIONS not in files:
    return {}
  where = f"{_CAPTIONS} in data.root"
  try:
    rows = csv.DictReader(io.StringIO(read(files[_CAPTIONS]).decode("utf-8-sig"), newline=""))
    columns = rows.fieldnames or []
    pairs = [tuple((row.get(name) or "").strip() for name in _COLUMNS) for row in rows]
  except (UnicodeDecodeError, csv.Error) as error:
    raise ConfigError(f"{where} cannot be read as a table in UTF-8 ({error}).") from error
  if not {*_COLUMNS} <= {*columns}:
    raise ConfigError(
      f"{where} has the columns {', '.join(columns) or 'of an empty file'}; its first line must "
      f"name {' and '.join(_COLUMNS)}."
    )
  (name, count), *_ = collections.Counter(file for file, _ in pairs).most_common(1) or [("", 0)]
  if count > 1:
    raise ConfigError(f"{where} has {count} rows of {name!r}: leave it one.")
  if not {name for name, _ in pairs} & {*keys}:
    raise ConfigError(
      f"{where} names no clip: its column {_COLUMNS[0]!r} must hold paths in data.root such as "
      f"{keys[0]!r}" + (f", it has {name!r}." if pairs else ".")
    )
  return dict(pairs)


# ---- what was taken for the data set -------------------------------------------------------------


def survey(config: DataConfig) -> tuple[Listing, Listing]:
  """Lists both splits and logs what was taken for the data set, and what looks wrong with it.

  Raises:
    ConfigError: as of `list_clips`, of either split.
  """
  train, val = (list_clips(config, split) for split in ("train", "val"))
  logging.info("%s", describe(train, val))
  for sentence in doubts(config, train, val):
    logging.warning("%s", sentence)
  return train, val


def describe(train: Listing, val: Listing) -> str:
  """Returns a line: clips by split and class, and files that were passed over."""
  parts = []
  for split, listing in (("train", train), ("val", val)):
    counts = collections.Counter(listing.class_names[clip.label] for clip in listing.clips)
    each = f"{len(counts)} classes ({_counts(counts)})" if len(counts) > 1 else "1 class"
    parts.append(f"{split}: {len(listing.clips)} clips of {each}")
  if train.others:
    parts.append(f"passed over: {_counts(train.others)}")
  return "; ".join(parts)


def doubts(config: DataConfig, train: Listing, val: Listing) -> list[str]:
  """Returns sentences about what is probably not meant."""
  found = []
  names = train.class_names
  trained = {clip.label for clip in train.clips}
  unseen = [name for label, name in enumerate(names) if label not in trained]
  if unseen:
    found.append(
      f"no training clip of {_some(unseen)}: eval.py leaves such classes out unless they are named"
    )
  if (
    config.condition == "class"
    and len(names) == 1
    and all(clip.key.count("/") > 1 for clip in train.clips)
  ):
    inner = {clip.key.split("/")[1] for clip in train.clips}
    if len(inner) > 1:
      found.append(
        f"all clips are of one class, {names[0]}, in subfolders {_some(sorted(inner))}: if those "
        f"are the classes, set data.root to {str(pathlib.Path(config.root) / names[0])!r}"
      )
  if config.source == "folder":
    stems = [pathlib.Path(clip.key).stem for clip in train.clips]
    if all(_UCF101.match(stem) for stem in stems):
      found.append(
        "these are clips of UCF-101, several of each scene: its own lists keep a scene in one "
        "split (data.source='ucf101'), a folder does not"
      )
  if len(train.clips) > 1:
    found += _shared(train, val)
  return found


def _shared(train: Listing, val: Listing) -> list[str]:
  """Returns a sentence about files of both splits that have the same contents."""
  sizes = collections.defaultdict(list)
  for clip in train.clips:
    sizes[_size(clip)].append(clip)
  pairs = []
  for clip in val.clips:
    alike = [other for other in sizes.get(_size(clip), ()) if _size(clip)]
    same = [other for other in alike if fingerprint(other.path) == fingerprint(clip.path)]
    pairs += [f"{clip.key} = {same[0].key}"] if same else []
  if not pairs:
    return []
  return [f"{len(pairs)} clips of val are in train, too ({_some(pairs)}): the loss is too good"]


def _size(clip: Clip) -> int:
  """Returns bytes, 0 of a file that is not there: encoding will name it."""
  try:
    return stat(clip.path)[0]
  except OSError:
    return 0


def _some(names: list[str]) -> str:
  """Returns the first names, and how many more there are."""
  more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
  return ", ".join(map(printable, names[:_NAMED])) + more


def _counts(counts: Mapping[str, int]) -> str:
  """Returns "cat 5, dog 3 and 2 more", the greatest first."""
  return _some([f"{name} {n}" for name, n in collections.Counter(counts).most_common()])


def printable(name: str) -> str:
  """Returns a file name that can be printed, as some are no UTF-8."""
  return name.encode(errors="backslashreplace").decode()
