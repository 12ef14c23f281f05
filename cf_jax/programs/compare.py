"""Evaluations side by side: paired differences, settings, what changed.

Two evaluations of the same questions are compared question by question. Files
of the workdir:
  comparison.html  everything, with film strips of questions that changed
  comparison.md    the tables
  comparison.json  the tables, unrounded
  changed.jsonl    every question whose main score changed
"""

import collections
import itertools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import jax
import ml_collections
import numpy as np
from absl import logging

from cf_jax import comparison_page, disk, pages
from cf_jax.data import footage, video
from cf_jax.evals import differences, paired
from cf_jax.programs import eval_settings, evaluate, score
from cf_jax.runtime import telemetry

PAGE_FILE = "comparison.html"
TABLE_FILE = "comparison.md"
RESULTS_FILE = "comparison.json"
CHANGED_FILE = "changed.jsonl"

# Rows of the files of a question that must be the same in both evaluations.
_SAME = ("question", "options", "labels", "answer", "kind", "task", "clip")
_JPEG_QUALITY = 80


class Evaluation(NamedTuple):
  """What one folder holds.

  Attributes:
    name: a letter.
    folder: where it lies.
    manifest: eval_manifest.json.
    scores: scores.json.
    questions: id -> row of questions.jsonl.
    predictions: id -> row of predictions.jsonl.
  """

  name: str
  folder: pathlib.Path
  manifest: dict[str, Any]
  scores: dict[str, Any]
  questions: dict[str, dict[str, Any]]
  predictions: dict[str, dict[str, Any]]

  @property
  def benchmark(self) -> str:
    """Its name."""
    return self.manifest["settings"]["benchmark"]["name"]


def find(folder: str | pathlib.Path) -> pathlib.Path:
  """The folder with an eval_manifest.json: this one, or the only one below.

  Raises:
    ValueError: none, or several.
  """
  folder = pathlib.Path(folder).expanduser()
  if (folder / evaluate.MANIFEST_FILE).is_file():
    return folder
  found = sorted(folder.rglob(evaluate.MANIFEST_FILE))
  if len(found) != 1:
    held = ", ".join(str(path.parent) for path in found[:5]) or "none"
    raise ValueError(
      f"config.evaluations: {folder} holds {len(found)} evaluations ({held});"
      " give the folder of one of them"
    )
  return found[0].parent


def read(folder: str | pathlib.Path, name: str) -> Evaluation:
  """Opens a finished evaluation.

  Args:
    folder: as in `find`.
    name: what it is called.

  Raises:
    ValueError: there is none, or it is not finished.
  """
  folder = find(folder)

  def rows(file):
    found = {row["id"]: row for row in telemetry.read_rows(folder / file)}
    if not found:
      raise ValueError(
        f"{folder} has no {file}: this evaluation is not finished; start it"
        " again with its own settings"
      )
    return found

  questions = rows(score.QUESTIONS_FILE)
  return Evaluation(
    name,
    folder,
    json.loads((folder / evaluate.MANIFEST_FILE).read_text("utf-8")),
    json.loads((folder / score.SCORES_FILE).read_text("utf-8")),
    questions,
    rows(evaluate.PREDICTIONS_FILE),
  )


def shared_ids(
  evaluations: Sequence[Evaluation], *, allow_partial: bool
) -> list[str]:
  """Ids of the questions that all evaluations were asked, in order.

  Args:
    evaluations: at least two.
    allow_partial: leaves out what they do not share.

  Raises:
    ValueError: other benchmarks or other questions; or none are shared.
  """
  first = evaluations[0]
  shared = list(first.questions)
  for other in evaluations[1:]:
    if other.benchmark != first.benchmark:
      raise ValueError(
        f"{other.folder} is of {other.benchmark}, {first.folder} of"
        f" {first.benchmark}; compare evaluations of one benchmark"
      )
    unlike = [
      i
      for i in first.questions.keys() & other.questions.keys()
      if any(first.questions[i][k] != other.questions[i][k] for k in _SAME)
    ]
    only = [
      len(a.questions.keys() - b.questions.keys())
      for a, b in ((first, other), (other, first))
    ]
    if (unlike or any(only)) and not allow_partial:
      raise ValueError(
        f"{first.folder} and {other.folder} are of different questions:"
        f" {only[0]} are only in the first, {only[1]} only in the second, and"
        f" {len(unlike)} of the same id differ in text or truth; compare like"
        " with like, or set config.allow_partial=True to compare what they"
        " share"
      )
    kept = other.questions.keys() - set(unlike)
    shared = [i for i in shared if i in kept]
  if not shared:
    raise ValueError(
      f"{' and '.join(str(e.folder) for e in evaluations)} share no question"
    )
  return shared


def metrics_of(evaluations: Sequence[Evaluation]) -> list[str]:
  """What questions are scored by, the main metric first."""
  names = dict.fromkeys(
    name
    for evaluation in evaluations
    for row in evaluation.questions.values()
    for name in row["score"]
  )
  main = evaluations[0].scores["metric"]
  return sorted(names, key=lambda name: name != main)


def groups_of(row: Mapping[str, Any]) -> list[str]:
  """What a question is counted under: all, its task, its breakdowns."""
  made = ["all"]
  if row["task"]:
    made.append(f"task: {row['task']}")
  made += [f"{k}: {v}" for k, v in row["groups"].items() if v != row["task"]]
  return made


def compare(
  first: Evaluation,
  second: Evaluation,
  ids: Sequence[str],
  metrics: Sequence[str],
  **bootstrap: float,
) -> list[dict[str, Any]]:
  """Paired differences of two evaluations, by metric and group.

  Args:
    first: what the other is compared with.
    second: the other.
    ids: of questions that both have.
    metrics: the main one first, which alone is broken down.
    **bootstrap: draws, level and seed of `differences.compare`.

  Returns:
    A row for each, "all" first; p_holm is adjusted over the rows of a metric.
  """
  made = []
  for metric in metrics:
    both = [
      i
      for i in ids
      if metric in first.questions[i]["score"]
      and metric in second.questions[i]["score"]
    ]
    members = collections.defaultdict(list)
    for i in both:
      groups = groups_of(first.questions[i])
      for group in groups if metric == metrics[0] else groups[:1]:
        members[group].append(i)
    rows = []
    for group in sorted(members, key=lambda g: (g != "all", g)):
      mine = members[group]
      found = differences.compare(
        [first.questions[i]["score"][metric] for i in mine],
        [second.questions[i]["score"][metric] for i in mine],
        [_video(first.questions[i]) for i in mine],
        **bootstrap,
      )
      rows.append(
        dict(
          first_name=first.name,
          second_name=second.name,
          metric=metric,
          group=group,
          main=metric == metrics[0],
        )
        | telemetry.to_jsonable(found._asdict())
        | dict(p_holm=None)
      )
    tested = [row for row in rows if row["p"] is not None]
    for row, p in zip(tested, paired.holm([row["p"] for row in tested])):
      row["p_holm"] = p
    made += rows
  return made


def _video(row: Mapping[str, Any]) -> str:
  """What is resampled: a file, whatever its parts."""
  return row["video"]


def changed_questions(
  first: Evaluation, second: Evaluation, ids: Sequence[str], metric: str
) -> list[dict[str, Any]]:
  """Questions whose score changed, the largest changes first.

  Args:
    first: an evaluation.
    second: another one.
    ids: of questions that both have.
    metric: that decides.
  """
  made = []
  for i in ids:
    rows = [e.questions[i] for e in (first, second)]
    if any(metric not in row["score"] for row in rows):
      continue
    before, after = (row["score"][metric] for row in rows)
    if before != after:
      made.append(
        dict(
          id=i,
          task=rows[0]["task"],
          first_name=first.name,
          second_name=second.name,
          metric=metric,
          first=before,
          second=after,
          change="gained" if after > before else "lost",
          read=[row["read"] for row in rows],
          answer=rows[0]["answer"],
        )
      )
  made.sort(key=lambda row: (row["change"], -abs(row["second"] - row["first"])))
  return made


def in_turn(rows: Sequence[Mapping[str, Any]], limit: int) -> list:
  """The first rows of each task in turn, at most `limit`."""
  by_task = collections.defaultdict(list)
  for row in rows:
    by_task[row["task"]].append(row)
  turns = itertools.zip_longest(*by_task.values())
  return [row for turn in turns for row in turn if row is not None][:limit]


# --------------------------------------------------------------- film strips


class FilmStrips:
  """The frames that evaluations showed, read again from the videos.

  Args:
    max_frames: of a strip; of more, evenly spaced ones.
    height_px: of a picture.
    limits: of decoding.
  """

  def __init__(self, *, max_frames: int, height_px: int, limits: video.Limits):
    self._max_frames, self._height_px = max_frames, height_px
    self._limits = limits

  def __call__(
    self, question: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
  ) -> list[tuple[list[dict[str, Any]], str]]:
    """Pictures and a note for each of some predictions of one question."""
    kept = []
    for row in rows:
      count = len(row.get("frames", ()))
      place = np.unique(
        np.linspace(0, count - 1, min(count, self._max_frames)).round()
      ).astype(int)
      kept.append(place if count else np.zeros(0, int))
    wanted = sorted(
      {row["frames"][n] for row, place in zip(rows, kept) for n in place}
    )
    try:
      pictures = self._read(question, wanted)
    except (video.VideoError, OSError) as error:
      return [([], f"no pictures: {error}") for _ in rows]
    made = []
    for row, place in zip(rows, kept):
      frames = [
        dict(
          uri=pictures[row["frames"][n]],
          time_s=row["time_s"][n],
          evidence=any(
            start <= row["time_s"][n] <= end
            for start, end in question["evidence"]
          ),
        )
        for n in place
      ]
      note = ""
      if "unreadable" in row:
        note = f"the video could not be read: {row['unreadable']}"
      elif len(place) < len(row["frames"]):
        note = f"{len(place)} of the {len(row['frames'])} frames shown"
      made.append((frames, note))
    return made

  def _read(self, question, wanted: Sequence[int]) -> dict[int, str]:
    if not wanted:
      return {}
    clip = question["clip"] and tuple(question["clip"])
    source = footage.Footage(question["video"], clip, question["fps"])
    info = footage.probe(source, limits=self._limits)
    width = max(1, round(info.width * self._height_px / info.height))
    frames = footage.read_frames(
      source,
      np.asarray(wanted),
      (self._height_px, width),
      resize="area",
      limits=self._limits,
    )
    return {
      number: pages.data_uri(_jpeg(frame), "image/jpeg")
      for number, frame in zip(wanted, frames)
    }


def _jpeg(frame: np.ndarray) -> bytes:
  done, data = cv2.imencode(
    ".jpg",
    cv2.cvtColor(frame, cv2.COLOR_RGB2BGR),
    [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY],
  )
  assert done
  return data.tobytes()


def _shown(
  first: Evaluation,
  second: Evaluation,
  changed: Sequence[Mapping[str, Any]],
  strips: Callable,
  limit: int,
) -> list[dict[str, Any]]:
  """What the page says of some questions that changed."""
  made = []
  for change, arrow in (("lost", "worse"), ("gained", "better")):
    rows = [row for row in changed if row["change"] == change]
    picked = in_turn(rows, limit)
    heading = (
      f"{second.name} is {arrow} than {first.name}: {len(rows)} questions"
      + (f", {len(picked)} of them shown" if len(picked) < len(rows) else "")
    )
    for row in picked:
      question = first.questions[row["id"]]
      said = [e.predictions.get(row["id"], {}) for e in (first, second)]
      films = strips(question, said)
      better = (row["first"] > row["second"], row["second"] > row["first"])
      marks = question["labels"] or [f"{chr(65 + n)}." for n in range(26)]
      made.append(
        dict(
          heading=heading,
          id=row["id"],
          task=row["task"],
          video=pathlib.Path(question["video"]).name,
          question=question["question"],
          options=[
            f"{mark} {option}"
            for mark, option in zip(marks, question["options"])
          ],
          truth=question["answer"],
          answers=[
            dict(
              name=e.name,
              read=e.questions[row["id"]]["read"] or "nothing",
              score=score,
              better=good,
              response=prediction.get("response", ""),
              frames=frames,
              note=note,
            )
            for e, score, good, prediction, (frames, note) in zip(
              (first, second),
              (row["first"], row["second"]),
              better,
              said,
              films,
              strict=True,
            )
          ],
        )
      )
  return made


# -------------------------------------------------------------------- tables


def differing_settings(
  evaluations: Sequence[Evaluation],
) -> list[dict[str, Any]]:
  """setting, and its value in each evaluation, of those that are not all same.

  Versions, revision and devices are those of the newest start.
  """

  def told(evaluation):
    last = evaluation.manifest["starts"][-1]
    return evaluation.manifest["settings"] | dict(
      versions=last["versions"], git=last["git"], devices=last["devices"]
    )

  trees = [told(evaluation) for evaluation in evaluations]
  names = dict.fromkeys(
    name
    for tree in trees[1:]
    for name, _, _ in eval_settings.differences(trees[0], tree)
  )

  def value(tree, name):
    for key in name.split("."):
      tree = tree.get(key) if isinstance(tree, Mapping) else None
    return "–" if tree is None else json.dumps(tree, ensure_ascii=False)

  return [
    dict(
      setting=name,
      value={e.name: value(t, name) for e, t in zip(evaluations, trees)},
    )
    for name in names
  ]


def official_figures(
  evaluations: Sequence[Evaluation],
) -> list[dict[str, Any]]:
  """The figures of every scores.json side by side."""
  made = {}
  for evaluation in evaluations:
    for figure in evaluation.scores["figures"]:
      row = made.setdefault((figure["metric"], figure["group"]), {})
      row[evaluation.name] = figure["value"]
  return [
    dict(metric=metric, group=group, value=value)
    for (metric, group), value in made.items()
  ]


_COLUMNS = (
  "pair",
  "metric",
  "of",
  "first %",
  "second %",
  "points",
  "interval",
  "p",
  "p, Holm",
  "gained/lost",
  "n",
)


def _cells(row: Mapping[str, Any]) -> list[str]:
  interval = "–"
  if row["low"] is not None:
    interval = f"{100 * row['low']:+.2f} to {100 * row['high']:+.2f}"
  return [
    f"{row['first_name']} → {row['second_name']}",
    row["metric"],
    row["group"],
    f"{100 * row['first']:.2f}",
    f"{100 * row['second']:.2f}",
    f"{100 * row['mean']:+.2f}",
    interval,
    "–" if row["p"] is None else f"{row['p']:.2g}",
    "–" if row["p_holm"] is None else f"{row['p_holm']:.2g}",
    f"{row['gained']}/{row['lost']}",
    str(row["count"]),
  ]


def _markdown(title, words, evaluations, rows, settings) -> str:
  def table(head, lines):
    escaped = [
      [str(cell).replace("|", r"\|").replace("\n", " ") for cell in line]
      for line in (head, ["---"] * len(head), *lines)
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)

  names = [evaluation.name for evaluation in evaluations]
  return (
    f"# {title}\n\n"
    + "".join(f"{word}\n\n" for word in words)
    + "".join(f"- {e.name}: `{e.folder}`\n" for e in evaluations)
    + "\n"
    + table(_COLUMNS, map(_cells, rows))
    + "\nSettings that differ:\n\n"
    + table(
      ["setting", *names],
      ([row["setting"], *(row["value"][n] for n in names)] for row in settings),
    )
  )


# ------------------------------------------------------------------------ run


def run(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> dict[str, Any]:
  """Compares the evaluations of a config.

  Args:
    config: of configs/compare.py.
    workdir: gets the files.

  Returns:
    What comparison.json holds.

  Raises:
    ValueError: fewer than two evaluations, unfinished ones, or evaluations of
      different questions.
  """
  if jax.process_count() > 1:
    raise ValueError("compare runs in one process; leave config.distributed")
  folders = [name.strip() for name in config.evaluations.split(",")]
  folders = [name for name in folders if name]
  if not 2 <= len(folders) <= 26:
    raise ValueError(
      f"config.evaluations names {len(folders)} folders, expected 2 to 26 with"
      " a comma between"
    )
  evaluations = [read(folder, chr(65 + n)) for n, folder in enumerate(folders)]
  first = evaluations[0]
  ids = shared_ids(evaluations, allow_partial=config.allow_partial)
  metrics = metrics_of(evaluations)
  main = metrics[0]
  rows, changed, shown = [], [], []
  strips = FilmStrips(
    max_frames=config.shown.max_frames,
    height_px=config.shown.height_px,
    limits=video.Limits(**config.limits),
  )
  for other in evaluations[1:]:
    rows += compare(first, other, ids, metrics, **config.bootstrap)
    mine = changed_questions(first, other, ids, main)
    changed += mine
    shown += _shown(first, other, mine, strips, config.shown.max_questions)

  num_videos = len({_video(first.questions[i]) for i in ids})
  partial = max(len(e.questions) for e in evaluations) - len(ids)
  words = [
    f"{len(ids)} questions about {num_videos} videos of {first.benchmark}."
    + (f" PARTIAL: {partial} questions are not shared." if partial else ""),
    "Differences are means over questions of the second less the first."
    f" Intervals ({config.bootstrap.level:.0%}) are bootstrapped by video:"
    f" {config.bootstrap.draws} draws of as many videos as there are, each with"
    " all of its questions. p is two-sided: McNemar's exact test where answers"
    " are right or wrong and every video has one question, else the paired"
    " t-test over the videos' sums; Holm's correction is over the groups of a"
    " metric.",
  ]
  settings = differing_settings(evaluations)
  figures = official_figures(evaluations)
  title = f"{first.benchmark}: {' and '.join(e.name for e in evaluations)}"
  result = dict(
    benchmark=first.benchmark,
    questions=len(ids),
    videos=num_videos,
    not_shared=partial,
    unit="video",
    bootstrap=config.bootstrap.to_dict(),
    evaluations={e.name: str(e.folder) for e in evaluations},
    differences=rows,
    figures=figures,
    settings=settings,
    changed=len(changed),
  )
  telemetry.write_json(workdir / RESULTS_FILE, result)
  disk.write_text(
    workdir / TABLE_FILE, _markdown(title, words, evaluations, rows, settings)
  )
  disk.write_text(
    workdir / CHANGED_FILE,
    "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in changed),
  )
  page = comparison_page.write(
    workdir / PAGE_FILE,
    title=title,
    words=words,
    evaluations=[
      dict(
        name=e.name,
        key=e.folder.name,
        policy=e.manifest["where"]["policy"],
        weights=e.manifest["settings"]["policy"]["weights"],
        unreadable=len(e.manifest["results"]["unreadable"]),
      )
      for e in evaluations
    ],
    differences=rows,
    figures=figures,
    settings=settings,
    changed=shown,
  )
  for other in evaluations[1:]:
    telemetry.closing_table(
      f"{first.benchmark}: {other.name} ({other.folder.name}) less {first.name}"
      f" ({first.folder.name}), {main}",
      ("of", "points", "interval", "p", "p, Holm", "gained/lost", "n"),
      [
        [cells[2], *cells[5:]]
        for cells in (
          _cells(row)
          for row in rows
          if row["main"] and row["second_name"] == other.name
        )
      ],
    )
  logging.info(
    "%d settings differ, %d scores changed; page: %s",
    len(settings),
    len(changed),
    page,
  )
  return telemetry.to_jsonable(result)
