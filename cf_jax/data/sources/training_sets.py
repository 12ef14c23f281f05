"""Sets to train on: Video-R1 and LLaVA-Video-178K.

As in `choice_benchmarks`, `NAME` makes the Sample of a row. What cannot be
judged (a number that is none, a letter without its option) is an error of the
row, never a reward of 0 for every answer.
"""

import dataclasses
import re

from cf_jax.data import answers, images, records, rows

VIDEO_R1_KINDS = {
  "multiple choice": "multiple_choice",
  "numerical": "numerical",
  "OCR": "ocr",
  "free-form": "free_form",
  "regression": "regression",
}
_OPTION = re.compile(r"[A-Z][.)] ")


def video_r1(row: rows.Row) -> records.Sample:
  """Video-R1-260k (arXiv 2503.21776), pictures included."""
  said = row.one_of("problem_type", tuple(VIDEO_R1_KINDS))
  kind = VIDEO_R1_KINDS[said]
  solution = _tagged(row, "solution", answers.ANSWER)
  options, answer = (), solution
  if kind == "multiple_choice":
    options = row.options("options")
    answer = dataclasses.replace(row, data={"solution": solution}).letter(
      "solution", options
    )
  is_number = kind in ("numerical", "regression")
  if is_number and answers.read_number(answer) is None:
    row.fail("solution", f"got {answer!r}, expected a number")
  is_image = row.one_of("data_type", ("image", "video")) == "image"
  video = row.text("path").removeprefix("./")
  if is_image != images.is_image(video):
    kinds = ", ".join(images.SUFFIXES)
    row.fail(
      "path",
      f"got {video!r} for data_type {row.text('data_type')!r}; pictures end in"
      f" {kinds}",
    )
  reasoning = ""
  if row.has("process"):
    reasoning = _tagged(row, "process", answers.THINK)
  return row.sample(
    id=row.label("problem_id"),
    video=video,
    question=row.text("problem"),
    options=options,
    answer=answer,
    kind=kind,
    task=said,
    groups=(
      ("data_type", row.text("data_type")),
      ("data_source", row.text("data_source", "none")),
    ),
    reasoning=reasoning,
  )


def video_r1_cot(row: rows.Row) -> records.Sample:
  """Video-R1-CoT-165k: the same rows, each with its reasoning."""
  row.value("process")
  return video_r1(row)


def _tagged(row: rows.Row, name: str, tags: tuple[str, str]) -> str:
  """What stands between one pair of tags, which are all of a field."""
  text, (opening, closing) = row.text(name), tags
  inside = text.removeprefix(opening).removesuffix(closing).strip()
  if (
    not text.startswith(opening)
    or not text.endswith(closing)
    or opening in inside
    or closing in inside
    or not inside
  ):
    row.fail(name, f"got {text[:80]!r}, expected {opening}...{closing}")
  return inside


def llava_video(row: rows.Row) -> list[records.Sample]:
  """LLaVA-Video-178K, multiple choice (arXiv 2410.02713): a sample a turn."""
  turns = row.listed("conversations")
  if not turns or len(turns) % 2:
    row.fail("conversations", f"got {len(turns)} turns, expected pairs of them")
  video = row.text("video")
  source = row.text("data_source", row.path.stem)
  made = []
  for number in range(0, len(turns), 2):
    asked = _said(row, turns, number, "human")
    told = _said(row, turns, number + 1, "gpt")
    asked = asked.removeprefix("<image>").removeprefix("<video>").strip()
    lines = asked.split("\n")
    first = next(
      (n for n, line in enumerate(lines) if _OPTION.match(line)), len(lines)
    )
    # What follows the options tells the policy how to answer.
    last = first
    while last < len(lines) and _OPTION.match(lines[last]):
      last += 1
    if not 0 < first < last:
      row.fail(
        f"conversations[{number}]", "expected a question, then options 'A. ...'"
      )
    options = row.options(f"conversations[{number}]", lines[first:last])
    turn = rows.Row(
      {"value": told}, f"{row.where}: conversations[{number + 1}]", row.path, 0
    )
    made.append(
      row.sample(
        id=f"{row.path.stem}/{row.number}/{number // 2}",
        video=video,
        question="\n".join(lines[:first]).strip(),
        options=options,
        answer=turn.letter("value", options),
        task=source,
      )
    )
  return made


def _said(row: rows.Row, turns: list, number: int, speaker: str) -> str:
  turn = turns[number]
  name = f"conversations[{number}]"
  if not isinstance(turn, dict) or turn.get("from") != speaker:
    row.fail(name, f"got {str(turn)[:80]}, expected a turn of {speaker}")
  if not isinstance(turn.get("value"), str) or not turn["value"].strip():
    row.fail(name, f"got {turn.get('value')!r}, expected text")
  return turn["value"].strip()
