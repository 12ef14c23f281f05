"""Every config builds, and every subtree is the keywords of one function."""

import inspect
import re

import jax
import ml_collections
import pytest

from cf_jax import grpo, rewards, sampling, tad, views
from cf_jax.data import pipeline, prompts, synthetic
from cf_jax.main import PROGRAMS
from cf_jax.models import config as model_config
from cf_jax.models import vlm
from cf_jax.programs import evaluate
from cf_jax.runtime import checkpoint, optim, sharding
from tests.conftest import ROOT, load_config


def variants():
  """(file, argument) of every config, the arguments as its docstring says."""
  for path in sorted((ROOT / "configs").glob("*.py")):
    name = f"configs/{path.name}"
    documented = re.findall(rf"{re.escape(name)}:([\w,=.]+)", path.read_text())
    for arg in [None, *sorted(set(documented))]:
      yield pytest.param(name, arg, id=path.stem + (f":{arg}" if arg else ""))


every = pytest.mark.parametrize(("path", "arg"), list(variants()))


def _optimizer(**settings):
  shapes = jax.eval_shape(
    lambda: vlm.init(model_config.tiny(), jax.random.key(0))
  )
  return optim.make_optimizer(shapes, **settings)


# Subtree -> the function whose keywords it is, and what the program gives.
BINDS = {
  "mesh": (sharding.make_mesh, (), {}),
  "data.synthetic": (synthetic.ensure, ("cache",), {"seed": 0}),
  "data.loader": (
    pipeline.make_loader,
    ([],),
    dict(
      batch_size=1, seed=0, max_skip_fraction=0.0, shard_index=0, shard_count=1
    ),
  ),
  "data.reader": (pipeline.FrameReader, (), {}),
  "scan": (views.make_selector, (), {"encode": None, "num_keyframes": 1}),
  "tad": (tad.select_keyframes, (None,), {}),
  "prompt.build": (
    prompts.build_prompt,
    (None, "", ()),
    dict(frame_time_s=(), grid=(1, 1)),
  ),
  "model": (model_config.make, (), {"vocab_size": 1}),
  "sampling": (sampling.generate, (None,) * 6, {"eos_id": 0}),
  "reward": (rewards.combine, ({},), {}),
  "contrast": (rewards.contrast_bonus, (None,) * 4, {"shuffled_mask": None}),
  "advantage": (grpo.group_advantages, (None,), {}),
  "loss": (grpo.policy_loss, (None,) * 6, {}),
  "sft.optim": (_optimizer, (), {}),
  "rl.optim": (_optimizer, (), {}),
  "checkpoint": (checkpoint.Checkpoints, ("folder",), {}),
  "evaluation": (evaluate.Evaluator, (None, []), {"max_tokens": 1}),
}
# Read key by key by the programs (test_train.py checks that each is read).
PLAIN = ("", "data", "prompt", "sft", "rl", "report", "reward.weight")
# `tau` is rollout_contrast's; the views of `num_shuffles` are made before.
ELSEWHERE = {"contrast": ("num_shuffles", "tau")}


def subtrees(config, prefix=""):
  """(dotted name, subtree) of a config, itself included."""
  yield prefix, config
  for name, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      yield from subtrees(value, f"{prefix}.{name}" if prefix else name)


@every
def test_builds_and_locks(path, arg):
  config = load_config(path, arg)
  assert config.name == path.split("/")[1][:-3] + (f"_{arg}" if arg else "")
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
  for name, subtree in subtrees(load_config(path, arg)):
    if name in PLAIN or name.startswith("model."):
      continue
    assert name in BINDS, (
      f"{path} has {name}: name the function that takes it in BINDS"
    )
    function, args, given = BINDS[name]
    settings = {
      key: value
      for key, value in subtree.items()
      if key not in ELSEWHERE.get(name, ())
      and (
        not isinstance(value, ml_collections.ConfigDict)
        or name not in PLAIN
        and f"{name}.{key}" not in BINDS
      )
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


@every
def test_values_are_accepted(path, arg):
  """What only shows when the function is called."""
  config = load_config(path, arg)
  _optimizer(**config.sft.optim)
  _optimizer(**config.rl.optim)
  model_config.make(vocab_size=500, **config.model)
  views.make_selector(descriptor="pixels", **config.tad)
  assert set(config.evaluation.arms) <= set(views.ARMS)
  assert set(config.data.synthetic.tasks) <= set(synthetic.TASKS)
  inspect.signature(rewards.rollout_contrast).bind(
    None, None, None, tau=config.contrast.tau
  )
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


@every
def test_every_setting_has_a_place_in_overrides(path, arg):
  """Keys are words: --config.a.b=1 can name each of them."""
  for name, subtree in subtrees(load_config(path, arg)):
    for key in subtree:
      assert re.fullmatch(r"[a-z][a-z0-9_]*", key), f"{name}.{key}"
