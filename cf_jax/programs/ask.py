"""Asks a policy one question about one video or picture, streams the answer.

The video is scanned, the keyframes are chosen from the scan, decoded at the
policy's resolution and put into the prompt, one or two to a temporal slice;
then the answer comes token by token. A still picture is a video of one frame.
The answer alone goes to standard output. Files of the workdir:
  answer.json     question, answer, keyframes, tokens, seconds, settings
  keyframes.png   the keyframes over the curve of variation scores

Axes: `T` scanned frames, `K` keyframes, `L` temporal slices, `P` visual tokens
of a slice, `S` prompt slots, `C` answer slots, `V` vocabulary.
"""

import codecs
import contextlib
import functools
import json
import math
import os
import pathlib
import sys
import typing
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import rich.console
from jax.sharding import PartitionSpec as P

from cf_jax import descriptor, figures, sampling, selectors, tad
from cf_jax import policy as policy_lib
from cf_jax.data import drawing, frame_size, images, patches, prompts, video
from cf_jax.models import config as model_config
from cf_jax.models import vlm
from cf_jax.programs import policies
from cf_jax.runtime import lifecycle, sharding, telemetry
from cf_jax.types import Prompt

ANSWER_FILE = "answer.json"
PICTURE_FILE = "keyframes.png"

# What a None of configs/ask.py stands for, where no run says otherwise.
_NUM_KEYFRAMES = 8
_MIN_VISUAL, _MAX_VISUAL = 4, 256  # visual tokens of a frame
_RESIZE = "bicubic"
_PROMPT = dict(frames_per_slice=1, number_frames=False)
_BUILD = dict(
  show_time=True,
  time_format=prompts.TIME_FORMAT,
  question_template="{question}{options}",
)

# Both caches are split by heads; the rest is small.
_DECODING_RULES = (
  (r"prefix_cache/(key|value)/", P(None, "tensor")),  # [B, M, S, H]
  (r"cache/(key|value)/", P(None, None, "tensor")),  # [B, G, M, C, H]
  (r"", P()),
)


class Seen(NamedTuple):
  """What was chosen of a video.

  Attributes:
    frames: uint8[K, height, width, 3] RGB, as the policy sees them.
    number: int64[K] numbers of the decoded frames.
    time_s: float64[K] seconds.
    score: float[T] curve of variation scores, real frames only.
    apex: bool[T] its inflections.
    scan_s: float64[T] times of the scanned frames in seconds.
  """

  frames: np.ndarray
  number: np.ndarray
  time_s: np.ndarray
  score: np.ndarray
  apex: np.ndarray
  scan_s: np.ndarray


class Steps(NamedTuple):
  """The compiled programs.

  Attributes:
    encode: params, float[1, L, 4P, patch] -> float[1, L * P, D].
    start: as `sampling.start`.
    advance: as `sampling.advance`; its state is donated.
  """

  encode: Callable
  start: Callable
  advance: Callable


# ------------------------------------------------------------------- settings


def check_settings(config: ml_collections.ConfigDict) -> None:
  """What can be told before anything is opened.

  Raises:
    ValueError: a setting is missing or out of range.
  """
  for name, what in (
    ("checkpoint", "a Qwen2.5-VL directory or a run's workdir"),
    ("video", "a video file"),
    ("question", "what you want to know"),
  ):
    if not config[name].strip():
      raise ValueError(
        f"config.{name} is empty; set --config.{name}= to {what}"
      )
  if config.select not in selectors.CHOICES:
    raise ValueError(
      f"select must be one of {selectors.CHOICES}, got {config.select!r};"
      " change config.select"
    )
  for name, value in (
    ("stream_tokens", config.stream_tokens),
    ("prompt.pad_multiple", config.prompt.pad_multiple),
    ("scan.num_frames", config.scan.num_frames),
  ):
    if value < 1:
      raise ValueError(f"config.{name} must be at least 1, got {value}")
  if config.dtype not in (None, *model_config.DTYPES):
    raise ValueError(
      f"dtype must be None or one of {model_config.DTYPES}, got"
      f" {config.dtype!r}; change config.dtype"
    )
  sampling.check_settings(**config.sampling)
  kernels = typing.get_args(frame_size.Resize)
  for name, fits, what in (
    ("scan.size_px", min(config.scan.size_px) > 0, "(height, width)"),
    ("resize", config.resize in (None, *kernels), f"None or one of {kernels}"),
  ):
    if not fits:
      value = functools.reduce(getattr, name.split("."), config)
      raise ValueError(f"config.{name} must be {what}, got {value!r}")


def settle(
  config: ml_collections.ConfigDict, model: model_config.VLMConfig
) -> ml_collections.ConfigDict:
  """Puts a value in the place of every None.

  Of a run, what its policy was shown comes before the program's defaults: the
  number and the area of keyframes, how they are resized, how many share a
  slice, whether they bear numbers, and the prompt's form: the template of
  questions with options, or of those without. How keyframes are found, and
  their aspect ratio, are the program's own.

  Args:
    config: of configs/ask.py.
    model: shape of the policy.

  Raises:
    ValueError: a number of keyframes or of pixels that shows nothing, or of
      frames that no slice holds.
  """
  config = config.copy_and_resolve_references()
  config.unlock()
  trained = {}
  if (pathlib.Path(config.checkpoint) / telemetry.MANIFEST_FILE).is_file():
    trained = telemetry.read_manifest(config.checkpoint)["config"]

  def fill(node, defaults):
    for name, value in defaults.items():
      if node[name] is None and value is not None:
        node[name] = value

  side = model.vision.patch_size * model.vision.spatial_merge_size
  if trained:
    reader = trained["data"]["reader"]
    fill(config, {"num_keyframes": trained["tad"]["num_keyframes"]})
    fill(config, {"resize": reader.get("resize")})
    fill(config.frame, {"max_pixels": math.prod(reader["size_px"])})
    prompt = trained["prompt"]
    fill(config.prompt, {k: prompt.get(k) for k in _PROMPT})
    kind = "multiple_choice" if config.options else "free_form"
    template = prompt.get("templates", {}).get(kind)
    fill(config.prompt.build, {"question_template": template})
    build = prompt["build"]
    fill(config.prompt.build, {k: build.get(k) for k in config.prompt.build})
  elif images.is_image(config.video):  # as Qwen2.5-VL knows pictures
    fill(config.prompt.build, {"show_time": True, "time_format": ""})
  fill(config, {"num_keyframes": _NUM_KEYFRAMES, "resize": _RESIZE})
  fill(config.frame, {"max_pixels": _MAX_VISUAL * side**2})
  least = min(_MIN_VISUAL * side**2, config.frame.max_pixels)
  fill(config.frame, {"min_pixels": least})
  fill(config.prompt, _PROMPT)
  fill(config.prompt.build, _BUILD)

  temporal = model.vision.temporal_patch_size
  if config.prompt.frames_per_slice not in (1, temporal):
    raise ValueError(
      f"frames_per_slice must be 1 or the {temporal} frames that the model's"
      f" temporal patch holds, got {config.prompt.frames_per_slice}; change"
      " config.prompt.frames_per_slice"
    )
  if not 1 <= config.num_keyframes <= config.scan.num_frames:
    raise ValueError(
      f"num_keyframes must be from 1 to the {config.scan.num_frames} scanned"
      f" frames, got {config.num_keyframes}; change config.num_keyframes or"
      " config.scan.num_frames"
    )
  for name in ("max_pixels", "total_pixels"):
    value = config.frame[name]
    if value is not None and value < side**2:
      raise ValueError(
        f"config.frame.{name} is {value}, and one visual token takes"
        f" {side} x {side} = {side**2} pixels; raise it"
      )
  if config.frame.min_pixels > config.frame.max_pixels:
    raise ValueError(
      f"config.frame.min_pixels ({config.frame.min_pixels}) is above"
      f" config.frame.max_pixels ({config.frame.max_pixels}); change one"
    )
  return config


def end_ids(
  tokenizer: prompts.Tokenizer, vocab_size: int, folder: pathlib.Path
) -> tuple[int, ...]:
  """Ids that end an answer.

  Args:
    tokenizer: gives the end of a chat message.
    vocab_size: V of the model.
    folder: may hold a generation_config.json, whose `eos_token_id` adds to it.

  Raises:
    ValueError: that file cannot be used.
  """
  path = folder / "generation_config.json"
  listed = []
  if path.is_file():
    try:
      listed = json.loads(path.read_text("utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
      raise ValueError(f"{path} is not a JSON object: {error}") from error
    if not isinstance(listed, list):
      listed = [] if listed is None else [listed]
    if not all(isinstance(i, int) and 0 <= i < vocab_size for i in listed):
      raise ValueError(
        f"{path}: eos_token_id must be ids below {vocab_size}, got {listed}"
      )
  return tuple(dict.fromkeys([tokenizer.eos_id, *listed]))


# ---------------------------------------------------------------------- video


def look(config: ml_collections.ConfigDict, factor: int) -> Seen:
  """Scans the video or picture and decodes its keyframes.

  Args:
    config: settled.
    factor: pixels a side of a visual token.

  Raises:
    video.VideoError: the file cannot be read.
    ValueError: a setting of the selector is out of range.
  """
  reader, how = video, dict(num_threads=config.scan.num_threads)
  if images.is_image(config.video):
    reader, how = images, {}
  how["limits"] = limits = video.Limits(**config.limits)
  scan = reader.scan_frames(
    config.video, config.scan.num_frames, tuple(config.scan.size_px), **how
  )
  embedding = jax.jit(descriptor.pixel_descriptor)(scan.frames)
  mask = jnp.asarray(scan.mask)
  chosen = selectors.select_videos(
    config.select,
    embedding[None],
    mask[None],
    num_keyframes=config.num_keyframes,
    **(config.tad if config.select == "tad" else {}),
  )
  chosen = jax.tree.map(lambda leaf: leaf[0], chosen)
  score = chosen.variation
  if config.select != "tad":
    score = tad.score_videos(embedding[None], mask[None])[0]
  slot = np.asarray(chosen.index)[np.asarray(chosen.mask)]
  number = scan.frame_index[slot].astype(np.int64)
  info = reader.probe(config.video, limits=limits)
  size_px = frame_size.fit_size(
    info.height,
    info.width,
    num_frames=len(number),
    factor=factor,
    frames_per_slice=config.prompt.frames_per_slice,
    **config.frame,
  )
  frames, time_s = reader.read_frames(
    config.video, number, size_px, resize=config.resize, **how
  )
  if config.prompt.number_frames:
    frames = drawing.draw_numbers(frames, np.arange(len(frames)))
  return Seen(
    frames=frames,
    number=number,
    time_s=time_s,
    score=np.asarray(score)[scan.mask],
    apex=np.asarray(chosen.apex)[scan.mask],
    scan_s=scan.time_s[scan.mask],
  )


def word(
  config: ml_collections.ConfigDict,
  model: model_config.VLMConfig,
  tokenizer: prompts.Tokenizer,
  seen: Seen,
) -> tuple[Prompt, dict[str, int]]:
  """The padded prompt of one row, and what it costs in tokens.

  Raises:
    ValueError: the model has no positions for so many tokens.
  """
  grid = _grid(model, seen)
  merge = model.vision.spatial_merge_size
  row = prompts.build_prompt(
    tokenizer,
    config.question,
    tuple(config.options),
    frame_time_s=seen.time_s[:: config.prompt.frames_per_slice],
    grid=(grid.height // merge, grid.width // merge),
    tokens_per_second=model.vision.tokens_per_second,
    **config.prompt.build,
  )
  count = len(row.token)
  visual = int(np.sum(row.visual >= 0))
  limit, answer = model.max_position_embeddings, config.sampling.max_tokens
  if count + answer > limit:
    raise ValueError(
      f"the prompt has {count} tokens ({visual} of them visual) and the answer"
      f" may have {answer}, but the model was made for {limit}; lower"
      " config.num_keyframes, config.frame.max_pixels or"
      " config.sampling.max_tokens, or ask a shorter question"
    )
  multiple = config.prompt.pad_multiple
  slots = -(-count // multiple) * multiple
  return Prompt(**prompts.pad_prompts([row], slots)), dict(
    visual=visual,
    visual_per_slice=grid.height * grid.width // merge**2,
    text=count - visual,
    prompt=count,
    slots=slots,
  )


def _grid(model: model_config.VLMConfig, seen: Seen) -> patches.Grid:
  return patches.grid_of(
    *seen.frames.shape[1:3],
    patch=model.vision.patch_size,
    merge=model.vision.spatial_merge_size,
  )


# --------------------------------------------------------------------- answer


def memory_bytes(
  model: model_config.VLMConfig, *, slots: int, dtype: str | None
) -> dict[str, int]:
  """What parameters and cache will take, over all devices.

  Args:
    model: shape of the policy.
    slots: of prompt and answer together.
    dtype: of both; None is the model's.
  """
  shapes = jax.eval_shape(lambda: vlm.init(model, jax.random.key(0)))
  count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  return dict(
    parameters=count * jnp.dtype(dtype or model.param_dtype).itemsize,
    cache=vlm.cache_bytes(model, slots, dtype),
  )


def compile_steps(
  model: model_config.VLMConfig,
  params: dict,
  pixel: np.ndarray,
  prompt: Prompt,
  seed: np.ndarray,
  banned: np.ndarray,
  how: dict[str, np.ndarray],
  *,
  grid: tuple[int, int],
  mesh: jax.sharding.Mesh,
  eos_id: tuple[int, ...],
  max_tokens: int,
) -> Steps:
  """Compiles the three programs before the first of them runs.

  Args:
    model: shape of the policy.
    params: its parameters, on the mesh.
    pixel: float32[1, L, 4P, patch].
    prompt: Prompt of one row.
    seed: uint32[1, 2].
    banned: bool[V].
    how: temperature, top_p and top_k; arguments of the programs.
    grid: (height, width) of a frame in patches.
    mesh: where the state lies.
    eos_id: ends an answer.
    max_tokens: C.
  """
  whole = sharding.replicated(mesh)

  def encode(params, pixel):
    token = policy_lib.encode_frames(model, params, pixel, grid=grid)
    return token.reshape(1, -1, token.shape[-1])

  def start(params, prompt, visual, seed, banned, **how):
    return sampling.start(
      model,
      params,
      prompt,
      visual,
      seed,
      banned,
      num_completions=1,
      max_tokens=max_tokens,
      eos_id=eos_id,
      **how,
    )

  def advance(params, decoding, limit, banned, **how):
    return sampling.advance(
      model, params, decoding, limit, banned, eos_id=eos_id, **how
    )

  def located(tree, places):
    return jax.tree.map(
      lambda leaf, place: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=place
      ),
      tree,
      places,
    )

  visual = jax.eval_shape(encode, params, pixel)
  visual = located(visual, whole)
  begun = jax.eval_shape(start, params, prompt, visual, seed, banned, **how)
  places = sharding.tree_shardings(begun, mesh, _DECODING_RULES)
  return Steps(
    encode=jax.jit(encode, out_shardings=whole).lower(params, pixel).compile(),
    start=jax.jit(start, out_shardings=places)
    .lower(params, prompt, visual, seed, banned, **how)
    .compile(),
    advance=jax.jit(advance, donate_argnums=1, out_shardings=places)
    .lower(params, located(begun, places), np.int32(0), banned, **how)
    .compile(),
  )


def stream(
  decoding: sampling.Decoding,
  advance: Callable[[sampling.Decoding, np.int32], sampling.Decoding],
  *,
  every: int,
) -> Iterator[list[int]]:
  """The ids of the first answer, some at a time.

  Args:
    decoding: from `sampling.start`; it is used up.
    advance: state and limit -> state.
    every: ids at a time.

  Yields:
    New ids, the end included.
  """
  shown = 0
  while True:
    count, done, token = jax.device_get(
      (decoding.slot, decoding.done[0, 0], decoding.token[0, 0])
    )
    yield token[shown:count].tolist()
    shown = int(count)
    if done or shown == len(token):
      return
    decoding = advance(decoding, np.int32(shown + every))


class Text:
  """Bytes of ids -> text; an unfinished UTF-8 character waits for its rest."""

  def __init__(self, tokenizer: prompts.Tokenizer):
    self._bytes_of = tokenizer.token_bytes
    self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

  def __call__(self, ids: list[int], *, last: bool = False) -> str:
    """Text that is certain after these ids; with `last`, all of it."""
    return self._decoder.decode(b"".join(map(self._bytes_of, ids)), final=last)


def say(text: str) -> None:
  """Writes to standard output at once."""
  encoding = sys.stdout.encoding or "utf-8"
  try:
    print(text.encode(encoding, "replace").decode(encoding), end="", flush=True)
  except BrokenPipeError:
    # The reader has enough (`| head -c 80`); answer.json will have it all.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ------------------------------------------------------------------------ run


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict:
  """Answers the question of a config.

  Args:
    config: of configs/ask.py.
    workdir: gets answer.json and keyframes.png.

  Returns:
    What answer.json holds.

  Raises:
    ValueError: a setting, the checkpoint or the video is not as it should be,
      or another process uses the workdir.
  """
  check_settings(config)
  if jax.process_index():
    return _run(config, workdir)
  with lifecycle.locked(workdir):
    return _run(config, workdir)


def _run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict:
  """What `run` does while nobody else writes there."""
  console = rich.console.Console(stderr=True, quiet=jax.process_index() > 0)
  timer = telemetry.PhaseTimer()

  @contextlib.contextmanager
  def phase(name, doing):
    with telemetry.waiting(doing, console=console), timer(name):
      yield

  # ---- what will be asked, and what it takes ----
  mesh = sharding.make_mesh(**config.mesh)
  described = policies.describe(config.checkpoint, config.init_from)
  model, tokenizer = described
  config = settle(config, model)
  vision = model.vision
  with phase("video", f"looking through {config.video}"):
    seen = look(config, vision.patch_size * vision.spatial_merge_size)
  prompt, cost = word(config, model, tokenizer, seen)
  memory = memory_bytes(
    model, slots=cost["slots"] + config.sampling.max_tokens, dtype=config.dtype
  )
  telemetry.startup_table(
    config.question, _plan(config, mesh, seen, cost, memory), console=console
  )
  telemetry.closing_table(
    "",
    ("keyframe", "frame", "time (s)"),
    [
      (str(k), number, f"{seconds:.2f}")
      for k, (number, seconds) in enumerate(
        zip(seen.number, seen.time_s, strict=True), start=1
      )
    ],
    console=console,
  )

  # ---- policy ----
  with phase("load", f"loading {config.checkpoint}"):
    policy = policies.load_policy(
      config.checkpoint,
      mesh,
      dtype=config.dtype,
      init_from=config.init_from,
      described=described,
    )
    params = vlm.unstack(policy.params)
  model, tokenizer = policy.model, policy.tokenizer
  eos_id = end_ids(tokenizer, model.vocab_size, policy.folder)
  banned = tokenizer.banned_mask(model.vocab_size)
  banned[list(eos_id)] = False
  seed = jax.device_get(
    sampling.row_seeds(jax.random.key(config.seed), jnp.zeros(1, jnp.int32))
  )
  how = dict(
    temperature=np.float32(config.sampling.temperature),
    top_p=np.float32(config.sampling.top_p),
    top_k=np.int32(config.sampling.top_k),
  )
  pixel = patches.frames_to_patches(
    seen.frames,
    patch=vision.patch_size,
    merge=vision.spatial_merge_size,
    temporal=vision.temporal_patch_size,
    pair=config.prompt.frames_per_slice > 1,
  )[None]
  with phase("compile", "compiling"):
    steps = compile_steps(
      model,
      params,
      pixel,
      prompt,
      seed,
      banned,
      how,
      grid=_grid(model, seen),
      mesh=mesh,
      eos_id=eos_id,
      max_tokens=config.sampling.max_tokens,
    )

  # ---- answer ----
  with phase("vision", f"encoding {len(seen.frames)} frames"):
    visual = jax.block_until_ready(steps.encode(params, pixel))
  with phase("prefill", f"reading {cost['prompt']} tokens"):
    decoding = jax.block_until_ready(
      steps.start(params, prompt, visual, seed, banned, **how)
    )
  text, pieces, new = Text(tokenizer), [], []
  with timer("decode"):
    for ids in stream(
      decoding,
      lambda decoding, limit: steps.advance(
        params, decoding, limit, banned, **how
      ),
      every=config.stream_tokens,
    ):
      new += ids
      pieces.append(text([i for i in ids if i not in eos_id]))
      if not console.quiet:
        say(pieces[-1])
  pieces.append(text([], last=True))
  if not console.quiet:
    say(pieces[-1] + "\n")

  # ---- what is kept and told ----
  seconds = {
    name.removeprefix("time/").removesuffix("_s"): value
    for name, value in timer.collect().items()
  }
  seconds["all"] = seconds.pop("step")
  told = dict(
    question=config.question,
    options=list(config.options),
    answer="".join(pieces),
    ended=new[-1] in eos_id,
    keyframes=[
      dict(frame=number, time_s=round(time_s, 6))
      for number, time_s in zip(
        seen.number.tolist(), seen.time_s.tolist(), strict=True
      )
    ],
    frame_px=list(seen.frames.shape[1:3]),
    tokens=cost | dict(new=len(new)),
    # The first token comes with the prompt.
    tokens_per_s=(len(new) - 1) / seconds["decode"] if len(new) > 1 else None,
    seconds=seconds,
    memory_bytes=memory,
    checkpoint=policy.source,
    settings=config.to_dict(),
  )
  if not console.quiet:
    telemetry.write_json(workdir / ANSWER_FILE, told)
    figures.keyframe_strip(
      workdir / PICTURE_FILE,
      frames=seen.frames,
      frame_s=seen.time_s,
      score=seen.score,
      time_s=seen.scan_s,
      apex=seen.apex,
      label="TAD" if config.select == "tad" else config.select,
    )
  telemetry.startup_table("", _account(told, workdir), console=console)
  return told


def _plan(config, mesh, seen, cost, memory) -> dict[str, str]:
  """What is about to be done, for the first table."""
  height, width = seen.frames.shape[1:3]
  devices = jax.devices()
  return {
    "checkpoint": config.checkpoint,
    "devices": f"{len(devices)} x {devices[0].device_kind}, mesh"
    f" {dict(mesh.shape)}",
    "video": f"{config.video}, {len(seen.scan_s)} frames looked at",
    "shown": f"{len(seen.frames)} frames of {height} x {width} px, chosen by"
    f" {config.select}, {config.prompt.frames_per_slice} to a slice",
    "tokens": f"{cost['visual']} visual ({cost['visual_per_slice']} per slice)"
    f" + {cost['text']} text in {cost['slots']} slots, up to"
    f" {config.sampling.max_tokens} new",
    "memory": f"parameters {_size(memory['parameters'])}, key/value cache"
    f" {_size(memory['cache'])}",
  }


def _account(told, workdir) -> dict[str, str]:
  """What it was, for the last table."""
  tokens, rate = told["tokens"], told["tokens_per_s"]
  ended = "ended by itself" if told["ended"] else "cut off at the limit"
  return {
    "tokens": f"{tokens['visual']} visual + {tokens['text']} text ->"
    f" {tokens['new']} new, {ended}",
    "speed": "one token" if rate is None else f"{rate:.1f} tokens/s",
    "seconds": ", ".join(
      f"{name} {value:.2f}" for name, value in told["seconds"].items()
    ),
    "kept in": f"{workdir / ANSWER_FILE}, {workdir / PICTURE_FILE}",
  }


def _size(count: int) -> str:
  """`5.20 GiB`, `38.1 MiB`."""
  mib = count / 2**20
  return f"{mib / 2**10:.2f} GiB" if mib >= 2**10 else f"{mib:.1f} MiB"
