"""The page over the keyframes of some videos (`programs/keyframes.py`)."""

import os
import pathlib
import urllib.parse
from collections.abc import Mapping
from typing import Any

from cf_jax import pages


def write(
  path: str | os.PathLike,
  *,
  title: str,
  records: Mapping[str, dict],
  failed: Mapping[str, str],
  settings: Mapping[str, Any],
) -> pathlib.Path:
  """Writes the page over the keyframes of some videos.

  Pictures are linked, not held: the page moves together with its folder.

  Args:
    path: of the page; the files of a video lie beside it, in a folder of the
      video's name.
    title: heading.
    records: name of a video -> its keyframes.json.
    failed: name of a video -> what went wrong.
    settings: of all of them.

  Returns:
    The path.
  """
  path = pathlib.Path(path)
  sections = [
    ("", name, _one_video(name, row)) for name, row in records.items()
  ]
  if failed:
    rows = [[pages.escape(cell) for cell in row] for row in failed.items()]
    table = pages.html_table(["video", "what went wrong"], rows)
    sections.insert(0, ("left", "Failed", table))
  rows = [
    [f"<code>{pages.escape(cell)}</code>" for cell in row]
    for row in pages.leaves(dict(settings))
  ]
  sections.append(
    ("left", "Settings", pages.html_table(["setting", "value"], rows))
  )
  body = "".join(
    f'<section class="{kind}"><h2>{pages.escape(heading)}</h2>'
    f"{content}</section>"
    for kind, heading, content in sections
  )
  count = sum(len(record["keyframes"]) for record in records.values())
  videos = "video" if len(records) == 1 else "videos"
  head = (
    f"<h1>{pages.escape(title)}</h1><p class='quiet'>{count} keyframes of"
    f" {len(records)} {videos}</p>"
  )
  return pages.write_page(path, title, head, body)


def _one_video(name: str, record: dict) -> str:
  """Facts, film strip and keyframes of one video."""
  about = record["video"]
  changes = ", variable" if about["variable_fps"] else ""
  turned = f", turned by {about['rotation']}°" if about["rotation"] else ""
  facts = {
    "frames": f"{about['num_frames']}, {record['num_scanned']} scanned",
    "length": f"{about['duration_s']:.2f} s",
    "frames a second": f"{about['fps']:.4g}{changes}",
    "size": f"{about['width']} × {about['height']} px{turned}",
    "codec": about["codec"],
    "apexes": len(record["apexes"]),
  }
  caption = "".join(
    f"<span><b>{pages.escape(key)}</b> {pages.escape(value)}</span>"
    for key, value in facts.items()
  )
  problem = about["problem"]

  def link(file: str) -> str:
    return pages.escape(urllib.parse.quote(f"{name}/{file}"))

  strip = link(record["film_strip"])
  rows = [
    [
      f'<a href="{link(row["file"])}">frame {row["frame_index"]}</a>',
      f"{row['timestamp']:.3f}",
      f"{row['segment']['start']:.2f} – {row['segment']['end']:.2f}",
      f"{row['apex']['timestamp']:.3f}" if row["apex"] else "–",
      f"{row['score']:.2f}",
      f"{row['saliency']:.2f}",
    ]
    for row in record["keyframes"]
  ]
  head = ("keyframe", "time (s)", "segment (s)", "opened by the apex at (s)")
  table = pages.html_table([*head, "score", "saliency"], rows)
  return (
    (f'<p class="bad">{pages.escape(problem)}</p>' if problem else "")
    + f'<figure><a href="{strip}"><img loading="lazy" src="{strip}"'
    f' alt="Keyframes of {pages.escape(name)} over the score curve"></a>'
    f"<figcaption>{caption}</figcaption></figure>"
    f"<details><summary>Keyframes</summary>{table}</details>"
  )
