"""Bytes that a program compiled for a TPU moves to and from its main memory.

Counted in the text of the optimized program, where a layout says which memory
an array lies in: `S(1)` and higher are on the chip, none is main memory (HBM).

- An instruction reads its operands and writes its results, once each.
- A fusion reads an operand once for every different slice of it, since each
  slice is fetched for itself, as the compiler's own dumps show; an operand
  that is used whole is read once.
- A loop counts as often as its condition says: index < constant. Loops whose
  end depends on the data count once and are reported.
"""

import math
import re
from typing import NamedTuple

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_FREE = (
  "bitcast",
  "constant",
  "get-tuple-element",
  "iota",
  "parameter",
  "tuple",
  "copy-done",
  "opt-barrier",
)
_SLICES = ("slice", "dynamic-slice")


class Instruction(NamedTuple):
  """`name = type opcode(operands), rest`."""

  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  number: int | None  # of a parameter or a constant
  rest: str


class Traffic(NamedTuple):
  """What `count` found.

  Attributes:
    read: bytes read.
    written: bytes written.
    open_loops: loops counted once, whose number of rounds is not known.
  """

  read: int
  written: int
  open_loops: int


def _closing(text: str, start: int) -> int:
  """Where the bracket that opens at `start` closes."""
  depth = 0
  for place in range(start, len(text)):
    depth += {"(": 1, ")": -1}.get(text[place], 0)
    if depth == 0:
      return place
  raise ValueError(f"no bracket closes {text[start : start + 80]!r}")


def _parse(line: str) -> Instruction:
  name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
  stop = _closing(rest, 0) + 1 if rest[0] == "(" else rest.index(" ")
  kind, rest = rest[:stop], rest[stop:].lstrip()
  stop = rest.index("(")
  opcode, end = rest[:stop], _closing(rest, stop)
  operands = tuple(re.findall(r"%[\w.\-]+", rest[stop:end]))
  inside = rest[stop + 1 : end]
  number = int(inside) if inside.isdigit() else None
  return Instruction(name, kind, opcode, operands, number, rest[end + 1 :])


def _bytes(kind: str) -> int:
  """Of the arrays of a type that lie in main memory."""
  total = 0
  for dtype, shape, layout in _ARRAY.findall(kind):
    if re.search(r"S\([1-9]", layout):
      continue
    bits = re.search(r"\d+", dtype)
    width = max(1, int(bits.group()) // 8) if bits else 1
    total += width * math.prod(int(n) for n in shape.split(",") if n)
  return total


def _computations(text: str) -> dict[str, list[Instruction]]:
  found, entry = {}, ""
  for block in text.split("\n\n"):
    head, *lines = block.strip().splitlines() or [""]
    match = re.match(r"(ENTRY )?(%[\w.\-]+) \(", head)
    if match:
      body = [line for line in lines if " = " in line]
      found[match.group(2)] = [_parse(line) for line in body]
      entry = match.group(2) if match.group(1) else entry
  found["ENTRY"] = found[entry]
  return found


def _fetched(inside: list[Instruction], number: int, whole: int) -> int:
  """Bytes of operand `number` that a fused computation fetches."""
  names = {
    i.name for i in inside if i.opcode == "parameter" and i.number == number
  }
  slices, used_whole = {}, False
  for user in inside:
    if not names.intersection(user.operands):
      continue
    if user.opcode == "bitcast":
      names.add(user.name)
    elif user.opcode in _SLICES:
      place = re.search(r"slice=\{.*?\]\}", user.rest)
      key = place.group() if place else user.operands
      slices[key] = _bytes(re.sub(r"S\(\d+\)", "", user.type))
    else:
      used_whole = True
  return whole if used_whole or not slices else sum(slices.values())


def count(text: str) -> Traffic:
  """Bytes that the program moves, from its optimized HLO as text."""
  computations = _computations(text)

  def visit(name: str) -> Traffic:
    types = {i.name: i.type for i in computations[name]}
    read = written = loops = 0
    for i in computations[name]:
      if i.opcode in _FREE:
        continue
      called = dict(re.findall(r"(\w+)=(%[\w.\-]+)", i.rest))
      if i.opcode == "while":
        rounds = _rounds(computations[called["condition"]])
        inner = visit(called["body"])
        read += (rounds or 1) * inner.read
        written += (rounds or 1) * inner.written
        loops += inner.open_loops + (rounds is None)
        continue
      if i.opcode in ("call", "conditional"):
        for other in re.findall(r"%[\w.\-]+", i.rest):
          if other in computations:
            inner = visit(other)
            read, written = read + inner.read, written + inner.written
            loops += inner.open_loops
        continue
      written += _bytes(i.type.split(", u32[]")[0])
      for number, operand in enumerate(i.operands):
        whole = _bytes(types[operand])
        if whole and i.opcode == "fusion":
          whole = _fetched(computations[called["calls"]], number, whole)
        elif i.opcode in _SLICES and number == 0:
          whole = min(whole, _bytes(re.sub(r"S\(\d+\)", "", i.type)))
        read += whole
    return Traffic(read, written, loops)

  return visit("ENTRY")


def _rounds(condition: list[Instruction]) -> int | None:
  """N where the condition is `index < N`, else None."""
  fixed = [i for i in condition if i.opcode == "constant"]
  if len(fixed) == 1 and condition[-1].opcode == "compare":
    return fixed[0].number
  return None
