"""From a Qwen2.5-VL directory to a run with adapters, and back to a directory.

One small run through the whole of it; the directory it starts from and the one
it ends in are compared with each other and with the adapters in between.
"""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cf_jax.data import prompts
from cf_jax.models import config as model_config
from cf_jax.models import hf_weights, lora
from cf_jax.programs import experiment, export, policies, train, verdicts
from cf_jax.runtime import checkpoint, optim, sharding
from tests.conftest import SMALLEST, init_params, load_config, shrink


def _model(**changes):
  tokenizer = prompts.load_tokenizer("tiny")
  fields = SMALLEST | dict(vocab_size=tokenizer.vocab_size, num_hidden_layers=2)
  return model_config.make(**(fields | tokenizer.config_ids | changes))


def _save(folder, model):
  hf_weights.save_hf(
    folder, model, init_params(model), tokenizer=prompts.TINY_TOKENIZER
  )
  return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """A Qwen2.5-VL directory of a policy of seeded noise."""
  return _save(tmp_path_factory.mktemp("base") / "hf", _model())


def _make_judge(experiment, make_judge=verdicts.make_judge):
  """Calls every other completion right."""
  judge = make_judge(experiment)

  def read(prepared, token, mask):
    found = judge(prepared, token, mask)
    right = (token * mask).sum(axis=-1) % 2
    return found.replace(
      component=found.component | {"accuracy": right.astype(np.float32)}
    )

  return read


def _config(base, cache_dir):
  config = shrink(load_config("configs/kfgrpo_cpu.py", "smoke"), cache_dir)
  config.init_from = str(base)
  config.tokenizer = ""
  config.model = dict(size="", dtype="float32", param_dtype="float32")
  config.lora.update(rank=2, alpha=4.0)
  config.sft.max_steps = 0
  config.rl.update(steps=2, checkpoint_every=1)
  config.rl.optim.learning_rate = 0.01
  config.evaluation.arms = ("keyframes",)
  config.report.stages = ("rl",)
  return config


@pytest.fixture(scope="module")
def run(base, cache_dir, tmp_path_factory):
  """A finished run of two updates; every other completion is called right."""
  workdir = tmp_path_factory.mktemp("lora") / "run"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(verdicts, "make_judge", _make_judge)
    train.run(_config(base, cache_dir).lock(), workdir)
  return workdir


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(data=-1, fsdp=1, tensor=1, context=1)


def _assert_equal(left, right, **tolerance):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(left),
    jax.tree.leaves(right),
    strict=True,
  ):
    np.testing.assert_allclose(
      a, b, err_msg=sharding.path_of(path), **(tolerance or {"rtol": 0})
    )


def test_only_adapters_are_in_the_checkpoint(run):
  store = checkpoint.Checkpoints(run / "checkpoints" / "rl", keep=2)
  state = store._manager.restore(2)["state"]
  store.close()
  paths = {
    sharding.path_of(path)
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      {"params": state["params"], "opt_state": state["opt_state"]}
    )
    if np.ndim(leaf)
  }
  assert paths and all("lora_a" in p or "lora_b" in p for p in paths)
  assert not any("vision" in p for p in paths)  # config.lora.modules


def test_a_run_is_its_base_with_trained_adapters(run, base, mesh):
  policy = policies.load_policy(str(run), mesh)
  _, plain = hf_weights.load_hf(base)
  adapters, rest = optim.split(policy.params, (r"^(?!.*/lora_)",))
  _assert_equal(rest, plain)
  moved = adapters["decoder"]["layers"]["query"]
  assert np.abs(moved["lora_b"]).max() > 1e-3  # zero at the start
  np.testing.assert_array_equal(moved["lora_scale"], 2.0)
  assert policy.model.vocab_size == policy.tokenizer.vocab_size
  assert policy.source.endswith("rl, step 2") and policy.folder == base


def test_export_merges(run, mesh, tmp_path):
  config = load_config("configs/export.py")
  config.checkpoint = str(run)
  config.max_shard_gb = 2e-5  # several files
  export.run(config.lock(), tmp_path / "hf")
  model, params = hf_weights.load_hf(tmp_path / "hf")
  policy = policies.load_policy(str(run), mesh)
  _assert_equal(params, lora.merge(policy.params))
  assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
  # And what was exported can be opened like any other directory.
  again = policies.load_policy(str(tmp_path / "hf"), mesh)
  _assert_equal(again.params, params)
  assert again.tokenizer.encode("red blue") == policy.tokenizer.encode(
    "red blue"
  )


def test_export_in_another_dtype(run, mesh, tmp_path):
  config = load_config("configs/export.py")
  config.checkpoint, config.dtype = str(run), "bfloat16"
  export.run(config.lock(), tmp_path / "hf")
  model, params = hf_weights.load_hf(tmp_path / "hf")
  assert model.param_dtype == "bfloat16"
  merged = lora.merge(policies.load_policy(str(run), mesh).params)
  rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), merged)
  _assert_equal(
    jax.tree.map(np.float32, params), jax.tree.map(np.float32, rounded)
  )


def test_a_target_is_checked_before_anything_is_loaded(run, tmp_path):
  (tmp_path / "note").write_text("mine")
  config = load_config("configs/export.py")
  config.checkpoint = str(run)
  with pytest.MonkeyPatch.context() as patch:
    patch.delattr(policies, "load_policy")
    with pytest.raises(ValueError, match="not empty; name a new directory"):
      export.run(config, tmp_path)
    for key, value, said in (
      ("max_shard_gb", 0.0, "must be positive, got 0.0"),
      ("dtype", "float16", "config.dtype must be '' or one of"),
    ):
      wrong = load_config("configs/export.py")
      wrong[key] = value
      with pytest.raises(ValueError, match=said):
        export.run(wrong, tmp_path / "new")


@pytest.mark.parametrize(
  ("key", "value", "said"),
  [
    ("lora.modules", ("q_proj",), r"\['q_proj'\] match no linear layer"),
    ("rl.optim.frozen", ("vison",), r"\['vison'\] match no parameter path"),
    ("prompt.max_tokens", 8, "raise config.prompt.max_tokens"),
    ("model.attention", "cudnn", "change config.model.attention to 'xla'"),
    ("model.attention", "splash", "runs on tpu, got a program for cpu"),
    ("sampling.top_p", 0.0, "top_p must be above 0 and at most 1, got 0.0"),
    ("sampling.num_completions", 0, "num_completions must be at least 1"),
  ],
)
def test_a_refused_config_does_not_claim_the_workdir(
  base, cache_dir, tmp_path, key, value, said
):
  config = _config(base, cache_dir)
  config.update_from_flattened_dict({key: value})
  with pytest.raises(ValueError, match=said):
    train.run(config.lock(), tmp_path)
  assert not (tmp_path / "manifest.json").exists()


def test_a_base_that_moved(run, base, mesh, tmp_path):
  moved, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
  shutil.copytree(run, moved)
  manifest = json.loads((moved / "manifest.json").read_text())
  assert manifest["config"]["init_from"] == str(base.absolute())
  manifest["config"]["init_from"] = str(tmp_path / "gone")
  manifest["config"]["model"]["attention"] = "cudnn"  # of another machine
  (moved / "manifest.json").write_text(json.dumps(manifest))
  with pytest.raises(ValueError, match="not there; .* --config.init_from"):
    policies.load_policy(str(moved), mesh)
  shutil.copytree(base, elsewhere)
  policy = policies.load_policy(str(moved), mesh, init_from=str(elsewhere))
  _assert_equal(policy.params, policies.load_policy(str(run), mesh).params)
  assert policy.model.attention == "auto"


def test_settings_of_the_base_survive(run, base, tmp_path):
  """Also where transformers 5 keeps them, and beside another tokenizer."""
  moved, source, tokenizer = (tmp_path / n for n in ("run", "base", "words"))
  shutil.copytree(run, moved)
  shutil.copytree(base, source)
  shutil.copytree(prompts.TINY_TOKENIZER, tokenizer)
  image = json.loads((source / "preprocessor_config.json").read_text())
  both = {
    "image_processor": image | {"min_pixels": 12544, "max_pixels": 100352},
    "video_processor": image | {"fps": 4.0, "max_pixels": 50176},
  }
  (source / "processor_config.json").write_text(json.dumps(both))
  for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
    (source / name).unlink()
  generation = {"eos_token_id": [7, 9], "temperature": 0.25}
  (source / "generation_config.json").write_text(json.dumps(generation))
  manifest = json.loads((moved / "manifest.json").read_text())
  manifest["config"] |= dict(init_from=str(source), tokenizer=str(tokenizer))
  (moved / "manifest.json").write_text(json.dumps(manifest))

  config = load_config("configs/export.py")
  config.checkpoint = str(moved)
  export.run(config.lock(), tmp_path / "hf")

  def read(name):
    return json.loads((tmp_path / "hf" / name).read_text())

  assert read("generation_config.json") == generation
  assert read("preprocessor_config.json")["max_pixels"] == 100352
  assert read("preprocessor_config.json")["min_pixels"] == 12544
  assert read("video_preprocessor_config.json")["fps"] == 4.0
  assert read("video_preprocessor_config.json")["max_pixels"] == 50176


def test_a_changed_base_is_noticed(run, base, mesh, tmp_path):
  """Adapters beside other weights would be silently wrong."""
  moved = tmp_path / "run"
  shutil.copytree(run, moved)
  other = _save(tmp_path / "other", _model(initializer_range=0.06))
  manifest = json.loads((moved / "manifest.json").read_text())
  manifest["config"]["init_from"] = str(other)
  (moved / "manifest.json").write_text(json.dumps(manifest))
  with pytest.raises(ValueError, match="beside other frozen parameters"):
    policies.load_policy(str(moved), mesh)


def test_dtype_of_a_loaded_run(run, mesh):
  policy = policies.load_policy(str(run), mesh, dtype="bfloat16")
  assert policy.model.dtype == policy.model.param_dtype == "bfloat16"
  for path, leaf in jax.tree_util.tree_leaves_with_path(policy.params):
    adapter = path[-1].key in lora.LEAVES
    assert leaf.dtype == (jnp.float32 if adapter else jnp.bfloat16)


def test_frozen_by_regex_in_one_stage(cache_dir, tmp_path, mesh):
  """The tower of the cold start stays through the reinforcement stage."""
  config = shrink(load_config("configs/kfgrpo_cpu.py", "smoke"), cache_dir)
  config.sft.update(max_steps=2, checkpoint_every=2)
  config.rl.update(steps=1, checkpoint_every=1)
  config.rl.optim.frozen = (r"^vision/",)
  # What else a run has is in others'.
  config.contrast.kind, config.loss.kl_weight = "none", 0.0
  config.evaluation.arms = ("keyframes",)
  config.report.stages = ("rl",)
  train.run(config.lock(), tmp_path / "run")
  policy = policies.load_policy(str(tmp_path / "run"), mesh)
  start = policies.initial_params(config, policy.model, mesh)
  store = checkpoint.Checkpoints(tmp_path / "run/checkpoints/sft", keep=2)
  sft, _ = store.restore_params(
    policies.abstract_params(config, policy.model, mesh)
  )
  store.close()
  _assert_equal(policy.params["vision"], sft["vision"])
  kernel = ("vision", "layers", "query", "kernel")
  moved, before = policy.params, start
  for name in kernel:
    moved, before = moved[name], before[name]
  assert np.abs(moved - before).max() > 0


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    (dict(size="tiny"), r"sets size='tiny', but config\.init_from"),
    (dict(size="", hidden_size=64), "sets hidden_size, but"),
  ],
)
def test_a_shape_said_twice(base, cache_dir, changes, said):
  config = _config(base, cache_dir)
  config.model = changes
  with pytest.raises(ValueError, match=said):
    policies.make_model(config, prompts.load_tokenizer(base))


def test_a_tokenizer_of_another_model(base, cache_dir):
  config = _config(base, cache_dir)
  tokenizer = prompts.load_tokenizer(base)
  tokenizer.config_ids = tokenizer.config_ids | {"image_token_id": 7}
  with pytest.raises(ValueError, match=r"image_token_id is \d+ in .*, 7 \("):
    policies.make_model(config, tokenizer)


def test_another_preprocessor(base, tmp_path):
  """Pictures prepared in another way would be silently wrong."""
  shutil.copytree(base, tmp_path / "hf")
  path = tmp_path / "hf" / "preprocessor_config.json"
  spec = json.loads(path.read_text())
  path.write_text(json.dumps(spec | {"image_mean": [0.5, 0.5, 0.5]}))
  with pytest.raises(ValueError, match=r"preprocessor has mean \(0.5, 0.5, 0"):
    policies.describe(str(tmp_path / "hf"))


def test_no_tokenizer_at_all(cache_dir):
  config = load_config("configs/kfgrpo_cpu.py")
  config.tokenizer = ""
  with pytest.raises(ValueError, match="config.tokenizer is empty"):
    policies.tokenizer_folder(config)


@pytest.mark.parametrize(
  ("make", "said"),
  [
    (lambda folder: "", "set --config.checkpoint"),
    (lambda folder: str(folder / "nothing"), "is not a directory with"),
    (lambda folder: str(folder), "has neither config.json"),
  ],
)
def test_not_a_checkpoint(mesh, tmp_path, make, said):
  with pytest.raises(ValueError, match=said):
    policies.load_policy(make(tmp_path), mesh)


def test_a_run_without_a_checkpoint(run, mesh, tmp_path):
  (tmp_path / "manifest.json").write_text((run / "manifest.json").read_text())
  with pytest.raises(ValueError, match="without a checkpoint yet"):
    policies.load_policy(str(tmp_path), mesh)


def test_a_checkpoint_of_another_shape(run, mesh, tmp_path):
  """Named, with both shapes."""
  store = checkpoint.Checkpoints(run / "checkpoints" / "rl", keep=2)
  template = {
    "decoder": {
      "layers": {
        "query": {"lora_a": jax.ShapeDtypeStruct((2, 32, 5), jnp.float32)},
        "other": {"lora_a": jax.ShapeDtypeStruct((2, 32, 5), jnp.float32)},
      }
    }
  }
  try:
    with pytest.raises(ValueError, match="other/lora_a must be .* got nothing"):
      store.restore_params(template)
    del template["decoder"]["layers"]["other"]
    with pytest.raises(ValueError, match=r"\[2, 32, 5\], got .*\[2, 32, 2\]"):
      store.restore_params(template)
  finally:
    store.close()


def test_prompts_and_model_count_time_alike(base, cache_dir):
  config = _config(base, cache_dir)
  model = policies.make_model(config, prompts.load_tokenizer(base))
  tower = dataclasses.replace(model.vision, tokens_per_second=25)
  with pytest.raises(ValueError, match="tokens_per_second is 2, .* counts 25"):
    experiment.check_prompt(config, dataclasses.replace(model, vision=tower))


def test_a_run_goes_on_from_another_runs_policy(run, base, cache_dir, mesh):
  config = _config(base, cache_dir)
  config.sft.from_run = str(run)
  tokenizer = prompts.load_tokenizer(policies.tokenizer_folder(config))
  model = policies.make_model(config, tokenizer)
  started = policies.load_start(config, model, mesh)
  whole = policies.load_policy(str(run), mesh).params
  _assert_equal(started, whole, rtol=0, atol=0)
  # Two updates have moved it from where that run itself began.
  begun = policies.initial_params(config, model, mesh)
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), started, begun)
  assert any(jax.tree.leaves(moved))
  config.lora.rank = 3
  with pytest.raises(ValueError, match="policy of other shapes"):
    policies.load_start(config, model, mesh)
  config.sft.from_run = str(base)
  with pytest.raises(ValueError, match="no run's workdir"):
    policies.load_start(config, model, mesh)
