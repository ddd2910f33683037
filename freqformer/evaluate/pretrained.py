"""Pretrained video models from a folder as it was downloaded, under any attention method.

  pipe = freqformer.load_pretrained("Wan2.1-T2V-1.3B-Diffusers")
  videos = pipe(["a cat on a table"], method="adaspa", frames=81, size=(480, 832))

A folder has what diffusers' repositories have: transformer, vae, text_encoder, tokenizer,
scheduler. Nothing is downloaded, and no torch is used.
"""

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from tqdm import tqdm

from freqformer.config import ConfigError, did_you_mean, refusing
from freqformer.diffusion.sampling import SampleConfig
from freqformer.evaluate.draw import draw
from freqformer.evaluate.learned import Learned, weights_hash
from freqformer.evaluate.memory import check_weights_fit
from freqformer.model.config import DTYPES, AttentionConfig
from freqformer.model.leaves import flatten, leaf_name
from freqformer.model.wan import WanConfig, WanDiT, is_narrow, load_params
from freqformer.simulation.descriptions import load_model
from freqformer.train.distil import (
  DistilConfig,
  Keeper,
  beside_dense,
  check_learns,
  distil,
  own_leaves,
)
from freqformer.wan import levels, prompts, text_encoder, vae
from freqformer.wan.files import open_tensors, part, read_config
from freqformer.wan.json_file import read_object
from freqformer.wan.prompts import PromptEmbeddings

_KNOWN = ("WanTransformer3DModel",)
# A model's transformers: the only one or that for high noise, and that for low noise.
_HIGH = "transformer"
_LOW = "transformer for low noise"
_RANDOM = "random:"
_SHIFT = 3.0  # of Wan 2.1 at 480p, as diffusers' files have it
_BLOCK = 128  # rows of a tile: what the kernels are made for
_GUIDANCE = 5.0  # as diffusers' pipeline has it
_STEPS = 50
# What the published models were made for, by the channels of their latents.
_USUAL = {16: (81, (480, 832), 16.0), 48: (121, (704, 1280), 24.0)}
# Keys of the transformer's config.json that say what is computed, and the only values that are.
_COMPUTED = {
  "qk_norm": "rms_norm_across_heads",
  "cross_attn_norm": True,
  "image_dim": None,
  "added_kv_proj_dim": None,
  "pos_embed_seq_len": None,
}


@dataclasses.dataclass(frozen=True)
class LowNoise:
  """The second transformer of a model that has one for high and one for low noise (Wan 2.2 A14B).

  Attributes:
    boundary: it runs below this t, as the model is told it.
    params: its parameters.
    guidance: scale; None: as for high noise.
  """

  boundary: float
  params: Any
  guidance: float | None = None


@dataclasses.dataclass(frozen=True)
class PretrainedRun:
  """A model under one method at one size: what `draw` and `compare` sample.

  Attributes:
    model: the abstract `WanDiT`, for its config, tables and schedule.
    params: its parameters; models of other methods share their arrays.
    latent_shape: (t, y, x, c).
    decode: latents `[b, t, y, x, c]` to videos, uint8 `[b, frames, rows, cols, 3]`.
    low: of a model with two transformers that for low noise.
  """

  model: WanDiT
  params: Any
  latent_shape: tuple[int, int, int, int]
  decode: Callable[[np.ndarray], np.ndarray]
  low: LowNoise | None = None


class Pretrained:
  """A downloaded model. Weights are read when they are first needed.

  Attributes:
    folder: as downloaded.
    dtype: of matrices and activations, a name in `DTYPES`.
    block: rows of a tile.
    vae: its autoencoder, not read yet.
    frames: of a video, where nothing else is asked for.
    size: (rows, cols) in pixels, likewise.
    fps: frames a second.
    schedule: the noise levels.
  """

  def __init__(
    self,
    folder: str | pathlib.Path,
    *,
    dtype: str | None = None,
    block: int = _BLOCK,
    cache: str | pathlib.Path | None = None,
  ):
    """Reads the configs of a folder, and the headers of its weights.

    Args:
      folder: as downloaded.
      dtype: of matrices and activations, "bfloat16" or "float32"; None: bfloat16 on a GPU.
      block: rows of a tile.
      cache: folder of prompts' embeddings; None: one in the user's cache.

    Raises:
      ConfigError: a part is missing, damaged, or of a model that is not known.
    """
    self.folder = pathlib.Path(folder)
    self.dtype = _dtype(dtype)
    self.block = block
    self._cache = pathlib.Path(cache) if cache else _user_cache()
    own = part(self.folder, "transformer")
    self._sizes = _sizes(read_config(own), own)
    self._tensors = {_HIGH: open_tensors(own)}
    self._boundary = None
    second = self.folder / "transformer_2"
    if second.is_dir():
      self._boundary = _boundary(self.folder)
      if _sizes(read_config(second), second) != self._sizes:
        raise ConfigError(f"{own} and {second} are of other sizes; download both again.")
      self._tensors[_LOW] = open_tensors(second)
    self.vae = vae.open_vae(self.folder)
    self._factor = self.vae.structure.factor
    channels = self._sizes.pop("channels")
    if self.vae.structure.channels != channels:
      raise ConfigError(
        f"{self.folder}: the transformer takes latents of {channels} channels, the VAE makes "
        f"{self.vae.structure.channels}; download both from one repository."
      )
    self._channels = channels
    self._base = {}
    self.schedule = levels.read_schedule(self.folder / "scheduler" / "scheduler_config.json")
    self.frames, self.size, self.fps = _USUAL.get(channels, _USUAL[16])

  def config(
    self, method: str = "dense", schedule: str | None = None, block: int | None = None
  ) -> WanConfig:
    """Returns the model's config under a method, and with an `attention.schedule`.

    Args:
      method: attention method.
      schedule: dense evaluations and layers; None: none.
      block: rows of a tile; None: those of this object.

    Raises:
      ConfigError: the method is unknown, or a field of it.
    """
    attention = AttentionConfig(methods=(), method="dense", block=block or self.block)
    config = WanConfig(attention=attention, dtype=self.dtype, **self._sizes)
    config = config.with_method(method)
    return config if schedule is None else config.with_schedule(schedule)

  def latent_shape(self, frames: int, size: Sequence[int]) -> tuple[int, int, int, int]:
    """Returns (t, y, x, c) of a video's latents.

    Raises:
      ConfigError: there are no such videos; names the nearest.
    """
    factor = self._factor
    patch = WanConfig.patch
    tokens = tuple(f * p for f, p in zip(factor, patch, strict=True))
    vae.check_video((frames, *size), tokens)
    cells = (side // f for side, f in zip(size, factor[1:], strict=True))
    return ((frames - 1) // factor[0] + 1, *cells, self._channels)

  def embed(self, texts: Sequence[str], negative: str | None = "") -> PromptEmbeddings:
    """Returns embeddings of prompts, from the cache or by the text encoder, which is freed then."""
    own = self.folder / "text_encoder"
    config = text_encoder.read_config(own / "config.json")
    tokenizer = self.folder / "tokenizer" / "tokenizer.json"
    tensors = open_tensors(own)
    dtype = DTYPES[self.dtype]
    identity = prompts.weights_identity(
      [own / "config.json", tokenizer], {tensors.file_of(name) for name in tensors}, dtype
    )

    def load():
      needed = jnp.dtype(dtype).itemsize * sum(map(math.prod, tensors.shapes.values()))
      instead = "ready embeddings, --prompts=FILE.npz"
      check_weights_fit(f"the text encoder of {self.folder}", needed, instead)
      logging.info("loading the text encoder ...")
      return text_encoder.stacked(config, tensors, dtype)

    encoder = prompts.TextEncoder(config, tokenizer, load)
    cache = prompts.EmbeddingCache(self._cache, identity, config.d_model)
    return prompts.embed_prompts(texts, negative, encoder, cache)

  def at(
    self,
    method: str | None = None,
    frames: int | None = None,
    size: Sequence[int] | None = None,
    schedule: str | None = None,
    guidance_low: float | None = None,
    block: int | None = None,
    learned: Learned | str | pathlib.Path | None = None,
  ) -> PretrainedRun:
    """Returns the model under a method at a size; its weights are there once for all methods.

    Args:
      method: None: that of `learned`, or dense attention.
      frames: 4 k + 1; None: as usual for the model.
      size: (rows, cols) in pixels, likewise.
      schedule: as of `config`.
      guidance_low: scale at low noise, of a model with two transformers; None: as at high noise.
      block: as of `config`.
      learned: leaves of the method that were learned on this model, or their file; None: a method's
        own leaves are as they begin.

    Raises:
      ConfigError: there are no such videos, a method cannot serve them, weights do not fit, or what
        was learned is of another method or model.
    """
    learned = self.opened(learned)
    if method is None:
      method = "dense" if learned is None else learned.method
    elif learned is not None and not self.is_of(learned, method):
      raise ConfigError(
        f"{learned.origin} was learned for {learned.method}, not for {method}; leave the method "
        "out, or name the same."
      )
    if guidance_low is not None and self._boundary is None:
      raise ConfigError(
        f"guidance_low={guidance_low} is for models with two transformers, {self.folder} has one."
      )
    config = self.config(method, schedule, block)
    return self._run(method, config, frames, size, learned, guidance_low)

  def beside_dense(
    self,
    method: str,
    frames: int | None = None,
    size: Sequence[int] | None = None,
    learned: Learned | None = None,
  ) -> PretrainedRun:
    """Returns the dense model with a method beside it, which is compared with it in every layer.

    What it samples is dense attention's; its aux has `error` (`methods.distilled`). Arguments and
    errors as of `at`.
    """
    return self._run(method, beside_dense(self.config(method)), frames, size, learned)

  def learnable(self, method: str, latent_shape) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a method's own leaves by name, those of all layers.

    Raises:
      ConfigError: there are none, or the method cannot train on latents of this shape.
    """
    config = self.config(method)
    check_learns(config, latent_shape)
    return own_leaves(nnx.state(_abstract(config, latent_shape)))

  def _run(
    self, method: str, config: WanConfig, frames, size, learned, guidance_low=None
  ) -> PretrainedRun:
    shape = self.latent_shape(frames or self.frames, size or self.size)
    create, model = self._without_weights(method, config, shape)
    low = None
    if self._boundary is not None:
      low = LowNoise(self._boundary, self._params(model, create, learned, _LOW), guidance_low)
    return PretrainedRun(model, self._params(model, create, learned), shape, self.decode, low)

  @property
  def weight_bytes(self) -> int:
    """Bytes of one transformer's weights as they lie on a device."""
    leaves = flatten(nnx.state(_abstract(self.config(), self._any_shape)))
    return sum(x.size * (self._itemsize if is_narrow(k) else 4) for k, x in leaves.items())

  @property
  def _any_shape(self) -> tuple[int, int, int, int]:
    """Shape of short latents: no weight depends on it."""
    return self.latent_shape(1 + self._factor[0], self.size)

  @property
  def _itemsize(self) -> int:
    return jnp.dtype(DTYPES[self.dtype]).itemsize

  def check_memory(self) -> None:
    """Raises ConfigError if the device has no room for the transformers that are not there yet."""
    parts = [_HIGH] if self._boundary is None else [_HIGH, _LOW]
    missing = [which for which in parts if which not in self._base]
    needed = len(missing) * self.weight_bytes
    instead = "a smaller model" if self._itemsize == 2 else 'dtype="bfloat16"'
    check_weights_fit(f"the transformer of {self.folder}", needed, instead)

  def check(self, method: str, latent_shape, evaluations: int, schedule: str | None = None) -> None:
    """Raises ConfigError if a method cannot sample latents of a shape so; loads nothing."""
    config = self.config(method, schedule)
    config.phases(evaluations)
    _, model = self._without_weights(method, config, latent_shape)
    with refusing(f"method {method}"):
      model.tables(latent_shape)

  @staticmethod
  def _without_weights(method: str, config: WanConfig, latent_shape):
    """Returns the function that makes a model of random numbers, and the abstract model."""
    with refusing(f"method {method}"):
      config.layout(latent_shape)
    return functools.partial(WanDiT, config, latent_shape), _abstract(config, latent_shape)

  def _check_one(self):
    """Refuses a model with two transformers where routers and gates are learned, or were."""
    if self._boundary is not None:
      raise ConfigError(
        f"{self.folder} has two transformers; routers and gates are learned on models with one."
      )

  @functools.cached_property
  def identity(self) -> str:
    """Hash of the transformer's weights, of `learned.weights_hash`."""
    return weights_hash(self._tensors[_HIGH])

  def opened(self, learned: Learned | str | pathlib.Path | None) -> Learned | None:
    """Returns learned leaves, read from their file if need be; None stays None.

    Raises:
      ConfigError: the file cannot be used, or they were learned on other weights.
    """
    if learned is None:
      return None
    self._check_one()
    if not isinstance(learned, Learned):
      learned = Learned.read(learned)
    learned.check_base(self.identity, self.folder)
    return learned

  def is_of(self, learned: Learned, method: str) -> bool:
    """Tells whether leaves were learned for a method, all of whose fields count.

    Raises:
      ConfigError: one of the two methods is unknown, or a field of it.
    """
    with refusing(learned.origin):
      own = self.config(learned.method)
    return own == self.config(method)

  def distil(
    self,
    texts: Sequence[str] | str | PromptEmbeddings,
    method: str,
    *,
    negative: str = "",
    frames: int | None = None,
    size: Sequence[int] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    shift: float | None = None,
    config: DistilConfig | None = None,
    seed: int = 0,
    progress: bool = True,
    keeper: Keeper | None = None,
  ) -> Learned:
    """Learns a method's own leaves from the dense model's trajectories for prompts.

    Args:
      texts: prompts, one, or the embeddings of some.
      method: with a router, gates or other parameters of its own, e.g. "freqformer".
      negative: what guidance leads away from; embeddings bring their own.
      frames: 4 k + 1; None: as usual for the model, as for the next four.
      size: (rows, cols) in pixels.
      steps: of UniPC; each is a step of the optimizer.
      guidance: scale, as the method shall sample; 1 is the conditional model alone, at half the
        cost.
      shift: of the noise levels.
      config: of the learning; None: the defaults.
      seed: of the noise.
      progress: show a progress bar.
      keeper: as of `train.distil.distil`.

    Raises:
      ConfigError: a number is out of its bounds, or the method cannot serve the size or has no
        parameters.
      Stopped: the keeper was asked to stop.
    """
    self._check_one()
    sample = self.sampling(steps, guidance, shift)
    config = config or DistilConfig()
    # Refused before texts are encoded and weights are loaded.
    shape = self.latent_shape(frames or self.frames, size or self.size)
    student = self.config(method)
    student.phases(len(sample.guided()))
    check_learns(student, shape)
    if not isinstance(texts, PromptEmbeddings):
      texts = [texts] if isinstance(texts, str) else list(texts)
      texts = self.embed(texts, negative if any(sample.guided()) else None)
    run = self.beside_dense(method, frames, size)
    found = distil(
      run.model,
      run.params,
      texts.embeddings,
      shape,
      sample,
      config,
      seed,
      null=texts.negative,
      progress=progress,
      keeper=keeper,
    )
    facts = {
      "prompts": len(texts.texts),
      "latent_shape": shape,
      "block": self.block,
      "dtype": self.dtype,
      "sampling": dataclasses.asdict(sample),
      "learning": dataclasses.asdict(config),
      "steps": found.steps,
      "first_error": [round(float(x), 5) for x in found.errors[0]],
      "last_error": [round(float(x), 5) for x in found.errors[-1]],
    }
    return Learned(method, self.identity, found.leaves, facts)

  def _loaded(self, which: str) -> dict[str, jax.Array]:
    """Returns the pretrained arrays of a transformer by leaf, on the device."""
    if which not in self._base:
      self.check_memory()
      logging.info("loading the %s ...", which)
      model = _abstract(self.config(), self._any_shape)
      params, _ = load_params(model, self._tensors[which], DTYPES[self.dtype])
      self._base[which] = flatten(params)
    return self._base[which]

  def _params(self, model, create, learned: Learned | None = None, which: str = _HIGH):
    """Returns a model's parameters: pretrained ones, and a method's own, learned or fresh."""
    base = self._loaded(which)
    paths = flatten(nnx.state(model))
    lacking = sorted(paths.keys() - base.keys())
    fresh = {}
    if learned is not None:
      learned.check_leaves({name: paths[name].shape for name in lacking})
      fresh = {name: jnp.asarray(array) for name, array in learned.arrays.items()}
    elif lacking:
      logging.info("%d arrays are the method's own, untrained: %s ...", len(lacking), lacking[0])

      @jax.jit
      def start():  # all others are left out of the program
        state = flatten(nnx.state(create(nnx.Rngs(0))))
        return {name: state[name] for name in lacking}

      fresh = start()
    known = base | fresh
    return jax.tree_util.tree_map_with_path(
      lambda path, _: known[leaf_name(path)], nnx.state(model)
    )

  @functools.cached_property
  def _decoder(self):
    params = {name: jnp.asarray(x, jnp.float32) for name, x in self.vae.tensors.items()}
    return jax.jit(functools.partial(vae.decode, mean=self.vae.mean, std=self.vae.std)), params

  def decode(self, latents: np.ndarray, progress: bool = True) -> np.ndarray:
    """Returns videos of latents, uint8 `[b, frames, rows, cols, 3]`, one after the other."""
    run, params = self._decoder
    found = []
    for latent in tqdm(latents, desc="decoding", unit="video", disable=not progress):
      video = np.asarray(run(params, jnp.asarray(latent)[None]))[0]
      found.append(np.rint(127.5 * (video + 1)).astype(np.uint8))
    return np.stack(found)

  def sampling(
    self,
    steps: int | None = None,
    guidance: float | None = None,
    shift: float | None = None,
    batch_size: int = 1,
  ) -> SampleConfig:
    """Returns how videos are sampled; None takes what is usual for the model."""
    with refusing("sampling"):
      return SampleConfig(
        steps=_STEPS if steps is None else steps,
        guidance=_GUIDANCE if guidance is None else guidance,
        shift=self.schedule.shift if shift is None else shift,
        batch_size=batch_size,
        sampler="unipc",
        levels="wan",
      )

  def __call__(
    self,
    texts: Sequence[str] | str,
    *,
    method: str | None = None,
    learned: Learned | str | pathlib.Path | None = None,
    negative: str = "",
    frames: int | None = None,
    size: Sequence[int] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    guidance_low: float | None = None,
    shift: float | None = None,
    seed: int = 0,
    progress: bool = True,
  ) -> np.ndarray:
    """Samples a video for each prompt.

    Args:
      texts: prompts, or one.
      method: attention method, e.g. "adaspa(sparsity=0.8)"; None: that of `learned`, or dense.
      learned: as of `at`.
      negative: what guidance leads away from.
      frames: 4 k + 1; None: as usual for the model, as for the next four.
      size: (rows, cols) in pixels.
      steps: of UniPC.
      guidance: scale; 1 is none.
      guidance_low: as of `at`.
      shift: of the noise levels.
      seed: of the noise; a prompt's noise depends on its place, too.
      progress: show a progress bar.

    Returns:
      Videos, uint8 `[prompts, frames, rows, cols, 3]`.

    Raises:
      ConfigError: a number is out of its bounds, a text is too long, or weights do not fit.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    config = self.sampling(steps, guidance, shift)
    found = self.embed(texts, negative)
    run = self.at(method, frames, size, guidance_low=guidance_low, learned=learned)
    places = np.arange(len(texts))
    drawn = draw(
      run, found.embeddings, places, seed, config, null=found.negative, progress=progress
    )
    return self.decode(drawn.latents, progress)


class RandomWeights(Pretrained):
  """A model of a published size with random weights: it has speed and memory, and no pictures."""

  def __init__(self, name: str, *, dtype: str | None = None, block: int = _BLOCK):
    """Takes the sizes of a model that the simulator knows.

    Args:
      name: "wan2.1-1.3b" or another of `freqformer/simulation/models` with a text to attend to.
      dtype: as of `Pretrained`.
      block: rows of a tile.

    Raises:
      ConfigError: there is no such model, or it is not built as Wan is.
    """
    card = load_model(name)
    if card.text_mode != "cross" or card.patch != WanConfig.patch:
      raise ConfigError(f"random:{name} is not built as Wan is; name wan2.1-1.3b or wan2.1-14b.")
    self.folder = pathlib.Path(f"random:{name}")
    self.dtype = _dtype(dtype)
    self.block = block
    self._sizes = dict(width=card.width, heads=card.heads, depth=card.layers, mlp=card.mlp)
    self._channels = card.patch_channels // math.prod(card.patch)
    self._factor = card.compression
    self._boundary = None
    self._base = {}
    self.schedule = levels.LevelSchedule(_SHIFT)
    self.frames, self.size, self.fps = _USUAL.get(self._channels, _USUAL[16])

  def embed(self, texts: Sequence[str], negative: str | None = "") -> prompts.PromptEmbeddings:
    """Returns noise in the place of embeddings."""
    config = self.config()
    shape = (len(texts) + 1, config.text_length, config.text_width)
    rows = np.random.default_rng(0).standard_normal(shape, np.float32)
    return prompts.PromptEmbeddings(tuple(texts), rows[1:], rows[0])

  def _check_one(self):
    raise ConfigError(f"{self.folder} has random weights, on which nothing can be learned.")

  def decode(self, latents: np.ndarray, progress: bool = True) -> np.ndarray:
    """Refuses: there is nothing to be seen."""
    raise ConfigError(f"{self.folder} has random weights, and no videos.")

  def _loaded(self, which: str) -> dict[str, jax.Array]:
    if which not in self._base:
      self.check_memory()
      config = self.config()
      shape = self._any_shape

      @jax.jit
      def make():
        state = flatten(nnx.state(WanDiT(config, shape, nnx.Rngs(0))))
        narrow = DTYPES[self.dtype]
        return {k: x.astype(narrow) if is_narrow(k) else x for k, x in state.items()}

      self._base[which] = make()
    return self._base[which]


def load_pretrained(folder: str | pathlib.Path, **options) -> Pretrained:
  """Opens a downloaded model, or one of random weights, "random:wan2.1-1.3b".

  Arguments and errors as of `Pretrained` and `RandomWeights`.
  """
  if str(folder).startswith(_RANDOM):
    return RandomWeights(str(folder).removeprefix(_RANDOM), **options)
  return Pretrained(folder, **options)


def _abstract(config: WanConfig, latent_shape) -> WanDiT:
  """Returns a model without arrays."""
  return nnx.eval_shape(lambda: WanDiT(config, latent_shape, nnx.Rngs(0)))


def _sizes(values: dict, folder: pathlib.Path) -> dict:
  """Returns fields of `WanConfig`, and the latents' channels, from the transformer's config.json.

  Raises:
    ConfigError: it is of another model, or computes something else.
  """
  kind = values.get("_class_name")
  if kind not in _KNOWN:
    raise ConfigError(
      f"{folder / 'config.json'} is of a {kind}, which is not known; known are "
      f"{', '.join(_KNOWN)} (Wan 2.1 and 2.2, text to video)."
    )
  others = [
    f"{key}={values[key]!r}"
    for key, supported in _COMPUTED.items()
    if values.get(key, supported) != supported
  ]
  if values.get("in_channels") != values.get("out_channels"):
    others.append(f"in_channels={values.get('in_channels')} unlike out_channels")
  if tuple(values.get("patch_size", WanConfig.patch)) != WanConfig.patch:
    others.append(f"patch_size={values['patch_size']}")
  if others:
    raise ConfigError(
      f"{folder / 'config.json'} has {', '.join(others)}: image-to-video and other variants are "
      "not supported; name a folder of a text-to-video model, e.g. Wan2.1-T2V-1.3B-Diffusers."
    )
  try:
    heads = int(values["num_attention_heads"])
    return {
      "width": heads * int(values["attention_head_dim"]),
      "heads": heads,
      "depth": int(values["num_layers"]),
      "mlp": int(values["ffn_dim"]),
      "text_width": int(values["text_dim"]),
      "frequencies": int(values["freq_dim"]),
      "channels": int(values["in_channels"]),
    }
  except (KeyError, TypeError, ValueError) as error:
    raise ConfigError(
      f"{folder / 'config.json'} lacks a size, or it is no number ({error}); download it again."
    ) from error


def _boundary(folder: pathlib.Path) -> float:
  """Returns the t from which on the first of two transformers runs, by model_index.json.

  Raises:
    ConfigError: the file does not tell.
  """
  path = folder / "model_index.json"
  try:
    return float(read_object(path)["boundary_ratio"])
  except (KeyError, TypeError, ValueError) as error:
    raise ConfigError(
      f"{path} has no number boundary_ratio, which divides the work of the two transformers in "
      f"{folder}; download it again."
    ) from error


def _dtype(given: str | None) -> str:
  """Returns a name in `DTYPES`; None is as usual for the device."""
  if given is None:
    return "bfloat16" if jax.default_backend() == "gpu" else "float32"
  if given not in DTYPES:
    raise ConfigError(f"dtype={given!r} is unknown; {did_you_mean(given, DTYPES)}")
  return given


def _user_cache() -> pathlib.Path:
  caches = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
  return caches / "freqformer" / "prompts"
