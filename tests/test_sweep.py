"""The sweep runs what is missing, in order, and tells; contrasts by hand."""

import contextlib
import json
import os
import pathlib
import runpy
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import contrasts, controls
from benchmarks import neighbours as neighbours_table
from benchmarks import terms as terms_table
from cf_jax.data import answers, synthetic_specs, synthetic_tasks
from cf_jax.programs import reinforce
from configs import contrasts as contrasts_config
from configs import neighbours, shortcut, terms
from launch import sweep

CONFIG = """
def get_config(arg=None):
  return {}

def sweep(add):
  add("one/start", arg="cold", **{"data.seed": 3})
  add("one/next", **{"sft.from_run": "{out}/one/start", "seed": 1})
  add("two")
"""


@pytest.fixture
def config(tmp_path):
  path = tmp_path / "config.py"
  path.write_text(CONFIG)
  return path


def _finish(workdir, accuracy):
  workdir.mkdir(parents=True)
  rows = [
    dict(stage="rl", view="keyframes", task=task, accuracy=accuracy)
    for task in ("needle", "all")
  ]
  (workdir / "results.json").write_text(json.dumps({"evaluations": rows}))
  (workdir / "report.html").write_text("")


def test_runs_what_is_missing_and_tells(config, tmp_path, monkeypatch, capsys):
  out = tmp_path / "out"
  _finish(out / "one" / "start", 0.25)
  ran = []

  def run(command):
    ran.append(command)
    workdir = pathlib.Path(command[4].partition("=")[2])
    failed = workdir.name == "two"
    if not failed:
      _finish(workdir, 0.5)
    return subprocess.CompletedProcess(command, 2 * failed)

  monkeypatch.setattr(sweep.subprocess, "run", run)
  assert sweep.main([f"--config={config}", f"--out={out}"]) == 1
  assert ran[0] == [
    sys.executable,
    "-m",
    "cf_jax.main",
    f"--config={config}",
    f"--workdir={out}/one/next",
    f"--config.sft.from_run={out}/one/start",
    "--config.seed=1",
  ]
  assert len(ran) == 2
  said = capsys.readouterr()
  assert "two failed with exit code 2" in said.out
  assert "3 points, 2 to run" in said.out and "min left" in said.out
  text = (out / "sweep.md").read_text()
  assert "| one/start | rl | keyframes | 25.0 | 25.0 |" in text
  assert "| one/next | rl | keyframes | 50.0 | 50.0 |" in text
  kept = json.loads((out / "sweep.json").read_text())
  assert [point["name"] for point in kept] == ["one/start", "one/next"]
  assert kept[0]["overrides"] == {"data.seed": 3}
  # Finished points are not run again; the one that failed is.
  ran.clear()
  sweep.main([f"--config={config}", f"--out={out}"])
  assert [command[4].rpartition("/")[2] for command in ran] == ["two"]


def test_a_part_of_the_points(config, tmp_path, monkeypatch):
  ran = []

  def run(command):
    ran.append(command)
    _finish(pathlib.Path(command[4].partition("=")[2]), 0.5)
    return subprocess.CompletedProcess([], 0)

  monkeypatch.setattr(sweep.subprocess, "run", run)
  flags = [f"--config={config}", f"--out={tmp_path / 'out'}"]
  assert sweep.main([*flags, "--points=^one/"]) == 0
  assert [command[4].rpartition("/")[2] for command in ran] == ["start", "next"]
  assert ran[0][3].endswith("config.py:cold")
  with pytest.raises(SystemExit):
    sweep.main([*flags, "--points=three"])


def test_points_that_others_run_are_waited_for(
  config, tmp_path, monkeypatch, capsys
):
  """Another process runs the first point: the second waits, the third goes."""
  out = tmp_path / "out"
  points = sweep.collect(
    lambda add: [
      add("one/start"),
      add("one/next", **{"sft.from_run": "{out}/one/start"}),
    ]
  )
  names = ("one", "one/start", "one/start/more", "one/star")
  assert sweep.needs(points[1], names[1:]) == {"one/start"}
  ran, other = [], contextlib.ExitStack()
  assert other.enter_context(sweep.claimed(points[0], out))

  def run(command):
    workdir = pathlib.Path(command[4].partition("=")[2])
    ran.append(workdir.name)
    _finish(workdir, 0.5)
    return subprocess.CompletedProcess([], 0)

  def sleep(_):
    assert ran == ["two"]
    _finish(out / "one" / "start", 0.5)
    other.close()

  monkeypatch.setattr(sweep.subprocess, "run", run)
  monkeypatch.setattr(sweep.time, "sleep", sleep)
  assert sweep.main([f"--config={config}", f"--out={out}"]) == 0
  assert ran == ["two", "next"]
  assert "waiting for what others run: one/start, one/next" in (
    capsys.readouterr().out
  )


def test_an_unfinished_start_that_is_not_among_the_points(
  config, tmp_path, monkeypatch, capsys
):
  """Nothing is started from a policy that is not done."""
  out, ran = tmp_path / "out", []
  monkeypatch.setattr(sweep.subprocess, "run", ran.append)
  flags = [f"--config={config}", f"--out={out}", "--points=next"]
  assert sweep.main(flags) == 1 and not ran
  said = "one/next starts from one/start, which is not finished"
  assert said in capsys.readouterr().out
  # Another command is at it: this one waits.
  points = {point.name: point for point in sweep.collect(_points(config))}
  other = contextlib.ExitStack()
  other.enter_context(sweep.claimed(points["one/start"], out))

  def run(command):
    ran.append(command)
    _finish(out / "one" / "next", 0.5)
    return subprocess.CompletedProcess(command, 0)

  def sleep(_):
    assert not ran
    _finish(out / "one" / "start", 0.5)
    other.close()

  monkeypatch.setattr(sweep.subprocess, "run", run)
  monkeypatch.setattr(sweep.time, "sleep", sleep)
  assert sweep.main(flags) == 0 and len(ran) == 1


def _points(config):
  return runpy.run_path(str(config))["sweep"]


def test_what_starts_from_a_failed_point_fails(config, tmp_path, monkeypatch):
  ran = []

  def run(command):
    ran.append(command[4].rpartition("/")[2])
    return subprocess.CompletedProcess(command, 2 * (ran[-1] == "start"))

  monkeypatch.setattr(sweep.subprocess, "run", run)
  # "two" ends with exit code 0 and without results: that has failed, too.
  assert sweep.main([f"--config={config}", f"--out={tmp_path / 'out'}"]) == 1
  assert ran == ["start", "two"]


@pytest.mark.parametrize("name", ["a b", "../x", "/x", "x/", ""])
def test_names_are_folders_inside(name):
  with pytest.raises(ValueError, match="words with slashes"):
    sweep.collect(lambda add: add(name))


def test_a_name_twice():
  def twice(add):
    add("x")
    add("x", arg="y")

  with pytest.raises(ValueError, match="two points"):
    sweep.collect(twice)


def test_contrasts_by_hand(tmp_path):
  def run(needle, order):
    return {
      (view, task): value
      for view in contrasts.VIEWS
      for task, value in (
        ("needle", needle),
        ("order_two", order),
        ("all", 0.0),
      )
    }

  seeds = [
    {
      "uniform_grpo": run(0.4, 0.4),
      "tad_grpo": run(0.6, 0.6 + step),  # 0.2 and 0.2 + step / 2 above
      "tad_tgrpo": run(0.6, 0.6),
      "tad_kfgrpo": run(0.7, 0.7),
      "tad_placebo": run(0.6, 0.6),
      "tad_placebo_prompt": run(0.7, 0.7),
    }
    for step in (0.0, 0.2)
  ]
  found = contrasts.contrasts(seeds)
  a, b, c = found.values()
  assert a["mean"] == pytest.approx(0.25)
  np.testing.assert_allclose(a["each"], [0.2, 0.3])
  # Two seeds: t(1) of 0.975 is 12.706, the error of the mean 0.05.
  assert a["low"] == pytest.approx(0.25 - 12.706 * 0.05, abs=1e-4)
  assert b["mean"] == pytest.approx(0.1) and c["mean"] == pytest.approx(0.05)
  assert a["p_holm"] >= a["p"]
  assert "| b) KF-GRPO - T-GRPO, TAD | 10.0 |" in contrasts.table(found)
  contrasts.draw(seeds, tmp_path / "plot.png", task="order_two")
  assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_table_of_frames_and_methods(tmp_path):
  def run(keyframes, uniform):
    return {
      (view, task): value
      for view, value in (("keyframes", keyframes), ("uniform", uniform))
      for task in ("needle", "order_two", "all")
    }

  seeds = {
    "seed_0": {"cold_start": run(0.6, 0.4), "tad_grpo": run(0.8, 0.5)},
    "seed_1": {"cold_start": run(0.7, 0.4)},
  }
  found = contrasts.cells(seeds)
  assert found == {
    "uniform sft": {"seed_0": 0.4, "seed_1": 0.4},
    "tad sft": {"seed_0": 0.6, "seed_1": 0.7},
    "tad grpo": {"seed_0": 0.8},
  }
  # 60 and 70: mean 65, standard deviation 10 / sqrt(2).
  row = "| tad | 65.0 (sd 7.1), n=2 | 80.0, n=1 |  |  |"
  assert row in contrasts.describe(found)

  lines = ['{"stage": "sft", "reward/correct": 9}']
  lines += [f'{{"stage": "rl", "reward/correct": {n / 20}}}' for n in range(20)]
  (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
  curve = contrasts.curve(tmp_path, "reward/correct")
  assert len(curve) == 20 and curve[3] == 0.15
  contrasts.draw_curves({"a": [curve, curve[::-1]]}, tmp_path / "curves.png")
  assert (tmp_path / "curves.png").stat().st_size > 10_000


def _flat(config, prefix=""):
  made = {}
  for key, value in config.items():
    inside = hasattr(value, "items")
    made |= _flat(value, f"{prefix}{key}.") if inside else {prefix + key: value}
  return made


@pytest.mark.parametrize(
  "arm, changed",
  [
    ("tad_temporal", {"contrast.rollout.alpha_c": 0.0}),
    ("tad_content", {"contrast.rollout.alpha_t": 0.0}),
    ("tad_margin", {"contrast.kind": "margin", "sampling.num_completions": 8}),
    ("tad_group_std", {"advantage.scale": "group"}),
    ("tad_contrastive", {"contrastive.weight": 0.1}),
    (
      "tad_contrastive_stop",
      {"contrastive.weight": 0.1, "contrastive.form": "stop_gradient"},
    ),
  ],
)
def test_a_term_is_one_change(arm, changed):
  whole, config = (_flat(terms.get_config(a)) for a in (None, arm))
  found = {key for key in whole if config[key] != whole[key]}
  assert found == {"name", "evaluation.arms", *changed}
  assert {key: config[key] for key in changed} == changed


def test_terms_share_the_cold_starts_of_the_contrasts():
  both = [sweep.collect(c.sweep) for c in (terms, contrasts_config)]
  mine, theirs = ({p.name: p for p in points} for points in both)
  shared = mine.keys() & theirs.keys()
  assert {name.partition("/")[2] for name in shared} == {
    "cold_start",
    "tad_grpo",
    "tad_kfgrpo",
  }
  for name in shared:  # the same run, whichever sweep makes it
    assert mine[name] == theirs[name]
    arm = mine[name].arg
    assert terms.get_config(arm) == contrasts_config.get_config(arm)


def test_table_of_terms(tmp_path):
  rows = [
    {"stage": "rl", "view": view, "task": task, "accuracy": value}
    for view, value in (("keyframes", 0.5), ("reversed", 0.25))
    for task in ("needle", "order_two", "all")
  ]
  (tmp_path / "results.json").write_text(json.dumps({"evaluations": rows}))
  # The first of 21 updates is not among the last 20.
  lines = [
    json.dumps({"stage": "rl", "length/reasoning": 9 if n else 1e9})
    for n in range(21)
  ]
  (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
  found = terms_table.columns(tmp_path)
  assert found == {
    "right, %": 50,
    "order, ordered": 50,
    "order, reversed": 25,
    "tokens before the answer": 9,
  }
  other = found | {"right, %": 52.0, "tokens before the answer": 10.0}
  row = (
    "| a | 2 | 51.0 (sd 1.4) | 50.0 (sd 0.0) | 25.0 (sd 0.0) | 9.50 (sd 0.71) |"
  )
  assert row in terms_table.table({"a": {"0": found, "1": other}})


def test_terms_are_compared_on_the_same_seeds(tmp_path):
  for name in ("seed_0/a", "seed_0/b", "seed_1/a", "seed_10/a", "seed_10/b"):
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "results.json").touch()
  (tmp_path / "seed_2/b").mkdir(parents=True)  # not finished
  found = terms_table.whole_seeds(tmp_path, ("a", "b"))
  assert [folder.name for folder in found] == ["seed_0", "seed_10"]


@pytest.mark.parametrize(
  ("module", "arms"),
  [
    (terms, (*terms.ARMS, *terms.CITED, "cited_cold_start")),
    (
      contrasts_config,
      (
        *(*contrasts_config.ARMS, *contrasts_config.FURTHER_ARMS),
        *("cold_start", "uniform_cold_start", "uniform_own_grpo"),
      ),
    ),
    (shortcut, (*shortcut.ARMS, "cold_start")),
    (
      neighbours,
      [
        f"{name}_{arm}"
        for name, all_ in neighbours.ARMS.items()
        for arm in all_
      ],
    ),
  ],
  ids=["terms", "contrasts", "shortcut", "neighbours"],
)
def test_every_arm_can_judge_and_reward_its_tasks(module, arms):
  for arm in arms:
    config = module.get_config(arm)
    samples = [
      synthetic_tasks.to_sample(spec, "a.mp4")
      for spec in synthetic_specs.make_specs(
        "train", 8, seed=0, tasks=config.data.synthetic.tasks
      )
    ]
    answers.check_samples(
      samples, components=config.answers.components, has_judge=False
    )
    reinforce.check_settings(config)
    reinforce.check_credit(config, samples)


def test_neighbours_arms():
  points = {p.name: p for p in sweep.collect(neighbours.sweep)}
  assert len(points) == 12 * neighbours.SEEDS
  selected = points["seed_1/temporal_selected"]
  assert sweep.needs(selected, points) == {
    "seed_1/temporal_cold",
    "seed_1/temporal_select",
  }
  for point in points.values():
    config = neighbours.get_config(point.arg)
    for key in point.overrides:  # each is a setting of its config
      inner = config
      for part in key.split("."):
        inner = inner[part]
  with pytest.raises(ValueError, match="temporal_select"):
    neighbours.get_config("temporal_half")


def test_table_of_neighbours(tmp_path):
  common = {"accuracy": 0.5, "component": {"iou": 0.4}}
  rows = [
    {"stage": "sft", "view": "keyframes", "task": "all", **common},
    {"stage": "rl", "view": "blind", "task": "all", **common},
    {"stage": "rl", "view": "keyframes", "task": "all", **common},
    {
      "stage": "rl",
      "view": "keyframes",
      "task": "grounding",
      **common,
      "recall": {"0.3": 0.75, "0.5": 0.5, "0.7": 0.25},
    },
  ]
  results = {"evaluations": rows, "hit_rates": {"rl": {"keyframes": 1.0}}}
  (tmp_path / "results.json").write_text(json.dumps(results))
  run = neighbours_table.read(tmp_path)
  assert run == {
    "all": {"right": 0.5, "IoU": 0.4, "hits": 1.0},
    "grounding": {
      "right": 0.5,
      "IoU": 0.4,
      "from 0.3": 0.75,
      "from 0.5": 0.5,
      "from 0.7": 0.25,
    },
  }
  *_, row = neighbours_table.table({"arm": {"0": run, "1": run}}).splitlines()
  cells = ["50.0", "40.0", "75.0", "50.0", "25.0"]
  shown = " | ".join(f"{cell} (sd 0.0)" for cell in cells)
  assert row == f"| arm | 2 | grounding | {shown} |  |"
  curves = {"a": [list(range(9)), [3] * 9]}
  neighbours_table.draw(curves, tmp_path / "curves.png", what="reward")
  assert (tmp_path / "curves.png").stat().st_size > 8_000


def test_answers_to_the_same_questions(tmp_path, monkeypatch):
  """The joint arm's, whatever the policy was trained on; asked once."""
  rows = [
    {"task": "needle", "score": {"accuracy": 1.0}},
    {"task": "gqa", "score": {"accuracy": 1.0, "iou": 0.5}},
    {"task": "gqa", "score": {"accuracy": 0.0, "iou": 0.25}},
  ]
  policy, workdir, ran = tmp_path / "policy", tmp_path / "asked", []
  policy.mkdir()
  manifest = {"config": {"data": {"seed": 3}}}
  (policy / "manifest.json").write_text(json.dumps(manifest))
  (policy / "results.json").touch()

  def run(command, check):
    assert check
    ran.append(command)
    folder = workdir / "synthetic" / f"weights_{len(ran)}"
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "questions.jsonl").write_text(lines)
    (folder / "scores.json").touch()

  monkeypatch.setattr(controls.subprocess, "run", run)
  for _ in range(2):
    assert neighbours_table.ask(policy, workdir) == {
      "all": {"right": 2 / 3, "IoU": 0.375},
      "needle": {"right": 1.0},
      "gqa": {
        "right": 0.5,
        "IoU": 0.375,
        "from 0.3": 0.5,
        "from 0.5": 0.5,
        "from 0.7": 0.0,
      },
    }
  (command,) = ran
  assert command[3:] == [
    "--config=configs/evaluate.py",
    "--config.benchmark=synthetic",
    f"--config.policy={policy}",
    "--config.data.seed=3",
    "--config.data.synthetic.tasks=('grounding', 'grounded_qa', 'needle')",
    "--config.data.synthetic.num_test=768",
    "--config.data.synthetic.num_frames=80",
    f"--workdir={workdir}",
  ]
  # The policy was trained anew: asked again, and both are there.
  later_s = (policy / "results.json").stat().st_mtime + 60
  os.utime(policy / "results.json", (later_s, later_s))
  with pytest.raises(ValueError, match="holds 2 evaluations"):
    neighbours_table.ask(policy, workdir)


def test_neighbours_of_two_files(tmp_path, monkeypatch, capsys):
  """Runs here, ViaRL's and an earlier file's in one table and one file."""
  results = {
    "evaluations": [
      {"stage": "rl", "view": "keyframes", "task": "all", "accuracy": 0.5}
    ],
    "hit_rates": {"rl": {"keyframes": 1.0}},
  }
  folder = tmp_path / "runs/seed_1/tspo_tad"
  folder.mkdir(parents=True)
  (folder / "results.json").write_text(json.dumps(results))
  lines = [json.dumps({"stage": "rl", "selector/reward": 1})] * 10
  (folder / "metrics.jsonl").write_text("\n".join(lines))
  cycle = {
    "after": "answerer",
    "task": "all",
    "accuracy/chosen": {"accuracy": 0.5},
    "accuracy/uniform": {"accuracy": 0.25},
    "lists/hit": 0.75,
  }
  viarl = tmp_path / "viarl"
  viarl.mkdir()
  (viarl / "manifest.json").write_text('{"seed": 2}')
  (viarl / "results.json").write_text(json.dumps({"evaluations": [cycle]}))
  kept, out = tmp_path / "kept.json", tmp_path / "out.json"
  kept.write_text('{"tspo_tad": {"seed_0": {"all": {"right": 0.75}}}}')
  command = [
    "neighbours",
    f"--runs={tmp_path / 'runs'}",
    f"--viarl={viarl}",
    f"--beside={kept}",
    f"--out={out}",
    f"--plots={tmp_path}",
  ]
  monkeypatch.setattr(sys, "argv", command)
  neighbours_table.main()
  found = json.loads(out.read_text())
  assert found["tspo_tad"] == {
    "seed_0": {"all": {"right": 0.75}},
    "seed_1": {"all": {"right": 0.5, "hits": 1.0}},
  }
  assert list(found["viarl"]) == ["seed_2"]
  said = capsys.readouterr().out
  assert "| tspo_tad | 2 | all | 62.5 (sd 17.7) |" in said
  assert "| answerer | 50.0 | 25.0 | 75.0 |" in said
  for name in ("tspo_curves.png", "viarl_seed_2.png"):
    assert (tmp_path / name).stat().st_size > 8_000
  folder.rename(folder.with_name("videochat_gqa"))
  with pytest.raises(SystemExit):
    neighbours_table.main()
  assert "--asked must name a folder" in capsys.readouterr().err


def test_table_of_cycles(tmp_path):
  def row(after, task, chosen):
    return {
      "after": after,
      "task": task,
      "accuracy/chosen": {"accuracy": chosen},
      "accuracy/uniform": {"accuracy": 0.25},
      "lists/hit": 0.5,
    }

  rows = [
    row("answerer", "all", 0.5),
    row("answerer", "order", 0.1),
    row("cycle_1/selector", "all", 0.75),
  ]
  (tmp_path / "results.json").write_text(json.dumps({"evaluations": rows}))
  found = neighbours_table.read_cycles(tmp_path)
  assert list(found) == ["answerer", "cycle_1/selector"]
  *_, last = neighbours_table.cycles_table(found).splitlines()
  assert last == "| cycle_1/selector | 75.0 | 25.0 | 50.0 |"
  neighbours_table.draw_cycles(found, tmp_path / "cycles.png")
  assert (tmp_path / "cycles.png").stat().st_size > 8_000


def test_short_cut_arms_differ_in_the_bonus_alone():
  points = {p.name: p for p in sweep.collect(shortcut.sweep)}
  assert len(points) == shortcut.SEEDS * (1 + len(shortcut.ARMS))
  assert set(contrasts.STUDIES["shortcut"].arms) == set(shortcut.ARMS)
  whole = _flat(shortcut.get_config("kfgrpo"))
  found = {}
  for arm in shortcut.ARMS:
    config = _flat(shortcut.get_config(arm))
    found[arm] = {key for key in whole if config[key] != whole[key]} - {"name"}
  assert found == {
    "grpo": {"contrast.kind"},
    "tgrpo": {
      "contrast.kind",
      "contrast.num_shuffles",
      "sampling.num_completions",
    },
    "kfgrpo": set(),
    "kfgrpo_text": {"contrast.span"},
    "placebo": {"contrast.span", "contrast.placebo"},
  }
  with pytest.raises(ValueError, match="kfgrpo_text"):
    shortcut.get_config("tad_kfgrpo")


def test_runs_elsewhere_stand_beside_these(tmp_path, monkeypatch, capsys):
  old = {"a": {"seed_1": 1, "seed_0": 2}, "b": {"seed_0": 3}}
  new = {"c": {"seed_0": 4}, "a": {"seed_1": 5, "seed_2": 6}}
  assert list(contrasts.beside(old, new).items()) == [
    ("a", {"seed_0": 2, "seed_1": 1, "seed_2": 6}),
    ("b", {"seed_0": 3}),
    ("c", {"seed_0": 4}),
  ]
  said = capsys.readouterr().out
  assert said == "a, seed_1: the file's numbers stand, other ones were found\n"
  # By the command: another seed of the table, the contrasts as they were.
  kept, out = tmp_path / "kept.json", tmp_path / "out.json"
  cells = {"learned grpo": {"seed_0": 0.5}, "tad grpo": {"seed_0": 0.75}}
  whole = {"contrasts": {}, "views": {}, "bonuses": {}}
  kept.write_text(json.dumps(whole | {"cells": cells}))
  folder = tmp_path / "runs" / "seed_1" / "learned_grpo"
  _finish(folder, 0.25)
  results = json.loads((folder / "results.json").read_text())
  results["hit_rates"] = {"rl": {"keyframes": 1.0, "uniform": 0.5}}
  (folder / "results.json").write_text(json.dumps(results))
  _finish(tmp_path / "runs" / "seed_1" / "uniform_own_grpo", 0.75)
  command = ["contrasts", f"--runs={tmp_path / 'runs'}", f"--out={out}"]
  monkeypatch.setattr(sys, "argv", [*command, f"--beside={kept}"])
  contrasts.main()
  assert json.loads(out.read_text()) == whole | {
    "cells": cells | {"learned grpo": {"seed_0": 0.5, "seed_1": 0.25}},
    "hits": {"learned grpo": {"seed_1": 1.0}},
    "own": {"uniform_own_grpo": {"seed_1": 0.75}},
  }
  said = capsys.readouterr().out
  assert "37.5 (sd 17.7), n=2" in said and "seed_1 is left out" in said
  for wrong, message in (("a.json", "No such file"), ("b.json", "has arm")):
    (tmp_path / "b.json").write_text('{"arm": {"seed_0": {}}}')
    monkeypatch.setattr(sys, "argv", [*command, f"--beside={tmp_path / wrong}"])
    with pytest.raises(SystemExit):
      contrasts.main()
    assert message in capsys.readouterr().err


def test_table_of_views():
  views = {
    "grpo": {f"{view} order": [0.5, 0.7] for view in contrasts.VIEWS},
    "cold_start": {"keyframes another": [0.5]},
  }
  *_, row = contrasts.views_table(views, "order").splitlines()
  assert row == "| grpo |" + " 60.0 (sd 14.1) |" * 4


def test_spread_of_bonuses_by_hand(tmp_path):
  def row(step, text, bonus, accuracy=1.0):
    return {
      "stage": "rl",
      "step": step,
      "sample_id": "a",
      "completion": text,
      "rewards": {"accuracy": accuracy, "bonus": bonus},
    }

  rows = [
    *(row(1, "x", 0.1), row(1, "y", 0.3), row(1, "z", 9.0, accuracy=0.0)),
    *(row(2, "x", 0.4), row(2, "x", 0.4)),
    row(3, "x", 7.0),  # alone: nothing to differ from
  ]
  lines = "".join(json.dumps(row) + "\n" for row in rows)
  (tmp_path / "rollouts.jsonl").write_text(lines)
  found = contrasts.bonuses(tmp_path)
  assert found == pytest.approx(
    {"mean": 0.3, "within": 0.1 / 2**0.5, "between": 0.1, "texts": 1.5}
  )
  row = "| a | 0.300 | 0.071 | 0.100 | 1.500 |"
  assert row in contrasts.bonus_table({"a": [found]})


def test_answers_by_a_short_cut_and_by_looking(tmp_path, monkeypatch, capsys):
  rows = [
    {
      "view": view,
      "completion": f"<think>{text}</think>",
      "answer": answer,
      "correct": correct,
    }
    for view, text, answer, correct in (
      ("keyframes", "A", "A", True),
      ("keyframes", "A", "B", False),
      ("keyframes", "red blue", "A", True),
      ("keyframes", "A red", "A", True),
      ("keyframes", "blue red", "B", False),
      ("blind", "A", "A", True),
    )
  ]
  folder = tmp_path / "seed_3" / "grpo"
  folder.mkdir(parents=True)
  lines = "".join(json.dumps(row) + "\n" for row in rows)
  (folder / "predictions.jsonl").write_text(lines)
  expected = {
    "right": 3 / 5,
    "short_cut": 2 / 5,
    "right_looking": 2 / 3,
    "right_A": 1.0,
    "right_B": 0.0,
  }
  text = contrasts.STUDIES["shortcut"].short_cut
  assert contrasts.habits(folder, text) == pytest.approx(expected)
  # A pilot of one seed: the table alone, and none of frames and methods.
  _finish(tmp_path / "seed_3" / "cold_start", 0.5)
  out = tmp_path / "out.json"
  monkeypatch.setattr(
    sys,
    "argv",
    ["contrasts", "--study=shortcut", f"--runs={tmp_path}", f"--out={out}"],
  )
  contrasts.main()
  row = "| seed_3/grpo | 60.0 | 40.0 | 66.7 | 100.0 | 0.0 |"
  assert row in capsys.readouterr().out
  found = json.loads(out.read_text())
  assert list(found) == ["habits"]
  assert found["habits"]["seed_3/grpo"] == pytest.approx(expected)


def test_table_of_controls(tmp_path):
  folder = tmp_path / "synthetic" / "tad-K8"
  folder.mkdir(parents=True)
  figures = [{"group": "all", "value": 0.9}] + [
    {"group": f"task: {task}", "value": 0.5} for task in controls.TASKS
  ]
  (tmp_path / "results.json").touch()
  manifest = {"config": {"data": {"seed": 3}}}
  (tmp_path / "manifest.json").write_text(json.dumps(manifest))
  (folder / "scores.json").write_text(json.dumps({"figures": figures}))
  # Finished: nothing is run.
  found = controls.evaluate(tmp_path, "tad", tmp_path, count=1)
  assert found == dict.fromkeys(controls.TASKS, 0.5)
  other = found | {"needle": 0.7}
  row = "| tad | 60.0 (sd 14.1) | 50.0 (sd 0.0) | 50.0 (sd 0.0) |"
  assert row in controls.table({"tad": {"0": found, "1": other}})
