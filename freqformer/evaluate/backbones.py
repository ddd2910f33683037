"""Networks whose features videos are compared by, each with its own name in the metric's.

`motionnet` is ours and committed. `i3d` is the file that FVD is usually computed with: nothing is
downloaded, the user brings it. Features of any other network can be brought as arrays, see
`python -m freqformer.evaluate --help`.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable

import numpy as np

from freqformer.config import ConfigError, did_you_mean
from freqformer.evaluate import motion_net

I3D_FILE = "i3d_torchscript.pt"
# As StyleGAN-V calls it (src/metrics/frechet_video_distance.py): frames from 0 to 255, rescaled and
# resized to 224 x 224 inside, and the 400 logits of Kinetics before the softmax.
_I3D_CALL = dict(rescale=True, resize=True, return_features=True)
_I3D_LEAST_FRAMES = 10  # below, its last pooling has nothing to pool


@dataclasses.dataclass(frozen=True)
class Backbone:
  """A network by name.

  Attributes:
    name: ends a metric's name, as in fvd_i3d.
    features: videos uint8 `[b, t, y, x, 3]` -> `[b, f]`.
    hash: beginning of the sha256 of its weights.
    input: what it makes of a video, for people.
  """

  name: str
  features: Callable[[np.ndarray], np.ndarray]
  hash: str
  input: str


def backbone(name: str, weights: str | None = None) -> Backbone:
  """Returns a backbone by name.

  Args:
    name: "motionnet" or "i3d".
    weights: file of the weights; "motionnet" has its own.

  Raises:
    ConfigError: the name is unknown, or the weights are not there or cannot be used.
  """
  if name not in ("motionnet", "i3d"):
    raise ConfigError(
      f"--backbone={name!r} is unknown; {did_you_mean(name, ('motionnet', 'i3d'))} Features of "
      "another network can be given: --features=samples.npy,real.npy."
    )
  if name == "i3d":
    return _i3d(weights)
  if weights:
    raise ConfigError("--weights goes with --backbone=i3d; motionnet has its own, in the package.")
  return Backbone(
    motion_net.NAME,
    lambda videos: motion_net.features([videos]),
    motion_net.weights_hash(),
    f"luma, {motion_net.FRAMES} frames {motion_net.SIDE}x{motion_net.SIDE}, less mean, over "
    "deviation",
  )


def _i3d(weights: str | None) -> Backbone:
  """Returns I3D from its TorchScript file."""
  where = (
    f"{I3D_FILE}, Kinetics-400, the file named in src/metrics/frechet_video_distance.py of "
    "github.com/universome/stylegan-v; nothing is downloaded"
  )
  path = pathlib.Path(weights or I3D_FILE)
  if not path.is_file():
    raise ConfigError(f"no I3D weights at {path}: bring {where}, and give --weights=FILE.")
  try:
    import torch  # an extra of the user's: nothing else of ours needs it
  except ModuleNotFoundError as error:
    raise ConfigError(
      "--backbone=i3d runs a TorchScript file and needs torch, which is not installed; install it, "
      "or compute the features elsewhere and give --features=samples.npy,real.npy."
    ) from error
  data = path.read_bytes()
  try:
    network = torch.jit.load(str(path)).eval()
  except RuntimeError as error:
    raise ConfigError(f"{path} is no TorchScript file; bring {where}.") from error

  def features(videos):
    if videos.shape[1] < _I3D_LEAST_FRAMES:
      raise ConfigError(f"I3D needs {_I3D_LEAST_FRAMES} frames, the videos have {videos.shape[1]}.")
    with torch.no_grad():
      x = torch.from_numpy(np.ascontiguousarray(videos.transpose(0, 4, 1, 2, 3)))
      return network(x.float(), **_I3D_CALL).numpy()

  return Backbone(
    "i3d", features, hashlib.sha256(data).hexdigest()[:12], "224x224 inside, 400 logits"
  )
