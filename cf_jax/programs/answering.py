"""Questions in groups, prepared ahead of the policy, and its answers.

Axes: `B` questions, `K` frames shown, `P` visual tokens per frame.
"""

import collections
import concurrent.futures
import contextlib
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from cf_jax import policy as policy_lib
from cf_jax import sampling, views
from cf_jax.data import (
  footage,
  frame_size,
  pipeline,
  prompts,
  records,
  video,
)
from cf_jax.models import config as model_config
from cf_jax.models import vlm
from cf_jax.programs import ask, choosing, policies, questions
from cf_jax.programs import experiment as experiment_lib
from cf_jax.runtime import sharding

# The user's text is put together here, so the prompt takes it as it is.
_AS_IT_IS = "{question}{options}"


class Group(NamedTuple):
  """Questions that share their programs.

  Attributes:
    size_px: (height, width) of their frames.
    num_keyframes: K.
    slots: of their prompts.
    numbers: of the questions, those about one video side by side.
  """

  size_px: tuple[int, int]
  num_keyframes: int
  slots: int
  numbers: tuple[int, ...]


class Planner:
  """What a question costs, known from the header of its video.

  Args:
    config: settled.
    model: shape of the policy.
    tokenizer: of the policy.
    wording: of the questions.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    model: model_config.VLMConfig,
    tokenizer: prompts.Tokenizer,
    wording: questions.Wording,
  ):
    self._config, self._model = config, model
    self._tokenizer, self._wording = tokenizer, wording
    self._side = model.vision.patch_size * model.vision.spatial_merge_size
    self.build = dict(config.prompt.build) | dict(
      tokens_per_second=model.vision.tokens_per_second,
      question_template=_AS_IT_IS,
    )

  def num_keyframes(self, info: video.VideoInfo) -> int:
    """K of a video."""
    config = self._config
    if config.fps is None:
      return config.num_keyframes
    return frame_size.num_shown(
      info.duration_s,
      config.fps,
      most=config.num_keyframes,
      multiple=config.prompt.frames_per_slice,
    )

  def size_px(self, info: video.VideoInfo, count: int) -> tuple[int, int]:
    """(height, width) of `count` frames of a video."""
    config = self._config
    if config.frame.size_px is not None:
      return tuple(config.frame.size_px)
    limits = {k: v for k, v in config.frame.items() if k != "size_px"}
    return frame_size.fit_size(
      info.height,
      info.width,
      num_frames=count,
      factor=self._side,
      frames_per_slice=config.prompt.frames_per_slice,
      **limits,
    )

  def slots(
    self, text: str, size_px: tuple[int, int], count: int, last_s: float
  ) -> int:
    """Prompt slots of a text behind frames up to `last_s` seconds, padded.

    Raises:
      ValueError: more than the model has positions for.
    """
    config = self._config
    need = prompts.count_tokens(
      self._tokenizer,
      text,
      (),
      num_frames=count // config.prompt.frames_per_slice,
      duration_s=last_s,
      grid=tuple(pixels // self._side for pixels in size_px),
      **self.build,
    )
    limit = self._model.max_position_embeddings
    if need + config.sampling.max_tokens > limit:
      raise ValueError(
        f"a prompt takes {need} tokens and its answer up to"
        f" {config.sampling.max_tokens}, but the model was made for {limit}:"
        f" {count} frames of {size_px[0]} x {size_px[1]} px and"
        f" {len(text)} characters of text; lower config.num_keyframes,"
        " config.frame.max_pixels or config.sampling.max_tokens, or set"
        " config.subtitles='shown'"
      )
    multiple = config.prompt.pad_multiple
    return -(-need // multiple) * multiple

  def __call__(
    self,
    samples: Sequence[records.Sample],
    numbers: Sequence[int],
    infos: Mapping[footage.Footage, video.VideoInfo],
  ) -> list[Group]:
    """Groups the questions whose videos have a header, costliest first.

    Args:
      samples: all of them.
      numbers: of those to be asked.
      infos: what is known of the videos that can be read.
    """
    found = collections.defaultdict(list)
    for number in numbers:
      sample = samples[number]
      info = infos[footage.of_sample(sample)]
      count = self.num_keyframes(info)
      size_px = self.size_px(info, count)
      # Of lines on screen, as many as there are frames: not known before.
      time_s = [] if self._config.subtitles == "shown" else None
      slots = self.slots(
        self._wording(sample, time_s),
        size_px,
        count,
        1.1 * info.duration_s + 1,  # a header may promise too little
      )
      found[size_px, count, slots].append(number)
    groups = []
    for (size_px, count, slots), mine in found.items():
      first = {}  # questions about a video side by side, videos in order
      for number in mine:
        first.setdefault(footage.of_sample(samples[number]), number)
      mine.sort(key=lambda n: (first[footage.of_sample(samples[n])], n))
      groups.append(Group(size_px, count, slots, tuple(mine)))
    return sorted(
      groups,
      key=lambda g: (-g.slots, -g.num_keyframes * math.prod(g.size_px)),
    )


class Pass(NamedTuple):
  """How questions are put, and which frames are shown with them.

  Attributes:
    config: settled.
    wording: of the questions.
    planner: what they cost.
    chooser: of the frames.
  """

  config: ml_collections.ConfigDict
  wording: questions.Wording
  planner: Planner
  chooser: choosing.Chooser


# ------------------------------------------------------------------ answering


# Of the module, so that another evaluation in this process compiles nothing.


@functools.partial(jax.jit, static_argnames=("model", "grid"))
def encode_step(params, pixel, *, model, grid):
  """Visual tokens: float[B, N, 4P, patch] -> float[B, N, P, D]."""
  return policy_lib.encode_frames(model, params, pixel, grid=grid)


@functools.partial(jax.jit, static_argnames=("model", "max_tokens", "eos_id"))
def start_step(
  params, view, encoded, seed, banned, how, *, model, max_tokens, eos_id
):
  """Prompts -> `sampling.Decoding` with one token."""
  return sampling.start(
    model,
    params,
    view.prompt,
    policy_lib.show(encoded, view.frame),
    seed,
    banned,
    num_completions=1,
    max_tokens=max_tokens,
    eos_id=eos_id,
    **how,
  )


@functools.partial(
  jax.jit, static_argnames=("model", "max_tokens", "eos_id"), donate_argnums=1
)
def advance_step(params, decoding, banned, how, *, model, max_tokens, eos_id):
  """`sampling.Decoding` -> the same at its end."""
  return sampling.advance(
    model, params, decoding, max_tokens, banned, eos_id=eos_id, **how
  )


class Answerer:
  """Answers to prepared questions: jitted vision, prefill and decoding.

  Args:
    policy: it is used up.
    mesh: of this process's devices.
    seed: of what is drawn.
    max_tokens: C.
    **how: how a token is drawn, see `sampling.generate`.
  """

  def __init__(
    self,
    policy: policies.Policy,
    mesh: jax.sharding.Mesh,
    *,
    seed: int,
    max_tokens: int,
    **how: float,
  ):
    model = policy.model
    self._params = vlm.unstack(policy.params)
    self._tokenizer, self._mesh = policy.tokenizer, mesh
    self.eos_id = ask.end_ids(policy.tokenizer, model.vocab_size, policy.folder)
    banned = policy.tokenizer.banned_mask(model.vocab_size)
    banned[list(self.eos_id)] = False
    self._banned = jnp.asarray(banned)
    self._rng = jax.random.key(seed)
    self._how = how
    self._static = dict(model=model, max_tokens=max_tokens, eos_id=self.eos_id)

  def __call__(
    self,
    prepared: views.Prepared,
    make_views: views.ViewMaker,
    numbers: np.ndarray,
    turn: contextlib.AbstractContextManager,
  ) -> list[dict[str, Any]]:
    """The answers to a batch.

    Args:
      prepared: with the keyframes' view.
      make_views: that made it.
      numbers: int[B] of the questions: they seed what is drawn, so a batch's
        other questions do not matter.
      turn: held while programs are sent to the devices, in one order for all.

    Returns:
      For each of the B: response, prompt_tokens, new_tokens, ended.
    """
    pixel = make_views.patches(experiment_lib.shown_frames(prepared))
    view = prepared.view["keyframes"]
    put = functools.partial(sharding.put_batch, mesh=self._mesh)
    with turn:
      seed = jax.device_get(
        sampling.row_seeds(self._rng, jnp.asarray(numbers, jnp.int32))
      )
      encoded = encode_step(
        self._params,
        put(pixel),
        model=self._static["model"],
        grid=make_views.grid,
      )
      begun = start_step(
        self._params,
        put(view),
        encoded,
        put(seed),
        self._banned,
        self._how,
        **self._static,
      )
      made = advance_step(
        self._params, begun, self._banned, self._how, **self._static
      )
    rollout = jax.device_get(made.rollout)
    rows = zip(
      rollout.token[:, 0],
      rollout.mask[:, 0],
      rollout.finished[:, 0],
      view.prompt.mask.sum(axis=1),
    )
    return [
      dict(
        response=self._tokenizer.decode(
          [i for i in token[mask].tolist() if i not in self.eos_id]
        ),
        prompt_tokens=int(length),
        new_tokens=int(mask.sum()),
        ended=bool(ended),
      )
      for token, mask, ended, length in rows
    ]


class Ready(NamedTuple):
  """A batch that the policy can be asked about.

  Attributes:
    numbers: of its real questions, which come first.
    prepared: its views; None where no video of it can be read.
    make_views: that made them.
    unreadable: number of a question -> why its video cannot be read.
  """

  numbers: list[int]
  prepared: views.Prepared | None
  make_views: views.ViewMaker | None
  unreadable: dict[int, str]


class Preparer:
  """Scans videos, chooses frames, reads them and words the prompts.

  Args:
    how: questions are put.
    model: shape of the policy.
    tokenizer: of the policy.
    samples: all questions.
    decoder: of the videos.
    batch_size: B.
    turn: held while the chooser's programs are sent to the devices.
    within: number of a question -> the (start, end) seconds over which its scan
      is spread; None scans all of every video.
  """

  def __init__(
    self,
    how: Pass,
    model: model_config.VLMConfig,
    tokenizer: prompts.Tokenizer,
    samples: Sequence[records.Sample],
    *,
    decoder: pipeline.Decoder,
    batch_size: int,
    turn: contextlib.AbstractContextManager,
    within: Mapping[int, Sequence[tuple[float, float]]] | None = None,
  ):
    self._config, self._wording, self._planner, self._chooser = how
    self._model, self._tokenizer = model, tokenizer
    self._samples, self._decoder = samples, decoder
    self._batch_size, self._turn = batch_size, turn
    self._within = within
    self._readers, self._makers = {}, {}

  def _reader(self, size_px) -> pipeline.FrameReader:
    if size_px not in self._readers:
      # One at a time: groups of a size follow each other.
      self._readers = {
        size_px: pipeline.FrameReader(
          size_px,
          resize=self._config.resize,
          decoder=self._decoder,
          **self._config.data.reader,
        )
      }
    return self._readers[size_px]

  def _maker(self, size_px, count, slots) -> views.ViewMaker:
    key = size_px, count, slots
    if key not in self._makers:
      vision, prompt = self._model.vision, self._config.prompt
      reader = self._reader(size_px)
      self._makers = {
        key: views.ViewMaker(
          self._tokenizer,
          self._chooser.choose,
          reader,
          prompt=self._planner.build,
          max_prompt_tokens=slots,
          patch=(
            vision.patch_size,
            vision.spatial_merge_size,
            vision.temporal_patch_size,
          ),
          num_keyframes=count,
          num_shuffles=1,
          seed=self._config.seed,
          frames_per_slice=prompt.frames_per_slice,
          number_frames=prompt.number_frames,
        )
      }
    return self._makers[key]

  def batches(self, groups: Sequence[Group]) -> Iterator[Ready]:
    """Batch after batch, one made ahead of the policy."""
    jobs = [
      (group, group.numbers[start : start + self._batch_size])
      for group in groups
      for start in range(0, len(group.numbers), self._batch_size)
    ]
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
      ahead = thread.submit(self.prepare, *jobs[0]) if jobs else None
      for following in [*jobs[1:], None]:
        if ahead is None:
          return
        ready = ahead.result()
        ahead = following and thread.submit(self.prepare, *following)
        yield ready

  def prepare(self, group: Group, numbers: Sequence[int]) -> Ready:
    """One batch of a group."""
    rows = [self._samples[n] for n in numbers]
    count = group.num_keyframes
    batch, skipped = pipeline.collate_readable(
      rows,
      np.asarray(numbers, np.int32),
      batch_size=self._batch_size,
      scan_frames=self._chooser.scan_frames(count),
      scan_size_px=self._chooser.scan_size_px,
      decoder=self._decoder,
      within=self._within and [self._within[n] for n in numbers],
    )
    # Of a video that others ask about too, a part alone may be unreadable.
    asked = [] if batch is None else batch.sample_index.tolist()
    real = list(dict.fromkeys(asked))
    unreadable = {
      n: skipped[row.video] for n, row in zip(numbers, rows) if n not in real
    }
    if batch is None:
      return Ready([], None, None, unreadable)
    with self._turn:
      keyframes = self._chooser.choose(batch, count)
    shown = np.where(keyframes.mask, keyframes.index, 0)
    time_s = np.take_along_axis(batch.scan_time_s, shown, axis=1)
    texts = [
      self._wording(sample, seconds[mask])
      for sample, seconds, mask in zip(batch.samples, time_s, keyframes.mask)
    ]
    slots = max(
      group.slots,
      *(
        self._planner.slots(text, group.size_px, count, float(seconds.max()))
        for text, seconds in zip(texts, time_s)
      ),
    )
    make_views = self._maker(group.size_px, count, slots)
    worded = [
      sample._replace(question=text, options=(), kind="open_ended")
      for sample, text in zip(batch.samples, texts)
    ]
    try:
      prepared = make_views(
        batch._replace(samples=worded),
        ("keyframes",),
        selected=(keyframes, keyframes.index),
      )
    except video.VideoError as error:  # one that scans, and is not read then
      bad = {
        n: str(error) for n in real if self._samples[n].video == error.path
      }
      if not bad:
        raise
      left = [n for n in real if n not in bad]
      again = self.prepare(group, left) if left else Ready([], None, None, {})
      return again._replace(unreadable=unreadable | bad | again.unreadable)
    return Ready(real, prepared, make_views, unreadable)
