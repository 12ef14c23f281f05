"""A run: videos -> cold start -> reinforcement -> evaluation -> report.

`run` is the order of things; the cold start is in `sft.py`, the reinforcement
in `reinforce.py`.
"""

import json
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import ml_collections
from absl import logging

from cf_jax import report
from cf_jax.data import chance
from cf_jax.programs import evaluate, policies, reinforce, scorer, sft
from cf_jax.programs import experiment as experiment_lib
from cf_jax.runtime import checkpoint, telemetry

# Name, goal in points, and the two (stage, view, task) whose accuracies differ.
GAPS = (
  (
    "KF-GRPO over the cold start (all tasks)",
    10.0,
    ("rl", "keyframes", "all"),
    ("sft", "keyframes", "all"),
  ),
  (
    "needle: TAD over uniform frames",
    15.0,
    ("rl", "keyframes", "needle"),
    ("rl", "uniform", "needle"),
  ),
  (
    "order: ordered over shuffled keyframes",
    15.0,
    ("rl", "keyframes", "order"),
    ("rl", "shuffled", "order"),
  ),
)


# ------------------------------------------------------------------------ run


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """The whole of it. Interrupted, the same call goes on where it was."""
  begin = time.monotonic()
  workdir.mkdir(parents=True, exist_ok=True)
  results_path = workdir / "results.json"
  policies.make_paths_absolute(config)
  check_same_config(config, workdir)
  telemetry.parse_updates(config.profile, config.rl.steps)  # or fail at once
  scorer.check(config)
  if (workdir / "report.html").exists() and results_path.exists():
    logging.info(
      "this run is complete; its report is %s", workdir / "report.html"
    )
    return

  # -- data, tokenizer, policy
  experiment = experiment_lib.build(config, workdir)
  check_same_data(experiment.data_hash, workdir)
  # Before the workdir belongs to this config: it finds mistakes.
  about = experiment_lib.summary(experiment)
  telemetry.write_manifest(
    workdir,
    config=config,
    seed=config.seed,
    data_hash=experiment.data_hash,
    peak=experiment.peak,
  )
  folders = dict(zip(policies.STAGES, policies.STAGES, strict=True))
  if scorer.is_alone(config):
    folders["rl"] = "selector"  # no policy is in it
  stores = {
    stage: checkpoint.Checkpoints(
      workdir / "checkpoints" / folder, keep=config.checkpoint.keep
    )
    for stage, folder in folders.items()
  }
  resume = {
    stage: store.latest_step()
    for stage, store in stores.items()
    if store.latest_step() is not None
  }
  if resume:
    logging.info("continuing from checkpoints %s", resume)
  writer = telemetry.MetricWriter(
    workdir, resume=resume, active=jax.process_index() == 0
  )
  telemetry.startup_table(config.name, about | {"event files": writer.backend})

  # A set with shortcuts, or with too few videos to tell, shows before training.
  probes = evaluate.probes(experiment, config.report.probe_videos)

  # -- cold start, then KF-GRPO
  limits = {
    "batch_size": config.evaluation.batch_size,
    "max_tokens": config.sampling.max_tokens,
  }
  dev = evaluate.Evaluator(
    experiment, experiment.samples["dev"], ("keyframes",), **limits
  )
  if config.sft.from_run:
    sft_params = policies.load_start(config, experiment.model, experiment.mesh)
  else:
    sft_params = sft.cold_start(
      experiment,
      policies.initial_params(config, experiment.model, experiment.mesh),
      dev,
      writer,
      stores["sft"],
    )
  learned = None
  if config.selector.learn:
    learned = scorer.Scorer(experiment, sft_params)
  if scorer.is_alone(config):
    reinforce.train_scorer(
      experiment, sft_params, writer, stores["rl"], learned
    )
    rl_params = sft_params
  else:
    rl_params = reinforce.train_policy(
      experiment, sft_params, writer, stores["rl"], learned=learned
    )
  writer.close()

  # -- evaluation before and after, on videos that no stage has seen
  test = evaluate.Evaluator(
    experiment, experiment.samples["test"], config.evaluation.arms, **limits
  )
  judged, hit_rates = {}, {}
  for stage, params in (("sft", sft_params), ("rl", rl_params)):
    if stage == "rl" and learned is not None:
      test.select_by(learned.choose)
    judged[stage] = test.run(params, show_progress=True)
    hit_rates[stage] = test.hit_rates()
  rows = [
    row for stage, found in judged.items() for row in test.rows(found, stage)
  ]
  blind_chance = chance.correct(experiment.samples["test"])
  results = {
    "chance": blind_chance,
    "evaluations": rows,
    "probes": probes,
    "goals": goals(rows, blind_chance),
    # Share of the annotated events that the frames shown had.
    "hit_rates": hit_rates,
    "timing": {"this_start_s": round(time.monotonic() - begin, 1)},
  }
  test.write_predictions(judged, workdir / "predictions.jsonl")
  test.write_film_strips(workdir, config.report.num_film_strips)
  telemetry.write_json(results_path, results)
  path = report.write_report(workdir, num_rollouts=config.report.num_rollouts)
  for store in stores.values():
    store.close()

  # -- what came out
  found = {(row["stage"], row["view"], row["task"]): row for row in rows}
  tasks = [*sorted({s.task for s in experiment.samples["test"]}), "all"]
  telemetry.closing_table(
    "held-out accuracy",
    ["stage and view", *tasks],
    [
      [
        f"{stage}  {arm}",
        *(found[stage, arm, task]["accuracy"] for task in tasks),
      ]
      for stage in judged
      for arm in config.evaluation.arms
    ],
  )
  logging.info("report: %s", path)


def goals(rows: Sequence[dict], guess: dict[str, float]) -> list[dict]:
  """What a run is meant to show, in points of accuracy."""
  at = {
    (row["stage"], row["view"], row["task"]): row["accuracy"] for row in rows
  }

  inside = [
    100 * min(row["high"] - guess[row["task"]], guess[row["task"]] - row["low"])
    for row in rows
    if (row["stage"], row["view"]) == ("rl", "blind")
  ]
  made = []
  for name, goal, high, low in GAPS:
    if high in at and low in at:
      value = 100 * (at[high] - at[low])
      made.append(
        {"name": name, "value": value, "goal": goal, "met": value >= goal}
      )
  if inside:
    made.append(
      {
        "name": "blind policy: chance inside its interval in every task",
        "value": min(inside),
        "goal": 0.0,
        "met": min(inside) >= 0,
      }
    )
  return made


def check_same_config(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  *,
  free: Sequence[str] = ("profile",),
) -> None:
  """A workdir belongs to one config; what is traced may change.

  Args:
    config: of this start.
    workdir: of the run.
    free: settings, or subtrees of them, that may differ.

  Raises:
    ValueError: it holds a run of another one; names the first differences.
  """
  if not (workdir / telemetry.MANIFEST_FILE).exists():
    return
  there = telemetry.read_manifest(workdir)["config"]
  here = telemetry.to_jsonable(config.to_dict())
  differ = [
    f"{key} (there {json.dumps(old)}, now {json.dumps(new)})"
    for key, old, new in _differences(there, here)
    if key.partition(".")[0] not in free
  ]
  if differ:
    raise ValueError(
      f"{workdir} holds a run of another config: {'; '.join(differ[:5])};"
      " give another --workdir or the same settings"
    )


def check_same_data(data_hash: str, workdir: pathlib.Path) -> None:
  """A workdir belongs to one data set.

  Raises:
    ValueError: its run was started on other samples.
  """
  if not (workdir / telemetry.MANIFEST_FILE).exists():
    return
  there = telemetry.read_manifest(workdir)["data_hash"]
  if there != data_hash:
    raise ValueError(
      f"{workdir} holds a run on other data (hash {there}, now {data_hash});"
      " give another --workdir, or the data of config.data.source as it was"
    )


def _differences(
  there: Any, here: Any, prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
  if isinstance(there, dict) and isinstance(here, dict):
    for key in sorted(set(there) | set(here)):
      yield from _differences(
        there.get(key), here.get(key), f"{prefix}.{key}" if prefix else key
      )
  elif there != here:
    yield prefix, there, here
