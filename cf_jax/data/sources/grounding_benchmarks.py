"""Benchmarks that ask when, where, or for all that happens.

As in `choice_benchmarks`, `NAME_rows` gives the rows of one annotation file and
`NAME` makes the Sample of a row. Questions about times are the published
sentence alone; the prompt's template says what is to be done with it.
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterator

from cf_jax.data import records, rows
from cf_jax.data.sources import choice_benchmarks

_CHARADES_LINE = re.compile(r"(\S+) (\S+) (\S+)\s?##\s?(.+)")
_RANGE = re.compile(r"(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)", re.ASCII)
# A file that was cut says so: NAME_00:00:39:000_00:01:24:700.mp4.
_CUT_NAME = re.compile(r"_\d\d:\d\d:\d\d:\d{3}_\d\d:\d\d:\d\d:\d{3}\.")
GOT10K_FPS = 10.0
# Some published intervals of NExT-GQA start that long before the video.
_EARLIEST_S = -0.5
SALIENCY_CLIP_S = 2.0


def _interval_sample(
  row: rows.Row, windows: tuple[tuple[float, float], ...], **fields
) -> records.Sample:
  start_s, end_s = windows[0]
  return row.sample(
    options=(),
    answer=f"{start_s:.2f} to {end_s:.2f}",
    kind="interval",
    start_s=start_s,
    end_s=end_s,
    evidence=windows,
    **fields,
  )


def charades_sta_rows(path: pathlib.Path) -> Iterator[rows.Row]:
  """A query a row, of the published text, or of JSONL, JSON or parquet."""
  suffix = path.suffix.lower()
  if suffix == ".json":
    yield from sentences_rows(path)
  elif suffix == ".txt":
    number = 0
    for line_number, line in enumerate(rows.read_text(path).split("\n"), 1):
      if not line.strip():
        continue
      match = _CHARADES_LINE.fullmatch(line.strip())
      where = f"{path}:{line_number}"
      if match is None:
        problem = f"got {line[:80]!r}, expected VIDEO START END##SENTENCE"
        yield rows.Row({}, where, path, number, problem=problem)
      else:
        video, start, end, sentence = match.groups()
        data = dict(vid=video, query=sentence, relevant_windows=[[start, end]])
        yield rows.Row(data, where, path, number)
      number += 1
  else:
    yield from rows.read(path)


def charades_sta(row: rows.Row) -> records.Sample:
  """Charades-STA (arXiv 1705.02101), one interval a query."""
  if "place" in row.extra:
    return sentences(row)
  if row.has("caption"):  # parquet of lmms-eval: video, caption, timestamp
    windows = (row.interval("timestamp"),)
    video, query = row.text("video").removesuffix(".mp4"), row.text("caption")
  else:
    windows = row.intervals("relevant_windows")
    video, query = row.text("vid"), row.text("query")
    if len(windows) > 1:
      row.fail("relevant_windows", f"got {len(windows)}, expected one")
  return _interval_sample(
    row,
    windows,
    id=row.label("qid") if row.has("qid") else str(row.number),
    video=video,
    question=query,
    task="grounding",
    duration_s=row.seconds("duration"),
  )


def sentences_rows(path: pathlib.Path) -> Iterator[rows.Row]:
  """A sentence a row, of JSON: video -> duration, timestamps, sentences."""
  number = 0
  for video, data in rows.load_object(path).items():
    row = rows.Row(data, f"{path}: {video}", path, number)
    row.check()
    timestamps, said = row.listed("timestamps"), row.listed("sentences")
    if len(timestamps) != len(said):
      row.fail("sentences", f"got {len(said)} for {len(timestamps)} timestamps")
    for place, (timestamp, sentence) in enumerate(zip(timestamps, said)):
      yield rows.Row(
        dict(data, timestamps=timestamp, sentences=sentence),
        f"{path}: {video}[{place}]",
        path,
        number,
        dict(video=video, place=place),
      )
      number += 1


def sentences(row: rows.Row) -> records.Sample:
  """ActivityNet Captions (arXiv 1705.00754) as grounding of its sentences."""
  video = row.extra["video"]
  return _interval_sample(
    row,
    (row.interval("timestamps"),),
    id=f"{video}/{row.extra['place']}",
    video=video,
    question=row.text("sentences"),
    task="grounding",
    duration_s=row.seconds("duration"),
  )


def qvhighlights(row: rows.Row) -> records.Sample:
  """QVHighlights (arXiv 2107.09609): moments, and how salient clips are."""
  clips, scores = row.listed("relevant_clip_ids"), row.listed("saliency_scores")
  if len(clips) != len(scores):
    row.fail("saliency_scores", f"got {len(scores)} for {len(clips)} clips")
  duration_s = row.number_of("duration", low=0.0)
  saliency = []
  for clip, given in zip(clips, scores):
    number = row.as_number("relevant_clip_ids", clip, low=0.0)
    if number != int(number) or number * SALIENCY_CLIP_S >= duration_s:
      row.fail(
        "relevant_clip_ids", f"got {clip!r}, which is no clip of {duration_s} s"
      )
    if not isinstance(given, (list, tuple)) or len(given) != 3:
      row.fail("saliency_scores", f"got {given!r}, expected three scores")
    given = [row.as_number("saliency_scores", score) for score in given]
    saliency.append((int(number), tuple(int(score) for score in given)))
  return _interval_sample(
    row,
    row.intervals("relevant_windows"),
    id=row.label("qid"),
    video=row.text("vid"),
    question=row.text("query"),
    task="grounding",
    duration_s=duration_s,
    saliency=tuple(saliency),
  )


def timer1(row: rows.Row) -> records.Sample:
  """The training set of Time-R1 (arXiv 2503.13377)."""
  name = row.label("qid")
  return _time_r1(
    row,
    name,
    video=row.text("video"),
    sentence=row.text("sentence"),
    window=row.interval("timestamp"),
    bounds=("video_start", "video_end"),
    groups=(("source", name.split("|")[1] if name.count("|") > 1 else "none"),),
  )


def tvgbench(row: rows.Row) -> records.Sample:
  """TVGBench, the test set of Time-R1."""
  match = _RANGE.fullmatch(row.text("answer"))
  if match is None:
    row.fail("answer", f"got {row.text('answer')!r}, expected START-END")
  return _time_r1(
    row,
    str(row.number),
    video=row.text("path"),
    sentence=row.text("question"),
    # Some published moments of Ego4D are a point in time.
    window=row.interval("answer", list(match.groups()), empty=True),
    bounds=("start", "end"),
    groups=(
      ("query_type", row.text("qsemtype")),
      ("dataset", row.text("dataset_name", "nlq")),
    ),
  )


def _time_r1(row, name, *, video, sentence, window, bounds, groups):
  clip = None
  if any(row.has(bound) for bound in bounds):
    clip = row.interval(bounds[0], [row.value(bound) for bound in bounds])
  if _CUT_NAME.search(video):
    clip = None  # what it says is where the file was cut from
  return _interval_sample(
    row,
    (window,),
    id=name,
    video=video.removeprefix("./dataset/timer1/videos/"),
    question=sentence,
    task="grounding",
    duration_s=row.seconds("duration"),
    clip=clip,
    groups=groups,
  )


def nextgqa_rows(path: pathlib.Path) -> Iterator[rows.Row]:
  """The rows of a CSV, with the intervals of the file beside it.

  The intervals of `val.csv` are in `gsub_val.json`; training has none.
  """
  windows = None
  if path.stem != "train":
    if not nextgqa_windows(path).is_file():
      raise ValueError(
        f"{path}: its intervals are missing: expected"
        f" {nextgqa_windows(path).name} beside it"
      )
    windows = rows.load_object(nextgqa_windows(path))
  for row in choice_benchmarks.nextqa_rows(path):
    yield dataclasses.replace(row, extra=row.extra | {"windows": windows})


def nextgqa_windows(path: pathlib.Path) -> pathlib.Path:
  """The intervals of a split of NExT-GQA."""
  return path.with_name(f"gsub_{path.stem}.json")


def nextgqa(row: rows.Row) -> records.Sample:
  """NExT-GQA (arXiv 2309.01327)."""
  options = choice_benchmarks.nextqa_options(row)
  video, question = row.label("video_id"), row.label("qid")
  same = row.places("answer", options)
  about = dict(
    options=options,
    answer=same[0],  # the official code's first
    flaws=choice_benchmarks.said_often(same),
    **choice_benchmarks.nextqa_about(row, video),
  )
  windows = row.extra["windows"]
  if windows is None:
    return row.sample(**about)
  place = f"{nextgqa_windows(row.path)}: {video}"
  found = rows.Row(windows.get(video), place, row.path, row.number)
  found.check()
  evidence = found.within("location").intervals(question, low=_EARLIEST_S)
  alone = len(evidence) == 1
  return row.sample(
    kind="grounded_qa",
    evidence=evidence,
    start_s=evidence[0][0] if alone else None,
    end_s=evidence[0][1] if alone else None,
    duration_s=found.seconds("duration"),
    **about,
  )


def got10k(row: rows.Row) -> records.Sample:
  """GOT-10k (arXiv 1810.11981) with eight boxes a video, as VideoChat-R1."""
  boxes = []
  for given in row.listed("gt"):
    if not isinstance(given, (list, tuple)) or len(given) != 4:
      row.fail("gt", f"got {given!r}, expected [x0, y0, x1, y1]")
    x0, y0, x1, y1 = (row.as_number("gt", part, low=0.0) for part in given)
    if not (x0 < x1 <= 1 and y0 < y1 <= 1):
      row.fail("gt", f"got {given!r}, expected fractions, x0 < x1 and y0 < y1")
    boxes.append((x0, y0, x1, y1))
  if len(boxes) < 2:
    row.fail("gt", f"got {len(boxes)} boxes, expected at least 2")
  name = pathlib.PurePosixPath(row.text("path")).name
  target = row.text("object")
  first = ", ".join(f"{part:g}" for part in boxes[0])
  return row.sample(
    id=name,
    video=name,
    question=f"Track the {target} that is at [{first}] in the first frame.",
    options=(),
    answer=str([list(box) for box in boxes]),
    kind="tracking",
    task="tracking",
    groups=(("object", target),),
    fps=GOT10K_FPS,
    boxes=tuple(boxes),
  )


def dream1k(row: rows.Row) -> records.Sample:
  """DREAM-1K (arXiv 2407.00634), descriptions judged by their events."""
  if row.has("messages"):
    reference, about = _dream_reference(row), row.within("extra_info")
    source, video = row.text("dataset"), row.label("vid")
  else:
    reference, about = row.text("description"), row
    source = row.text("source", "DREAM-1K")
    video = pathlib.PurePosixPath(row.text("video_file")).name
  events = about.texts("events")
  if "" in events:
    row.fail("events", "got an empty text among the events")
  return row.sample(
    id=row.label("idx"),
    video=video,
    question="Describe the video in detail.",
    options=(),
    answer=reference,
    kind="caption",
    task=source.rpartition("/")[2],
    events=events,
    duration_s=about.seconds("duration"),
    flaws=() if events else ("no event is annotated",),
  )


def _dream_reference(row: rows.Row) -> str:
  """The description in the form of a dialogue."""
  for number, message in enumerate(row.listed("messages")):
    if not isinstance(message, dict) or message.get("role") != "assistant":
      continue
    turn = dataclasses.replace(
      row, data=message, where=f"{row.where}: messages[{number}]"
    )
    for part in turn.listed("content"):
      if isinstance(part, dict) and isinstance(part.get("reference"), str):
        return part["reference"].strip()
  row.fail("messages", "no message of the assistant has a reference")
