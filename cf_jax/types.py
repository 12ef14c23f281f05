"""The nouns of the data flow, with a shape on every field.

Axes: `B` videos, `G` completions per video, `T` scanned frames, `K` keyframes,
`N` encoded frames per video (the frames of all views), `P` visual tokens per
frame, `E` frame-embedding width, `S` prompt slots, `C` completion slots, `D`
model width. A mask is bool and True means real.
"""

from typing import Any

import flax.struct
import jax

Array = jax.Array


@flax.struct.dataclass
class Keyframes:
  """What Temporal Apex Distillation chose in one video (a batch adds `B`).

  Attributes:
    index: int32[K] frame numbers, ascending and distinct; masked slots hold T.
    mask: bool[K] False where the video has fewer than K real frames.
    order: int32[K] frame numbers in the order in which they were picked;
      masked slots hold T.
    weight: float[K, T] soft selection weights; a real row sums to 1.
    embedding: float[K, E] the keyframes' embeddings.
    score: float[T] priority of every frame.
    variation: float[T] variation score, the curve behind the apexes.
    saliency: float[K] in [0, 1], of the apex that opens the keyframe's segment.
    segment: int32[K, 2] first and one-past-last frame of each segment.
    apex: bool[T] every inflection, not capped by K.
    logprob: float[] log-probability of a stochastic selection, else 0.
  """

  index: Array
  mask: Array
  order: Array
  weight: Array
  embedding: Array
  score: Array
  variation: Array
  saliency: Array
  segment: Array
  apex: Array
  logprob: Array


@flax.struct.dataclass
class Prompt:
  """Tokenised prompts of one view, padded on the right to `S` slots.

  Attributes:
    token: int32[B, S] token ids.
    mask: bool[B, S].
    position: int32[B, 3, S] M-RoPE (time, height, width) positions.
    visual: int32[B, S] which of the view's `K * P` visual tokens a slot shows,
      -1 for a text slot. Media are merged by this index, never by token id.
  """

  token: Array
  mask: Array
  position: Array
  visual: Array


@flax.struct.dataclass
class View:
  """One way of looking at a video: a prompt and the frames put into it.

  Attributes:
    prompt: Prompt with its `K` frame slots.
    frame: int32[B, K] which of the video's `N` encoded frames each slot shows.
  """

  prompt: Prompt
  frame: Array


@flax.struct.dataclass
class Rollout:
  """Sampled completions.

  Attributes:
    token: int32[B, G, C] completion ids, the end token included.
    mask: bool[B, G, C] True up to and including the end token.
    logprob: float32[B, G, C] log-probability at which a token was sampled
      (temperature 1, banned ids excluded, before top-p and top-k).
    finished: bool[B, G] False where the length limit cut a completion off.
  """

  token: Array
  mask: Array
  logprob: Array
  finished: Array


@flax.struct.dataclass
class Verdict:
  """What the host read in the completions: the last place with strings.

  Attributes:
    component: dict of reward component name -> float32[B, G], each in [0, 1]
      unless the component says otherwise (accuracy, format, ...).
    answer_span: bool[B, G, C] the tokens of the answer inside its tag.
    reasoning_span: bool[B, G, C] those of the reasoning before it.
    length: int32[B, G] completion tokens.
    cited: bool[B, G, K] keyframes that the reasoning cites.
    applies: dict of the same names -> bool[B], the samples that have the
      component (each kind of question has its own); None means all.
  """

  component: dict[str, Array]
  answer_span: Array
  reasoning_span: Array
  length: Array
  cited: Array
  applies: dict[str, Array] | None = None


@flax.struct.dataclass
class OtherView:
  """What the contrastive loss reads: the same completions under another view.

  Attributes:
    view: View of the batch's videos; its frames are among those encoded.
    ref_logprob: float32[B, G, C] under the frozen reference and this view.
    answer_span: bool[B, G, C] the tokens that are compared.
    select: bool[B, G] completions that take part.
    moved: bool[B] False where the view is that of the keyframes: nothing can be
      shuffled there.
  """

  view: View
  ref_logprob: Array
  answer_span: Array
  select: Array
  moved: Array


@flax.struct.dataclass
class Experience:
  """Everything one policy update reads; nothing here is recomputed in it.

  A tower that is trained is differentiated: the update encodes `pixel`. One
  that is frozen has already encoded the frames: the update reads `encoded`.
  The other of the two is None.

  Attributes:
    view: View the completions were sampled under (ordered keyframes).
    rollout: Rollout.
    advantage: float32[B, G], or [B, G, C] for one a token.
    ref_logprob: float32[B, G, C] under the frozen reference policy; None where
      nothing of the loss asks for it.
    group_mask: bool[B] False for groups left out of the loss.
    pixel: float[B, K, 4P, patch] patches of the view's frames.
    encoded: float[B, K, P, D] their visual tokens.
    old_logprob: float32[B, G, C] of the trainer at the sampled parameters,
      where it is not taken for what the sampler said.
    other: OtherView of the contrastive loss.
  """

  view: View
  rollout: Rollout
  advantage: Array
  ref_logprob: Array | None
  group_mask: Array
  pixel: Array | None = None
  encoded: Array | None = None
  old_logprob: Array | None = None
  other: OtherView | None = None


@flax.struct.dataclass
class TrainState:
  """What an update changes. `step` counts updates."""

  step: Array
  params: Any
  opt_state: Any
  rng: Array
