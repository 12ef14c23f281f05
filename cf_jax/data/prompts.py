"""Question and frame times -> chat template -> token ids and positions.

Axes: `B` prompts, `K` frames shown, `P` visual tokens per frame, `S` slots.

The ids are those of transformers' `apply_chat_template` and processor for a
message that holds the media first (one video, or times and images in turn) and
then the text; but for two doors that stay shut. Text of a user (question,
options, system prompt) is encoded by a BPE that does not know the added tokens,
so a typed `<|image_pad|>` stays text, where transformers would take it for one.
And media are merged by the `visual` index of a slot, never by looking for a
token id.

M-RoPE positions follow what Qwen2.5-VL (arXiv 2502.13923) was trained with.
Text moves all three axes together. Media start at p = 1 + the maximum of the
positions so far over all axes, and so does the text after them:

- one video span: time = p + floor(tokens_per_second * (t_k - t_0)),
  height = p + row, width = p + column;
- one span per frame (times shown as text): height and width as above with the
  span's own p, time = max(p, p_0 + floor(tokens_per_second * (t_k - t_0))),
  p_0 the first span's start. A frame is then what the model knows as an image,
  and its time axis jumps ahead where frames are far apart.

Fractions of a second count; transformers up to 5.2.0 cuts the interval between
frames to whole seconds first (huggingface/transformers#48669).
"""

import functools
import json
import pathlib
import re
import string
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.sandbox
import numpy as np
import tokenizers

from cf_jax.data import json_file

TINY_TOKENIZER = pathlib.Path(__file__).parent / "assets" / "tiny_tokenizer"

# The added tokens of Qwen2.5-VL, in the order of their ids.
ADDED_TOKENS = (
  "<|endoftext|>",
  "<|im_start|>",
  "<|im_end|>",
  "<|object_ref_start|>",
  "<|object_ref_end|>",
  "<|box_start|>",
  "<|box_end|>",
  "<|quad_start|>",
  "<|quad_end|>",
  "<|vision_start|>",
  "<|vision_end|>",
  "<|vision_pad|>",
  "<|image_pad|>",
  "<|video_pad|>",
  "<tool_call>",
  "</tool_call>",
  "<|fim_prefix|>",
  "<|fim_middle|>",
  "<|fim_suffix|>",
  "<|fim_pad|>",
  "<|repo_name|>",
  "<|file_sep|>",
)
EOS = "<|im_end|>"
PAD = "<|endoftext|>"

# A model config's field -> the added token whose id it is.
ID_FIELDS = {
  "bos_token_id": PAD,
  "eos_token_id": EOS,
  "pad_token_id": PAD,
  "image_token_id": "<|image_pad|>",
  "video_token_id": "<|video_pad|>",
  "vision_start_token_id": "<|vision_start|>",
  "vision_end_token_id": "<|vision_end|>",
  "vision_token_id": "<|vision_pad|>",
}
# Those that prompts spell: a model and its tokenizer must agree on them. The
# others are generation's choice.
SPELLED_FIELDS = (
  "image_token_id",
  "video_token_id",
  "vision_start_token_id",
  "vision_end_token_id",
)

QUESTION_TEMPLATE = "{question}{options}\nThink, then answer."
TIME_FORMAT = "{:.1f}s"

# The settings that may name a tokenizer's folder.
_FOLDER = "config.tokenizer, config.init_from or config.checkpoint"

# Slots of the rendered template into which user text goes; private-use
# characters, so that no template holds them by chance.
_SYSTEM_SLOT = "\ue000system\ue001"
_USER_SLOT = "\ue000user\ue001"

# float32 seconds jitter in the fifth decimal: without this, 0.99999 s after
# the first frame would be one position too low.
_TIME_JITTER_S = 1e-4


class PromptRow(NamedTuple):
  """One prompt, not yet padded.

  Attributes:
    token: int32[n] ids.
    position: int32[3, n] M-RoPE (time, height, width) positions.
    visual: int32[n] which of the `K * P` visual tokens a slot shows, -1: text.
  """

  token: np.ndarray
  position: np.ndarray
  visual: np.ndarray


class Tokenizer:
  """The one door between text and ids: `tokenizer.json` and chat template.

  Attributes:
    folder: where its files lie.
    vocab_size: ids in use, added tokens included.
    special: name -> id of the added tokens.
    config_ids: the same by the names of a model config's fields.
    eos_id: ends a completion.
    pad_id: fills padded slots.
    banned_ids: ids that a policy never samples: every added token but the end.
    chat_template: jinja source.
  """

  def __init__(self, folder: pathlib.Path):
    """Reads the folder of a tokenizer; see `load_tokenizer`."""
    path = folder / "tokenizer.json"
    spec = json_file.read_object(path)
    self.special = _read_added_tokens(spec, path)
    self._full = _make_encoder(spec, path)
    # Without added tokens: no text can become one of them.
    self._plain = _make_encoder(spec | {"added_tokens": []}, path)
    self.vocab_size = 1 + max(self._full.get_vocab(True).values())
    self.folder = folder
    self.config_ids = {
      field: self.special[name] for field, name in ID_FIELDS.items()
    }
    self.eos_id = self.special[EOS]
    self.pad_id = self.special[PAD]
    self.banned_ids = tuple(sorted(set(self.special.values()) - {self.eos_id}))
    self._template_path, self.chat_template = _read_chat_template(folder)
    self._names = re.compile(
      "(" + "|".join(re.escape(name) for name in self.special) + ")"
    )
    self._bytes_of = {symbol: byte for byte, symbol in _byte_symbols().items()}
    self._added = {i: name for name, i in self.special.items()}

  def encode(self, text: str) -> list[int]:
    """Ids of plain text; never the id of an added token."""
    return list(self._encode(text))

  @functools.lru_cache(maxsize=8192)  # noqa: B019 (one object a run)
  def _encode(self, text: str) -> tuple[int, ...]:
    return tuple(self._plain.encode(text, add_special_tokens=False).ids)

  def decode(self, ids: Iterable[int]) -> str:
    """Text of ids; added tokens show as their names, bad UTF-8 as U+FFFD."""
    joined = b"".join(self.token_bytes(int(i)) for i in ids)
    return joined.decode("utf-8", errors="replace")

  @functools.lru_cache(maxsize=262144)  # noqa: B019
  def token_bytes(self, token_id: int) -> bytes:
    """The UTF-8 bytes one id stands for; a character may span several ids.

    Raises:
      ValueError: not an id of this tokenizer.
    """
    if token_id in self._added:
      return self._added[token_id].encode("utf-8")
    piece = self._full.id_to_token(token_id)
    if piece is None:
      raise ValueError(
        f"id {token_id} is outside the tokenizer's {self.vocab_size} ids; ban"
        " the model's padding ids (Tokenizer.banned_mask)"
      )
    return bytes(self._bytes_of[symbol] for symbol in piece)

  def banned_mask(self, vocab_size: int) -> np.ndarray:
    """bool[V] of a model whose embedding may have rows beyond the tokenizer.

    Raises:
      ValueError: the model has fewer rows than the tokenizer has ids.
    """
    if vocab_size < self.vocab_size:
      raise ValueError(
        f"the model has {vocab_size} token embeddings, the tokenizer has"
        f" {self.vocab_size} ids; change config.model or config.tokenizer"
      )
    banned = np.zeros(vocab_size, dtype=bool)
    banned[list(self.banned_ids)] = True
    banned[self.vocab_size :] = True
    return banned

  @functools.lru_cache(maxsize=8)  # noqa: B019
  def chat_pieces(self, with_system: bool) -> tuple[str, ...]:
    """The rendered template, cut at the slots for user text.

    Returns:
      Strings: template text and the slots' names, in turn.

    Raises:
      ValueError: the template is broken, refuses the messages, or does not
        show the system or user text once.
    """
    messages = [{"role": "user", "content": _USER_SLOT}]
    if with_system:
      messages.insert(0, {"role": "system", "content": _SYSTEM_SLOT})
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True
    )
    # transformers' environment has it, for templates that refuse messages.
    environment.globals["raise_exception"] = _refuse_messages
    try:
      rendered = environment.from_string(self.chat_template).render(
        messages=messages, add_generation_prompt=True, tools=None
      )
    except Exception as error:  # a template is a program: it can raise anything
      raise ValueError(
        f"the chat template in {self._template_path} fails: {_line(error)};"
        " expected one that renders"
        f" {' and '.join(message['role'] for message in messages)} messages;"
        " change that file"
      ) from error
    slots = [_SYSTEM_SLOT] * with_system + [_USER_SLOT]
    if any(rendered.count(slot) != 1 for slot in slots):
      raise ValueError(
        f"the chat template in {self._template_path} shows a message not"
        " exactly once; change that file"
      )
    return tuple(re.split(f"({_SYSTEM_SLOT}|{_USER_SLOT})", rendered))

  def split_special(self, text: str) -> list[str | int]:
    """Cuts trusted text at the names of added tokens, which become ids."""
    return [
      self.special.get(part, part) for part in self._names.split(text) if part
    ]


def load_tokenizer(path: str | pathlib.Path) -> Tokenizer:
  """Opens "tiny" (shipped) or a folder with `tokenizer.json`.

  The chat template is `chat_template.jinja`, `chat_template.json`, or the one
  in `tokenizer_config.json`: the first that is there.

  Raises:
    ValueError: a file or an added token is missing, or a file is broken.
  """
  folder = TINY_TOKENIZER if str(path) == "tiny" else pathlib.Path(path)
  if not (folder / "tokenizer.json").is_file():
    raise ValueError(
      f"no tokenizer.json in {str(folder)!r}; expected a folder that has one"
      f" ({_FOLDER})"
    )
  return Tokenizer(folder)


def _line(error: Exception) -> str:
  """An error's text in one line."""
  return " ".join(str(error).split())


def _read_added_tokens(spec: dict, path: pathlib.Path) -> dict[str, int]:
  """Name -> id of a tokenizer's added tokens."""
  tokens = json_file.field(
    spec, "added_tokens", "a list of objects", prefix=f"{path}: ", default=()
  )
  special = {}
  for number, token in enumerate(tokens):
    where = f"{path}: added_tokens[{number}]."
    name = json_file.field(token, "content", "a string", prefix=where)
    special[name] = json_file.field(
      token, "id", "an integer of at least 0", prefix=where
    )
    if name is None or special[name] is None:
      raise ValueError(
        f"{path}: added_tokens[{number}] is {token!r:.60}, expected an object"
        " with content and id; take the file of the model's repository"
      )
  missing = [name for name in ADDED_TOKENS if name not in special]
  if missing:
    raise ValueError(
      f"{path} lacks {', '.join(missing)}; expected the added tokens of"
      f" Qwen2.5-VL; change the folder ({_FOLDER})"
    )
  return special


def _make_encoder(spec: dict, path: pathlib.Path) -> tokenizers.Tokenizer:
  try:
    return tokenizers.Tokenizer.from_str(json.dumps(spec))
  except Exception as error:  # the library raises no narrower class
    raise ValueError(
      f"{path} is not a tokenizer: {_line(error)}; expected the tokenizer.json"
      " of a Qwen2.5-VL model; take the file of the model's repository"
    ) from error


def _refuse_messages(message: str) -> None:
  raise jinja2.TemplateError(message)


def _read_chat_template(folder: pathlib.Path) -> tuple[pathlib.Path, str]:
  """The file that holds the template, and the template."""
  path = folder / "chat_template.jinja"
  if path.is_file():
    return path, path.read_text("utf-8")
  for name in ("chat_template.json", "tokenizer_config.json"):
    path = folder / name
    if path.is_file():
      template = json_file.read_object(path).get("chat_template")
      if isinstance(template, str):
        return path, template
  raise ValueError(
    f"no chat template in {str(folder)!r}: expected chat_template.jinja,"
    " chat_template.json or tokenizer_config.json with one; change the folder"
    f" ({_FOLDER})"
  )


def _byte_symbols() -> dict[int, str]:
  """Byte -> the printable character that stands for it in byte-level BPE."""
  printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
  symbols = {byte: chr(byte) for byte in printable}
  hidden = (byte for byte in range(256) if byte not in printable)
  return symbols | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


def _fill(
  template: str, setting: str, expected: str, *values: Any, **fields: Any
) -> str:
  """`str.format`, whose many errors become one that names the setting."""
  try:
    return template.format(*values, **fields)
  except KeyError as error:
    problem = f"no field {error}"
  except (IndexError, ValueError, AttributeError, TypeError) as error:
    problem = str(error)
  raise ValueError(
    f"cannot fill in {template!r}: {problem}; expected {expected}; change"
    f" config.prompt.build.{setting}"
  )


def _time_label(time_format: str, seconds: float) -> str:
  return _fill(
    time_format,
    "time_format",
    "one field for a number of seconds, as in '{:.1f}s'",
    seconds,
  )


def label_tolerance_s(time_format: str) -> float:
  """How far a time may be from the label that shows it, in seconds.

  Args:
    time_format: as in `build_prompt`.

  Raises:
    ValueError: a bad format.
  """
  shown = re.search(r"\d+(?:\.(\d+))?", _time_label(time_format, 0.0))
  decimals = len(shown[1] or "") if shown else 0
  return 0.5 * 10.0**-decimals + 1e-3


def option_lines(options: Sequence[str]) -> str:
  """`\\nA. red\\nB. blue`: every option on a line of its own, or nothing.

  Raises:
    ValueError: more options than letters.
  """
  if len(options) > len(string.ascii_uppercase):
    raise ValueError(
      f"got {len(options)} options, expected at most 26; fix the sample"
    )
  return "".join(
    f"\n{letter}. {option}"
    for letter, option in zip(string.ascii_uppercase, options, strict=False)
  )


def _media(
  tokenizer: Tokenizer,
  time_s: np.ndarray,
  num_visual: int,
  *,
  show_time: bool,
  time_format: str,
) -> list:
  """Text, ids and (first frame, number of frames) of the media, in order."""
  start = tokenizer.special["<|vision_start|>"]
  end = tokenizer.special["<|vision_end|>"]
  if not len(time_s) or not num_visual:
    return []
  if not show_time:
    return [start, (0, len(time_s)), end]
  parts = []
  for k, seconds in enumerate(time_s):
    parts += [_time_label(time_format, seconds), start, (k, 1), end]
  return parts


def build_prompt(
  tokenizer: Tokenizer,
  question: str,
  options: Sequence[str],
  *,
  frame_time_s: np.ndarray,
  grid: tuple[int, int],
  tokens_per_second: float,
  show_time: bool = True,
  time_format: str = TIME_FORMAT,
  question_template: str = QUESTION_TEMPLATE,
  system: str | None = None,
) -> PromptRow:
  """The prompt of one view: frames, question, options, generation prompt.

  Args:
    tokenizer: from `load_tokenizer`.
    question: the user's words.
    options: the choices, without letters; empty for an open question.
    frame_time_s: float[K] seconds of the frames shown, ascending (leave out
      masked frames; none at all gives a blind prompt).
    grid: (height, width) of a frame in visual tokens (after the merger).
    tokens_per_second: positions of the time axis for one second (Qwen2.5-VL:
      2).
    show_time: each frame is preceded by its time as text; else the frames are
      one video.
    time_format: of the time text; one positional field, in seconds.
    question_template: with the fields `{question}` and `{options}`; the latter
      is one line per option, each with a newline before it.
    system: the system message; None leaves it to the chat template.

  Returns:
    PromptRow; its visual indices count frames in the order given.

  Raises:
    ValueError: times that are not finite or go back, or a bad template or
      format.
  """
  time_s = np.asarray(frame_time_s, dtype=np.float64)
  if time_s.ndim != 1 or not np.all(np.isfinite(time_s)):
    raise ValueError(
      "frame_time_s must be finite seconds in one dimension, got"
      f" {time_s.tolist()}; leave out masked frames"
    )
  if np.any(np.diff(time_s) < 0):
    raise ValueError(
      f"frame_time_s must ascend, got {time_s.tolist()}; a shuffled view"
      " keeps the times and moves the pictures"
    )
  user = _fill(
    question_template,
    "question_template",
    "the fields {question} and {options}, and {{ and }} for literal braces",
    question=question,
    options=option_lines(options),
  )

  height, width = grid
  num_visual = height * width
  parts = []
  for piece in tokenizer.chat_pieces(system is not None):
    if piece == _SYSTEM_SLOT:
      parts.append(system)
    elif piece == _USER_SLOT:
      parts += _media(
        tokenizer,
        time_s,
        num_visual,
        show_time=show_time,
        time_format=time_format,
      )
      parts.append(user)
    else:
      parts += tokenizer.split_special(piece)

  pad = tokenizer.special["<|image_pad|>" if show_time else "<|video_pad|>"]
  elapsed = np.zeros(0, np.int64)
  if len(time_s):
    elapsed = np.floor(
      tokens_per_second * (time_s - time_s[0] + _TIME_JITTER_S)
    ).astype(np.int64)
  row, column = np.divmod(np.arange(num_visual), width)

  token, position, visual = [], [], []
  following = 0  # 1 + the maximum over the three axes so far
  first_start = None

  def add(ids, where, shown):
    nonlocal following
    token.extend(ids)
    position.append(where)
    visual.append(shown)
    following = int(where.max()) + 1

  def add_text(ids):
    if ids:
      line = following + np.arange(len(ids))
      add(ids, np.stack([line] * 3), np.full(len(ids), -1))

  text = ""  # neighbouring pieces are encoded together, as the reference does
  for part in [*parts, None]:
    if isinstance(part, str):
      text += part
      continue
    add_text(tokenizer.encode(text))
    text = ""
    if isinstance(part, int):
      add_text([part])
    elif part is not None:
      first, count = part
      begin = following
      first_start = begin if first_start is None else first_start
      time = np.maximum(begin, first_start + elapsed[first : first + count])
      add(
        [pad] * (count * num_visual),
        np.stack(
          [
            np.repeat(time, num_visual),
            np.tile(begin + row, count),
            np.tile(begin + column, count),
          ]
        ),
        first * num_visual + np.arange(count * num_visual),
      )
  return PromptRow(
    token=np.asarray(token, np.int32),
    position=np.concatenate(position, axis=1).astype(np.int32),
    visual=np.concatenate(visual).astype(np.int32),
  )


def count_tokens(
  tokenizer: Tokenizer,
  question: str,
  options: Sequence[str],
  *,
  num_frames: int,
  duration_s: float,
  **build,
) -> int:
  """The most slots a prompt can take, known before a frame is decoded.

  Args:
    tokenizer: from `load_tokenizer`.
    question: as in `build_prompt`.
    options: as in `build_prompt`.
    num_frames: K.
    duration_s: of the video; no time in it has a longer text than its end.
    **build: the other keyword arguments of `build_prompt`.
  """
  return len(
    build_prompt(
      tokenizer,
      question,
      options,
      frame_time_s=np.full(num_frames, duration_s),
      **build,
    ).token
  )


def pad_prompts(
  rows: Sequence[PromptRow], length: int, *, pad_id: int = 0
) -> dict[str, np.ndarray]:
  """Prompts padded on the right, as the fields of `types.Prompt`.

  Args:
    rows: B prompts.
    length: S.
    pad_id: id in padded slots; masks decide, not ids, so any will do.

  Returns:
    token int32[B, S], mask bool[B, S], position int32[B, 3, S] (0 in padded
    slots), visual int32[B, S] (-1 there).

  Raises:
    ValueError: a prompt is longer than `length`; it is never cut.
  """
  longest = max(len(row.token) for row in rows)
  if longest > length:
    raise ValueError(
      f"a prompt has {longest} tokens, the budget is {length}; raise"
      " config.prompt.max_tokens, or show fewer or smaller frames"
    )
  token = np.full((len(rows), length), pad_id, np.int32)
  mask = np.zeros((len(rows), length), bool)
  position = np.zeros((len(rows), 3, length), np.int32)
  visual = np.full((len(rows), length), -1, np.int32)
  for b, row in enumerate(rows):
    count = len(row.token)
    token[b, :count] = row.token
    mask[b, :count] = True
    position[b, :, :count] = row.position
    visual[b, :count] = row.visual
  return {"token": token, "mask": mask, "position": position, "visual": visual}
