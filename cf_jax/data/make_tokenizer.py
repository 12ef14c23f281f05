"""Trains the small tokenizer that ships with the package.

  python -m cf_jax.data.make_tokenizer

A byte-level BPE over the words of the built-in task, with the normaliser, the
pre-tokenizer and the 22 added tokens (names and order) of Qwen2.5, and a chat
template that renders like Qwen2.5-VL's. Training has no randomness: the same
words give the same files.
"""

import collections
import itertools
import json
import pathlib
from collections.abc import Iterable

import tokenizers
from absl import app, flags

from cf_jax import disk
from cf_jax.data import prompts

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
LATER_TAGS = ("<glue>", "</glue>", "<index>", "</index>")
# Qwen2.5's split. It would cut "<think>" in two, so the tags go before it; and
# it would take "]</" of "]</glue>" for one piece, so marks end before a tag.
_TAG = "|".join(TAGS + LATER_TAGS)
SPLIT = (
  rf"{_TAG}"
  r"|(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  rf"| ?(?:(?!{_TAG})[^\s\p{{L}}\p{{N}}])+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

COLOURS = (
  "red",
  "green",
  "blue",
  "yellow",
  "orange",
  "purple",
  "pink",
  "cyan",
  "magenta",
  "brown",
  "white",
  "black",
  "gray",
  "teal",
  "lime",
  "navy",
)
SENTENCES = (
  "You are a helpful assistant.",
  "Which colour of shape appears in the video?",
  "Which color of shape appears in the video?",
  "Which colour appears first?",
  "Which of these colours appears last?",
  "How many times does a shape appear?",
  "Does the disc, the square, the diamond or the ring appear before it?",
  "When does this event happen? What comes after that, and then?",
  "Think, then answer.",
  "Answer with one letter.",
  "yes no none one two three four five once twice",
  "system user assistant frame frames time seconds second video image",
  "start end from to between at is was of on in not",
)

# Words that came later: their tokens follow those of `corpus`, so that a text
# without them keeps its ids.
LATER_WORDS = (
  *LATER_TAGS,
  *("What", "Where", " when", " happens", " order", "end", "_time"),
  *("[[", "],[", "]]", "[(", "),(", ")]", '{"', '":"', '","', '"}'),
)

CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- if loop.first and message['role'] != 'system' %}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string %}
{{- message['content'] }}
{%- else %}
{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}
{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part['type'] == 'video' %}
{{- '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- else %}
{{- part['text'] }}
{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def corpus() -> list[str]:
  """Every text whose words become single tokens, the commonest repeated."""
  letters = "ABCDEFGH"
  words = [*TAGS, *letters, *(f" {c}" for c in letters), *"0123456789"]
  for colour in COLOURS:
    words += [colour, f" {colour}"]
  for sentence in SENTENCES:
    words.append(sentence)
    words += [f" {word}" for word in sentence.split()]
  return words + ["\n", "s", ". ", "? "]


def train(texts: Iterable[str]) -> tokenizers.Tokenizer:
  """A byte-level BPE in which every pre-token of `texts` is one token."""
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.normalizer = tokenizers.normalizers.NFC()
  byte_level = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [
      tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(SPLIT), behavior="isolated"
      ),
      byte_level,
    ]
  )
  made.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    # A ceiling that is not reached: training ends when no pair is left.
    vocab_size=4096,
    min_frequency=1,
    show_progress=False,
    initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
  )
  made.train_from_iterator(texts, trainer)
  return made


def extend(made: tokenizers.Tokenizer, words: Iterable[str]) -> None:
  """Makes every word one token; tokens and merges so far keep their places.

  Byte-pair encoding goes on where training ended: the commonest pair of pieces
  of the words becomes a token, the first in the alphabet of equals.

  Args:
    made: from `train`; changed.
    words: each one pre-token.
  """
  model = json.loads(made.to_str())["model"]
  vocab, merges = model["vocab"], list(map(tuple, model["merges"]))
  pieces = [
    [token.value for token in made.model.tokenize(symbols)]
    for word in words
    for symbols, _ in made.pre_tokenizer.pre_tokenize_str(word)
  ]
  while any(len(word) > 1 for word in pieces):
    pairs = collections.Counter(
      pair for word in pieces for pair in itertools.pairwise(word)
    )
    best = min(pairs, key=lambda pair: (-pairs[pair], pair))
    merges.append(best)
    vocab["".join(best)] = len(vocab)
    pieces = [_merge(word, best) for word in pieces]
  made.model = tokenizers.models.BPE(vocab=vocab, merges=merges)


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
  """The word with every such pair of neighbours as one piece."""
  done = []
  for piece in word:
    if done and (done[-1], piece) == pair:
      done[-1] += piece
    else:
      done.append(piece)
  return done


def make() -> tokenizers.Tokenizer:
  """The shipped tokenizer."""
  made = train(corpus())
  extend(made, LATER_WORDS)
  made.add_special_tokens(
    [
      tokenizers.AddedToken(name, special=True, normalized=False)
      for name in prompts.ADDED_TOKENS
    ]
  )
  return made


def write(out: pathlib.Path) -> None:
  """Writes tokenizer.json and tokenizer_config.json into `out`."""
  disk.write_text(out / "tokenizer.json", make().to_str(pretty=True))
  settings = {
    "chat_template": CHAT_TEMPLATE,
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    # transformers 5 gives Qwen2Tokenizer Qwen2.5's split whatever the file
    # says; this class keeps the file's, with the tags.
    "tokenizer_class": "PreTrainedTokenizerFast",
  }
  disk.write_text(
    out / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n"
  )


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}; use --out=FOLDER")
  out = pathlib.Path(flags.FLAGS.out)
  write(out)
  print(f"{out}: {prompts.load_tokenizer(out).vocab_size} tokens")


if __name__ == "__main__":
  flags.DEFINE_string("out", str(prompts.TINY_TOKENIZER), "folder of the files")
  app.run(main)
