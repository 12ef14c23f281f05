"""The reinforcement loop under the settings of KF-GRPO and its neighbours.

Rewards and advantages of the jitted step against numbers worked by hand, and
short runs in which every option of the loop is used.
"""

import ast
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cf_jax import rewards
from cf_jax.data import answers, records
from cf_jax.programs import experiment as experiment_lib
from cf_jax.programs import reinforce, rl_steps, train, verdicts
from cf_jax.runtime import checkpoint, sharding, telemetry
from cf_jax.types import Rollout, Verdict
from tests.conftest import init_params, load_config

# Two prompts of four completions of three tokens.
B, G, C, K = 2, 4, 3, 2
ACCURACY = np.array([[1, 1, 0, 0], [1, 0, 0, 0]], np.float32)
LENGTH = np.array([[3, 2, 1, 2], [1, 3, 3, 2]], np.int32)


@pytest.fixture
def config():
  config = load_config("configs/kfgrpo_cpu.py", "smoke")
  config.reward.weight = dict(accuracy=1.0)
  return config


def score(config, *, scored=None, sampled=None, reference=None, **changes):
  """The reward step of a config on the batch above."""
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1, context=1)
  experiment = types.SimpleNamespace(config=config, mesh=mesh)
  mask = np.arange(C) < LENGTH[..., None]
  verdict = Verdict(
    component={"accuracy": ACCURACY, "format": np.ones((B, G), np.float32)},
    answer_span=mask,
    reasoning_span=np.zeros_like(mask),
    length=LENGTH,
    cited=np.zeros((B, G, K), bool),
    applies={name: np.ones(B, bool) for name in ("accuracy", "format")},
  ).replace(**changes)
  rollout = Rollout(
    token=np.zeros((B, G, C), np.int32),
    mask=mask,
    logprob=np.where(mask, -1.0, 0).astype(np.float32),
    finished=np.ones((B, G), bool),
  )
  evidence = rl_steps.Evidence(
    scored=scored or {},
    sampled=sampled or {},
    ref_logprob=reference,
    saliency=jnp.zeros((B, G)),
    top=np.eye(K, dtype=bool)[[1, 1]] & [[True], [False]],
    can_shuffle=jnp.array([True, True]),
    has_apex=jnp.array([True, False]),
    kind=jnp.array([0, 1]),
    task=jnp.array([1, 1]),
    rng=jax.random.key(0),
  )
  step = rl_steps.make_reward_step(experiment, num_kinds=2, num_tasks=2)
  moments = (jnp.zeros(2), jnp.zeros(2))
  return step(verdict, rollout, evidence, moments)


# ------------------------------------------------------------ rewards, by hand


def test_what_a_policy_may_learn_in_place_of_looking_is_counted(config):
  # The first prompt's second keyframe is TAD's most salient, the second
  # prompt has none.
  cited = np.zeros((B, G, K), bool)
  cited[0, 0], cited[0, 1, 1], cited[0, 2, 0], cited[1, 0, 1] = 1, 1, 1, 1
  first_token = np.arange(C) < np.ones((B, G, 1))
  found = score(config, cited=cited, answer_span=first_token)
  assert float(found.metrics["cited/any"]) == 4 / 8
  assert float(found.metrics["cited/keyframes"]) == 5 / 8
  assert float(found.metrics["cited/top"]) == 2 / 4
  assert float(found.metrics["length/reasoning"]) == 17 / 8 - 1


def test_grpo_is_the_reward_less_its_group_mean(config):
  config.contrast.kind = "none"
  found = score(config)
  np.testing.assert_array_equal(found.bonus, 0)
  expected = [[0.5, 0.5, -0.5, -0.5], [0.75, -0.25, -0.25, -0.25]]
  np.testing.assert_allclose(found.advantage, expected, rtol=1e-6)
  mean, count = found.task_mean
  np.testing.assert_allclose(mean, [0, 3 / 8], rtol=1e-6)
  assert count.tolist() == [0, 2]
  assert float(found.metrics["reward/correct"]) == 3 / 8


@pytest.mark.parametrize(
  ("mu", "given"), [(0.8, (True, False)), (1.3, (False, False))]
)
def test_t_grpo(config, mu, given):
  """Mean accuracies 0.5 and 0.25, shuffled 0.5 and 0.5."""
  config.contrast.update(kind="threshold")
  config.contrast.threshold.mu = mu
  shuffled = jnp.array([[1.0, 0.0], [0.5, 0.5]])
  found = score(config, sampled={"shuffled": shuffled})
  expected = 0.3 * ACCURACY * np.asarray(given)[:, None]
  np.testing.assert_allclose(found.bonus, expected, rtol=1e-6)
  np.testing.assert_allclose(found.reward, ACCURACY + expected, rtol=1e-6)
  assert float(found.metrics["arm/shuffled"]) == 0.5


def test_t_grpo_of_another_prompt(config):
  """The placebo compares with the next prompt's shuffled accuracy."""
  config.contrast.update(kind="threshold", placebo="other_prompt")
  shuffled = jnp.array([[0.0, 0.0], [1.0, 1.0]])
  found = score(config, sampled={"shuffled": shuffled})
  np.testing.assert_allclose(
    found.bonus, 0.3 * ACCURACY * np.array([[0], [1]]), rtol=1e-6
  )


def test_rollout_contrast_is_each_rollouts_own(config):
  """0.5 nats a token: 0.3 * 0.5, for the shuffled arm and where it applies."""
  scored = {
    arm: jnp.full((B, M, G, C), -1.5)
    for arm, M in (("shuffled", 2), ("uniform", 1))
  }
  scored["shuffled"] = scored["shuffled"].at[0, :, 1].set(-1.0)
  found = score(config, scored=scored)
  expected = [[0.15 + 0.15, 0.15, 0, 0], [0.15, 0, 0, 0]]
  np.testing.assert_allclose(found.bonus, expected, rtol=1e-5)


def test_the_contrast_may_read_the_reasoning_too(config):
  """The answer hangs on nothing, the words before it on order."""
  tokens = np.arange(C) < LENGTH[..., None]
  answer = tokens & (np.arange(C) == 0)
  scored = {
    "shuffled": jnp.where(answer[:, None], -1.0, -2.0),
    "uniform": jnp.full((B, 1, G, C), -1.0),
  }
  spans = dict(answer_span=answer, reasoning_span=tokens & ~answer)
  found = score(config, scored=scored, **spans)
  np.testing.assert_array_equal(found.bonus, 0)
  config.contrast.span = "text"
  found = score(config, scored=scored, **spans)
  expected = 0.3 * (ACCURACY > 0.1) * (LENGTH - 1) / LENGTH
  assert expected.any()
  np.testing.assert_allclose(found.bonus, expected, rtol=1e-6)


def test_the_random_placebo_moves_bonuses_between_correct_rollouts(config):
  config.contrast.placebo = "random"
  scored = {"shuffled": jnp.full((B, 1, G, C), -1.5)}
  scored["shuffled"] = scored["shuffled"].at[0, :, 0].set(-1.25)
  found = score(config, scored=scored)
  dealt = np.asarray(found.bonus)
  assert np.all(dealt[ACCURACY == 0] == 0)
  np.testing.assert_allclose(
    np.sort(dealt[ACCURACY == 1]), [0.075, 0.15, 0.15], rtol=1e-5
  )


def test_margin_leaves_one_out(config):
  """p_K without i is 1/3 and 0 for the right ones; the other arm has 1/2."""
  config.contrast.update(kind="margin")
  config.contrast.rollout.alpha_c = 0.0
  found = score(config, sampled={"shuffled": jnp.array([[1.0, 0.0]] * 2)})
  expected = 0.3 * np.array([[-1 / 6, -1 / 6, 0, 0], [-1 / 2, 0, 0, 0]])
  np.testing.assert_allclose(found.bonus, expected, rtol=1e-5)


def test_length_products_and_the_soft_penalty(config):
  """Video-R1's bonus, ViaRL's product and length, DAPO's penalty in one."""
  config.contrast.kind = "none"
  config.reward.products = dict(both=("accuracy", "format"))
  config.reward.weight = dict(both=2.0, length=0.2)
  config.reward.length = dict(low=2, high=3, bonus=0.5)
  config.reward.overlong = dict(weight=1.0, buffer=2)
  config.sampling.max_tokens = 3
  found = score(config)
  inside = (LENGTH >= 2).astype(np.float32)
  several = np.array([[1], [0]])  # right ones in the group: 2 and 1
  expected = (
    2 * ACCURACY
    + 0.2 * inside
    + 0.5 * ACCURACY * inside * several
    - (LENGTH - 1) / 2
  )
  np.testing.assert_allclose(found.reward, expected, rtol=1e-6)


def test_kl_in_the_reward(config):
  """k1 of 0.5 nats a token, weight 0.1."""
  config.contrast.kind = "none"
  config.reward.kl = dict(weight=0.1, kind="k1")
  reference = jnp.full((B, G, C), -1.5)
  found = score(config, reference=reference)
  np.testing.assert_allclose(
    found.reward, ACCURACY - 0.1 * 0.5 * LENGTH, rtol=1e-6
  )


def test_reinforce_whitens_over_tokens(config):
  config.contrast.kind = "none"
  config.rl.advantage = "reinforce"
  config.reinforce.update(kl_weight=0.0, discount=1.0)
  found = np.asarray(score(config, reference=jnp.zeros((B, G, C))).advantage)
  mask = np.arange(C) < LENGTH[..., None]
  # Undiscounted and without KL, a token's return is its completion's reward.
  returns = np.broadcast_to(ACCURACY[..., None], mask.shape)[mask]
  expected = (returns - returns.mean()) / returns.std(ddof=1)
  np.testing.assert_allclose(found[mask], expected, rtol=1e-5)
  assert np.all(found[~mask] == 0)


def test_batch_scale_is_by_kind_and_remembers(config):
  config.contrast.kind = "none"
  config.advantage.update(scale="batch", ddof=1, eps=0.0)
  config.rl.std_decay = 1.0
  found = score(config)
  std = [np.std(row, ddof=1) for row in ACCURACY]
  centred = ACCURACY - ACCURACY.mean(axis=1, keepdims=True)
  np.testing.assert_allclose(
    found.advantage, centred / np.array(std)[:, None], rtol=1e-5
  )
  np.testing.assert_allclose(found.moments[0], [1.0, 0.75], rtol=1e-6)
  np.testing.assert_allclose(found.moments[1], [3, 3])


# ------------------------------------------------------------------- settings


def test_contrast_arms(config):
  arms = reinforce.contrast_arms(config)
  assert arms.made == ("keyframes", "shuffled", "uniform")
  assert arms.sampled == () and arms.watched == ("shuffled", "uniform")
  config.contrast.watch_every = 0
  assert reinforce.contrast_arms(config).watched == ()
  config.contrast.rollout.alpha_c = 0.0
  assert reinforce.contrast_arms(config).scored == ("shuffled",)
  config.contrast.kind = "threshold"
  arms = reinforce.contrast_arms(config)
  assert (arms.scored, arms.sampled) == ((), ("shuffled",))
  config.contrast.kind = "none"
  assert reinforce.contrast_arms(config).made == ("keyframes",)
  config.contrastive.weight = 0.1
  assert reinforce.contrast_arms(config).scored == ("shuffled",)
  config.contrast.watch_every = 5
  assert reinforce.contrast_arms(config).made[1:] == ("shuffled", "uniform")


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("contrast.kind", "treshold"),
    ("contrast.saliency", "tad"),
    ("contrast.placebo", "sugar"),
    ("contrast.span", "prompt"),
    ("rl.advantage", "gae"),
  ],
)
def test_an_unknown_choice_names_its_setting(config, name, value):
  subtree, _, key = name.partition(".")
  config[subtree][key] = value
  with pytest.raises(ValueError, match=f"config.{name} .*{value}"):
    reinforce.contrast_arms(config)


def test_a_kl_weight_that_nobody_reads_is_refused(config):
  config.reward.kl.weight = 0.1
  reinforce.contrast_arms(config)
  config.rl.advantage = "reinforce"
  with pytest.raises(ValueError, match="config.reinforce.kl_weight"):
    reinforce.contrast_arms(config)


def test_answers_that_would_earn_nothing_are_refused(config):
  def sample(kind):
    return records.Sample("a", "a.mp4", "", (), "", kind)

  samples = [sample("multiple_choice"), sample("interval")]
  with pytest.raises(ValueError, match=r"interval question .* 'iou': 1.0"):
    reinforce.check_credit(config, samples)
  reinforce.check_credit(config, samples[:1])
  config.reward.weight = dict(both=1.0)
  config.reward.products = dict(both=("accuracy", "iou"))
  reinforce.check_credit(config, samples)
  config.reward.weight = dict(both=0.0, accuracy=1.0)
  with pytest.raises(ValueError, match="interval"):
    reinforce.check_credit(config, samples)


def test_components_and_tasks_that_a_batch_lacks():
  """Means over two batches weigh samples; what neither has is left out."""
  collector = object.__new__(reinforce.Collector)
  collector._tasks = ["needle", "order", "tracking"]

  def scored(**fields):
    return types.SimpleNamespace(**fields)

  every = [
    scored(
      component_mean={"accuracy": (0.5, 2), "iou": (0.0, 0)},
      task_mean=([0.5, 0.0, 0.0], [2, 0, 0]),
      task_reward=([0.7, 0.0, 0.0], [2, 0, 0]),
    ),
    scored(
      component_mean={"accuracy": (1.0, 6), "iou": (0.0, 0)},
      task_mean=([1.0, 0.25, 0.0], [2, 4, 0]),
      task_reward=([1.1, 0.3, 0.0], [2, 4, 0]),
    ),
  ]
  assert collector.partial_means(every) == pytest.approx(
    {
      "reward/accuracy": 0.875,
      "accuracy/needle": 0.75,
      "task_reward/needle": 0.9,
      "accuracy/order": 0.25,
      "task_reward/order": 0.3,
    }
  )


def test_the_contrastive_loss_leaves_out_what_cannot_be_shuffled():
  collector = object.__new__(reinforce.Collector)
  collector._masks = collector._filters = False
  collector._contrastive = True
  mask = np.arange(C) < LENGTH[..., None]
  rollout = Rollout(
    token=np.zeros((B, G, C), np.int32),
    mask=mask,
    logprob=jnp.where(mask, -1.0, 0),
    finished=np.ones((B, G), bool),
  )
  scored = types.SimpleNamespace(
    spread=jnp.ones(B, bool),
    correct=jnp.ones((B, G), bool),
    advantage=jnp.zeros((B, G)),
  )
  made = collector._experience(
    {"keyframes": None, "shuffled": None},
    rollout,
    scored,
    None,
    None,
    {"shuffled": jnp.full((B, 1, G, C), -2.0)},
    types.SimpleNamespace(answer_span=mask),
    jnp.array([True, False]),
  )
  assert made.other.select.tolist() == [[True] * G, [False] * G]
  assert made.other.moved.tolist() == [True, False]


@pytest.mark.parametrize("buffer", [0, -1])
def test_a_penalty_needs_tokens_to_grow_over(config, buffer):
  config.reward.overlong = dict(weight=0.0, buffer=buffer)
  reinforce.check_settings(config)
  config.reward.overlong.weight = 0.5
  with pytest.raises(ValueError, match="config.reward.overlong.buffer"):
    reinforce.check_settings(config)


@pytest.mark.parametrize(
  ("named", "changes"),
  [
    ("advantage.baseline='mean'", {}),
    ("advantage.baseline='leave_one_out'", {}),
    ("advantage.scale='group'", {"advantage.baseline": "none"}),
    ("advantage.scale='batch'", {"advantage.baseline": "none"}),
    ("reinforce.baseline='mean'", {"rl.advantage": "reinforce"}),
    ("contrast.kind='margin'", {"rl.advantage": "reinforce"}),
    ("rl.mask_zero_spread=True", {"rl.advantage": "reinforce"}),
    ("rl.resample=2", {"rl.advantage": "reinforce"}),
  ],
)
def test_one_completion_has_no_group(config, named, changes):
  name, _, value = named.partition("=")
  changes = changes | {name: ast.literal_eval(value)}
  config.update_from_flattened_dict(changes)
  reinforce.check_settings(config)
  config.sampling.num_completions = 1
  with pytest.raises(ValueError, match=f"num_completions=1 .*{named}"):
    reinforce.check_settings(config)
  config.selector.update(learn=True, train_policy=False)
  reinforce.check_settings(config)  # selections are compared


def test_one_completion_that_is_compared_with_none(config):
  config.sampling.num_completions = 1
  config.advantage.baseline = "none"
  reinforce.check_settings(config)
  config.rl.advantage, config.advantage.baseline = "reinforce", "mean"
  reinforce.check_settings(config)
  config.contrast.kind = "margin"
  config.contrast.rollout.update(alpha_t=0.0, alpha_c=0.0)
  reinforce.check_settings(config)


def test_a_run_is_refused_before_anything_is_made(config, tmp_path):
  config.sampling.num_completions = 1
  with pytest.raises(ValueError, match="config.sampling.num_completions=1"):
    train.run(config, tmp_path / "run")
  assert not list((tmp_path / "run").iterdir())


def test_the_reference_is_asked_only_where_it_counts(config):
  assert reinforce.uses_reference(config)
  config.loss.kl_weight = 0.0
  assert not reinforce.uses_reference(config)
  config.rl.advantage = "reinforce"
  assert reinforce.uses_reference(config)
  config.reinforce.kl_weight = 0.0
  assert not reinforce.uses_reference(config)
  config.contrastive.weight = 1.0
  assert reinforce.uses_reference(config)


def test_useful_first():
  pool = np.array([False, True, False])
  fresh = np.array([True, True, False])
  assert reinforce.useful_first(pool, fresh).tolist() == [1, 3, 4]
  assert reinforce.useful_first(pool, ~fresh).tolist() == [1, 5, 0]


# ----------------------------------------------------------------- whole steps


def _train(config, workdir, monkeypatch, *, make_judge):
  """Runs the stage from random weights; its metrics."""
  monkeypatch.setattr(verdicts, "make_judge", make_judge)
  experiment = experiment_lib.build(config.lock(), workdir)
  store = checkpoint.Checkpoints(workdir / "rl", keep=1)
  with telemetry.MetricWriter(workdir, resume={}) as writer:
    reinforce.train_policy(
      experiment, init_params(experiment.model), writer, store
    )
  store.close()
  return telemetry.read_rows(workdir / telemetry.METRICS_FILE)


def _lucky(change=lambda right, call: right):
  """A judge that calls some rollouts right, and their first token the answer.

  Args:
    change: bool-like float32[B, G] and the number of the call -> the same.

  Returns:
    What takes the place of `make_judge`, and the G of every call.
  """
  real, calls = verdicts.make_judge, []

  def make_judge(experiment):
    judge = real(experiment)

    def read(prepared, token, mask):
      found = judge(prepared, token, mask)
      calls.append(token.shape[1])
      right = ((token * mask).sum(axis=-1) % 2).astype(np.float32)
      right[:, 0], right[:, 1] = 0, 1
      return found.replace(
        component=found.component | {"accuracy": change(right, len(calls))},
        answer_span=mask & (np.arange(token.shape[-1]) == 0),
      )

    return read

  return make_judge, calls


def test_deletion_judges_what_is_not_annotated(
  tiny_config, tmp_path, monkeypatch
):
  config = tiny_config
  config.rl.steps = 1
  config.contrast.update(saliency="evidence_else_deletion", watch_every=0)
  annotated, found = [], []
  evidence_keyframes = answers.evidence_keyframes

  def watched(samples, time_s):
    annotated.append([bool(sample.evidence) for sample in samples])
    return evidence_keyframes(samples, time_s)

  build = experiment_lib.build

  def build_half(*args):
    """Every second sample is not annotated."""
    made = build(*args)
    for number in range(0, len(made.samples["train"]), 2):
      sample = made.samples["train"][number]
      made.samples["train"][number] = sample._replace(evidence=())
    return made

  make_reward_step = rl_steps.make_reward_step

  def make_watched(*args, **settings):
    reward = make_reward_step(*args, **settings)

    def step(verdict, rollout, evidence, moments):
      found.append(np.asarray(evidence.saliency))
      return reward(verdict, rollout, evidence, moments)

    return step

  def deletion(params, view, encoded, rollout, *rest):
    return jnp.full(rollout.token.shape[:2], 0.25)

  monkeypatch.setattr(experiment_lib, "build", build_half)
  monkeypatch.setattr(answers, "evidence_keyframes", watched)
  monkeypatch.setattr(rl_steps, "make_reward_step", make_watched)
  monkeypatch.setattr(rl_steps, "make_deletion_step", lambda _: deletion)
  monkeypatch.setattr(
    rewards, "evidence_saliency", lambda cited, _: jnp.ones(cited.shape[:2])
  )
  _train(config, tmp_path, monkeypatch, make_judge=_lucky()[0])
  (saliency,), (known,) = found, annotated
  assert {True, False} == set(known)
  want = np.where(np.array(known)[:, None], 1.0, 0.25)
  np.testing.assert_array_equal(saliency, np.broadcast_to(want, saliency.shape))


def test_t_grpo_with_resampling(tiny_config, tmp_path, monkeypatch):
  """Two batches without a spread are followed by one that has it."""
  config = tiny_config
  config.rl.update(steps=2, resample=2, overlong_filter=True)
  config.contrast.update(kind="threshold", num_samples=3)
  config.advantage.scale = "group"
  config.loss.kl_weight = 0.0
  config.reward.weight = dict(accuracy=1.0)  # the format has no spread either
  # Keyframes and shuffled take turns; only the third batch is ever right.
  make_judge, calls = _lucky(lambda right, call: right * (call % 6 == 5))
  rows = _train(config, tmp_path, monkeypatch, make_judge=make_judge)
  assert calls[:6] == [2, 3, 2, 3, 2, 3]
  assert [row["sampled/batches"] for row in rows] == [3, 3]
  assert [row["sampled/groups_that_teach"] for row in rows] == [4, 4]
  for row in rows:
    assert row["reward/zero_spread_groups"] == pytest.approx(2 / 3)
    assert row["recompiles"] == 0 and "kl" not in row
    assert row["time/other arms_s"] > 0 and "rate/reference_per_s" not in row
  assert rows[-1]["data/skipped_total"] == 0


def test_every_option_of_the_loss(tiny_config, tmp_path, monkeypatch):
  """Deletion saliency, contrastive loss, importance weights, two updates."""
  config = tiny_config
  config.rl.update(
    steps=2,
    updates_per_batch=2,
    importance_cap=2.0,
    entropy_weight=1e-3,
    std_decay=0.9,
    micro_batches=2,
  )
  config.contrast.update(saliency="deletion", watch_every=2)
  config.contrastive.weight = 0.1
  config.advantage.scale = "batch"
  make_judge, _ = _lucky()
  rows = _train(config, tmp_path, monkeypatch, make_judge=make_judge)
  for row in rows:
    assert row["recompiles"] == 0
    assert row["mismatch_max"] < 1e-4 and row["mismatch_capped"] == 0
    # The second update of a batch has moved away from what was sampled.
    assert row["log_ratio_abs"] > 0
    assert 0 <= row["contrastive_loss"] < 5 and row["kl_other_view"] >= 0
    assert row["time/deletion_s"] > 0
  assert any(row["contrastive_loss"] > 0 for row in rows)
  assert "arm/shuffled" not in rows[0]
  assert 0 <= rows[1]["arm/shuffled"] <= 1 and "arm/uniform" in rows[1]
