"""What the project's HTML pages are made of.

A page is self-contained (pictures are data URIs, the style is inline, there is
no script), so it opens offline and can be mailed. Texts are escaped where they
become HTML: `escape`, and what says that it takes HTML takes no text.
"""

import base64
import html
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib
import matplotlib.axes
import matplotlib.backends.backend_svg
import matplotlib.figure

from cf_jax import disk, figures


def write_page(
  path: str | os.PathLike, title: str, head: str, body: str
) -> pathlib.Path:
  """A whole page; `head` and `body` are HTML."""
  path = pathlib.Path(path)
  page = _PAGE.format(title=escape(title), style=_CSS, head=head, body=body)
  disk.write_text(path, page)
  return path


def escape(value: Any) -> str:
  """Text as HTML that shows it."""
  return html.escape(str(value), quote=True)


def percent(value: float | None, digits: int = 1) -> str:
  """`0.123` as `12.3 %`, nothing as a dash."""
  return "–" if value is None else f"{100 * value:.{digits}f} %"


def number(value: Any) -> str:
  """A number in four digits; anything else as it is."""
  if isinstance(value, float):
    return f"{value:.4g}"
  return str(value)


def data_uri(data: bytes, kind: str) -> str:
  """A file as an address, so that a page needs none beside it."""
  return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """Cells are HTML already; the first column is text, the rest numbers."""
  top = "".join(f"<th>{cell}</th>" for cell in head)
  lines = "".join(
    "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>"
    for row in rows
  )
  return (
    f'<div class="scroll"><table><thead><tr>{top}</tr></thead>'
    f"<tbody>{lines}</tbody></table></div>"
  )


def svg_panel(
  alt: str,
  draw: Callable[[matplotlib.axes.Axes], None],
  *,
  width: float = 5.4,
  height: float = 2.7,
) -> str:
  """One small figure as an image tag; panels stack on a narrow screen."""
  memory = io.BytesIO()
  with matplotlib.rc_context(figures.STYLE):
    figure = matplotlib.figure.Figure(
      figsize=(width, height), layout="constrained"
    )
    matplotlib.backends.backend_svg.FigureCanvasSVG(figure)
    draw(figure.add_subplot())
    figure.savefig(memory, format="svg", metadata={"Date": None})
  uri = data_uri(memory.getvalue(), "image/svg+xml")
  return f'<img alt="{escape(alt)}" src="{uri}">'


def leaves(tree: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
  """(dotted name, value as JSON) of every setting in nested dicts."""
  if isinstance(tree, dict) and tree:
    for key, value in tree.items():
      yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
  else:
    yield prefix, json.dumps(tree, ensure_ascii=False)


# --------------------------------------------------------------------- style

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>{head}</header>
{body}
</body>
</html>
"""

_CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 1120px;
  background: #fff; color: #1c2733;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans",
    "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .3rem; padding-top: .9rem;
  border-top: 1px solid #dfe4ea; }
p { margin: .3rem 0 .8rem; max-width: 46rem; }
.quiet { color: #66727f; font-size: .88rem; margin: 0 0 .4rem; }
.tiles { display: grid; gap: .8rem; margin-top: 1.2rem;
  grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); }
.tile { border: 1px solid #dfe4ea; border-radius: 8px; padding: .8rem 1rem; }
.tile b { font-size: 1.7rem; line-height: 1.1; display: block; }
.tile span { display: block; }
.tile i { font-style: normal; font-size: .85rem; }
.met i, .ok { color: #23704d; }
.missed i, .bad { color: #a8402a; }
.grid { display: grid; gap: 1.2rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.grid > * { min-width: 0; }
img { max-width: 100%; height: auto; display: block; }
.grid img { width: 100%; }
.scroll { overflow-x: auto; }
.wide img { width: 100%; min-width: 46rem; }
figure { margin: 1.2rem 0 2rem; }
figcaption { margin-top: .5rem; font-size: .88rem; overflow-wrap: anywhere; }
figcaption span { margin-right: 1.2rem; display: inline-block; }
figcaption b { color: #66727f; font-weight: 500; }
table { border-collapse: collapse; margin: .4rem 0 1rem; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th { font-weight: 500; color: #66727f; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid #dfe4ea;
  text-align: right; white-space: nowrap; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
td i { color: #66727f; }
article { border: 1px solid #dfe4ea; border-radius: 8px; padding: .9rem 1rem; }
pre { margin: .3rem 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: .85rem/1.45 ui-monospace, "DejaVu Sans Mono", Menlo, monospace; }
section > article { margin: .8rem 0; }
article pre:not(.prompt) { background: #f5f7f9; border-radius: 4px;
  padding: .5rem .6rem; }
.parts { font-size: .82rem; color: #66727f; margin: .2rem 0 .6rem; }
.parts span { margin-right: .9rem; display: inline-block; }
.parts b { color: #1c2733; font-weight: 600; }
.parts b.ok { color: #23704d; }
.parts b.bad { color: #a8402a; }
.narrow { max-width: 34rem; }
code { font: .85rem ui-monospace, "DejaVu Sans Mono", Menlo, monospace; }
details summary { cursor: pointer; margin: .6rem 0; }
.left td:last-child, .left th:last-child { text-align: left;
  white-space: normal; overflow-wrap: anywhere; }
.film { display: flex; gap: 3px; overflow-x: auto; margin: .2rem 0 .5rem; }
.film figure { margin: 0; flex: 0 0 auto; }
.film img { height: 84px; width: auto; border-radius: 3px; }
.film figcaption { margin: 0; font-size: .75rem; color: #66727f; }
.film .evidence img { outline: 3px solid #e8a33d; outline-offset: -3px; }
@media print { .scroll { overflow: visible; } section { break-inside: auto; } }
"""
