"""The settings of an evaluation: checked, filled in, hashed, compared."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections

from cf_jax import sampling
from cf_jax.data import datasets, footage, prompts, records
from cf_jax.evals import benchmarks
from cf_jax.models import config as model_config
from cf_jax.programs import choosing, questions
from cf_jax.programs import experiment as experiment_lib
from cf_jax.runtime import telemetry

STYLES = ("direct", "run")
SUBTITLES = ("none", "shown", "all")
UNREADABLE = ("wrong", "left_out")

# What a None of configs/evaluate.py stands for, where no run says otherwise.
_NUM_KEYFRAMES, _MAX_TOKENS = 16, 512
_SCAN = dict(num_frames=256, size_px=(64, 64), descriptor="pixels")
_MIN_VISUAL, _MAX_VISUAL = 4, 256  # visual tokens of a frame
_BUILD = dict(show_time=True, time_format=prompts.TIME_FORMAT)


def check_settings(config: ml_collections.ConfigDict) -> None:
  """What can be told before anything is opened.

  Raises:
    ValueError: a setting is missing or out of range.
  """
  scored = [name for name in datasets.DATASETS if name in benchmarks.RULES]
  known = (*questions.OWN, *scored)
  if config.benchmark not in known:
    raise ValueError(
      f"config.benchmark is {config.benchmark!r}, expected one of"
      f" {', '.join(known)}"
    )
  if not config.policy:
    raise ValueError(
      "config.policy is empty; set --config.policy= to a Qwen2.5-VL directory"
      " or a run's workdir"
    )
  for name, value, choices in (
    ("select", config.select, (None, *choosing.CHOICES)),
    ("subtitles", config.subtitles, SUBTITLES),
    ("unreadable", config.unreadable, UNREADABLE),
    ("prompt.style", config.prompt.style, (None, *STYLES)),
  ):
    if value not in choices:
      raise ValueError(f"config.{name} must be one of {choices}, got {value!r}")
  for name, value in (
    ("batch_size", config.batch_size),
    ("prompt.pad_multiple", config.prompt.pad_multiple),
    ("num_questions", config.num_questions),
    ("num_keyframes", config.num_keyframes),
    ("scan.num_frames", config.scan.num_frames),
  ):
    if value is not None and value < 1:
      raise ValueError(f"config.{name} must be at least 1, got {value}")
  if config.clue.frames < 0:
    raise ValueError(
      f"config.clue.frames must be at least 0, got {config.clue.frames}"
    )
  if config.fps is not None and not 0 < config.fps < math.inf:
    raise ValueError(f"config.fps must be above 0 or None, got {config.fps}")
  if not 0 <= config.shard.index < config.shard.count:
    raise ValueError(
      f"config.shard.index is {config.shard.index}, expected 0 to"
      f" config.shard.count - 1 = {config.shard.count - 1}"
    )
  if config.distributed and config.shard.count > 1:
    raise ValueError(
      "config.distributed=True divides the questions by itself; leave"
      " config.shard.count at 1"
    )


def settle(
  config: ml_collections.ConfigDict, model: model_config.VLMConfig
) -> ml_collections.ConfigDict:
  """Puts a value in the place of every None, a run's own before the others.

  Args:
    config: of configs/evaluate.py.
    model: shape of the policy.

  Raises:
    ValueError: settings that do not fit together.
  """
  config = config.copy_and_resolve_references()
  config.unlock()
  run = questions.run_config(config)

  def fill(node, **defaults):
    for name, value in defaults.items():
      if node[name] is None and value is not None:
        node[name] = value

  side = model.vision.patch_size * model.vision.spatial_merge_size
  limits = ("min_pixels", "max_pixels", "total_pixels")
  if run:
    # Programs that only ask have no such section.
    learns = run.get("selector", {}).get("learn", False)
    fill(config, select=choosing.LEARNED if learns else run["scan"]["select"])
    if config.select == "uniform" and config.num_keyframes is None:
      fill(config, fps=run["data"].get("fps") or None)
    if config.select != choosing.VIARL:
      fill(config, num_keyframes=run["tad"]["num_keyframes"])
    fill(config, resize=run["data"]["reader"].get("resize"))
    fill(
      config.scan,
      num_frames=run["data"]["loader"]["scan_frames"],
      size_px=tuple(run["data"]["loader"]["scan_size_px"]),
      descriptor=run["scan"]["descriptor"],
    )
    if all(config.frame[name] is None for name in limits):
      fill(config.frame, size_px=tuple(run["data"]["reader"]["size_px"]))
    own = run["prompt"]
    build = own["build"]
    fill(
      config.prompt,
      style="run",
      frames_per_slice=own["frames_per_slice"],
      number_frames=own["number_frames"],
    )
    fill(config.prompt.build, **{k: build.get(k) for k in config.prompt.build})
    fill(config.sampling, max_tokens=run["sampling"]["max_tokens"])
  if config.prompt.style == "run" and not run:
    raise ValueError(
      f"config.prompt.style is 'run', but {config.policy} is not a run; set it"
      " to 'direct'"
    )
  fill(config, select="tad", resize="bicubic")
  if config.select == choosing.LEARNED and not config.selector:
    config.selector = config.policy
  if config.select == choosing.VIARL and config.selector:
    fill(config, num_keyframes=choosing.amplified_frames(config.selector))
  fill(config.scan, **_SCAN)
  if config.select == "all_frames":
    config.num_keyframes = config.scan.num_frames
  fill(config, num_keyframes=_NUM_KEYFRAMES)
  if config.frame.size_px is None:
    fill(config.frame, max_pixels=_MAX_VISUAL * side**2)
    least = min(_MIN_VISUAL * side**2, config.frame.max_pixels)
    fill(config.frame, min_pixels=least)
  fill(config.prompt, style="direct", frames_per_slice=1, number_frames=False)
  fill(config.prompt.build, **_BUILD)
  fill(config.sampling, max_tokens=_MAX_TOKENS)
  _check_settled(config, side)
  return config


def _check_settled(config: ml_collections.ConfigDict, side: int) -> None:
  """Raises a ValueError where settings do not fit together."""
  sampling.check_settings(**config.sampling)
  scanned = config.select != "uniform"
  if scanned and config.num_keyframes > config.scan.num_frames:
    raise ValueError(
      f"config.num_keyframes is {config.num_keyframes}, and"
      f" {config.scan.num_frames} frames are scanned; raise"
      " config.scan.num_frames"
    )
  for name, count in (
    ("num_keyframes", config.num_keyframes),
    ("clue.frames", config.clue.frames),
  ):
    if count % config.prompt.frames_per_slice:
      raise ValueError(
        f"config.{name}={count} frames do not divide into slices of"
        f" {config.prompt.frames_per_slice}; change it or"
        " config.prompt.frames_per_slice"
      )
  if config.fps is not None and config.select in (
    choosing.LEARNED,
    choosing.VIARL,
  ):
    raise ValueError(
      f"config.select={config.select!r} always chooses config.num_keyframes"
      " frames; leave config.fps None"
    )
  if config.frame.size_px is not None:
    given = [k for k in ("max_pixels", "total_pixels") if config.frame[k]]
    if given or any(pixels % side for pixels in config.frame.size_px):
      raise ValueError(
        f"config.frame.size_px is {tuple(config.frame.size_px)}; it takes"
        f" multiples of {side} and no config.frame.max_pixels or total_pixels"
        " beside it"
      )
  elif config.frame.min_pixels > config.frame.max_pixels:
    raise ValueError(
      f"config.frame.min_pixels ({config.frame.min_pixels}) is above"
      f" config.frame.max_pixels ({config.frame.max_pixels}); change one"
    )


def open_chooser(
  config: ml_collections.ConfigDict,
  mesh: jax.sharding.Mesh,
  model: model_config.VLMConfig,
  batch_size: int,
) -> choosing.Chooser:
  """What the config says about frames.

  Args:
    config: settled.
    mesh: of this process's devices.
    model: shape of the policy.
    batch_size: B.
  """
  if config.select == choosing.LEARNED:
    return choosing.learned(
      config.selector,
      mesh,
      init_from=config.init_from,
      num_keyframes=config.num_keyframes,
    )
  if config.select == choosing.VIARL:
    return choosing.viarl(
      config.selector,
      mesh,
      init_from=config.init_from,
      num_keyframes=config.num_keyframes,
      batch_size=batch_size,
    )
  if config.select == choosing.ORACLE:
    return choosing.oracle(
      num_frames=config.scan.num_frames, size_px=config.scan.size_px
    )
  encode = None
  if config.scan.descriptor == "vision" and config.select != "uniform":
    encode = choosing.own_tower(
      config, config.policy, mesh, model, tuple(config.scan.size_px)
    )
  return choosing.by_name(
    config.select,
    encode=encode,
    tad=_tad_settings(config),
    **config.scan,
  )


def _tad_settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Keyword arguments of TAD: a run's own, and what the config says."""
  made = dict(questions.run_config(config).get("tad", {}))
  made.pop("num_keyframes", None)
  made |= {k: v for k, v in config.tad.items() if v is not None}
  # A manifest has lists, and what is compiled for them wants tuples.
  return {k: tuple(v) if isinstance(v, list) else v for k, v in made.items()}


# ------------------------------------------------------------- what decides


def key_of(config: ml_collections.ConfigDict, digest: str) -> str:
  """The folder's name: main settings, and the first digits of a hash of all.

  Args:
    config: settled.
    digest: of everything that decides.
  """
  frame = config.frame
  size = f"max{frame.max_pixels}px"
  if frame.size_px is not None:
    size = "x".join(map(str, frame.size_px)) + "px"
  elif frame.total_pixels is not None:
    size += f"-total{frame.total_pixels}px"
  how = config.sampling
  drawn = f"t{how.temperature:g}" if how.temperature else "greedy"
  fps = f"-{config.fps:g}fps" if config.fps else ""
  words = {"none": "", "shown": "-subs", "all": "-allsubs"}[config.subtitles]
  clue = f"-clue{config.clue.frames}" if config.clue.frames else ""
  return (
    f"{config.select}-K{config.num_keyframes}{fps}{clue}-{size}{words}-{drawn}-"
    f"{digest[:8]}"
  )


def digest_of(value: Any) -> str:
  """SHA-256 of JSON, whatever the order of its keys."""
  text = json.dumps(telemetry.to_jsonable(value), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def decides(
  config: ml_collections.ConfigDict,
  *,
  model: model_config.VLMConfig,
  tokenizer: prompts.Tokenizer,
  wording: questions.Wording,
  chooser: choosing.Chooser,
  samples: Sequence[records.Sample],
  weights: str,
  eos_id: Sequence[int],
  clue: Mapping[str, Any],
) -> dict[str, Any]:
  """All that an answer depends on; neither paths nor speeds.

  Args:
    config: settled.
    model: shape of the policy.
    tokenizer: of the policy.
    wording: of the questions.
    chooser: of the frames.
    samples: the questions.
    weights: fingerprint of the policy.
    eos_id: ids that end an answer.
    clue: of clue inference; empty without it.
  """
  used = sorted({sample.kind for sample in samples})
  prompt = dict(
    style=config.prompt.style,
    templates={kind: wording.templates[kind] for kind in used},
    chat_template=hashlib.sha256(tokenizer.chat_template.encode()).hexdigest(),
    tokenizer=hashlib.sha256(
      (tokenizer.folder / "tokenizer.json").read_bytes()
    ).hexdigest(),
    subtitles=config.subtitles,
    **dict(config.prompt.build),
  )
  if config.subtitles != "none":
    prompt["subtitles_template"] = config.prompt.subtitles
  frame = {k: v for k, v in config.frame.items() if v is not None}
  greedy = not config.sampling.temperature
  return telemetry.to_jsonable(
    dict(
      benchmark=dict(
        name=config.benchmark,
        data_hash=experiment_lib.hash_samples({"": list(samples)}),
        questions=len(samples),
        videos=len({footage.of_sample(sample) for sample in samples}),
      ),
      policy=dict(
        weights=weights,
        dtype=model.dtype,
        param_dtype=model.param_dtype,
      ),
      frames=dict(
        num_keyframes=config.num_keyframes,
        fps=config.fps,
        resize=config.resize,
        frames_per_slice=config.prompt.frames_per_slice,
        number_frames=config.prompt.number_frames,
        size=frame,
        chooser=chooser.settings,
      ),
      prompt=prompt | dict(hash=digest_of(prompt)[:16]),
      sampling=dict(config.sampling)
      | dict(eos_id=list(eos_id))
      | ({} if greedy else dict(seed=config.seed)),
      unreadable=config.unreadable,
    )
    # Evaluations without it keep their hash.
    | (dict(clue=dict(clue)) if clue else {})
  )


def differences(
  there: Any, here: Any, prefix: str = ""
) -> list[tuple[str, Any, Any]]:
  """(dotted name, there, here) of the settings that differ."""
  if isinstance(there, Mapping) and isinstance(here, Mapping):
    return [
      found
      for key in sorted({*there, *here})
      for found in differences(
        there.get(key), here.get(key), f"{prefix}.{key}" if prefix else key
      )
    ]
  return [(prefix, there, here)] if there != here else []
