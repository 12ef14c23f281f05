"""From completions to numbers, by an experiment's settings: the host's part.

Training and evaluation read answers through the same door.
"""

from collections.abc import Callable

import numpy as np

from cf_jax import rewards
from cf_jax.data import answers, judge, prompts
from cf_jax.programs import experiment as experiment_lib
from cf_jax.types import Verdict
from cf_jax.views import Prepared

Reader = Callable[[Prepared, np.ndarray, np.ndarray], Verdict]


def make_judge(experiment: experiment_lib.Experiment) -> Reader:
  """What reads the completions of a batch, each by its sample's kind.

  Returns:
    A function of Prepared, token int32[B, G, C] and mask bool[B, G, C] that
    gives the Verdict as numpy arrays.
  """
  config = experiment.config
  cite_tolerance_s = prompts.label_tolerance_s(config.prompt.build.time_format)
  settings, llm = dict(config.answers), dict(config.judge)
  ask = judge.Judge(**llm).score if llm["url"] else None

  def read(prepared: Prepared, token: np.ndarray, mask: np.ndarray) -> Verdict:
    return Verdict(
      **answers.judge(
        experiment.tokenizer,
        prepared.batch.samples,
        token,
        mask,
        frame_time_s=prepared.slot_time_s,
        cite_tolerance_s=cite_tolerance_s,
        ask=ask,
        **settings,
      )._asdict()
    )

  return read


def main_score(verdict: Verdict) -> np.ndarray:
  """float32[B, G]: what decides whether a completion is right."""
  return np.asarray(rewards.main_component(verdict.component, verdict.applies))
