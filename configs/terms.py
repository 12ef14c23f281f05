"""Each term of KF-GRPO on and off: the runs behind a table.

  python -m launch.sweep --config=configs/terms.py --out=runs/contrasts
  python -m benchmarks.terms --runs=runs/contrasts

The first arms go on from the cold starts of configs/contrasts.py (in the same
folder they are shared), on TAD's keyframes, with as many updates and
completions. Those named cited_ ask for times in the reasoning, which saliency
judges, and have a cold start of their own; their contrast is over the text.

  tad_grpo, tad_kfgrpo              no term, the method: as in contrasts.py
  tad_temporal, tad_content         one of the two contrasts alone
  tad_margin                        a group's margin in place of each rollout's
  tad_group_std, tad_batch_std      advantages divided by a standard deviation
  tad_contrastive, tad_contrastive_stop   with the contrastive loss
  cited_none, cited_evidence, cited_deletion   saliency of cited keyframes

The threshold's arm is tad_tgrpo of contrasts.py.
"""

import ml_collections

from configs import contrasts

ARMS = (
  "tad_grpo",
  "tad_kfgrpo",
  "tad_temporal",
  "tad_content",
  "tad_margin",
  "tad_group_std",
  "tad_batch_std",
  "tad_contrastive",
  "tad_contrastive_stop",
)
CITED = ("cited_none", "cited_evidence", "cited_deletion")
SEEDS = 3


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """One arm; the default is the method."""
  if arg is None:
    config = contrasts.get_config("tad_kfgrpo")
    config.name = "terms"
    return config
  arm = arg
  if arm in contrasts.ARMS or arm == "cold_start":
    return contrasts.get_config(arm)
  if arm not in (*ARMS, *CITED, "cited_cold_start"):
    known = ("cold_start", *ARMS, "cited_cold_start", *CITED)
    raise ValueError(
      f"configs/terms.py takes one of {', '.join(known)}; got {arg!r}"
    )
  cold = arm == "cited_cold_start"
  config = contrasts.get_config("cold_start" if cold else "tad_kfgrpo")
  config.name = f"terms_{arm}"
  if not cold:
    config.evaluation.arms = ("keyframes", "reversed")
  frames, _, term = arm.partition("_")
  if frames == "cited":
    config.data.synthetic.tasks = ("grounded_qa",)
    # Looked at, not rewarded: to cite pays by saliency alone.
    config.answers.components = ("accuracy", "format", "iou")
    config.answers.reasoning = "tagged"
    config.prompt.max_tokens = 128
    config.sampling.max_tokens = 40  # reasoning, answer and intervals
    if not cold:
      config.contrast.saliency = term
      # After a worded reasoning the answer's tokens have no contrast that
      # saliency could multiply.
      config.contrast.span = "text"
  elif term in ("temporal", "content"):
    off = {"temporal": "alpha_c", "content": "alpha_t"}[term]
    config.contrast.rollout[off] = 0.0
  elif term == "margin":
    config.contrast.kind = "margin"
    config.sampling.num_completions = 8  # and four under each other view
  elif term in ("group_std", "batch_std"):
    config.advantage.scale = term.removesuffix("_std")
  else:
    config.contrastive.weight = 0.1
    if term == "contrastive_stop":
      config.contrastive.form = "stop_gradient"
  return config


def sweep(add) -> None:
  """Every arm of the first seeds after its cold start."""
  for seed in range(SEEDS):
    for cold, arms in (("cold_start", ARMS), ("cited_cold_start", CITED)):
      seeds = {"seed": seed, "data.seed": seed}
      add(f"seed_{seed}/{cold}", arg=cold, **seeds)
      start = {"sft.from_run": f"{{out}}/seed_{seed}/{cold}"}
      for arm in arms:
        add(f"seed_{seed}/{arm}", arg=arm, **seeds | start)
