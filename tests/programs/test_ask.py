"""A question about a video, from the settings to the streamed answer.

The policy is a small random one in a Qwen2.5-VL directory; the video has three
scenes of one colour each.
"""

import contextlib
import dataclasses
import functools
import io
import json
import os
import subprocess
import sys

import cv2
import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from cf_jax import policy as policy_lib
from cf_jax import sampling, selectors
from cf_jax.data import patches, prompts, video
from cf_jax.models import config as model_config
from cf_jax.models import hf_weights, vlm
from cf_jax.programs import ask, policies
from cf_jax.runtime import sharding, telemetry
from cf_jax.types import Prompt
from tests.conftest import ROOT, load_config

QUESTION = "Is <|image_pad|> a colour, naïve one?"
MAX_TOKENS = 24
FPS = 4.0
CUTS = (8, 20)  # frames at which a scene starts
END, ALSO_END = "<|im_end|>", "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer():
  return prompts.load_tokenizer("tiny")


@pytest.fixture(scope="module")
def model(tokenizer):
  return model_config.make(
    size="tiny",
    vocab_size=tokenizer.vocab_size + 3,  # rows that no id uses
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    mrope_section=(1, 2, 1),
    max_position_embeddings=512,
    initializer_range=0.5,
    vision=dict(
      depth=1,
      hidden_size=16,
      intermediate_size=24,
      num_heads=2,
      out_hidden_size=32,
      fullatt_block_indexes=(0,),
    ),
    **tokenizer.config_ids,
  )


@pytest.fixture(scope="module")
def params(model):
  return jax.jit(lambda: vlm.init(model, jax.random.key(3)))()


@pytest.fixture(scope="module")
def checkpoint(model, params, tokenizer, tmp_path_factory):
  """A Qwen2.5-VL directory whose generation_config.json has two end ids."""
  folder = tmp_path_factory.mktemp("model") / "qwen"
  hf_weights.save_hf(folder, model, params, tokenizer=tokenizer.folder)
  ends = [tokenizer.special[END], tokenizer.special[ALSO_END]]
  told = {"eos_token_id": ends, "temperature": 5.0, "repetition_penalty": 9.0}
  (folder / "generation_config.json").write_text(json.dumps(told))
  return folder


@pytest.fixture(scope="module")
def clip(write_video, tmp_path_factory):
  """32 frames of 64 x 96 px at 4 a second: red, green, blue."""
  frames = np.zeros((32, 64, 96, 3), np.uint8)
  for channel, (first, last) in enumerate(
    zip((0, *CUTS), (*CUTS, 32), strict=True)
  ):
    frames[first:last, ..., channel] = 200
  return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", frames, FPS)


def make_config(checkpoint, clip):
  """configs/ask.py for the above, unlocked."""
  config = load_config("configs/ask.py")
  config.update(checkpoint=str(checkpoint), video=str(clip), question=QUESTION)
  config.num_keyframes = 3
  config.scan.update(num_frames=32, size_px=(32, 32), num_threads=1)
  config.sampling.max_tokens = MAX_TOKENS
  config.sampling.temperature = 1.0
  return config


@pytest.fixture
def config(checkpoint, clip):
  return make_config(checkpoint, clip)


def run(config, workdir):
  """What answer.json holds, and what went to standard output and error."""
  with (
    contextlib.redirect_stdout(io.StringIO()) as out,
    contextlib.redirect_stderr(io.StringIO()) as err,
  ):
    told = ask.run(config.lock(), workdir)
  return told, out.getvalue(), err.getvalue(), workdir


@pytest.fixture(scope="module")
def asked(checkpoint, clip, tmp_path_factory):
  """One keyframe to a slice."""
  workdir = tmp_path_factory.mktemp("asked")
  return run(make_config(checkpoint, clip), workdir)


@pytest.fixture(scope="module")
def asked_in_pairs(checkpoint, clip, tmp_path_factory):
  """Two to a slice; the third has one with itself."""
  config = make_config(checkpoint, clip)
  config.prompt.frames_per_slice = 2
  return run(config, tmp_path_factory.mktemp("pairs"))


@pytest.mark.parametrize("per_slice", [1, 2])
def test_the_answer_is_generates(
  asked, asked_in_pairs, model, params, tokenizer, clip, per_slice
):
  """Put together by hand from the file, and sampled in one go."""
  told, out, *_ = asked if per_slice == 1 else asked_in_pairs
  numbers = [keyframe["frame"] for keyframe in told["keyframes"]]
  rows, columns = told["frame_px"]
  frames, time_s = video.read_frames(
    clip, np.array(numbers), (rows, columns), resize="bicubic"
  )
  row = prompts.build_prompt(
    tokenizer,
    QUESTION,
    (),
    frame_time_s=time_s[::per_slice],
    grid=(rows // 28, columns // 28),
    tokens_per_second=2,
    question_template="{question}{options}",
  )
  banned = tokenizer.banned_mask(model.vocab_size)
  banned[tokenizer.special[ALSO_END]] = False
  ends = (tokenizer.special[END], tokenizer.special[ALSO_END])

  @jax.jit
  def generate(prompt, pixel, seed):
    visual = policy_lib.encode_frames(
      model, params, pixel, grid=(rows // 14, columns // 14)
    )
    return sampling.generate(
      model,
      params,
      prompt,
      visual.reshape(1, -1, visual.shape[-1]),
      seed,
      banned,
      num_completions=1,
      max_tokens=MAX_TOKENS,
      eos_id=ends,
    )

  rollout = jax.device_get(
    generate(
      Prompt(**prompts.pad_prompts([row], len(row.token))),
      patches.frames_to_patches(frames, pair=per_slice == 2)[None],
      sampling.row_seeds(jax.random.key(0), jnp.array([0])),
    )
  )
  ids = rollout.token[0, 0][rollout.mask[0, 0]].tolist()
  assert told["tokens"]["new"] == len(ids) > 1
  assert told["tokens"]["visual"] == (18 if per_slice == 1 else 12)
  assert told["ended"] == (ids[-1] in ends) == bool(rollout.finished)
  text = tokenizer.decode(i for i in ids if i not in ends)
  assert told["answer"] == text
  assert out == text + "\n"  # and nothing else


def test_what_was_seen_and_what_it_cost(asked, tokenizer):
  told, _, err, workdir = asked
  kept = json.loads((workdir / "answer.json").read_text("utf-8"))
  assert kept == telemetry.to_jsonable(told)
  # One frame of each scene, at the time that the file gives it.
  numbers = [keyframe["frame"] for keyframe in told["keyframes"]]
  assert [sum(n >= cut for cut in CUTS) for n in numbers] == [0, 1, 2]
  times = [keyframe["time_s"] for keyframe in told["keyframes"]]
  np.testing.assert_allclose(times, np.array(numbers) / FPS, atol=1e-6)
  # 64 x 96 px are 2.29 x 3.43 visual tokens, rounded 2 x 3.
  assert told["frame_px"] == [56, 84]
  tokens = told["tokens"]
  assert (tokens["visual"], tokens["visual_per_slice"]) == (18, 6)
  assert tokens["prompt"] == tokens["visual"] + tokens["text"]
  assert tokens["slots"] % 64 == 0
  assert 0 <= tokens["slots"] - tokens["prompt"] < 64
  phases = {"video", "load", "compile", "vision", "prefill", "decode", "all"}
  assert set(told["seconds"]) == phases
  assert told["tokens_per_s"] == pytest.approx(
    (tokens["new"] - 1) / told["seconds"]["decode"]
  )
  assert told["settings"]["resize"] == "bicubic"  # what None stood for
  picture = matplotlib.image.imread(workdir / "keyframes.png")
  assert picture.shape[1] > 1000 and picture[..., :3].std() > 0.1
  for said in ("18 visual (6 per slice)", f"{times[1]:.2f}", "key/value cache"):
    assert said in err


def test_memory_is_what_is_held(model, params):
  memory = ask.memory_bytes(model, slots=100, dtype=None)
  assert memory["parameters"] == sum(p.nbytes for p in jax.tree.leaves(params))
  # keys and values x layers x slots x heads x width x float32
  assert memory["cache"] == 2 * 2 * 100 * 2 * 8 * 4
  half = ask.memory_bytes(model, slots=100, dtype="bfloat16")
  assert half == {name: size // 2 for name, size in memory.items()}


def test_from_the_command_line(checkpoint, clip, tmp_path):
  """Only the answer is piped."""
  ran = subprocess.run(
    [
      sys.executable,
      "-m",
      "cf_jax.main",
      "--config=configs/ask.py",
      f"--workdir={tmp_path}",
      f"--config.checkpoint={checkpoint}",
      f"--config.video={clip}",
      "--config.question=Which colour, naïve one?",
      "--config.options=('red','blue')",
      "--config.num_keyframes=3",
      "--config.scan.num_frames=32",
      "--config.scan.size_px=(32,32)",
      f"--config.sampling.max_tokens={MAX_TOKENS}",
      "--config.stream_tokens=7",
      "--config.compilation_cache_dir=",
    ],
    cwd=ROOT,
    capture_output=True,
    env=os.environ | {"PYTHONIOENCODING": "utf-8"},
  )
  assert ran.returncode == 0, ran.stderr.decode()
  told = json.loads((tmp_path / "answer.json").read_text("utf-8"))
  assert ran.stdout.decode() == told["answer"] + "\n"
  assert told["options"] == ["red", "blue"] and len(told["keyframes"]) == 3
  assert told["tokens"]["new"] > 1


class Spelled:
  """A tokenizer whose id `n` stands for the nth of some byte strings."""

  def __init__(self, *pieces):
    self.token_bytes = pieces.__getitem__


def test_unfinished_characters_wait():
  # "aé€" is 61 | C3 A9 | E2 82 AC in UTF-8, "😀" is F0 9F 98 80.
  text = ask.Text(
    Spelled(b"a\xc3", b"\xa9\xe2", b"\x82", b"\xac!", b"\xf0\x9f", b"\x98\x80")
  )
  said = [text([i]) for i in range(4)] + [text([4]), text([5]), text([0])]
  assert said == ["a", "é", "", "€!", "", "😀", "a"]
  assert text([], last=True) == "\ufffd"  # the C3 that nothing followed


def test_bytes_that_are_no_text():
  text = ask.Text(Spelled(b"\xff", b"\xe2\x82", b"b"))
  # A broken start shows when the next byte does not go on with it.
  assert [text([0]), text([1]), text([2])] == ["\ufffd", "", "\ufffdb"]


def test_a_reader_that_has_left(monkeypatch):
  """`| head -c 5` is no error: the answer goes on into answer.json."""
  reader, writer = os.pipe()
  os.close(reader)
  with os.fdopen(writer, "w") as out:
    monkeypatch.setattr(sys, "stdout", out)
    ask.say("one")
    ask.say("two")


def test_a_terminal_that_cannot_show_it(monkeypatch, tmp_path):
  with open(tmp_path / "out", "w", encoding="ascii") as out:
    monkeypatch.setattr(sys, "stdout", out)
    ask.say("né")
  assert (tmp_path / "out").read_bytes() == b"n?"


def test_users_text_is_never_a_token(config, model, tokenizer):
  """Slots of pictures are those, and only those, that show one."""
  config.options = ("<|vision_start|>", "<|im_end|>")
  config = ask.settle(config, model)
  seen = ask.look(config, 28)
  prompt, cost = ask.word(config, model, tokenizer, seen)
  pad = tokenizer.special["<|image_pad|>"]
  np.testing.assert_array_equal(prompt.token == pad, prompt.visual >= 0)
  ids = prompt.token[0].tolist()
  assert ids.count(tokenizer.special["<|vision_start|>"]) == 3
  text = tokenizer.decode(prompt.token[prompt.mask & (prompt.visual < 0)])
  assert f"{QUESTION}\nA. <|vision_start|>\nB. <|im_end|>" in text


def test_positions_per_second_are_the_models(config, model, tokenizer):
  config.prompt.build.show_time = False
  config = ask.settle(config, model)
  seen = ask.look(config, 28)
  seen = seen._replace(time_s=np.array([0.5, 1.5, 4.0]))
  for per_second in (2, 5):
    vision = dataclasses.replace(model.vision, tokens_per_second=per_second)
    other = dataclasses.replace(model, vision=vision)
    prompt, _ = ask.word(config, other, tokenizer, seen)
    time = prompt.position[0, 0][prompt.visual[0] >= 0]
    first = time - time[0]
    expected = np.repeat([0, 1 * per_second, int(3.5 * per_second)], 6)
    np.testing.assert_array_equal(first, expected)


def test_a_run_is_asked_as_it_was_trained(config, model, tmp_path):
  build = dict(
    show_time=False,
    time_format="{:.0f}s",
    question_template="{question}",
    tokens_per_second=2,
  )
  trained = dict(
    tad={"num_keyframes": 5},
    data={"reader": {"size_px": [56, 28], "resize": "area"}},
    prompt={
      "build": build,
      "frames_per_slice": 2,
      "number_frames": True,
      "templates": {"multiple_choice": "Choose: {question}{options}"},
    },
  )
  telemetry.write_json(tmp_path / "manifest.json", {"config": trained})
  config.checkpoint = str(tmp_path)
  config.num_keyframes = None
  config.prompt.build.time_format = "at {}"
  settled = ask.settle(config, model)
  assert settled.num_keyframes == 5 and settled.resize == "area"
  assert settled.frame.to_dict() == dict(
    min_pixels=56 * 28, max_pixels=56 * 28, total_pixels=None
  )
  assert settled.prompt.build.to_dict() == dict(
    show_time=False,
    time_format="at {}",  # the user's own
    question_template="{question}",
    system=None,
  )
  assert settled.prompt.frames_per_slice == 2 and settled.prompt.number_frames
  config.options = ("red", "blue")
  template = ask.settle(config, model).prompt.build.question_template
  assert template == "Choose: {question}{options}"


def test_a_picture(config, model, tokenizer, tmp_path):
  """A prompt with one image in it, as transformers words it."""
  picture = np.zeros((64, 96, 3), np.uint8)
  picture[:, 48:, 2] = 200  # the right half is blue
  path = tmp_path / "picture.png"
  cv2.imwrite(str(path), picture[..., ::-1])
  config.video = str(path)
  config.num_keyframes = None
  settled = ask.settle(config, model)
  seen = ask.look(settled, 28)
  assert seen.frames.shape == (1, 56, 84, 3) and seen.time_s.tolist() == [0]
  assert seen.frames[0, :, 60:, 2].min() > 150 > 50 > seen.frames[..., 0].max()
  prompt, cost = ask.word(settled, model, tokenizer, seen)
  assert cost["visual"] == cost["visual_per_slice"] == 6
  text = tokenizer.decode(prompt.token[prompt.mask])
  assert (
    f"<|vision_start|>{'<|image_pad|>' * 6}<|vision_end|>{QUESTION}" in text
  )


def test_end_ids(tokenizer, tmp_path):
  def ends(told):
    path = tmp_path / "generation_config.json"
    path.write_text(told if isinstance(told, str) else json.dumps(told))
    return ask.end_ids(tokenizer, 900, tmp_path)

  end = tokenizer.eos_id
  assert ask.end_ids(tokenizer, 900, tmp_path) == (end,)
  assert ends({"eos_token_id": 7}) == (end, 7)
  assert ends({"eos_token_id": [7, end, 8]}) == (end, 7, 8)
  assert ends({"temperature": 0.1}) == ends({"eos_token_id": None}) == (end,)
  with pytest.raises(ValueError, match=r"ids below 900, got \[900\]"):
    ends({"eos_token_id": 900})
  for broken in ("{", "[1]"):
    with pytest.raises(ValueError, match="generation_config.json is not"):
      ends(broken)


@pytest.mark.parametrize("select", selectors.CHOICES)
def test_every_selector_takes_what_it_is_given(select):
  choose = functools.partial(selectors.by_name(select), num_keyframes=3)
  found = jax.eval_shape(choose, jnp.zeros((32, 98)), jnp.ones(32, bool))
  assert found.index.shape == found.mask.shape == (3,)


def test_another_selector(config, model):
  config.select = "k_center"
  seen = ask.look(ask.settle(config, model), 28)
  # The first frame, and the first that looks like neither of the others.
  np.testing.assert_array_equal(seen.number, [0, *CUTS])
  assert seen.frames.shape == (3, 56, 84, 3)
  assert min(abs(seen.score.argmax() - cut) for cut in CUTS) <= 1


def test_a_video_shorter_than_the_keyframes(config, model, tokenizer):
  config.select = "uniform"
  config.num_keyframes = 40
  config.scan.num_frames = 64
  config = ask.settle(config, model)
  seen = ask.look(config, 28)
  np.testing.assert_array_equal(seen.number, np.arange(32))
  _, cost = ask.word(config, model, tokenizer, seen)
  assert cost["visual"] == 32 * 6


@pytest.mark.parametrize(
  ("setting", "value", "said"),
  [
    ("checkpoint", "", r"config.checkpoint is empty; set --config.checkpoint="),
    ("video", "", r"config.video is empty; set --config.video="),
    ("question", " ", r"config.question is empty; set --config.question="),
    ("checkpoint", "no/such", "no/such is not a directory"),
    ("checkpoint", str(ROOT), r"has neither config.json"),
    ("video", "no/such.mp4", "no/such.mp4: there is no such file"),
    ("video", str(ROOT / "README.md"), "README.md: not a video"),
    ("select", "best", "got 'best'; change config.select"),
    ("dtype", "float8", "got 'float8'; change config.dtype"),
    ("num_keyframes", 0, "got 0; change config.num_keyframes"),
    ("num_keyframes", 33, "32 scanned frames, got 33"),
    ("frame.max_pixels", 783, r"is 783, and one visual token takes 28 x 28"),
    ("frame.total_pixels", 5, r"frame.total_pixels is 5, and one visual"),
    ("frame.min_pixels", 10**9, r"min_pixels \(1000000000\) is above"),
    ("sampling.max_tokens", 0, "sampling.max_tokens must be at least 1, got 0"),
    ("sampling.temperature", -1.0, "temperature must be 0 .* got -1.0"),
    ("stream_tokens", 0, "config.stream_tokens must be at least 1"),
    ("sampling.max_tokens", 500, r"\(18 of them visual\) .* made for 512"),
    ("tad.shown", "best", "shown='best'"),
    ("resize", "nearest", "got 'nearest'"),
    ("prompt.frames_per_slice", 3, "must be 1 or the 2 frames .* got 3"),
  ],
)
def test_what_a_user_gets_wrong(config, tmp_path, setting, value, said):
  """Told before any weight is read."""
  *path, name = setting.split(".")
  node = config
  for part in path:
    node = node[part]
  node[name] = value
  with (
    pytest.MonkeyPatch.context() as patch,
    pytest.raises(ValueError, match=said),
  ):
    patch.delattr(policies, "load_policy")
    ask.run(config.lock(), tmp_path)
  assert not list(tmp_path.iterdir())


def test_every_setting_is_read():
  config = load_config("configs/ask.py")
  source = (ROOT / "cf_jax/programs/ask.py").read_text("utf-8")
  source += (ROOT / "cf_jax/main.py").read_text("utf-8")
  for name in config:
    assert f"config.{name}" in source or f'"{name}"' in source, name
  for name in config.sampling:
    assert f"config.sampling.{name}" in source, name


def test_state_lies_on_the_mesh():
  """Heads of the caches are split, everything else is on every device."""
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1, context=1)
  prefix, own = np.zeros((1, 2, 4, 8)), np.zeros((1, 1, 2, 4, 8))
  tree = {
    "prefix_cache": {"key": (prefix,), "value": (prefix,)},
    "cache": {"key": (own,), "value": (own,)},
    "slot": np.int32(0),
    "key": np.zeros((1, 1, 2)),
  }
  places = sharding.tree_shardings(tree, mesh, ask._DECODING_RULES)
  specs = jax.tree.map(lambda place: tuple(place.spec), places)
  assert specs["prefix_cache"]["key"][0][1] == "tensor"
  assert specs["cache"]["value"][0][2] == "tensor"
  assert not any(specs["key"]) and not any(specs["slot"])
