"""Key tiles that devices send each other, so that each attends with its own query tiles.

Tiles are dealt to devices in layout order, equally many to each. What a device's query tiles list
beyond its own tiles comes from the devices that have it, and nothing else does: of a window these
are the neighbours' nearest tiles (a halo). Each device then has a buffer `[own | received]` and a
table over it, which the kernels run as any other.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from freqformer.kernels.block_sparse.table import BlockMask, pad_lists


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TileExchange:
  """A static table of a sample's tiles, dealt to devices.

  Attributes:
    whole: the table of all tiles.
    own: the devices' tables, each over its buffer; stacked, devices in front.
    sends: per shift int32 `[devices, count]`: of its own tiles, those that a device sends to the
      one that is so many places before it. Where it sends fewer, the last ones are of no use.
    shifts: static; places between the sender and the receiver, ascending.
  """

  whole: BlockMask
  own: BlockMask
  sends: tuple[jax.Array | np.ndarray, ...]
  shifts: tuple[int, ...] = dataclasses.field(metadata={"static": True})

  @classmethod
  def of(cls, mask: BlockMask, devices: int) -> "TileExchange":
    """Returns the exchange of a concrete table of equally many query and key tiles.

    Args:
      mask: one for all samples; its lists are NumPy.
      devices: they divide the tiles.
    """
    each = mask.kv_tiles // devices
    needed = _needed(mask, devices)  # [devices, devices, each]
    shifts = tuple(s for s in range(1, devices) if _sent(needed, s).any())
    sends = []
    # Of each device: the places of all tiles in its buffer.
    place = np.zeros((devices, mask.kv_tiles), np.int32)
    lengths = [mask.kv_len.reshape(devices, each)]
    for device in range(devices):
      place[device, device * each : (device + 1) * each] = np.arange(each)
    start = each
    for shift in shifts:
      sent = _sent(needed, shift)
      count = int(sent.sum(-1).max())
      tiles = np.argsort(~sent, axis=-1, stable=True)[:, :count].astype(np.int32)
      for sender in range(devices):
        receiver = (sender - shift) % devices
        place[receiver, sender * each + tiles[sender]] = start + np.arange(count)
      senders = (np.arange(devices) + shift) % devices
      lengths.append(mask.kv_len.reshape(devices, each)[senders[:, None], tiles[senders]])
      sends.append(tiles)
      start += count
    kv_len = np.concatenate(lengths, 1).astype(np.int32)
    tables = [
      _table(mask, device, each, place[device], kv_len[device]) for device in range(devices)
    ]
    own = jax.tree.map(lambda *leaves: np.stack(leaves), *tables)
    whole = dataclasses.replace(mask, transposed=None, launch=None)
    return cls(whole, own, tuple(sends), shifts)

  @property
  def received(self) -> int:
    """Tiles that each device receives."""
    return sum(tiles.shape[-1] for tiles in self.sends)

  def gather(self, x: jax.Array, axis: str) -> jax.Array:
    """Returns a device's buffer of tiles, inside `shard_map`, of its own `[b, rows, h, d]`.

    Args:
      axis: of the mesh, along which the devices lie.
    """
    b, rows, *rest = x.shape
    devices = lax.axis_size(axis)
    block = self.own.block_kv
    tiles = x.reshape(b, rows // block, block, *rest)
    found = [x]
    for shift, own in zip(self.shifts, self.sends, strict=True):
      sent = jnp.take(tiles, own[0], axis=1, mode="clip")
      pairs = [(sender, (sender - shift) % devices) for sender in range(devices)]
      found.append(lax.ppermute(sent, axis, pairs).reshape(b, -1, *rest))
    return jnp.concatenate(found, 1)

  def table(self) -> BlockMask:
    """Returns a device's table, inside `shard_map`."""
    return jax.tree.map(lambda x: x[0], self.own)


def _needed(mask: BlockMask, devices: int) -> np.ndarray:
  """Tells which tiles of each device another one lists: bool `[receiver, sender, own tiles]`."""
  each = mask.kv_tiles // devices
  found = np.zeros((devices, mask.kv_tiles), bool)
  listed = np.arange(mask.max_kv) < mask.kv_counts[..., None]
  rows = mask.q_tiles // devices
  ids = mask.indices()
  for device in range(devices):
    part = np.s_[:, :, device * rows : (device + 1) * rows]
    found[device, ids[part][listed[part]]] = True
  return found.reshape(devices, devices, each)


def _sent(needed: np.ndarray, shift: int) -> np.ndarray:
  """Tells what each device sends to the one `shift` places before it: bool `[devices, tiles]`."""
  senders = np.arange(len(needed))
  return needed[(senders - shift) % len(needed), senders]


def _table(mask: BlockMask, device: int, each: int, place, kv_len) -> BlockMask:
  """Returns a device's own table; `place` is where each of all tiles lies in its buffer."""
  rows = np.s_[:, :, device * each : (device + 1) * each]
  counts = mask.kv_counts[rows]
  ids = place[mask.indices()[rows]]
  behind = np.arange(mask.max_kv) >= counts[..., None]
  ids = np.sort(np.where(behind, len(kv_len), ids), -1)  # the buffer has another order
  ids = np.minimum(ids, len(kv_len) - 1).astype(np.int32)
  found = pad_lists(ids, counts, kv_len, None, mask.block_q, mask.block_kv)
  return found.with_transpose()
