"""The learned selection: a scorer of scanned frames that rewards teach.

For every prompt `N` selections of keyframes are drawn one frame after another
from the softmax of the score, and each becomes a prompt of its own: `B` prompts
are `B * N` rows of a batch, the N of a prompt in a row. What a selection earns
is compared with the prompt's other selections, and the scorer follows the
gradient of the *exact* log-probability of the ordered picks, computed again
from the picks with the parameters at hand:

    grad J = mean over prompts and selections of A_n * grad log p(picks_n)

The score is TAD's priority times `config.selector.tad_weight`, plus what
`models/selector.py` makes of the scan's embeddings and the question's words
(the mean of the policy's token embeddings, as they are where the stage starts).

After TSPO (arXiv 2508.04369), whose public code scores its picks as if they
were drawn independently of each other.

Axes: `B` prompts, `N` selections per prompt, `T` scanned frames, `K` keyframes,
`G` completions per row, `E` and `U` widths of frame and question embeddings.
"""

import functools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from cf_jax import descriptor, grpo, tad, views
from cf_jax.data import pipeline
from cf_jax.evals import keyframes as keyframe_evals
from cf_jax.models import selector, vlm
from cf_jax.programs import experiment as experiment_lib
from cf_jax.programs import policies, sft
from cf_jax.runtime import checkpoint, optim, sharding
from cf_jax.types import TrainState

_COLD = 1e-6  # so far below a score's differences that the best frames win


class Drawn(NamedTuple):
  """What an update reads of selections that were drawn.

  Attributes:
    embedding: float32[B, T, E] of the scanned frames.
    mask: bool[B, T] those that exist.
    question: float32[B, U].
    priority: float32[B, T] the part of the score that is TAD's: a constant.
    order: int32[B, N, K] picks in the order drawn, T for none.
  """

  embedding: jax.Array
  mask: jax.Array
  question: jax.Array
  priority: jax.Array
  order: jax.Array


class Rows(NamedTuple):
  """A batch in which every video stands N times, each with its own frames.

  Attributes:
    batch: of B * N rows. In place of its sample's number, a row has its own: it
      seeds what is drawn for it.
    selected: Keyframes and uniform frames of the rows.
    drawn: the picks, on the devices.
  """

  batch: pipeline.Batch
  selected: views.Selected
  drawn: Drawn

  @property
  def keyframe_time_s(self) -> np.ndarray:
    """float32[B * N, K] seconds, NaN where there is no keyframe."""
    keyframes = self.selected[0]
    index = np.where(keyframes.mask, keyframes.index, 0)
    seconds = np.take_along_axis(self.batch.scan_time_s, index, axis=1)
    return np.where(keyframes.mask, seconds, np.nan)


@flax.struct.dataclass
class JointState(TrainState):
  """The policy's TrainState and, in the same checkpoint, the scorer's."""

  selector: TrainState


# -------------------------------------------------------------------- settings


def check(config: ml_collections.ConfigDict) -> None:
  """Raises a ValueError where `config.selector` cannot be followed."""
  settings = config.selector
  network = _network(config, embedding_dim=1, query_dim=1)
  shapes = jax.eval_shape(
    functools.partial(selector.init, network), jax.random.key(0)
  )
  optim.make_optimizer(shapes, **settings.optim)
  grpo.group_advantages(jnp.zeros((1, 2)), **settings.advantage)
  weights = dict(settings.reward)
  if settings.num_selections < 2:
    raise ValueError(
      "a selection is compared with another one of the same prompt, got"
      f" config.selector.num_selections={settings.num_selections}; make it 2"
      " or more"
    )
  if settings.temperature <= 0 or settings.tad_weight < 0:
    raise ValueError(
      f"config.selector.temperature is {settings.temperature}, expected more"
      f" than 0; config.selector.tad_weight is {settings.tad_weight}, expected"
      " 0 or more"
    )
  if settings.learn and not any(weights.values()):
    raise ValueError(
      f"config.selector.reward is {weights}: nothing would teach the scorer;"
      " give one of them a weight"
    )
  if not settings.learn and not settings.train_policy:
    raise ValueError(
      "config.selector.train_policy=False leaves nothing to train; set"
      " config.selector.learn=True, or config.rl.steps=0 for no reinforcement"
    )
  if settings.learn and not settings.train_policy and config.rl.resample:
    raise ValueError(
      f"config.rl.resample={config.rl.resample} fills up updates of the policy,"
      " which config.selector.train_policy=False leaves out; set it to 0"
    )


def is_alone(config: ml_collections.ConfigDict) -> bool:
  """Is the scorer trained and the policy, its answerer, frozen?"""
  return config.selector.learn and not config.selector.train_policy


def _network(config, **widths) -> selector.SelectorConfig:
  return selector.SelectorConfig(**widths, **config.selector.network)


# ---------------------------------------------------------------- the gradient


def selection_loss(
  params: dict,
  drawn: Drawn,
  advantage: jax.Array,
  *,
  network: selector.SelectorConfig,
  **settings: float,
) -> tuple[jax.Array, jax.Array]:
  """What has the policy gradient of the draws as its gradient.

  Args:
    params: of the scorer.
    drawn: the picks.
    advantage: float[B, N]; a constant.
    network: the scorer.
    **settings: temperature and min_gap of the draw.

  Returns:
    -mean(advantage * log p(picks)) and float[B, N] the log-probabilities.
  """

  def one(embedding, mask, question, priority, order):
    score = priority + selector.apply(
      network, params, embedding, mask, question
    )
    return jax.vmap(
      lambda picks: tad.selection_logprob(score, picks, mask, **settings)
    )(order)

  logprob = jax.vmap(one)(*drawn)
  return -jnp.mean(jax.lax.stop_gradient(advantage) * logprob), logprob


# ------------------------------------------------------------------- the scorer


class Scorer:
  """Draws selections, learns from what they earn, and chooses frames.

  Args:
    experiment: from `experiment.build`.
    params: all parameters of the policy where the stage starts; of these only
      the token embeddings are read, which no update may change or give away.

  Attributes:
    state: TrainState, on all devices whole. It is small; set it to go on from
      a checkpoint. Of several processes each draws for its own rows of a
      batch, and all make the same update of all rows.
  """

  def __init__(self, experiment: experiment_lib.Experiment, params: dict):
    config, model = experiment.config, experiment.model
    self._experiment = experiment
    self._num_selections = config.selector.num_selections
    self._weight = dict(config.selector.reward)
    self._words = {"decoder": {"embed": params["decoder"]["embed"]}}
    self._num_words = config.prompt.max_tokens
    if config.scan.descriptor == "vision":
      width = model.vision.out_hidden_size
    else:
      width = jax.eval_shape(
        descriptor.pixel_descriptor, jax.ShapeDtypeStruct((4, 4, 3), np.uint8)
      ).shape[-1]
    network = _network(config, embedding_dim=width, query_dim=model.hidden_size)
    rng = jax.random.fold_in(jax.random.key(config.seed), 2)
    self._rng = jax.random.fold_in(rng, 0)
    optimizer = optim.make_optimizer(
      jax.eval_shape(functools.partial(selector.init, network), rng),
      **config.selector.optim,
    )

    def fresh(rng):
      params = selector.init(network, rng)
      return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=optimizer.init(params),
        rng=jax.random.key_data(rng),
      )

    whole = sharding.replicated(experiment.mesh)
    by_row = sharding.batch_sharding(experiment.mesh)
    self.state = jax.jit(fresh, out_shardings=whole)(rng)

    settings = dict(config.tad)
    settings |= dict(
      selection="stochastic", temperature=config.selector.temperature
    )
    for name in ("variation_weight", "apex_weight"):
      settings[name] = settings.get(name, 1.0) * config.selector.tad_weight
    num_keyframes = settings["num_keyframes"]
    how_drawn = {
      name: settings[name]
      for name in ("temperature", "min_gap")
      if name in settings
    }
    advantage_settings = dict(config.selector.advantage)

    @jax.jit
    def ask_step(words, token, mask):
      """The question's words: int32[B, S] and bool[B, S] -> float32[B, U]."""
      each = vlm.embed_text(model, words, token).astype(jnp.float32)
      count = jnp.maximum(jnp.sum(mask, axis=1), 1)
      return jnp.einsum("bsu,bs->bu", each, mask) / count[:, None]

    # Each process reads its own rows of what these two give.
    @functools.partial(jax.jit, out_shardings=by_row)
    def uniform_step(mask):
      uniform = functools.partial(
        tad.uniform_index, num_keyframes=num_keyframes
      )
      return jax.vmap(uniform)(mask)

    @functools.partial(jax.jit, out_shardings=by_row)
    def draw_step(params, embedding, mask, question, number, rng, temperature):
      """Keyframes[B, n] of the keys int32[B, n], folded into `rng`, and TAD's
      priority float32[B, T]."""

      def one(embedding, mask, question, number):
        learned = selector.apply(network, params, embedding, mask, question)
        found = jax.vmap(
          lambda n: selector.select(
            network,
            params,
            embedding,
            mask,
            question,
            **settings
            | {"rng": jax.random.fold_in(rng, n), "temperature": temperature},
          )
        )(number)
        return found, found.score[0] - learned

      with jax.named_scope("select"):
        return jax.vmap(one)(embedding, mask, question, number)

    @functools.partial(jax.jit, out_shardings=whole)
    def update_step(state, drawn, reward):
      advantage = grpo.group_advantages(reward, **advantage_settings)
      loss = functools.partial(selection_loss, network=network, **how_drawn)
      grad, logprob = jax.grad(loss, has_aux=True)(
        state.params, drawn, advantage
      )
      spread = jnp.max(reward, axis=1) - jnp.min(reward, axis=1)
      metrics = {
        "logprob": jnp.mean(logprob),
        "reward": jnp.mean(reward),
        "reward_best": jnp.mean(jnp.max(reward, axis=1)),
        "reward_worst": jnp.mean(jnp.min(reward, axis=1)),
        "advantage_std": jnp.std(advantage),
        "zero_spread_prompts": jnp.mean(spread < 1e-6),
      }
      return sft.apply_gradient(state, grad, metrics, optimizer)

    self._ask, self._uniform = ask_step, uniform_step
    self._draw, self._update = draw_step, update_step
    self._temperature = config.selector.temperature

  def draw(self, batch: pipeline.Batch, *, number: int) -> Rows:
    """Draws N selections of every video.

    Args:
      batch: of B videos, from the loader.
      number: of the batch; another one gives other draws.
    """
    count = self._num_selections
    inputs = self._inputs(batch)
    number_of = batch.sample_index[:, None] * count + np.arange(count)
    number_of = number_of.astype(np.int32)
    found, priority = self._draw(
      self.state.params,
      *inputs,
      self._experiment.put(number_of),
      jax.random.fold_in(self._rng, number),
      self._temperature,
    )
    keyframes = sharding.local(found)
    uniform = sharding.local(self._uniform(inputs[1]))
    repeated = pipeline.Batch(
      sample_index=number_of.reshape(-1),
      samples=[sample for sample in batch.samples for _ in range(count)],
      **{
        name: np.repeat(value, count, axis=0)
        for name, value in batch._asdict().items()
        if name not in ("sample_index", "samples")
      },
    )
    return Rows(
      repeated,
      (
        jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), keyframes),
        np.repeat(uniform, count, axis=0),
      ),
      Drawn(*inputs, priority, found.order),
    )

  def choose(self, batch: pipeline.Batch) -> views.Selected:
    """The frames of highest score that keep `tad.min_gap`, ties at random.

    What the draws become as their temperature falls to 0. Ties are those of an
    untrained scorer, and a sample's are broken the same way every time.
    """
    inputs = self._inputs(batch)
    found, _ = self._draw(
      self.state.params,
      *inputs,
      self._experiment.put(batch.sample_index[:, None].astype(np.int32)),
      jax.random.key(0),
      _COLD,
    )
    keyframes = sharding.local(found)
    uniform = sharding.local(self._uniform(inputs[1]))
    return jax.tree.map(lambda x: x[:, 0], keyframes), uniform

  def earned(self, rows: Rows, main: np.ndarray | None) -> np.ndarray:
    """float32[B, N]: what every selection of a batch earns.

    Args:
      rows: of `draw`.
      main: float[B * N, G] of `verdicts.main_score`, where `asks` says so.
    """
    earned = np.zeros(len(rows.batch.samples), np.float32)
    if self._weight["answer"]:
      earned += self._weight["answer"] * np.mean(main, axis=1)
    if self._weight["evidence"]:
      hits, count = _hits(rows)
      earned += self._weight["evidence"] * hits / np.maximum(count, 1)
    return earned.astype(np.float32).reshape(-1, self._num_selections)

  @property
  def asks(self) -> bool:
    """Does the reward depend on answers?"""
    return bool(self._weight["answer"])

  def update(self, rows: Rows, main: np.ndarray | None) -> dict[str, float]:
    """One update, from what `earned` says; metrics, all named `selector/`.

    Raises:
      FloatingPointError: a gradient that is not finite.
    """
    reward = self.earned(rows, main)
    self.state, found = self._update(
      self.state, rows.drawn, self._experiment.put(reward)
    )
    metrics = {
      f"selector/{name}": float(value)
      for name, value in jax.device_get(found).items()
    }
    if metrics.pop("selector/nonfinite"):
      raise FloatingPointError(
        f"selector: non-finite gradient at update {int(self.state.step)}; lower"
        " config.selector.optim.learning_rate"
      )
    own = [[int(part.sum()) for part in _hits(rows)]]
    hits, count = np.sum(self._experiment.gather(own), axis=0)
    if count:
      metrics["selector/hit_rate"] = float(hits / count)
    return metrics

  def joint(self, state: TrainState) -> JointState:
    """The policy's state and this one, for one checkpoint."""
    return JointState(
      step=state.step,
      params=state.params,
      opt_state=state.opt_state,
      rng=state.rng,
      selector=self.state,
    )

  def take(self, joint: JointState) -> TrainState:
    """Goes on from a checkpoint; the policy's state in it."""
    self.state = joint.selector
    return TrainState(
      step=joint.step,
      params=joint.params,
      opt_state=joint.opt_state,
      rng=joint.rng,
    )

  def _inputs(self, batch: pipeline.Batch) -> tuple[Any, Any, Any]:
    """Embeddings, mask and questions of a batch, on the devices."""
    put = self._experiment.put
    encode = self._experiment.tokenizer.encode
    token = np.zeros((len(batch.samples), self._num_words), np.int32)
    mask = np.zeros(token.shape, bool)
    for row, sample in enumerate(batch.samples):
      ids = encode(sample.question)[: self._num_words]
      token[row, : len(ids)], mask[row, : len(ids)] = ids, True
    embedding = np.asarray(self._experiment.embed(batch.scan), np.float32)
    return (
      put(embedding),
      put(batch.scan_mask),
      self._ask(self._words, put(token), put(mask)),
    )


def open_scorer(
  experiment: experiment_lib.Experiment, *, init_from: str = ""
) -> Scorer:
  """The scorer of a run's newest checkpoint, to choose frames.

  Args:
    experiment: the run's, its workdir too.
    init_from: as in `policies.load_policy`.

  Raises:
    ValueError: the run has none.
  """
  config, workdir = experiment.config, experiment.workdir
  if not config.selector.learn:
    raise ValueError(
      f"the run in {workdir} learned no selection (its config.selector.learn is"
      " False); give another run, or another config.select"
    )
  if config.sft.from_run:
    params = policies.load_start(config, experiment.model, experiment.mesh)
  elif config.sft.max_steps:
    params = policies.load_policy(
      str(workdir),
      experiment.mesh,
      init_from=init_from,
      described=(experiment.model, experiment.tokenizer),
      stages=("sft",),
    ).params
  else:
    params = policies.initial_params(config, experiment.model, experiment.mesh)
  learned = Scorer(experiment, params)
  alone = is_alone(config)
  folder = workdir / "checkpoints" / ("selector" if alone else "rl")
  if not folder.is_dir():
    raise ValueError(
      f"{workdir} holds no checkpoint of its learned selection yet; let it go"
      " on until config.rl.checkpoint_every"
    )
  store = checkpoint.Checkpoints(folder, keep=1, read_only=True)
  try:
    found, _ = store.restore_params(
      jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
          leaf.shape, leaf.dtype, sharding=leaf.sharding
        ),
        learned.state.params,
      ),
      within="" if alone else "selector",
    )
  finally:
    store.close()
  learned.state = learned.state.replace(params=found)
  return learned


def _hits(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
  """int[B * N] annotated intervals with a keyframe, and how many there are."""
  evidence = [sample.evidence for sample in rows.batch.samples]
  return keyframe_evals.evidence_hits(evidence, rows.keyframe_time_s)
