"""Damaged and absurd inputs at every door, in bulk.

  python -m benchmarks.fuzz --examples=2000
  python -m benchmarks.fuzz --only=checkpoint --seconds=60

A door may take an input, or refuse it with one of its own errors and a message;
anything else (another exception, a crash, a checkpoint that is read back with
other numbers) is lost. Prints a line for each door and one for all: tried,
survived (and how many of them were refused), lost. tests/test_fuzz.py runs the
same with few examples.
"""

import argparse
import collections
import contextlib
import functools
import json
import os
import pathlib
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from hypothesis import strategies
from ml_collections import config_flags

from cf_jax import main as command
from cf_jax.data import answers, datasets, grounding_answers, prompts, records
from cf_jax.models import config as model_config
from cf_jax.models import hf_config, hf_weights, vlm
from cf_jax.runtime import checkpoint
from cf_jax.types import TrainState

ROOT = pathlib.Path(__file__).parents[1]


class Refused(Exception):
  """A door's own error."""


# ---------------------------------------------------------------- what goes in

TEXT = strategies.text(
  strategies.characters(exclude_categories=()), max_size=40
)
NUMBER = strategies.one_of(
  strategies.integers(),
  strategies.floats(),
  strategies.sampled_from(
    [0, -1, 1, 2**31, 2**63, 2**64, 1e400, -0.0, 10**400]
  ),
)
JSON = strategies.recursive(
  strategies.one_of(strategies.none(), strategies.booleans(), NUMBER, TEXT),
  lambda inner: strategies.one_of(
    strategies.lists(inner, max_size=4),
    strategies.dictionaries(TEXT, inner, max_size=3),
  ),
  max_leaves=6,
)
# (where, how, what): where in a file, as a share of it.
DAMAGE = strategies.lists(
  strategies.tuples(
    strategies.floats(0, 1, exclude_max=True),
    strategies.sampled_from(["flip", "cut", "drop", "double", "zero", "noise"]),
    strategies.integers(0, 2**16 - 1),
  ),
  min_size=1,
  max_size=4,
)


def damage(data: bytes, changes) -> bytes:
  """Bits turned, bytes lost, doubled and made up."""
  for where, how, what in changes:
    place = int(where * len(data))
    size = what % 64 + 1
    left, right = data[:place], data[place:]
    if how == "flip" and right:
      data = left + bytes([right[0] ^ (1 << what % 8)]) + right[1:]
    elif how == "cut":
      data = left
    elif how == "drop":
      data = left + right[size:]
    elif how == "double":
      data = left + right[:size] + right
    elif how == "zero":
      data = left + bytes(len(right[:size])) + right[size:]
    elif how == "noise":
      noise = random.Random(what).randbytes(len(right[:size]))
      data = left + noise + right[size:]
  return data


class Near(NamedTuple):
  """A value like the one that is there: most of a door lies behind it.

  Attributes:
    number: which one.
  """

  number: int

  def of(self, value: Any) -> Any:
    """The value in place of `value`; Ellipsis takes it out."""
    mild, wild = [value], [None, ...]
    if isinstance(value, bool):
      mild, wild = [not value], [*wild, int(value), str(value)]
    elif isinstance(value, int | float):
      mild += [value + 1, 3 * value, 0, 10**6 * value]
      mild += [value + 0.25 if abs(value) < 2**1000 else 0.25]
      wild += [-value, 10**400, -(10**400), 1e308, float("inf"), float("nan")]
      wild += [bool(value), str(value)]
    elif isinstance(value, str):
      mild += [f"{value} x", f" {value}\n", value.upper(), value * 9, "A", "B"]
      mild += [f"{value} é\u202e\U0001f600", f"{value}<|im_end|>", "3"]
      wild += [value[:-1], "", " ", f"../{value}", f"{value}\0", "\ud800"]
      wild += ["1e400", "9" * 400, "0.00 to 1.00", [value]]
    elif isinstance(value, list):
      mild += [value[::-1], value + value, value[:1], value * 13, []]
      wild += [value[1:], [value], dict(enumerate(map(str, value)))]
    elif isinstance(value, dict):
      mild += [value | {"more": "x"}]
      wild += [{}, {f"{key}x": v for key, v in value.items()}, [*value], "x"]
    made = wild if self.number % 3 == 0 else mild
    return made[self.number // 3 % len(made)]


def with_changes(spec: dict, changes) -> dict:
  """Fields of an object and of those within replaced, or taken out."""
  spec = json.loads(json.dumps(spec))
  for where, value in changes:
    places = []

    def walk(node):
      for key in node if isinstance(node, dict) else range(len(node)):
        places.append((node, key))  # noqa: B023
        if isinstance(node[key], dict | list):
          walk(node[key])

    walk(spec)
    if not places:
      break
    node, key = places[int(where * len(places))]
    if isinstance(value, Near):
      value = value.of(node[key])
    if value is Ellipsis:
      del node[key]
    else:
      node[key] = value
  return spec


CHANGES = strategies.lists(
  strategies.tuples(
    strategies.floats(0, 1, exclude_max=True),
    strategies.one_of(strategies.just(...), JSON),
  ),
  min_size=1,
  max_size=3,
)

FEW = strategies.lists(
  strategies.tuples(
    strategies.floats(0, 1, exclude_max=True),
    strategies.integers(0, 359).map(Near),
  ),
  min_size=1,
  max_size=2,
)


@functools.cache
def _scratch() -> pathlib.Path:
  import atexit

  folder = pathlib.Path(tempfile.mkdtemp(prefix="cf_jax_fuzz_"))
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  return folder


# ----------------------------------------------------------------------- doors


def read_answer(text: str) -> None:
  """data/answers.py: strings never raise, and a score is a share."""
  parsed = answers.parse_completion(text)
  box = (0.0, 0.0, 1.0, 1.0)
  common = dict(id="i", video="v", question="q")
  truths = [
    records.Sample(options=("red", "blue", "A"), answer="B", **common),
    records.Sample(kind="tracking", boxes=(box,) * 2, **_open(common)),
  ] + [
    records.Sample(
      kind=kind, start_s=1.0, end_s=4.0, **_open(common, answer="3")
    )
    for kind in ("numerical", "regression", "ocr", "free_form", "interval")
  ]
  for truth in truths:
    for form in ("strict", "last", "json"):
      made = answers.credit(text, parsed, truth, interval_form=form)
      assert all(0 <= score <= 1 for score in made.values()), made
  answers.cited_keyframes(text, np.arange(3.0), tolerance_s=0.1, cite="either")
  grounding_answers.read_indices(text, count=8, num_candidates=128)
  grounding_answers.read_intervals(text)


def _open(common, answer=""):
  return common | {"options": (), "answer": answer}


_CHOICE = {
  "video": "a.mp4",
  "question": "Which?",
  "options": ["red", "blue"],
  "answer": "B",
  "id": "x",
}
_FOUND = {"video": "a.mp4", "question": "When?", "start_s": 1.0, "end_s": 2.5}
# A line of a manifest for what can be in one.
LINES = {
  "choice": _CHOICE
  | {
    "start_s": 1.0,
    "end_s": 2.5,
    "task": "needle",
    "kind": "multiple_choice",
    "reasoning": "Because.",
    "groups": {"length": "short"},
    "labels": ["Option 1", "Option 2"],
    "flaws": ["two are right"],
  },
  "text": _CHOICE | {"answer": "blue", "evidence": [[1.0, 2.0], [3, 4.5]]},
  "grounded": _CHOICE | {"kind": "grounded_qa", "start_s": 0, "end_s": 3},
  "numerical": {"video": "a.mp4", "question": "How many?", "answer": 3},
  "regression": {
    "video": "a.mp4",
    "question": "How far?",
    "answer": "1,250.5",
    "kind": "regression",
    "duration_s": 9.5,
  },
  "open": {
    "video": "a.mp4",
    "question": "What?",
    "answer": "a cat",
    "kind": "open_ended",
    "rubric": "Is it right?",
    "subtitles": "a.srt",
    "subtitles_start_s": 30,
  },
  "interval": _FOUND | {"kind": "interval", "clip": [2.0, 12.5]},
  "highlights": _FOUND
  | {"kind": "interval", "saliency": [[0, [1, 2, 3]], [1, [0, 4, 4]]]},
  "tracking": {
    "video": "frames",
    "fps": 3.0,
    "image": "a.png",
    "question": "Where?",
    "kind": "tracking",
    "boxes": [[0.1, 0.1, 0.3, 0.4], [0.2, 0.1, 0.4, 0.4]],
  },
  "caption": {
    "video": "a.mp4",
    "question": "What happens?",
    "kind": "caption",
    "events": ["It rises.", "It falls."],
  },
}


def read_manifest(case) -> None:
  """data/records.py: a line of JSON with odd fields, or a damaged file.

  What is taken can be judged, and is the same when it is written and read.
  """
  name, changes = case
  path = _scratch() / "my.jsonl"
  if len(changes[0]) == 3:
    rows = [LINES[name] | {"id": str(n)} for n in range(3)]
    whole = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(damage(whole, changes))
  else:
    path.write_text(json.dumps(with_changes(LINES[name], changes)) + "\n")
  try:
    samples = records.load_jsonl(path)
    earned = {name for names in answers.CREDIT.values() for name in names}
    answers.check_samples(samples, components=sorted(earned), has_judge=True)
  except ValueError as error:
    raise Refused(error) from error
  for sample in samples:
    inside = pathlib.Path(sample.video).resolve().is_relative_to(_scratch())
    assert inside and isinstance(sample.question, str)
    _judge(sample)
  path.write_text(records.to_jsonl(samples))
  assert records.load_jsonl(path) == samples


def _judge(sample: records.Sample) -> None:
  """Any completion has a share of the credit."""
  for answer in ("A", "3", sample.answer, "1.00 to 2.50", "[[0, 0, 1, 1]]", ""):
    text = f"<think>At 1.5s.</think><answer>{answer}</answer>"
    parsed = answers.parse_completion(text)
    if sample.kind not in answers.JUDGED:
      made = answers.credit(text, parsed, sample, interval_form="strict")
      assert all(0 <= score <= 1 for score in made.values()), made


_RECIPE = {"id": "v_0", "question": "Which?", "answer": "b"}
# Dataset -> a name of its files, and a right file of its own.
PUBLISHED = {
  "videomme": (
    "a.json",
    [
      dict(
        videoID="v",
        question_id="001-1",
        question="Which?",
        options=["A. Apples.", "B. Candles."],
        answer="A",
        task_type="Counting Problem",
        duration="short",
        domain="Knowledge",
        sub_category="Geography",
      )
    ],
  ),
  "lvbench": (
    "a.jsonl",
    {
      "key": "Cm73",
      "type": "cartoon",
      "video_info": {"duration_minutes": 2.0},
      "qa": [
        {
          "uid": 55,
          "question": "Which year?\n(A) 1636\n(B) 1366",
          "answer": "B",
          "question_type": ["reasoning", "summarization"],
          "time_reference": "01:00-01:30",
        }
      ],
    },
  ),
  "longvideobench": (
    "lvb_val.json",
    [
      _RECIPE
      | dict(
        video_path="v.mp4",
        candidates=["a", "b", "c"],
        correct_choice=2,
        question_category="TOS",
        topic_category="KA",
        level="L2-Relation",
        duration_group=600,
        duration=190.16,
        subtitle_path="v_en.json",
        starting_timestamp_for_subtitles=30,
      )
    ],
  ),
  "mlvu": (
    "1_plotQA.json",
    [
      _RECIPE
      | dict(video="a.mp4", duration=9, question_type="plotQA")
      | dict(candidates=["a", "b"])
    ],
  ),
  "mvbench": (
    "episodic_reasoning.json",
    [
      _RECIPE | dict(video="clip_01", candidates=["a", "b"], start=2.0, end=5.0)
    ],
  ),
  "tempcompass": (
    "multi-choice.json",
    {
      "1_reverse": {
        "order": [{"question": "What?\nA. up\nB. down", "answer": "B. down"}]
      }
    },
  ),
  "vsibench": (
    "test.jsonl",
    dict(
      id=3,
      dataset="scannet",
      scene_name="scene0_00",
      question="How?",
      question_type="room_size_estimation",
      ground_truth="21.8",
      options=None,
    ),
  ),
  "charades_sta": (
    "test.json",
    {
      "3MSZA": {
        "duration": 30.96,
        "timestamps": [[24.3, 30.4]],
        "sentences": ["person turn a light on."],
      }
    },
  ),
  "activitynet": (
    "val_2.json",
    {
      "v_a": {
        "duration": 55.15,
        "timestamps": [[0, 4.14], [4.14, 50]],
        "sentences": ["Two men.", " One man."],
      }
    },
  ),
  "dream1k": (
    "DREAM-1k.jsonl",
    dict(
      idx=2,
      video_file="video/2.mp4",
      description="It was.",
      events=["it was"],
      duration=3.0,
      source="youtube",
    ),
  ),
  "video_r1": (
    "a.json",
    [
      {
        "problem_id": 7,
        "problem": "Which?",
        "data_type": "video",
        "problem_type": "multiple choice",
        "options": ["A. red", "B. blue"],
        "process": "<think>It is blue.</think>",
        "solution": "<answer>B</answer>",
        "path": "./CLEVRER/train/v.mp4",
        "data_source": "CLEVRER",
      }
    ],
  ),
  "llava_video": (
    "0_30_s_mc_qa.json",
    [
      {
        "id": "x",
        "video": "academic_source/a.mp4",
        "data_source": "academic",
        "conversations": [
          {
            "from": "human",
            "value": "<image>\nWho?\nA. Ann\nB. Bob\nAnswer by the letter.",
          },
          {"from": "gpt", "value": "B."},
        ],
      }
    ],
  ),
}


def read_annotations(case) -> None:
  """data/datasets.py: an annotation file of a published form, changed."""
  name, changes = case
  file, made = PUBLISHED[name]
  folder = _scratch() / "annotations"
  folder.mkdir(exist_ok=True)
  path = folder / file
  made = {"": made}
  made = with_changes(made, changes).get("", None)
  path.write_text(json.dumps(made) + "\n")
  try:
    samples = datasets.read(name, path)
    for sample in samples:
      answers.check_sample(sample)
  except ValueError as error:
    raise Refused(error) from error
  for sample in samples:
    assert ".." not in pathlib.Path(sample.video).parts, sample.video
    _judge(sample)


@functools.cache
def _tokenizer_files() -> dict[str, bytes]:
  return {p.name: p.read_bytes() for p in prompts.TINY_TOKENIZER.iterdir()}


def read_tokenizer(case) -> None:
  """data/prompts.py: a folder of tokenizer files."""
  number, changes = case
  files = _tokenizer_files()
  hit = sorted(files)[number % len(files)]
  folder = _scratch() / "tokenizer"
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir()
  for name, data in files.items():
    if name == hit:
      if len(changes[0]) == 3:
        data = damage(data, changes)
      else:
        data = json.dumps(with_changes(json.loads(data), changes)).encode()
    (folder / name).write_bytes(data)
  try:
    tokenizer = prompts.load_tokenizer(folder)
    tokenizer.decode(tokenizer.encode("<|im_end|> red 1.5s"))
    prompts.build_prompt(
      tokenizer,
      "What?",
      ("red", "blue"),
      frame_time_s=(0.0, 1.0),
      grid=(4, 4),
      show_time=True,
      time_format="{:.1f}s",
      question_template="{question}{options}",
      tokens_per_second=2,
    )
  except ValueError as error:
    raise Refused(error) from error


@functools.cache
def _small() -> model_config.VLMConfig:
  return model_config.make(
    size="tiny",
    vocab_size=24,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    mrope_section=(1, 2, 1),
    num_attention_heads=2,
    num_key_value_heads=1,
    vision=dict(
      depth=1,
      hidden_size=8,
      intermediate_size=8,
      num_heads=2,
      out_hidden_size=16,
      patch_size=2,
      window_size=8,
      fullatt_block_indexes=(0,),
    ),
  )


@functools.cache
def _directory() -> pathlib.Path:
  folder = _scratch() / "whole"
  shapes = jax.eval_shape(lambda: vlm.init(_small(), jax.random.key(0)))
  params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  hf_weights.save_hf(folder, _small(), params)
  return folder


def read_hf_config(changes) -> None:
  """models/hf_config.py: config.json with odd fields."""
  spec = json.loads((_directory() / "config.json").read_text())
  try:
    hf_config.from_hf(with_changes(spec, changes))
  except ValueError as error:
    raise Refused(error) from error


def read_safetensors(case) -> None:
  """models/hf_weights.py: headers with odd lengths, places, types and sizes."""
  kind, changes = case
  data = (_directory() / hf_weights.SINGLE).read_bytes()
  size = int.from_bytes(data[:8], "little")
  header, rest = data[8 : 8 + size], data[8 + size :]
  if kind == "bytes":
    data = damage(data[: 8 + size], changes) + rest
  elif kind == "length":
    number = [2**63, 2**64 - 1, size - 1, size + 8, 0, 10**9, 10**8 + 1, 2]
    data = number[changes[0][2] % len(number)].to_bytes(8, "little") + data[8:]
  elif kind == "cut":
    data = data[: int(changes[0][0] * len(data))]
  else:
    header = json.dumps(with_changes(json.loads(header), changes)).encode()
    data = len(header).to_bytes(8, "little") + header + rest
  folder = _scratch() / "hf"
  folder.mkdir(exist_ok=True)
  shutil.copy(_directory() / "config.json", folder)
  (folder / hf_weights.SINGLE).write_bytes(data)
  try:
    _, params = hf_weights.load_hf(folder)
  except ValueError as error:
    raise Refused(error) from error
  shapes = jax.eval_shape(lambda: vlm.init(_small(), jax.random.key(0)))
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)


def _state() -> TrainState:
  # Numbers that do not compress to nothing.
  rng = np.random.default_rng(0)
  return TrainState(
    step=jnp.int32(2),
    params={"kernel": jnp.asarray(rng.normal(size=(8, 16)), jnp.float32)},
    opt_state=(jnp.asarray(rng.normal(size=300), jnp.float32),),
    rng=jax.random.key_data(jax.random.key(0)),
  )


@functools.cache
def _saved() -> pathlib.Path:
  folder = _scratch() / "checkpoints"
  with checkpoint.Checkpoints(folder, keep=1) as store:
    store.save(2, _state(), {"loader": {"next": 3}})
  return folder


def read_checkpoint(case) -> None:
  """runtime/checkpoint.py: a folder with a damaged or missing file."""
  number, changes = case
  folder = _scratch() / "broken"
  shutil.rmtree(folder, ignore_errors=True)
  shutil.copytree(_saved(), folder)
  files = sorted(p for p in folder.rglob("*") if p.is_file())
  hit = files[number % len(files)]
  if changes[0][1] == "drop" and changes[0][2] % 4 == 0:
    hit.unlink()
  else:
    hit.write_bytes(damage(hit.read_bytes(), changes))
  try:
    with checkpoint.Checkpoints(folder, keep=1, read_only=True) as store:
      state, host = store.restore(jax.tree.map(jnp.zeros_like, _state()))
  except (ValueError, OSError) as error:
    raise Refused(error) from error
  for a, b in zip(
    jax.tree.leaves(state), jax.tree.leaves(_state()), strict=True
  ):
    same = np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert same, f"other numbers after damage to {hit.name}"
  assert host == {"loader": {"next": 3}}, f"other host state: {hit.name}"


KEYS = (
  "seed",
  "rl.steps",
  "rl.optim.learning_rate",
  "mesh.data",
  "tad.num_keyframes",
  "data.reader.size_px",
  "data.synthetic.tasks",
  "sft.optim.frozen",
  "model.size",
  "distributed",
  "answers.components",
)
VALUES = strategies.one_of(
  TEXT,
  JSON.map(json.dumps),
  JSON.map(repr),
  strategies.sampled_from(
    [
      "__import__('os').system('true')",
      "(" * 5000,
      "9" * 5000,
      "1e999",
      "None",
      "(1,",
      "[].__class__",
      "{'a': 1}",
      "lambda: 0",
    ]
  ),
)


def override(case) -> None:
  """main.py: `--config.KEY=VALUE` keeps a setting's type, or is refused."""
  key, value, name = case
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", None, "", values, lock_config=True)
  path = str(ROOT / "configs" / "kfgrpo_cpu.py")
  argv = ["main", f"--config={path}", f"--config.{name or key}={value}"]
  try:
    with _command_line(argv):
      values(argv)
  # What cf_jax.main._parse turns into a sentence.
  except (AttributeError, KeyError, OSError, flags.Error) as error:
    said = command.explain_flag_error(error, argv)
    assert said and "Traceback (most" not in said, said
    raise Refused(said) from error
  except ValueError as error:  # one sentence of cf_jax.main.main
    raise Refused(error) from error
  before, after = _setting(path, key), values.config
  for part in key.split("."):
    after = after[part]
  kinds = (type(before), int) if isinstance(before, float) else type(before)
  assert name or isinstance(after, kinds), (before, after)


@contextlib.contextmanager
def _command_line(argv: list[str]) -> Iterator[None]:
  """Overrides are looked for in `sys.argv`."""
  before, sys.argv = sys.argv, argv
  try:
    yield
  finally:
    sys.argv = before


@functools.cache
def _setting(path: str, key: str) -> Any:
  values, argv = flags.FlagValues(), ["main", f"--config={path}"]
  config_flags.DEFINE_config_file("config", None, "", values)
  with _command_line(argv):
    values(argv)
  found = values.config
  for part in key.split("."):
    found = found[part]
  return found


class Door(NamedTuple):
  """Where something comes in.

  Attributes:
    check: raises Refused, or nothing, or what is wrong with the door.
    cases: what is tried.
  """

  check: Callable[[Any], None]
  cases: strategies.SearchStrategy


PIECES = (
  "<think> </think> <answer> </answer> <glue> </glue> [ ] , 1 4 1e400 nan to A"
  ' B or frame ( ) . 1.5s < \ud800 \x00 \u0664 \u0410 { } "start_time": : "'
)
TAGS = strategies.sampled_from([*PIECES.split(" "), " ", "\n"])
EITHER = strategies.one_of(DAMAGE, CHANGES)
DOORS = {
  "answers": Door(
    read_answer,
    strategies.one_of(TEXT, strategies.lists(TAGS, max_size=20).map("".join)),
  ),
  "manifest": Door(
    read_manifest,
    strategies.tuples(
      strategies.sampled_from(sorted(LINES)),
      strategies.one_of(FEW, FEW, FEW, CHANGES, DAMAGE),
    ),
  ),
  "annotations": Door(
    read_annotations,
    strategies.tuples(
      strategies.sampled_from(sorted(PUBLISHED)),
      strategies.one_of(FEW, FEW, FEW, CHANGES),
    ),
  ),
  "tokenizer": Door(
    read_tokenizer, strategies.tuples(strategies.integers(0, 9), EITHER)
  ),
  "hf_config": Door(read_hf_config, CHANGES),
  "safetensors": Door(
    read_safetensors,
    strategies.one_of(
      strategies.tuples(
        strategies.sampled_from(["bytes", "length", "cut"]), DAMAGE
      ),
      strategies.tuples(strategies.just("header"), CHANGES),
    ),
  ),
  "checkpoint": Door(
    read_checkpoint, strategies.tuples(strategies.integers(0, 99), DAMAGE)
  ),
  "override": Door(
    override,
    strategies.tuples(
      strategies.sampled_from(KEYS),
      VALUES,
      strategies.one_of(strategies.just(""), strategies.just(""), TEXT),
    ),
  ),
}


def run(
  name: str, examples: int, *, seconds: float = 1e9, seed: int = 0
) -> tuple[collections.Counter, Exception | None]:
  """Tries a door.

  Returns:
    Counts of "tried" and "refused", and what went wrong first, made small.
  """
  door, count = DOORS[name], collections.Counter()
  begin = time.monotonic()

  @hypothesis.seed(seed)
  @hypothesis.settings(
    max_examples=examples,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
    print_blob=False,
  )
  @hypothesis.given(door.cases)
  def check(case):
    late = time.monotonic() - begin > seconds
    if late and not count["failed"]:  # what failed is made small in peace
      return
    count["tried"] += 1
    count["failed"] += 1
    try:
      door.check(case)
      count["failed"] -= 1
    except Refused as refused:
      count["failed"] -= 1
      count["refused"] += 1
      assert str(refused).strip(), f"refused without a word: {case!r}"

  found = None
  try:
    check()
  except Exception as error:
    found = error
  del count["failed"]
  return count, found


def main() -> int:
  """All doors; the exit code is 1 where one gave way."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--examples", type=int, default=2000, help="each door")
  parser.add_argument(
    "--seconds", type=float, default=1e9, help="for each door"
  )
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--only", choices=sorted(DOORS))
  args = parser.parse_args()
  logging.set_verbosity(logging.FATAL)  # of orbax, about what it refuses
  total = collections.Counter()
  for name in [args.only] if args.only else DOORS:
    count, error = run(
      name, args.examples, seconds=args.seconds, seed=args.seed
    )
    total += count
    total["lost"] += error is not None
    print(f"{name}: {dict(count)}", flush=True)
    if error is not None:
      print(f"  LOST: {type(error).__name__}: {error}"[:3000])
      for inner in getattr(error, "exceptions", ()):
        print(f"  {type(inner).__name__}: {inner}"[:1500])
      for note in getattr(error, "__notes__", ()):
        print(f"  {note}"[:1500], flush=True)
  survived = total["tried"] - total["lost"]
  print(
    f"fuzz: tried {total['tried']}, survived {survived} (refused"
    f" {total['refused']}), lost {total['lost']}"
  )
  return 1 if total["lost"] else 0


if __name__ == "__main__":
  sys.exit(main())
