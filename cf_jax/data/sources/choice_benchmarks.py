"""Question benchmarks whose answers are mostly one of several options.

Every reader has two functions: `NAME_rows` gives the rows of one annotation
file, `NAME` makes the Sample of a row. Where a row is wrong both raise a
ValueError that names file, row and field. `Sample.video` is the name under the
folder of videos; formats and ids are listed in docs/datasets.md.
"""

import collections
import dataclasses
import pathlib
import re
import string
from collections.abc import Iterator, Sequence

from cf_jax.data import records, rows

VIDEOMME_DURATIONS = ("short", "medium", "long")
LVBENCH_TYPES = (
  "entity recognition",
  "event understanding",
  "key information retrieval",
  "reasoning",
  "summarization",
  "temporal grounding",
)
VSIBENCH_NUMBERS = (
  "object_abs_distance",
  "object_counting",
  "object_size_estimation",
  "room_size_estimation",
)
VSIBENCH_CHOICES = (
  "obj_appearance_order",
  "object_rel_direction_easy",
  "object_rel_direction_hard",
  "object_rel_direction_medium",
  "object_rel_distance",
  "route_planning",
)
# MVBench's task -> folder of its videos (the benchmark's own notebook).
MVBENCH_FOLDERS = {
  "action_antonym": "ssv2_video",
  "action_count": "perception/videos",
  "action_localization": "sta/sta_video",
  "action_prediction": "star/Charades_v1_480",
  "action_sequence": "star/Charades_v1_480",
  "character_order": "perception/videos",
  "counterfactual_inference": "clevrer/video_validation",
  "egocentric_navigation": "vlnqa",
  "episodic_reasoning": "tvqa/frames_fps3_hq",
  "fine_grained_action": "Moments_in_Time_Raw/videos",
  "fine_grained_pose": "nturgbd",
  "moving_attribute": "clevrer/video_validation",
  "moving_count": "clevrer/video_validation",
  "moving_direction": "clevrer/video_validation",
  "object_existence": "clevrer/video_validation",
  "object_interaction": "star/Charades_v1_480",
  "object_shuffle": "perception/videos",
  "scene_transition": "scene_qa/video",
  "state_change": "perception/videos",
  "unexpected_action": "FunQA_test/test",
}
# Its videos of this task are folders of pictures, so many a second.
_FOLDERS_OF_PICTURES, _PICTURES_FPS = ("episodic_reasoning",), 3.0
TVBENCH_TASKS = (
  "action_antonym",
  "action_count",
  "action_localization",
  "action_sequence",
  "egocentric_sequence",
  "moving_direction",
  "object_count",
  "object_shuffle",
  "scene_transition",
  "unexpected_action",
)
TEMPCOMPASS_TASKS = (
  "multi-choice",
  "yes_no",
  "caption_matching",
  "captioning",
)
TEMPCOMPASS_ASPECTS = (
  "action",
  "attribute_change",
  "direction",
  "order",
  "speed",
)
# Video-MMMU's subject -> its discipline, and the folder of the videos.
VIDEO_MMMU_SUBJECTS = {
  subject: (discipline, folder)
  for discipline, folder, subjects in (
    ("Art and Design", "Art", "Art Art_Theory Design Music"),
    ("Business", "Business", "Accounting Economics Finance Manage Marketing"),
    ("Science", "Science", "Biology Chemistry Geography Math Physics"),
    (
      "Health and Medicine",
      "Medicine",
      "Basic_Medical_Science Clinical_Medicine"
      " Diagnostics_and_Laboratory_Medicine Pharmacy Public_Health",
    ),
    (
      "Humanities and Social Science",
      "Humanities",
      "History Literature Sociology Psychology",
    ),
    (
      "Tech and Engineering",
      "Engineering",
      "Agriculture Architecture_and_Engineering Computer_Science Electronics"
      " Energy_and_Power Materials Mechanical_Engineering",
    ),
  )
  for subject in subjects.split()
}
VIDEO_MMMU_TRACKS = ("Perception", "Comprehension", "Adaptation")
# Of MLVU's tasks these are answered in words.
_MLVU_WORDS = ("subPlot", "summary")
# A right answer of MLVU that is none of its two questions' candidates.
_MLVU_NO_CANDIDATE = "Catching a flying drone quadcopter"
NEXTQA_TYPES = {
  "CW": "causal",
  "CH": "causal",
  "TN": "temporal",
  "TC": "temporal",
  "TP": "temporal",
  "DC": "descriptive",
  "DL": "descriptive",
  "DO": "descriptive",
}
_SPAN = re.compile(r"(\d{1,4}):(\d{2})-(\d{1,4}):(\d{2})", re.ASCII)
_CAPTION_LABEL = re.compile(r"((?:Option|Sentence|Caption) [A-Z0-9]): ?(.+)")


def videomme(row: rows.Row) -> records.Sample:
  """Video-MME (arXiv 2405.21075)."""
  options = row.options("options")
  video = row.text("videoID")
  return row.sample(
    id=row.text("question_id"),
    video=video,
    question=row.text("question"),
    options=options,
    answer=row.letter("answer", options),
    task=row.text("task_type"),
    groups=(
      ("duration", row.one_of("duration", VIDEOMME_DURATIONS)),
      ("domain", row.text("domain")),
      ("sub_category", row.text("sub_category")),
    ),
    subtitles=f"{video}.srt",
  )


def lvbench_rows(path: pathlib.Path) -> Iterator[rows.Row]:
  """A question a row, of the published form (videos with `qa`) or the flat."""
  count = collections.Counter()
  for row in rows.read(path):
    if isinstance(row.data, dict) and "qa" in row.data:
      row.check()
      for number, data in enumerate(row.listed("qa")):
        if isinstance(data, dict):
          data = {"key": row.data.get("key"), "type": row.data.get("type")} | (
            data
          )
        where = f"{row.where}: qa[{number}]"
        info = row.data.get("video_info")
        yield dataclasses.replace(
          row, data=data, where=where, extra={"info": info}
        )
      continue
    extra = {}
    if isinstance(row.data, dict):
      name = str(row.data.get("key", row.data.get("video")))
      extra = {"number": count[name]}
      count[name] += 1
    yield dataclasses.replace(row, extra=extra)


def lvbench(row: rows.Row) -> records.Sample:
  """LVBench (arXiv 2406.08035); the first of its types is the task."""
  types = row.texts("question_type")
  if not types or not set(types) <= set(LVBENCH_TYPES):
    row.fail(
      "question_type", f"got {list(types)}, expected some of {LVBENCH_TYPES}"
    )
  question = row.text("question")
  if row.has("candidates"):
    options = row.options("candidates")
  else:
    question, *lines = question.split("\n")
    options = row.options("question", lines)
  flaws, evidence = (), ()
  said = row.text("time_reference")
  match = _SPAN.fullmatch(said)
  if match is not None:
    at = [int(part) for part in match.groups()]
    start_s, end_s = at[0] * 60.0 + at[1], at[2] * 60.0 + at[3]
    if end_s < start_s:
      flaws = (f"time_reference {said} ends before it starts",)
    else:
      evidence = ((start_s, end_s),)
  elif "None" in said:
    flaws = (f"time_reference is {said}",)
  else:
    row.fail("time_reference", f"got {said!r}, expected mm:ss-mm:ss")
  video = row.label("key") if row.has("key") else row.label("video")
  if row.has("uid"):
    name = row.label("uid")
  elif "number" in row.extra:
    name = f"{video}_{row.extra['number']}"
  else:
    row.value("uid")  # the published form has one
  info = row.extra.get("info")
  minutes = info.get("duration_minutes") if isinstance(info, dict) else None
  if minutes is not None:
    minutes = row.as_number("video_info.duration_minutes", minutes, low=0.0)
  return row.sample(
    id=name,
    video=video,
    question=question,
    options=options,
    answer=row.letter("answer", options),
    task=types[0],
    groups=(
      ("question_types", ", ".join(types)),
      ("video_type", row.text("type")),
    ),
    evidence=evidence,
    duration_s=None if minutes is None else 60.0 * minutes,
    flaws=flaws,
  )


def mlvu(row: rows.Row) -> records.Sample:
  """MLVU dev (arXiv 2406.04264), the needle and generation tasks included."""
  task, question = row.text("question_type"), row.any_text("question")
  about = dict(
    id=f"{row.path.stem}/{row.number}",
    video=f"{row.path.stem}/{row.text('video')}",
    question=question,
    task=task,
    duration_s=row.seconds("duration"),
  )
  if task in _MLVU_WORDS:
    points = row.texts("scoring_points") if row.has("scoring_points") else ()
    return row.sample(
      options=(),
      answer=row.text("answer"),
      kind="open_ended",
      events=points,
      **about,
    )
  options = row.options("candidates")
  answer, flaws = row.any_text("answer"), ()
  if answer == _MLVU_NO_CANDIDATE and answer not in options:
    flaws = ("the right text is none of the candidates",)
  else:
    same = row.places("answer", options)
    answer, flaws = same[-1], said_often(same)  # the official script's last
  if not question:
    flaws = (*flaws, "the question has no text")
  return row.sample(options=options, answer=answer, flaws=flaws, **about)


def said_often(same: Sequence[str]) -> tuple[str, ...]:
  """The flaw of a right text that stands at several options, if it does."""
  if len(same) == 1:
    return ()
  return (f"the right text is that of options {', '.join(same)}",)


def mvbench(row: rows.Row) -> records.Sample:
  """MVBench (arXiv 2311.17005); a task is the name of its file."""
  task = row.path.stem
  if task not in MVBENCH_FOLDERS:
    raise ValueError(
      f"{row.path}: got a file of task {task!r}, expected one of"
      f" {', '.join(MVBENCH_FOLDERS)}"
    )
  is_folder = task in _FOLDERS_OF_PICTURES
  return _of_task_file(
    row, MVBENCH_FOLDERS[task], fps=_PICTURES_FPS if is_folder else None
  )


def tvbench(row: rows.Row) -> records.Sample:
  """TVBench (arXiv 2410.07752), which has the form of MVBench."""
  task = row.path.stem
  if task not in TVBENCH_TASKS:
    raise ValueError(
      f"{row.path}: got a file of task {task!r}, expected one of"
      f" {', '.join(TVBENCH_TASKS)}"
    )
  return _of_task_file(row, task)


def _of_task_file(
  row: rows.Row, folder: str, *, fps: float | None = None
) -> records.Sample:
  options = row.options("candidates")
  clip, evidence = None, ()
  if row.has("start") or row.has("end"):
    clip = row.interval("start", [row.value("start"), row.value("end")])
    if row.has("accurate_start") or row.has("accurate_end"):
      exact = [row.value("accurate_start"), row.value("accurate_end")]
      start_s, end_s = row.interval("accurate_start", exact, empty=True)
      evidence = ((max(start_s - clip[0], 0.0), max(end_s - clip[0], 0.0)),)
  return row.sample(
    id=f"{row.path.stem}/{row.number}",
    video=f"{folder}/{row.text('video')}",
    question=row.text("question"),
    options=options,
    answer=row.place("answer", options),
    task=row.path.stem,
    clip=clip,
    fps=fps,
    evidence=evidence,
    duration_s=None if clip is None else clip[1] - clip[0],
  )


def tempcompass_rows(path: pathlib.Path) -> Iterator[rows.Row]:
  """Questions of video -> aspect -> list; a task is the name of its file."""
  task = path.stem.removeprefix("questions_")
  if task not in TEMPCOMPASS_TASKS:
    raise ValueError(
      f"{path}: got a file of task {task!r}, expected one of"
      f" {', '.join(TEMPCOMPASS_TASKS)}"
    )
  choices = {}
  if task == "captioning":
    choices = rows.load_object(tempcompass_choices(path))
  number = 0
  for video, aspects in rows.load_object(path).items():
    if not isinstance(aspects, dict):
      raise ValueError(f"{path}: {video}: expected an object of aspects")
    for aspect, questions in aspects.items():
      if not isinstance(questions, list):
        raise ValueError(f"{path}: {video}/{aspect}: expected a list")
      for place, data in enumerate(questions):
        judged = choices.get(video)
        judged = judged.get(aspect) if isinstance(judged, dict) else None
        extra = dict(task=task, video=video, aspect=aspect, place=place)
        extra["judged"] = judged[0] if isinstance(judged, list) else None
        where = f"{path}: {video}/{aspect}[{place}]"
        yield rows.Row(data, where, path, number, extra)
        number += 1


def tempcompass_choices(path: pathlib.Path) -> pathlib.Path:
  """The multiple choice questions by which captions are judged."""
  return path.with_name(path.name.replace("captioning", "multi-choice"))


def tempcompass(row: rows.Row) -> records.Sample:
  """TempCompass (arXiv 2403.00476), all four tasks."""
  extra = row.extra
  task, aspect = extra["task"], extra["aspect"]
  if aspect not in TEMPCOMPASS_ASPECTS:
    raise ValueError(
      f"{row.where}: got aspect {aspect!r}, expected one of"
      f" {', '.join(TEMPCOMPASS_ASPECTS)}"
    )
  question, options, labels, rubric = row.text("question"), (), (), ""
  kind = "multiple_choice"
  if task == "multi-choice":
    question, options = _lines_of_options(row, question)
    answer = row.letter("answer", options)
  elif task == "caption_matching":
    question, *lines = question.split("\n")
    found = [_CAPTION_LABEL.fullmatch(line.strip()) for line in lines]
    if len(found) < 2 or None in found:
      row.fail("question", f"got the options {lines}, expected 'Option 1: ...'")
    labels = tuple(match[1] for match in found)
    options = tuple(match[2].strip() for match in found)
    whole = [f"{label}: {text}" for label, text in zip(labels, options)]
    answer = row.place("answer", whole)
  elif task == "yes_no":
    kind, answer = "free_form", row.one_of("answer", ("yes", "no"))
  else:
    kind, judged = "open_ended", extra["judged"]
    if not isinstance(judged, dict):
      raise ValueError(
        f"{row.where}: no question of it in {tempcompass_choices(row.path)},"
        " which captions are judged by"
      )
    asked = dataclasses.replace(
      row, data=judged, where=f"{tempcompass_choices(row.path)}: {aspect}"
    )
    rubric, answer = asked.text("question"), asked.text("answer")
  return row.sample(
    id=f"{task}/{extra['video']}/{aspect}/{extra['place']}",
    video=extra["video"],
    question=question,
    options=options,
    answer=answer,
    kind=kind,
    task=task,
    groups=(("aspect", aspect),),
    labels=labels,
    rubric=rubric,
  )


def _lines_of_options(row, question):
  """A question and the options in the lines that follow it."""
  lines = question.split("\n")
  first = next(
    (n for n, line in enumerate(lines) if line.startswith("A. ")), len(lines)
  )
  if not 0 < first < len(lines):
    row.fail("question", "expected a question, then options 'A. ...'")
  options = row.options("question", lines[first:])
  if options[0] == lines[first]:
    row.fail(
      "question", f"got the options {lines[first:]}, expected A., B., C."
    )
  return "\n".join(lines[:first]).strip(), options


def vsibench(row: rows.Row) -> records.Sample:
  """VSI-Bench (arXiv 2412.14171)."""
  task = row.one_of("question_type", VSIBENCH_CHOICES + VSIBENCH_NUMBERS)
  scenes = row.text("dataset")
  options, kind = (), "regression"
  if task in VSIBENCH_CHOICES:
    options, kind = row.options("options"), "multiple_choice"
    answer = row.letter("ground_truth", options)
  else:
    row.number_of("ground_truth")
    answer = str(row.value("ground_truth")).strip()
  groups = [("dataset", scenes)]
  if row.has("pruned"):
    groups.append(("pruned", str(row.value("pruned")).lower()))
  return row.sample(
    id=row.label("id"),
    video=f"{scenes}/{row.label('scene_name')}",
    question=row.text("question"),
    options=options,
    answer=answer,
    kind=kind,
    task=task,
    groups=tuple(groups),
  )


def mmvu(row: rows.Row) -> records.Sample:
  """MMVU validation (arXiv 2501.12380)."""
  task = row.one_of("question_type", ("multiple-choice", "open-ended"))
  options, answer, kind = (), row.text("answer"), "open_ended"
  if task == "multiple-choice":
    choices = row.within("choices")
    letters = string.ascii_uppercase[: len(choices.data)]
    options = row.options(
      "choices", [choices.label(letter) for letter in letters]
    )
    answer, kind = row.letter("answer", options), "multiple_choice"
  # Published as an address; below its folder `videos` is what the set holds.
  video = row.text("video")
  _, found, name = video.rpartition("/videos/")
  if "://" in video and not found:
    row.fail("video", f"got {video!r}, expected .../videos/SUBJECT/NAME.mp4")
  return row.sample(
    id=row.text("id"),
    video=name if found else video,
    question=row.text("question"),
    options=options,
    answer=answer,
    kind=kind,
    task=task,
    groups=(("subject", row.within("metadata").text("subject")),),
  )


def video_mmmu_rows(path: pathlib.Path) -> Iterator[rows.Row]:
  """A question a row.

  Of the authors' JSON (track -> number -> question), or of parquet in a folder
  that has the track's name.
  """
  if path.suffix.lower() == ".parquet":
    track = path.parent.name
    if track not in VIDEO_MMMU_TRACKS:
      raise ValueError(
        f"{path}: got a folder {track!r}, expected one of"
        f" {', '.join(VIDEO_MMMU_TRACKS)}"
      )
    for row in rows.read(path):
      yield dataclasses.replace(row, extra={0: track})
    return
  number = 0
  for track, questions in rows.load_object(path).items():
    if track not in VIDEO_MMMU_TRACKS or not isinstance(questions, dict):
      raise ValueError(
        f"{path}: got {track!r}, expected an object of questions under one of"
        f" {', '.join(VIDEO_MMMU_TRACKS)}"
      )
    for name, data in questions.items():
      yield rows.Row(data, f"{path}: {track}/{name}", path, number, {0: track})
      number += 1


def video_mmmu(row: rows.Row) -> records.Sample:
  """Video-MMMU (arXiv 2501.13826), all three tracks."""
  track = row.extra[0]
  name = row.text("id")
  subject = "_".join(name.split("_")[1:-1])
  if subject not in VIDEO_MMMU_SUBJECTS:
    row.fail("id", f"got {name!r}, of which {subject!r} is no known subject")
  discipline, folder = VIDEO_MMMU_SUBJECTS[subject]
  asked = row.value("options") if row.has("options") else []
  options, answer, kind = (), row.text("answer"), "free_form"
  if asked:
    options = row.options("options")
    answer, kind = row.letter("answer", options), "multiple_choice"
  said = row.text("question_type", "" if track == "Adaptation" else "none")
  flaws = () if said else ("question_type is missing",)
  return row.sample(
    id=f"{track}/{name}",
    video=f"{folder}/{name}",
    question=row.text("question"),
    options=options,
    answer=answer,
    kind=kind,
    task=track,
    groups=(("subject", subject), ("discipline", discipline)),
    flaws=flaws,
  )


def longvideobench(row: rows.Row) -> records.Sample:
  """LongVideoBench validation (arXiv 2407.15754)."""
  if row.has("candidates"):
    options = row.options("candidates")
  else:  # the form of parquet: what there is not is "N/A"
    said = [row.label(f"option{n}") for n in range(5)]
    options = row.options("option0", [o for o in said if o != "N/A"])
  number = row.whole("correct_choice")
  if number >= len(options):
    row.fail(
      "correct_choice", f"got {number} for {len(options)} options from 0"
    )
  return row.sample(
    id=row.text("id"),
    video=row.text("video_path"),
    question=row.text("question"),
    options=options,
    answer=string.ascii_uppercase[number],
    task=row.text("question_category"),
    groups=(
      ("duration_group", row.label("duration_group")),
      ("level", row.text("level")),
      ("topic_category", row.text("topic_category")),
    ),
    duration_s=row.seconds("duration"),
    subtitles=row.text("subtitle_path"),
    subtitles_start_s=row.number_of("starting_timestamp_for_subtitles"),
  )


def nextqa_rows(path: pathlib.Path) -> Iterator[rows.Row]:
  """The rows of a CSV, with the folders of the videos where a map names them.

  The map is `map_vid_vidorID.json` beside the file, as published.
  """
  folders = {}
  if video_map(path).is_file():
    folders = rows.load_object(video_map(path))
  for row in rows.read(path):
    yield dataclasses.replace(row, extra={"folders": folders})


def video_map(path: pathlib.Path) -> pathlib.Path:
  """Where the numbers of NExT-QA's videos are mapped to folders."""
  return path.with_name("map_vid_vidorID.json")


def nextqa(row: rows.Row) -> records.Sample:
  """NExT-QA, multiple choice (arXiv 2105.08276)."""
  options = nextqa_options(row)
  number = row.whole("answer")
  if number >= len(options):
    row.fail("answer", f"got {number}, expected 0 to {len(options) - 1}")
  return row.sample(
    options=options,
    answer=string.ascii_uppercase[number],
    **nextqa_about(row, row.label("video")),
  )


def nextqa_options(row: rows.Row) -> tuple[str, ...]:
  """The five choices of a row."""
  return row.options("a0", [row.label(f"a{n}") for n in range(5)])


def nextqa_about(row: rows.Row, video: str) -> dict:
  """What NExT-QA and NExT-GQA share: id, video, question, task, groups."""
  task = row.one_of("type", tuple(NEXTQA_TYPES))
  folder = row.extra.get("folders", {}).get(video, video)
  if not isinstance(folder, str):
    raise ValueError(f"{video_map(row.path)}: {video}: got {folder!r}")
  return dict(
    id=f"{video}_{row.label('qid')}",
    video=folder,
    question=row.text("question"),
    task=task,
    groups=(("type", NEXTQA_TYPES[task]),),
  )
