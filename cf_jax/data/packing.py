"""Samples laid one behind another into rows, so that padding is not computed.

A row has the room of so many padded samples: their slots, their pictures and
their scored tokens. Samples that are shorter leave room for further ones.

Axes: `B` samples, `S` prompt slots, `C` completion slots, `K` slots of a view,
`P` visual tokens of a picture, `R` rows, `L` slots of a row, `F` pictures of a
row, `M` scored tokens of a row.
"""

from typing import NamedTuple

import numpy as np

from cf_jax.types import Prompt, Rollout


class Rows(NamedTuple):
  """What a batch becomes.

  Attributes:
    token: int32[R, L].
    position: int32[R, 3, L] of each sample its own.
    segment: int32[R, L] number of the sample in its row from 1 on, 0: padding.
    visual: int32[R, L] which of the row's F * P visual tokens a slot shows, -1
      for text.
    sample: int32[R, F] whose picture it is, a row of the batch.
    frame: int32[R, F] which of its encoded slices.
    state: int32[R, M] slots whose state predicts a token.
    label: int32[R, M] that token.
    scored: bool[R, M] False for padding.
  """

  token: np.ndarray
  position: np.ndarray
  segment: np.ndarray
  visual: np.ndarray
  sample: np.ndarray
  frame: np.ndarray
  state: np.ndarray
  label: np.ndarray
  scored: np.ndarray


def fit(size: np.ndarray, limit: np.ndarray) -> list[list[int]]:
  """First fit, longest first: which samples share a row.

  Args:
    size: int[B, n] what each takes of n kinds of room.
    limit: int[n] of a row.

  Returns:
    Numbers of the samples of each row.
  """
  rows, used = [], []
  for sample in np.argsort(-size[:, 0], kind="stable"):
    fits = [np.all(taken + size[sample] <= limit) for taken in used]
    if not any(fits):
      rows.append([])
      used.append(np.zeros_like(limit))
    first = fits.index(True) if any(fits) else -1
    rows[first].append(int(sample))
    used[first] += size[sample]
  return rows


def lay(
  prompt: Prompt,
  frame: np.ndarray,
  target: Rollout,
  *,
  room: int,
  num_visual: int,
  on_prompt: bool,
) -> Rows:
  """Lays samples, each a prompt and its one completion, into rows.

  There are never more rows than B / room, rounded up.

  Args:
    prompt: Prompt of B samples, numpy arrays.
    frame: int32[B, K] which encoded slice each slot of the view shows.
    target: Rollout with G = 1. Its last token is predicted and fed to nobody.
    room: how many padded samples a row has room for.
    num_visual: P.
    on_prompt: the prompts' text is scored as well as the completions.

  Returns:
    Rows; their width is the same for every batch, their number is not.
  """
  slots, length = prompt.token.shape[1], target.token.shape[2]
  read, told = prompt.mask.sum(axis=1), target.mask[:, 0].sum(axis=1)
  shown = (prompt.visual >= 0).sum(axis=1) // num_visual
  pictures = frame.shape[1]
  scored = told + on_prompt * read
  limit = room * np.array(
    [slots + length - 1, pictures, length + on_prompt * slots]
  )
  size = np.stack([read + told - 1, shown, scored], axis=1)
  samples = np.arange(len(size))
  in_order = np.split(samples, range(room, len(size), room))
  chosen = min(fit(size, limit), in_order, key=len)

  width, pictures, most = limit
  rows = empty(len(chosen), width, pictures, most)
  for r, members in enumerate(chosen):
    at = seen = filled = 0
    for number, b in enumerate(members, start=1):
      p, c = read[b], told[b]
      fed = slice(at, at + p + c - 1)
      ids = np.concatenate([prompt.token[b, :p], target.token[b, 0, :c]])
      after = 1 + prompt.position[b, :, :p].max() + np.arange(c - 1)
      visual = prompt.visual[b, :p]
      rows.token[r, fed] = ids[:-1]
      rows.position[r, :, fed] = np.concatenate(
        [prompt.position[b, :, :p], np.tile(after, (3, 1))], axis=1
      )
      rows.segment[r, fed] = number
      rows.visual[r, at : at + p] = np.where(
        visual < 0, -1, visual + seen * num_visual
      )
      rows.sample[r, seen : seen + shown[b]] = b
      rows.frame[r, seen : seen + shown[b]] = frame[b, : shown[b]]
      state = np.arange(p - 1, p + c - 1)  # of the tokens after them
      if on_prompt:
        text = np.flatnonzero(visual[1:] < 0)
        state = np.concatenate([text, state])
      these = slice(filled, filled + len(state))
      rows.state[r, these] = at + state
      rows.label[r, these] = ids[state + 1]
      rows.scored[r, these] = True
      at, seen, filled = fed.stop, seen + shown[b], these.stop
  return rows


def empty(count: int, slots: int, pictures: int, scored: int) -> Rows:
  """Rows of nothing but padding: R, L, F and M of them."""

  def zeros(*shape):
    return np.zeros((count, *shape), np.int32)

  return Rows(
    token=zeros(slots),
    position=zeros(3, slots),
    segment=zeros(slots),
    visual=zeros(slots) - 1,
    sample=zeros(pictures),
    frame=zeros(pictures),
    state=zeros(scored),
    label=zeros(scored),
    scored=zeros(scored) > 0,
  )


def fill_up(rows: Rows, count: int) -> Rows:
  """The same with rows of padding behind, `count` in all."""
  more = empty(
    count - len(rows.token),
    rows.token.shape[1],
    rows.sample.shape[1],
    rows.label.shape[1],
  )
  return Rows(*(np.concatenate(pair) for pair in zip(rows, more, strict=True)))
