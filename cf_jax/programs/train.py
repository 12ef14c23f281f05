"""A run: videos -> cold start -> reinforcement -> evaluation -> report.

`run` is the order of things; the cold start is in `sft.py`, the reinforcement
in `reinforce.py`.
"""

import contextlib
import dataclasses
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
from cf_jax.programs import experiment as experiment_lib
from cf_jax.programs import held_out, policies, reinforce, scorer, sft
from cf_jax.runtime import checkpoint, lifecycle, processes, telemetry

# Name, goal in points, and the two (stage, view, task) whose accuracies differ.
# {method} is what trained, {select} what chose the keyframes.
GAPS = (
  (
    "{method} over the cold start (all tasks)",
    10.0,
    ("rl", "keyframes", "all"),
    ("sft", "keyframes", "all"),
  ),
  (
    "needle: {select} over uniform frames",
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

# Settings that may differ from start to start: what is traced, kept and shown,
# and with what means videos are decoded, not which of them are refused.
FREE = (
  "profile",
  "runtime",
  "checkpoint",
  "data.decode.processes",
  "data.decode.timeout_s",
  "data.decode.max_memory_mib",
  "data.frame_cache",
)


# ------------------------------------------------------------------------ run


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """The whole of it. Interrupted, the same call goes on where it was.

  Raises:
    ValueError: settings that do not fit together, another config or other data
      than the workdir's, or another run that is using it.
    lifecycle.Stopped: by a signal or the time limit; everything is saved.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  policies.make_paths_absolute(config)
  check_same_config(config, workdir)
  telemetry.parse_updates(config.profile, config.rl.steps)  # or fail at once
  scorer.check(config)
  if config.rl.steps:
    reinforce.check_settings(config)
  if not config.report.stages or set(config.report.stages) - set(
    policies.STAGES
  ):
    raise ValueError(
      "config.report.stages must be one or more of"
      f" {policies.STAGES}, got {tuple(config.report.stages)}"
    )
  if is_complete(workdir):
    logging.info(
      "this run is complete; its report is %s", workdir / report.REPORT_FILE
    )
    return
  with lifecycle.Guard(workdir, **config.runtime) as guard:
    try:
      if (workdir / report.RESULTS_FILE).exists():  # all but the report
        _write_report(config, workdir)
      else:
        _run(config, workdir, guard)
    except lifecycle.Stopped as stopped:
      if (workdir / telemetry.METRICS_FILE).exists():
        try:
          _write_report(config, workdir)
        except Exception:  # what is saved is saved
          logging.exception("the report of %s could not be written", workdir)
      if not is_complete(workdir):
        raise
      # It came during the report, after which nothing is left to go on with.
      logging.info("%s; the run is complete all the same", stopped)


def _write_report(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> None:
  if processes.is_first():
    report.write_report(workdir, num_rollouts=config.report.num_rollouts)


def is_complete(workdir: pathlib.Path) -> bool:
  """Has a run its results, and a report that was written after them?

  A report alone says nothing: it is rebuilt while the run goes on.
  """
  results, page = workdir / report.RESULTS_FILE, workdir / report.REPORT_FILE
  if not (results.exists() and page.exists()):
    return False
  return page.stat().st_mtime_ns >= results.stat().st_mtime_ns


def _run(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  guard: lifecycle.Guard,
) -> None:
  """All stages, read top to bottom."""
  begin = time.monotonic()
  # -- data, tokenizer, policy
  guard.enter("data")
  experiment = dataclasses.replace(
    experiment_lib.build(config, workdir), guard=guard
  )
  check_same_data(experiment.data_hash, workdir)
  if config.rl.steps and not scorer.is_alone(config):
    reinforce.check_credit(config, experiment.samples["train"])
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
  with contextlib.ExitStack() as opened:
    stores = {
      stage: opened.enter_context(
        checkpoint.Checkpoints(
          workdir / "checkpoints" / folder, **config.checkpoint
        )
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
    writer = opened.enter_context(
      telemetry.MetricWriter(
        workdir, resume=resume, active=jax.process_index() == 0
      )
    )
    telemetry.startup_table(
      config.name, about | {"event files": writer.backend}
    )

    # A set with shortcuts, or with too few videos to tell, shows before
    # training.
    guard.enter("probes")
    probes = held_out.probes(experiment, config.report.probe_videos)

    # -- cold start, then KF-GRPO
    guard.enter("model")
    limits = {
      "batch_size": config.evaluation.batch_size,
      "max_tokens": config.sampling.max_tokens,
    }
    dev = held_out.Evaluator(
      experiment, experiment.samples["dev"], ("keyframes",), **limits
    )
    if config.sft.from_run:
      sft_params = policies.load_start(
        config, experiment.model, experiment.mesh
      )
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
        experiment, sft_params, writer, stores["rl"], learned=learned, dev=dev
      )

  # -- evaluation before and after, on videos that no stage has seen
  guard.enter("evaluation")
  test = held_out.Evaluator(
    experiment, experiment.samples["test"], config.evaluation.arms, **limits
  )
  judged, hit_rates = {}, {}
  policy = {"sft": sft_params, "rl": rl_params}
  for stage in config.report.stages:
    if stage == "rl" and learned is not None:
      test.select_by(learned.choose)
    judged[stage] = test.run(policy[stage], show_progress=True)
    hit_rates[stage] = test.hit_rates()
  rows = [
    row for stage, found in judged.items() for row in test.rows(found, stage)
  ]
  blind_chance = chance.correct(experiment.samples["test"])
  results = {
    "chance": blind_chance,
    "evaluations": rows,
    "probes": probes,
    "goals": goals(
      rows,
      blind_chance,
      method=report.method_name(config),
      select=report.selector_name(config),
    ),
    # Share of the annotated events that the frames shown had.
    "hit_rates": hit_rates,
    "timing": {"this_start_s": round(time.monotonic() - begin, 1)},
  }
  guard.enter("report")
  if not processes.is_first():
    return
  test.write_predictions(judged, workdir / "predictions.jsonl")
  test.write_film_strips(workdir, config.report.num_film_strips)
  # From here on nothing is computed again.
  telemetry.write_json(workdir / report.RESULTS_FILE, results)
  path = report.write_report(workdir, num_rollouts=config.report.num_rollouts)

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


def goals(
  rows: Sequence[dict], guess: dict[str, float], *, method: str, select: str
) -> list[dict]:
  """What a run is meant to show, in points of accuracy.

  Args:
    rows: evaluations.
    guess: task -> chance.
    method: name of what trained.
    select: name of what chose the keyframes; "uniform" is not compared with
      itself.
  """
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
    same = select == "uniform" and "uniform" in (low[1], high[1])
    if high in at and low in at and not same:
      value = 100 * (at[high] - at[low])
      said = name.format(method=method, select=select)
      made.append(
        {"name": said, "value": value, "goal": goal, "met": value >= goal}
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
  free: Sequence[str] = FREE,
) -> None:
  """A workdir belongs to one config; what is traced, kept or shown may change.

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
    if not any(f"{key}.".startswith(f"{name}.") for name in free)
    # With no process of its own nobody hears what the decoder complains of;
    # built-in videos are decoded in this one in any case.
    or (
      key == "data.decode.processes"
      and bool(old) != bool(new)
      and here.get("data", {}).get("source") != "synthetic"
    )
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
  there = telemetry.read_manifest(workdir).get("data_hash")
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
