"""The learned selection: its gradient, its rows, and how it goes on.

The gradient against the enumeration of all ordered picks; short runs of it
beside the policy and before a frozen one, with a break and without.
"""

import dataclasses
import functools
import itertools
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cf_jax import grpo
from cf_jax.data import pipeline
from cf_jax.models import selector
from cf_jax.programs import experiment as experiment_lib
from cf_jax.programs import held_out, reinforce, scorer, verdicts
from cf_jax.runtime import checkpoint, telemetry
from tests.conftest import init_params

NETWORK = selector.SelectorConfig(
  embedding_dim=5, query_dim=3, width=8, depth=1, kernel=3
)
T, K = 4, 2
FRAMES = np.random.default_rng(0).normal(size=(T, 5)).astype(np.float32)
QUESTION = np.array([1.0, -2.0, 0.5], np.float32)
ORDERS = np.array(list(itertools.permutations(range(T), K)), np.int32)
WORTH = np.cos(3.0 * ORDERS[:, 0] + ORDERS[:, 1]).astype(np.float32)
PRIORITY = np.array([0.3, -0.2, 0.0, 0.5], np.float32)
DRAW = dict(temperature=0.7, min_gap=1)


@pytest.fixture(scope="module")
def params():
  """As if trained: no leaf is zero."""
  fresh = jax.jit(functools.partial(selector.init, NETWORK))(jax.random.key(0))
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), fresh
  )


def drawn(order):
  """Every row of orders [B, N, K], drawn from the same video."""
  count = len(order)
  return scorer.Drawn(
    embedding=np.broadcast_to(FRAMES, (count, *FRAMES.shape)),
    mask=np.ones((count, T), bool),
    question=np.broadcast_to(QUESTION, (count, 3)),
    priority=np.broadcast_to(PRIORITY, (count, T)),
    order=np.asarray(order),
  )


def slope(params, order, advantage):
  """Of what an update descends."""
  loss = functools.partial(scorer.selection_loss, network=NETWORK, **DRAW)
  return jax.jit(jax.grad(loss, has_aux=True))(
    params, drawn(order), jnp.asarray(advantage)
  )[0]


# ---------------------------------------------------------------- the gradient


@pytest.mark.parametrize(
  ("baseline", "share"), [("leave_one_out", 1.0), ("mean", 0.5)]
)
def test_its_expectation_is_the_gradient_of_the_mean_reward(
  params, baseline, share
):
  """All pairs of selections, each of all ordered picks, by their chances.

  Against the reward's mean over picks, written with softmaxes. Less the mean
  over N = 2 selections, itself among them, is half of less the other one.
  """

  def chances(params):
    score = PRIORITY + selector.apply(NETWORK, params, FRAMES, None, QUESTION)
    level = jnp.exp(score / 0.7)
    first = level / level.sum()
    return jnp.stack(
      [first[a] * level[b] / (level.sum() - level[a]) for a, b in ORDERS]
    )

  chance, expected = jax.jit(
    lambda p: (chances(p), jax.grad(lambda p: chances(p) @ WORTH)(p))
  )(params)
  assert float(chance.sum()) == pytest.approx(1, abs=1e-5)

  pairs = np.array(list(itertools.product(range(len(ORDERS)), repeat=2)))
  advantage = grpo.group_advantages(
    jnp.asarray(WORTH[pairs]), scale="none", baseline=baseline, ddof=1, eps=0.0
  )
  # The loss is a mean over the pairs: their chances in place of 1 / pairs.
  weight = len(pairs) * jnp.prod(chance[pairs], axis=1)
  found = slope(params, ORDERS[pairs], weight[:, None] * advantage)
  assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected)) > 0.05
  chex.assert_trees_all_close(
    found, jax.tree.map(lambda x: -share * x, expected), atol=1e-5
  )


def test_a_selection_that_all_share_teaches_nothing(params):
  reward = jnp.array([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]])
  advantage = grpo.group_advantages(
    reward, scale="none", baseline="leave_one_out", ddof=1, eps=0.0
  )
  shared = np.repeat(ORDERS[[3, 7], None], 4, axis=1)
  nothing = slope(params, shared, advantage)
  each = slope(params, ORDERS[:8].reshape(2, 4, K), advantage)
  size = [
    max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))
    for tree in (nothing, each)
  ]
  assert size[0] < 1e-6 and size[1] > 0.05


# -------------------------------------------------------------------- settings


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    (dict(num_selections=1), "num_selections=1; make it 2"),
    (dict(temperature=0.0), r"temperature is 0\.0, expected more than 0"),
    (dict(train_policy=False), "leaves nothing to train"),
    (
      dict(learn=True, reward=dict(answer=0.0, evidence=0.0)),
      "nothing would teach the scorer",
    ),
  ],
)
def test_settings_that_cannot_be_followed(tiny_config, changes, said):
  tiny_config.selector.update(changes)
  with pytest.raises(ValueError, match=said):
    scorer.check(tiny_config)


def test_resampling_is_the_policys(tiny_config):
  tiny_config.selector.update(learn=True, train_policy=False)
  scorer.check(tiny_config)
  tiny_config.rl.resample = 1
  with pytest.raises(ValueError, match="config.rl.resample=1 fills up"):
    scorer.check(tiny_config)


# ------------------------------------------------------------ draws and choices


def _build(config, workdir):
  config.selector.network.update(width=8, depth=1)
  experiment = experiment_lib.build(config.lock(), workdir)
  params = init_params(experiment.model)
  return experiment, params, scorer.Scorer(experiment, params)


def test_draws_and_choices(tiny_config, tmp_path):
  """Two selections a video are two rows; the choice is the best frames."""
  config = tiny_config
  config.selector.learn = True
  config.selector.reward.update(answer=0.5, evidence=2.0)
  experiment, _, learned = _build(config, tmp_path)
  samples = experiment.samples["train"][:4]
  settings = config.data.loader
  batch = pipeline.collate(
    samples[:2],
    np.arange(2),
    scan_frames=settings.scan_frames,
    scan_size_px=settings.scan_size_px,
  )
  drawn = learned.draw(batch, number=1)
  found = drawn.drawn
  prepared = experiment.make_views(
    drawn.batch, ("keyframes", "shuffled"), selected=drawn.selected
  )
  assert found.order.shape == (2, 2, 4)
  np.testing.assert_array_equal(
    np.sort(found.order, axis=-1).reshape(4, 4), prepared.keyframes.index
  )
  assert [s.id for s in prepared.batch.samples] == [
    s.id for s in samples[:2] for _ in range(2)
  ]
  assert len(set(prepared.batch.sample_index.tolist())) == 4
  assert len({row.tobytes() for row in np.asarray(found.order[0])}) > 1
  rows = np.arange(4)[:, None]
  np.testing.assert_array_equal(drawn.keyframe_time_s, prepared.keyframe_time_s)
  np.testing.assert_allclose(
    prepared.keyframe_time_s,
    np.repeat(batch.scan_time_s, 2, axis=0)[rows, prepared.keyframes.index],
  )
  np.testing.assert_allclose(  # an untrained scorer says nothing
    found.priority, drawn.selected[0].score[::2], atol=1e-6
  )
  again = learned.draw(batch, number=1).drawn
  other = learned.draw(batch, number=2).drawn
  np.testing.assert_array_equal(again.order, found.order)
  assert np.any(np.asarray(other.order) != np.asarray(found.order))

  main = np.arange(8).reshape(4, 2).astype(np.float32)
  shown = [
    sum(any(start <= t <= end for t in times) for start, end in s.evidence)
    / max(len(s.evidence), 1)
    for s, times in zip(
      prepared.batch.samples, prepared.keyframe_time_s, strict=True
    )
  ]
  np.testing.assert_allclose(
    learned.earned(drawn, main),
    (main.mean(axis=1) / 2 + 2 * np.array(shown)).reshape(2, 2),
    rtol=1e-6,
  )

  chosen, uniform = learned.choose(batch)
  for score, order in zip(chosen.score, chosen.order, strict=True):
    left = dict(enumerate(score))
    for pick in order:
      assert score[pick] >= max(left.values()) - 1e-4
      left = {t: s for t, s in left.items() if abs(t - pick) >= 3}
  assert uniform[0].tolist() == [8, 24, 40, 56]  # of 64 frames

  judge = held_out.Evaluator(
    experiment, samples, ("keyframes",), batch_size=4, max_tokens=2
  )
  before = judge.hit_rates()
  fixed = experiment.make_views._selected

  def show_uniform(batch):
    keyframes, uniform = fixed(batch)
    return dataclasses.replace(keyframes, index=uniform), uniform

  judge.select_by(show_uniform)
  after = judge.hit_rates()
  assert after["keyframes"] == after["uniform"] == before["uniform"]
  assert before["keyframes"] != before["uniform"]


# ---------------------------------------------------------------- whole stages


def _lucky(judge):
  """Calls rollouts with an odd sum of tokens right."""

  def read(prepared, token, mask):
    found = judge(prepared, token, mask)
    right = ((token * mask).sum(axis=-1) % 2).astype(np.float32)
    return found.replace(component=found.component | {"accuracy": right})

  return read


def _train(config, workdir, *, steps_kept=None):
  """The stage, or its last update from the checkpoint in `steps_kept`."""
  experiment, params, learned = _build(config, workdir)
  folder = workdir / "checkpoints"
  if steps_kept is not None:
    shutil.copytree(steps_kept / "checkpoints" / "1", folder / "1")
  store = checkpoint.Checkpoints(folder, keep=2)
  judge = _lucky(verdicts.make_judge(experiment))
  with telemetry.MetricWriter(workdir, resume={}) as writer:
    if scorer.is_alone(config):
      reinforce.train_scorer(
        experiment, params, writer, store, learned, judge=judge
      )
    else:
      params = reinforce.train_policy(
        experiment, params, writer, store, judge=judge, learned=learned
      )
  host = store._manager.restore(2)["host"]
  store.close()
  rows = telemetry.read_rows(workdir / telemetry.METRICS_FILE)
  return rows, jax.device_get((learned.state, params)), host


def _stage(config, **changes):
  """Two updates, a checkpoint after each, and the least around them."""
  config.selector.update(learn=True, **changes)
  config.rl.update(steps=2, prompts_per_step=2, checkpoint_every=1)
  config.contrast.kind = "none"
  config.loss.kl_weight = 0.0
  return config


def _check(rows):
  for row in rows:
    assert row["selector/logprob"] < 0 and row["recompiles"] == 0
    assert 0 <= row["selector/hit_rate"] <= 1 and row["time/select_s"] > 0
    assert row["selector/reward_worst"] <= row["selector/reward_best"]


@pytest.mark.parametrize("kind", ["beside", "located"])
def test_goes_on_as_if_never_stopped(tiny_config, tmp_path, kind, monkeypatch):
  config = _stage(tiny_config, train_policy=kind == "beside")
  if kind == "located":
    config.selector.reward.update(answer=0.0, evidence=1.0)
    config.profile = "2:2"
  traced = []  # writing a trace takes longer than all the rest
  monkeypatch.setattr(
    telemetry.Tracer,
    "step",
    lambda self, number: traced.append((self._updates, number)),
  )
  (tmp_path / "straight").mkdir()
  (tmp_path / "resumed").mkdir()
  rows, state, host = _train(config, tmp_path / "straight")
  last, resumed, other = _train(
    config, tmp_path / "resumed", steps_kept=tmp_path / "straight"
  )
  chex.assert_trees_all_equal(state, resumed)
  assert host == other and int(state[0].step) == 2

  def computed(row):
    return {
      name: value
      for name, value in row.items()
      if not name.startswith(("time/", "rate/", "mfu/", "share/", "work/"))
      and name not in ("wall_s", "recompiles")
    }

  assert [computed(row) for row in last] == [computed(rows[1])]
  _check(rows)
  for row in rows:
    assert ("time/update_s" in row) == (kind == "beside")
    assert ("time/decode_s" in row) == (kind == "beside")
  updates = (2, 2) if kind == "located" else None
  assert traced == [(updates, number) for number in (1, 2, 2)]
  if kind == "beside":
    assert any(row["selector/grad_norm"] > 0 for row in rows)


def test_before_a_frozen_answerer(tiny_config, tmp_path):
  config = _stage(tiny_config, train_policy=False)
  rows, (state, params), _ = _train(config, tmp_path)
  _check(rows)
  assert int(state.step) == 2
  for row in rows:
    assert row["time/decode_s"] > 0 and "grad_norm" not in row
    assert "time/update_s" not in row and "time/reference_s" not in row
    assert row["selector/reward"] == pytest.approx(row["reward/accuracy"])
  experiment = experiment_lib.build(config, tmp_path)
  chex.assert_trees_all_equal(params, init_params(experiment.model))


def test_a_frozen_answerer_earns_no_bonus(tiny_config, tmp_path):
  config = tiny_config
  config.selector.update(learn=True, train_policy=False)
  experiment, params, learned = _build(config, tmp_path)
  with pytest.raises(ValueError, match="set config.contrast.kind='none'"):
    store = checkpoint.Checkpoints(tmp_path / "selector", keep=1)
    reinforce.train_scorer(experiment, params, None, store, learned)
