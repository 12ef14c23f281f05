"""Every config builds, and every subtree is the keywords of one function.

What a subtree binds to is said per program.
"""

import dataclasses
import inspect
import re
import typing

import jax
import jax.numpy as jnp
import ml_collections
import pytest

from cf_jax import grpo, rewards, sampling, tad, views
from cf_jax.data import (
  answers,
  datasets,
  decoding,
  frame_cache,
  frame_size,
  judge,
  pipeline,
  prompts,
  records,
  synthetic,
  synthetic_tasks,
  video,
)
from cf_jax.evals import differences
from cf_jax.main import PROGRAMS
from cf_jax.models import config as model_config
from cf_jax.models import lora, selector, vlm
from cf_jax.programs import (
  amplify,
  ask,
  choosing,
  clue,
  export_stablehlo,
  held_out,
  policies,
  reinforce,
  scorer,
  select_data,
)
from cf_jax.runtime import checkpoint, lifecycle, optim, sharding
from tests.conftest import ROOT, load_config


def variants(program=None):
  """(file, argument) of every config, the arguments as its docstring says.

  With `program`, of its configs alone.
  """
  for path in sorted((ROOT / "configs").glob("*.py")):
    if path.stem == "common":  # what recipes share
      continue
    name = f"configs/{path.name}"
    documented = re.findall(rf"{re.escape(name)}:([\w,=.]+)", path.read_text())
    for arg in [None, *sorted(set(documented))]:
      if program in (None, load_config(name, arg).program):
        yield pytest.param(name, arg, id=path.stem + (f":{arg}" if arg else ""))


every = pytest.mark.parametrize(("path", "arg"), list(variants()))
every_train = pytest.mark.parametrize(("path", "arg"), list(variants("train")))


def _optimizer(*, frozen, **settings):
  """As the programs take it: `frozen` says what it never sees."""
  assert all(re.compile(pattern) for pattern in frozen)
  shapes = jax.eval_shape(
    lambda: vlm.init(model_config.tiny(), jax.random.key(0))
  )
  return optim.make_optimizer(shapes, **settings)


# Program -> subtree -> the function whose keywords it is, and what the program
# gives itself.
MESH = (sharding.make_mesh, (), {})
BINDS = {
  "train": {
    "mesh": MESH,
    "data.synthetic": (synthetic.ensure, ("cache",), {"seed": 0}),
    "data.loader": (
      pipeline.make_loader,
      ([],),
      dict(
        batch_size=1,
        seed=0,
        max_skip_fraction=0.0,
        shard_index=0,
        shard_count=1,
      ),
    ),
    "data.reader": (pipeline.FrameReader, (), {}),
    "data.dataset": (datasets.read, ("name",), {"root": "folder"}),
    "data.decode": (decoding.Decoder, (), {}),
    "data.limits": (video.Limits, (), {}),
    "data.frame_cache": (frame_cache.around, (None,), {}),
    "scan": (views.make_selector, (), {"encode": None, "num_keyframes": 1}),
    "tad": (tad.select_keyframes, (None,), {}),
    "selector.network": (
      selector.SelectorConfig,
      (),
      {"embedding_dim": 1, "query_dim": 1},
    ),
    "selector.advantage": (grpo.group_advantages, (None,), {}),
    "selector.optim": (_optimizer, (), {"frozen": ()}),
    "prompt.build": (
      prompts.build_prompt,
      (None, "", ()),
      dict(frame_time_s=(), grid=(1, 1)),
    ),
    "model": (model_config.make, (), {"vocab_size": 1}),
    "lora": (lora.init, ({}, None), {}),
    "sampling": (sampling.generate, (None,) * 6, {"eos_id": 0}),
    "answers": (
      answers.judge,
      (None,) * 4,
      {"frame_time_s": None, "cite_tolerance_s": 0.1, "ask": None},
    ),
    "judge": (judge.Judge, (), {}),
    "reward.length": (rewards.length_bonus, (None, None), {}),
    "contrast.rollout": (rewards.contrast_bonus, (None,) * 4, {}),
    "contrast.threshold": (rewards.threshold_bonus, (None,) * 3, {}),
    "advantage": (grpo.group_advantages, (None,), {}),
    "reinforce": (grpo.reinforce_advantages, (None,) * 3, {}),
    "loss": (grpo.policy_loss, (None,) * 6, {}),
    "sft.optim": (_optimizer, (), {}),
    "rl.optim": (_optimizer, (), {}),
    "checkpoint": (checkpoint.Checkpoints, ("folder",), {}),
    "runtime": (lifecycle.Guard, ("folder",), {}),
    "evaluation": (held_out.Evaluator, (None, []), {"max_tokens": 1}),
  },
  "ask": {
    "mesh": MESH,
    "scan": (video.scan_frames, ("file",), {}),
    "limits": (video.Limits, (), {}),
    "tad": (tad.select_keyframes, (None,), {"num_keyframes": 1}),
    "frame": (
      frame_size.fit_size,
      (1, 1),
      dict(num_frames=1, factor=28, frames_per_slice=1),
    ),
    "prompt.build": (
      prompts.build_prompt,
      (None, "", ()),
      dict(frame_time_s=(), grid=(1, 1), tokens_per_second=2),
    ),
    "sampling": (
      sampling.generate,
      (None,) * 6,
      {"eos_id": 0, "num_completions": 1},
    ),
  },
  "export": {"mesh": MESH},
  "export_stablehlo": {
    "tad": (tad.select_keyframes, (None,), {}),
    "frames": (export_stablehlo.export_tad, (), {"platforms": ()}),
  },
  "plan": {},
  "keyframes": {
    "mesh": MESH,
    "limits": (video.Limits, (), {}),
    "tad": (tad.select_keyframes, (None,), {"num_keyframes": 1}),
  },
}
BINDS["select_data"] = {
  name: BINDS["train"][name]
  for name in (
    "mesh",
    "data.synthetic",
    "data.loader",
    "data.reader",
    "data.dataset",
    "data.decode",
    "data.limits",
    "data.frame_cache",
    "scan",
    "tad",
    "prompt.build",
    "model",
    "lora",
    "sampling",
    "answers",
    "judge",
    "sft.optim",
    "checkpoint",
    "runtime",
  )
} | {
  "evaluation": (held_out.Evaluator, (None, [], ()), {"max_tokens": 1}),
  "select": (select_data.decide, ((), None), {}),
}
BINDS["amplify"] = BINDS["train"] | {
  "evaluation": BINDS["select_data"]["evaluation"]
}
BINDS["evaluate"] = {
  name: BINDS["train"][name]
  for name in (
    "mesh",
    "judge",
    *(name for name in BINDS["train"] if name.startswith("data.")),
  )
  if name != "data.loader"
} | {
  "data.reader": (
    pipeline.FrameReader,
    (),
    dict(size_px=(28, 28), resize="area"),
  ),
  "scan": (choosing.by_name, ("tad",), dict(encode=None, tad={})),
  "tad": (tad.select_keyframes, (None,), {"num_keyframes": 1}),
  "clue": (clue.second_pass, (None,), {}),
  "prompt.build": (
    prompts.build_prompt,
    (None, "", ()),
    dict(
      frame_time_s=(),
      grid=(1, 1),
      tokens_per_second=2,
      question_template="",
    ),
  ),
  "sampling": (
    sampling.generate,
    (None,) * 6,
    {"eos_id": 0, "num_completions": 1},
  ),
}
BINDS["compare"] = {
  "bootstrap": (differences.compare, (None,) * 3, {}),
  "limits": (video.Limits, (), {}),
}
BINDS["cache_frames"] = {
  name: BINDS["train"][name]
  for name in (
    "data.synthetic",
    "data.loader",
    "data.reader",
    "data.decode",
    "data.limits",
    "data.frame_cache",
    "data.dataset",
    "scan",
    "tad",
  )
}
BINDS["score"] = {"judge": BINDS["train"]["judge"]}
BINDS["check_data"] = {
  "decoder": (decoding.Decoder, (), {}),
  "limits": (video.Limits, (), {}),
}
# Read key by key by the programs (test_train.py, test_ask.py and
# test_keyframes.py check that each is read).
PLAIN = {
  "cache_frames": ("", "data", "fill"),
  "train": (
    "",
    "data",
    "prompt",
    "prompt.templates",
    "sft",
    "rl",
    "report",
    "reward",
    "reward.weight",
    "reward.products",
    "reward.overlong",
    "reward.kl",
    "contrast",
    "contrastive",
    "selector",
    "selector.reward",
  ),
  "ask": ("", "prompt"),
  "export": ("",),
  "export_stablehlo": ("", "policy"),
  "plan": ("",),
  "keyframes": ("", "scan"),
  "select_data": ("", "data", "prompt", "prompt.templates", "sft"),
}

PLAIN["evaluate"] = (
  "",
  "shard",
  "frame",
  "prompt",
  "prompt.templates",
  "prompt.of_benchmark",
  "data",
)
PLAIN["compare"] = ("", "shown")
PLAIN["check_data"] = ("",)
PLAIN["score"] = ("",)


PLAIN["amplify"] = PLAIN["train"]


def subtrees(config, prefix=""):
  """(dotted name, subtree) of a config, itself included."""
  yield prefix, config
  for name, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      yield from subtrees(value, f"{prefix}.{name}" if prefix else name)


@every
def test_builds_and_locks(path, arg):
  config = load_config(path, arg)
  assert config.name == path.split("/")[1][:-3] + (
    "_" + arg.replace(",", "_") if arg else ""
  )
  assert config.program in PROGRAMS
  config.lock()
  with pytest.raises(AttributeError):
    config.seeed = 1
  assert load_config(path, arg) == load_config(path, arg)


@every
def test_an_unknown_argument_is_an_error(path, arg):
  with pytest.raises(ValueError, match=f"{path} takes .*'smoek'"):
    load_config(path, "smoek")


@every
def test_every_subtree_binds(path, arg):
  config = load_config(path, arg)
  binds, plain = BINDS[config.program], PLAIN[config.program]
  configs = [config]
  if config.program == "amplify":  # two policies, each with its own settings
    split = amplify.selector_config, amplify.answerer_config
    configs = [of_policy(config) for of_policy in split]
  for name, subtree in [pair for c in configs for pair in subtrees(c)]:
    if name in plain or name.startswith("model."):
      continue
    assert name in binds, (
      f"{path} has {name}: name the function that takes it in BINDS"
    )
    function, args, given = binds[name]
    settings = {
      key: value
      for key, value in subtree.items()
      if not isinstance(value, ml_collections.ConfigDict)
      or (name not in plain and f"{name}.{key}" not in binds)
    }
    signature = inspect.signature(function)
    bound = signature.bind(*args, **settings, **given).arguments
    catch_all = [
      parameter.name
      for parameter in signature.parameters.values()
      if parameter.kind == parameter.VAR_KEYWORD
    ]
    if function is not model_config.make:
      for catch in catch_all:
        extra = set(bound.get(catch, {})) - {"num_keyframes"}
        assert not extra or function is _optimizer, f"{name}: {extra}"


@every_train
def test_values_are_accepted(path, arg):
  """What only shows when the function is called."""
  config = load_config(path, arg)
  _optimizer(**config.sft.optim)
  _optimizer(**config.rl.optim)
  if config.model.size:
    model_config.make(vocab_size=500, **config.model)
  else:  # a directory says what the model is
    how = {key: config.model[key] for key in config.model if key != "size"}
    assert set(how) <= set(policies.RUN_FIELDS)
    dataclasses.replace(model_config.tiny(), **how)
  views.make_selector(descriptor="pixels", **config.tad)
  assert set(config.evaluation.arms) <= set(views.ARMS)
  assert set(config.data.synthetic.tasks) <= set(synthetic_tasks.TASKS)
  assert config.contrast.tau > 0
  reinforce.check_settings(config)
  scorer.check(config)
  rewards.combine(
    dict.fromkeys(
      (*config.answers.components, *config.reward.products, "length"),
      jnp.ones((1, 1)),
    ),
    weight=config.reward.weight,
  )
  assert set(config.prompt.templates) <= set(typing.get_args(records.Kind))
  inspect.signature(prompts.count_tokens).bind(
    None,
    "",
    (),
    num_frames=1,
    duration_s=1.0,
    grid=(1, 1),
    **config.prompt.build,
  )
  sampler = dict(config.sampling)
  assert sampler.pop("num_completions") > 1 and sampler.pop("max_tokens") > 1
  # The schedule ends with the stage.
  assert config.sft.optim.total_steps >= config.sft.max_steps
  assert config.rl.optim.total_steps >= config.rl.steps


def test_every_program_has_a_config():
  programs = {load_config(*variant.values).program for variant in variants()}
  assert programs == set(PROGRAMS) == set(BINDS) == set(PLAIN)


def test_values_of_ask_are_accepted():
  config = load_config("configs/ask.py")
  config.update(checkpoint="folder", video="file", question="why?")
  ask.check_settings(config)
  settled = ask.settle(config, model_config.qwen2_5_vl_7b())
  rows, columns = frame_size.fit_size(1080, 1920, num_frames=8, **settled.frame)
  assert (rows, columns) == (336, 588) and rows * columns <= 256 * 28 * 28
  empty = [
    name
    for name, subtree in subtrees(settled)
    for value in subtree.values()
    if value is None
  ]
  assert empty == ["", "frame", "prompt.build"]  # dtype, total_pixels, system


@every
def test_every_setting_has_a_place_in_overrides(path, arg):
  """Keys are words: --config.a.b=1 can name each of them."""
  for name, subtree in subtrees(load_config(path, arg)):
    for key in subtree:
      assert re.fullmatch(r"[a-z][a-z0-9_]*", key), f"{name}.{key}"
