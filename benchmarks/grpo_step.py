"""One GRPO update, ours and others', on the same weights and completions.

  python -m benchmarks.grpo_step [--size=100m] [--forms=cf_jax] [--out=FILE]

needs the `parity` extra; TRL's row needs `trl` too and is left out where it
cannot be imported. A random policy in float32 on two cores, a prompt of text
with G completions: the reference's scores, then the clipped loss with k3 KL,
its gradient by the decoder and the head, clipping, and AdamW.

- cf_jax: the prompt once (`policy.completion_logprobs`).
- cf_jax, repeated: the same functions over G repeated prompts, in parts.
- PyTorch: a plain implementation over transformers' model, G repeated prompts,
  scores of the completion's slots alone, fused AdamW.
- TRL: the loss, scores and gradient of `GRPOTrainer`, fed with the same
  completions, over transformers' Qwen2 with the same weights; fused AdamW.

The forms take turns, one update each in every round; losses (to 1e-4) and
gradient norms of all rounds must agree, or there is no table. The first round
is not timed; the table shows best times, their ratios, and the median of the
rounds' ratios (see `benchmarks.generate` for which counts when).
Useful work counts every pass once over the slots that a form runs; its share is
of the better of jax's and torch's matmuls.
"""

import functools
import os
import pathlib
import tempfile
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import transformers
from absl import app, flags

from benchmarks import peers
from cf_jax import grpo, policy
from cf_jax.models import flops, vlm
from cf_jax.programs import sft
from cf_jax.types import Rollout, TrainState, View

_OUT = flags.DEFINE_string("out", "", "also write the results as JSON here")
_SIZE = flags.DEFINE_enum("size", "100m", peers.SIZES, "of the model")
_GROUP = flags.DEFINE_integer("group", 8, "completions, G")
_PROMPT = flags.DEFINE_integer("prompt", 1_024, "tokens of the prompt")
_TOKENS = flags.DEFINE_integer("tokens", 64, "tokens of a completion")
_PARTS = flags.DEFINE_integer("parts", 8, "of our repeated form")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "of the timed forms")
_UNROLL = flags.DEFINE_integer(
  "scan_unroll", 1, "our layers per iteration of the loop over layers"
)
_CORES = flags.DEFINE_integer("cores", 2, "of both sides")
_FORMS = flags.DEFINE_multi_enum(
  "forms",
  ("cf_jax", "repeated", "trl"),
  ("cf_jax", "repeated", "trl"),
  "what is measured beside PyTorch's; once for each",
)

LOSS = dict(
  clip_low=0.2,
  clip_high=0.2,
  aggregate="sequence_mean",
  kl_weight=0.04,
  kl_kind="k3",
)
ADAM = dict(lr=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
MAX_GRAD_NORM = 1.0
OURS, REPEATED, PLAIN = "cf_jax", "cf_jax, repeated prompts", "PyTorch"


# ------------------------------------------------------------------------ ours


def make_batch(prompts, group, old_logprob, advantage) -> dict[str, Any]:
  """View, Rollout and advantages of G completions of each prompt."""
  rows = len(prompts.token)
  shape = (rows, group, _TOKENS.value)
  mask = jnp.ones(shape, bool)
  return dict(
    # A prompt of text shows none of its frames.
    view=View(
      prompt=jax.tree.map(jnp.asarray, prompts.ours),
      frame=jnp.zeros((rows, 1), jnp.int32),
    ),
    rollout=Rollout(
      token=draw_completions().reshape(shape),
      mask=mask,
      logprob=jnp.asarray(old_logprob).reshape(shape),
      finished=mask[..., 0],
    ),
    advantage=jnp.asarray(advantage).reshape(rows, group),
  )


def draw_completions() -> np.ndarray:
  """int32[G, C]."""
  words = peers.make_config(_SIZE.value).vocab_size
  rng = np.random.default_rng(1)
  return rng.integers(1, words - 8, (_GROUP.value, _TOKENS.value), np.int32)


def score(config, params, batch) -> jax.Array:
  """Log-probabilities float32[B, G, C]."""
  rows = len(batch["advantage"])
  return policy.completion_logprobs(
    config,
    params,
    batch["view"],
    jnp.zeros((rows, 1, 1, config.hidden_size)),
    batch["rollout"],
    jnp.zeros(config.vocab_size, bool),
  )[0]


def make_update(config, optimizer, parts: int):
  """Jitted: TrainState (donated), reference, batch -> state, metrics.

  With several parts, the batch's rows go through the model one part after the
  other.
  """

  def differentiate(params, reference, batch):
    ref_logprob = score(config, reference, batch)

    def loss(params):
      value, _ = grpo.policy_loss(
        score(config, params, batch),
        batch["rollout"].logprob,
        ref_logprob,
        batch["advantage"],
        batch["rollout"].mask,
        total=jnp.float32(_GROUP.value),
        **LOSS,
      )
      return value, {"loss": value}

    return jax.value_and_grad(loss, has_aux=True)(params)

  @functools.partial(jax.jit, donate_argnums=0)
  def update(state, reference, batch):
    if parts == 1:
      (_, metrics), grad = differentiate(state.params, reference, batch)
    else:
      grad, metrics = sft.accumulate(
        lambda part: differentiate(state.params, reference, part),
        jax.tree.map(jnp.zeros_like, state.params),
        jax.tree.map(
          lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), batch
        ),
        largest=(),
      )
    return sft.apply_gradient(state, grad, metrics, optimizer)

  return update


class Ours:
  """An update in one of our forms, with parameters of its own."""

  def __init__(self, config, params, reference, batch, parts):
    optimizer = optax.chain(
      optax.clip_by_global_norm(MAX_GRAD_NORM),
      optax.adamw(
        ADAM["lr"],
        b1=ADAM["betas"][0],
        b2=ADAM["betas"][1],
        eps=ADAM["eps"],
        weight_decay=ADAM["weight_decay"],
      ),
    )
    params = jax.tree.map(jnp.copy, params)
    state = TrainState(
      step=jnp.int32(0),
      params=params,
      opt_state=optimizer.init(params),
      rng=jax.random.key_data(jax.random.key(0)),
    )
    self._state, self._rest = state, (reference, batch)
    self._update = (
      make_update(config, optimizer, parts)
      .lower(self._state, *self._rest)
      .compile()
    )
    self.temporary_bytes = self._update.memory_analysis().temp_size_in_bytes

  def __call__(self) -> dict[str, float]:
    """One update: seconds, loss and gradient norm."""
    begin = time.perf_counter()
    self._state, metrics = jax.block_until_ready(
      self._update(self._state, *self._rest)
    )
    return {
      "step": time.perf_counter() - begin,
      "loss": float(metrics["loss"]),
      "grad_norm": float(metrics["grad_norm"]),
    }


# --------------------------------------------------------------------- PyTorch


class Torch:
  """A plain implementation: G repeated prompts through transformers' model."""

  def __init__(self, model, reference, token, old_logprob, advantage):
    self._model, self._reference = model.train(), reference
    self._token = torch.from_numpy(token).long()
    self._old = torch.tensor(old_logprob)
    self._advantage = torch.tensor(advantage)[:, None]
    self._trained = [
      *model.model.language_model.parameters(),
      *model.lm_head.parameters(),
    ]
    model.requires_grad_(False)
    for parameter in self._trained:
      parameter.requires_grad_(True)
    self._optimizer = torch.optim.AdamW(self._trained, fused=True, **ADAM)

  def _score(self, model):
    length = self._old.shape[1]
    logits = model(
      input_ids=self._token,
      attention_mask=torch.ones_like(self._token),
      logits_to_keep=length + 1,
      use_cache=False,
    ).logits[:, :-1]
    chosen = logits.gather(2, self._token[:, -length:, None])[..., 0]
    return chosen - logits.logsumexp(-1)

  def __call__(self) -> dict[str, float]:
    """One update: seconds, loss and gradient norm."""
    begin = time.perf_counter()
    with torch.no_grad():
      reference = self._score(self._reference)
    logprob = self._score(self._model)
    rho = torch.exp(logprob - self._old)
    clipped = rho.clamp(1 - LOSS["clip_low"], 1 + LOSS["clip_high"])
    surrogate = -torch.min(rho * self._advantage, clipped * self._advantage)
    gap = reference - logprob
    kl = torch.exp(gap) - gap - 1
    loss = (surrogate + LOSS["kl_weight"] * kl).mean(1).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(self._trained, MAX_GRAD_NORM)
    self._optimizer.step()
    self._optimizer.zero_grad()
    return {
      "step": time.perf_counter() - begin,
      "loss": float(loss.detach()),
      "grad_norm": float(norm),
    }


def to_qwen2(config, model) -> transformers.Qwen2ForCausalLM:
  """The text half of a Qwen2.5-VL, with the same weights."""
  made = transformers.Qwen2ForCausalLM(
    transformers.Qwen2Config(
      vocab_size=config.vocab_size,
      hidden_size=config.hidden_size,
      intermediate_size=config.intermediate_size,
      num_hidden_layers=config.num_hidden_layers,
      num_attention_heads=config.num_attention_heads,
      num_key_value_heads=config.num_key_value_heads,
      max_position_embeddings=config.max_position_embeddings,
      rms_norm_eps=config.rms_norm_eps,
      rope_parameters=dict(rope_type="default", rope_theta=config.rope_theta),
      tie_word_embeddings=config.tie_word_embeddings,
      bos_token_id=None,
      eos_token_id=None,
      pad_token_id=None,
    )
  )
  made.model.load_state_dict(model.model.language_model.state_dict())
  made.lm_head.load_state_dict(model.lm_head.state_dict())
  return made


class TRL:
  """The update of TRL's GRPOTrainer, its completions given."""

  def __init__(self, config, model, reference, token, old_logprob, advantage):
    import datasets
    import tokenizers
    import trl

    group, length = old_logprob.shape
    words = tokenizers.Tokenizer(
      tokenizers.models.WordLevel({"a": 0, "[PAD]": 1}, unk_token="a")
    )
    with tempfile.TemporaryDirectory() as name:
      # The trainer loads its reference from where the model is from.
      folder = pathlib.Path(name) / "model"
      to_qwen2(config, model).save_pretrained(folder)
      self._trainer = trl.GRPOTrainer(
        model=transformers.Qwen2ForCausalLM.from_pretrained(
          folder, dtype=torch.float32
        ),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=trl.GRPOConfig(
          output_dir=name,
          per_device_train_batch_size=group,
          num_generations=group,
          max_completion_length=length,
          beta=LOSS["kl_weight"],
          epsilon=LOSS["clip_low"],
          epsilon_high=LOSS["clip_high"],
          loss_type="grpo",
          use_bias_correction_kl=False,
          temperature=1.0,
          use_cpu=True,
          bf16=False,
          fp16=False,
          gradient_checkpointing=False,
          report_to=[],
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a"}] * group),
        processing_class=transformers.PreTrainedTokenizerFast(
          tokenizer_object=words, pad_token="[PAD]", eos_token="[PAD]"
        ),
      )
    trainer = self._trainer
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    trainer.ref_model.load_state_dict(to_qwen2(config, reference).state_dict())
    self._optimizer = torch.optim.AdamW(
      trainer.model.parameters(), fused=True, **ADAM
    )
    self._token = torch.from_numpy(token).long()
    prompt, completion = self._token[:, :-length], self._token[:, -length:]
    self._inputs = dict(
      prompt_ids=prompt,
      prompt_mask=torch.ones_like(prompt),
      completion_ids=completion,
      completion_mask=torch.ones_like(completion),
      advantages=torch.tensor(advantage),
      old_per_token_logps=torch.tensor(old_logprob),
    )

  def __call__(self) -> dict[str, float]:
    """One update: seconds, loss and gradient norm."""
    trainer = self._trainer
    begin = time.perf_counter()
    with torch.no_grad():
      reference = trainer._get_per_token_logps_and_entropies(
        trainer.ref_model,
        self._token,
        torch.ones_like(self._token),
        self._inputs["completion_ids"].shape[1],
      )[0]
    loss = trainer.compute_loss(
      trainer.model, self._inputs | {"ref_per_token_logps": reference}
    )
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(
      trainer.model.parameters(), MAX_GRAD_NORM
    )
    self._optimizer.step()
    self._optimizer.zero_grad()
    return {
      "step": time.perf_counter() - begin,
      "loss": float(loss.detach()),
      "grad_norm": float(norm),
    }


# --------------------------------------------------------------------- measure


def useful(config, *, repeated: bool) -> float:
  """Operations of one update: the reference's pass, and three of the policy."""
  prompt = np.array([_PROMPT.value] * (_GROUP.value if repeated else 1))
  length = np.full((len(prompt), _GROUP.value // len(prompt)), _TOKENS.value)
  forward = flops.prompts(config, prompt)
  return 4 * (forward + flops.completions(config, prompt, length))


def make_cases(config) -> tuple[dict[str, Any], dict[str, str]]:
  """name -> update, and name -> why there is none."""
  rng = np.random.default_rng(0)
  prompts = peers.make_prompts(config, rng, rows=1, text=_PROMPT.value, side=0)
  whole = jax.jit(lambda key: vlm.init(config, key))(jax.random.key(0))
  shifted = jax.tree.map(  # the reference: so far away that KL counts
    lambda leaf, key: (
      leaf + 0.3 * jnp.std(leaf) * jax.random.normal(key, leaf.shape)
    ),
    whole,
    jax.tree.unflatten(
      jax.tree.structure(whole),
      list(jax.random.split(jax.random.key(1), len(jax.tree.leaves(whole)))),
    ),
  )
  models = [peers.to_torch(config, tree) for tree in (whole, shifted)]
  params, reference = (
    {"decoder": tree["decoder"]} for tree in (whole, shifted)
  )

  # A sampler whose scores differ from the policy's, so that some are clipped.
  group = _GROUP.value
  shape = (group, _TOKENS.value)
  advantage = rng.standard_normal(group).astype(np.float32)
  blank = make_batch(prompts, group, np.zeros(shape, np.float32), advantage)
  exact = jax.jit(lambda p, b: score(config, p, b))(params, blank)
  noise = 0.15 * rng.standard_normal(shape).astype(np.float32)
  old_logprob = np.asarray(exact)[0] + noise

  token = np.concatenate(
    [np.repeat(prompts.token, group, 0), draw_completions()], axis=1
  )
  settings = (old_logprob, advantage)
  cases = {}
  if "cf_jax" in _FORMS.value:
    batch = make_batch(prompts, group, *settings)
    cases[OURS] = Ours(config, params, reference, batch, 1)
  if "repeated" in _FORMS.value:
    batch = make_batch(prompts.repeat(group), 1, *settings)
    cases[REPEATED] = Ours(config, params, reference, batch, _PARTS.value)
  missing = {
    "Tunix": "out of memory at 100m; 25m by hand: see docs/performance.md"
  }
  if "trl" in _FORMS.value:
    try:
      cases["TRL"] = TRL(config, *models, token, *settings)
    except ImportError as error:
      missing["TRL"] = str(error)
  cases[PLAIN] = Torch(*models, token, *settings)
  return cases, missing


def check(taken) -> None:
  """All forms' losses and gradient norms of every update must agree.

  Raises:
    SystemExit: they do not.
  """
  base = taken[PLAIN]
  for name, other in taken.items():
    for index, loss in enumerate(other["loss"]):
      norm, base_norm = other["grad_norm"][index], base["grad_norm"][index]
      off = abs(loss - base["loss"][index])
      if not (off < 1e-4 and abs(norm / base_norm - 1) < 1e-3):
        raise SystemExit(
          f"update {index}, {name}: loss {loss:.6f}, gradient norm {norm:.5f};"
          f" {PLAIN} has {base['loss'][index]:.6f} and {base_norm:.5f}"
        )


def rows_of(config, result) -> list[list]:
  """Lines of the table."""
  rows, taken = [], result["updates"]
  for name, found in taken.items():
    # The first update compiled; its seconds do not count, its loss does.
    step_s, base_s = found["step"][1:], taken[PLAIN]["step"][1:]
    off = max(abs(a - b) for a, b in zip(found["loss"], taken[PLAIN]["loss"]))
    work = useful(config, repeated=name != OURS)
    rows.append(
      [
        name,
        min(step_s),
        min(base_s) / min(step_s),
        peers.ratio(base_s, step_s),
        work / min(step_s) / result["matmul_flops_per_s"],
        off,
      ]
    )
  return rows + [[name] + 5 * [None] for name in result["missing"]]


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  peers.use_cores(_CORES.value)
  torch.set_num_threads(_CORES.value)
  config = peers.make_config(_SIZE.value, scan_unroll=_UNROLL.value)
  result = {
    "machine": peers.machine(),
    "size": _SIZE.value,
    "group": _GROUP.value,
    "prompt": _PROMPT.value,
    "tokens": _TOKENS.value,
    "scan_unroll": _UNROLL.value,
  }
  cases, result["missing"] = make_cases(config)
  result["temporary_bytes"] = {
    name: case.temporary_bytes
    for name, case in cases.items()
    if isinstance(case, Ours)
  }
  peaks = [peers.matmul_peak(), peers.torch_peaks()["matmul_flops_per_s"]]

  def keep(taken):
    check(taken)
    peers.write(_OUT.value, result | {"updates": taken})

  result["updates"] = peers.interleave(cases, 1 + _ROUNDS.value, keep)
  peaks += [peers.matmul_peak(), peers.torch_peaks()["matmul_flops_per_s"]]
  result["matmul_flops_per_s"] = max(peaks)
  result["load_average_end"] = os.getloadavg()[0]
  peers.write(_OUT.value, result)
  loss = result["updates"][PLAIN]["loss"][0]
  print(
    f"{_SIZE.value} parameters, float32, {_CORES.value} cores, G"
    f" {_GROUP.value}, {_PROMPT.value} prompt tokens, {_TOKENS.value} new ones,"
    f" {_ROUNDS.value} rounds; loss {loss:.5f}; matmul"
    f" {result['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s; load"
    f" {result['machine']['load_average']:.1f} at the start,"
    f" {result['load_average_end']:.1f} at the end\n"
  )
  print(
    peers.table(
      [
        "form",
        "update, s",
        "ratio of best",
        "median ratio",
        "of the matmul peak",
        "loss off by",
      ],
      rows_of(config, result),
    )
  )
  for name, why in result["missing"].items():
    print(f"\n{name}: {why}")


if __name__ == "__main__":
  app.run(main)
