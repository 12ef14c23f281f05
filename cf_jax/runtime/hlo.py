"""What a compiled program does, counted in its optimized text.

Floating point operations of matmuls and convolutions, bytes to and from main
memory, and what goes over the network, a loop's as often as it runs. XLA's own
`cost_analysis` counts the body of a loop once, and a model's layers are one.

- A layout says which memory an array lies in: `S(1)` and higher are on the
  chip, none is main memory (HBM).
- An instruction reads its operands and writes its results, once each.
- A fusion reads an operand once for every different slice of it, since each
  slice is fetched for itself, as the compiler's own dumps show; an operand
  that is used whole is read once. A slice that is updated in place is written
  alone. So it is with what is started in the background.
- A loop counts as often as the compiler knows, or its condition says: index <
  constant, from 0 on in the steps that its body adds. Loops whose end depends
  on the data run as often as the caller says.
- Of a conditional the costlier branch counts.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%[\w.\-]+")
_CALLED = re.compile(r"\b(\w+)=(%[\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_KERNEL = re.compile(r'"?cost_estimate"?:\s*\{"?flops"?:\s*"?(\d+)')
_FREE = (
  "bitcast",
  "constant",
  "get-tuple-element",
  "iota",
  "parameter",
  "tuple",
  "opt-barrier",
  "after-all",
  "partition-id",
  "replica-id",
)
_SLICES = ("slice", "dynamic-slice", "gather")
COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)


class Instruction(NamedTuple):
  """`name = type opcode(operands), rest`."""

  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  number: int | None  # of a parameter or a constant
  rest: str
  is_root: bool


class Transfer(NamedTuple):
  """One kind of collective.

  Attributes:
    kind: of `COLLECTIVES`.
    group: devices that take part in one.
  """

  kind: str
  group: int


class Cost(NamedTuple):
  """What a program does on one device.

  Attributes:
    flops: operations of matmuls and convolutions; a multiply-add is two.
    read: bytes read from main memory.
    written: bytes written to it.
    busy_s: sum over instructions of the longer of computing and moving; what
      is moved in the background does not count.
    transfers: Transfer -> (how many, bytes of the whole array: of what an
      all-gather makes, of what the others are given).
    open_loops: loops that ran as often as the caller said.
    kernels: calls of kernels that do not say what they compute.
  """

  flops: float = 0.0
  read: float = 0.0
  written: float = 0.0
  busy_s: float = 0.0
  transfers: dict[Transfer, tuple[float, float]] = {}
  open_loops: int = 0
  kernels: float = 0.0

  def plus(self, other: "Cost", times: float = 1) -> "Cost":
    """This and `times` the other."""
    transfers = dict(self.transfers)
    for key, (count, size) in other.transfers.items():
      before = transfers.get(key, (0.0, 0.0))
      transfers[key] = before[0] + times * count, before[1] + times * size
    return Cost(
      self.flops + times * other.flops,
      self.read + times * other.read,
      self.written + times * other.written,
      self.busy_s + times * other.busy_s,
      transfers,
      self.open_loops + other.open_loops,
      self.kernels + times * other.kernels,
    )


def _closing(text: str, start: int) -> int:
  """Where the bracket that opens at `start` closes."""
  depth = 0
  for match in re.compile(r"[()]").finditer(text, start):
    depth += 1 if match.group() == "(" else -1
    if depth == 0:
      return match.start()
  raise ValueError(f"no bracket closes {text[start : start + 80]!r}")


def _parse(line: str) -> Instruction:
  line = line.strip()
  is_root = line.startswith("ROOT ")
  name, _, rest = line.removeprefix("ROOT ").partition(" = ")
  stop = _closing(rest, 0) + 1 if rest[0] == "(" else rest.index(" ")
  kind, rest = rest[:stop], rest[stop:].lstrip()
  stop = rest.index("(")
  opcode, end = rest[:stop], _closing(rest, stop)
  inside = rest[stop + 1 : end]
  number = int(inside) if inside.isdigit() else None
  return Instruction(
    name,
    kind,
    opcode,
    tuple(_NAME.findall(inside)),
    number,
    rest[end + 1 :],
    is_root,
  )


def _shapes(kind: str) -> list[tuple[int, tuple[int, ...], bool]]:
  """(bytes, shape, lies in main memory) of the arrays of a type."""
  found = []
  for dtype, shape, layout in _ARRAY.findall(kind):
    bits = re.search(r"\d+", dtype)
    width = max(1, int(bits.group()) // 8) if bits else 1
    dims = tuple(int(n) for n in shape.split(",") if n)
    inside = re.search(r"S\([1-9]", layout) is None
    found.append((width * math.prod(dims), dims, inside))
  return found


def _bytes(kind: str) -> int:
  """Of the arrays of a type that lie in main memory."""
  return sum(size for size, _, inside in _shapes(kind) if inside)


def _all_bytes(kind: str) -> int:
  """Of the arrays of a type, wherever they lie."""
  return sum(size for size, _, _ in _shapes(kind))


def computations(text: str) -> dict[str, list[Instruction]]:
  """Name -> instructions; the program itself is "ENTRY"."""
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
  slices, used_whole, in_place = {}, False, False
  for user in inside:
    if not names.intersection(user.operands):
      continue
    if user.opcode == "bitcast":
      names.add(user.name)
    elif user.opcode in _SLICES and user.operands[0] in names:
      place = re.search(r"slice=\{.*?\]\}", user.rest)
      key = place.group() if place else user.operands
      slices[key] = _all_bytes(user.type)
    elif user.opcode == "dynamic-update-slice" and user.operands[0] in names:
      in_place = True
    else:
      used_whole = True
  if used_whole or not (slices or in_place):
    return whole
  return sum(slices.values())


def _stored(inside: list[Instruction], kind: str) -> int:
  """Bytes that a fused computation writes to main memory."""
  made = {i.name: i for i in inside}
  root = next((i for i in inside if i.is_root), inside[-1])
  parts = [root]
  if root.opcode == "tuple":
    parts = [made[name] for name in root.operands]
  outs = _shapes(kind)
  if len(outs) != len(parts):
    return _bytes(kind)
  total = 0
  for part, (size, _, outside) in zip(parts, outs, strict=True):
    while part.opcode == "bitcast" and part.operands[0] in made:
      part = made[part.operands[0]]
    if part.opcode == "dynamic-update-slice":
      size = _all_bytes(made[part.operands[1]].type)
    total += size * outside
  return total


def _dot_flops(i: Instruction, types: dict[str, str]) -> float:
  contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)
  shape = _shapes(types[i.operands[0]])[0][1]
  depth = math.prod(shape[int(n)] for n in contracted.group(1).split(",") if n)
  return 2.0 * math.prod(_shapes(i.type)[0][1]) * depth


def _window(rest: str, rank: int) -> list[dict[str, tuple[int, int]]]:
  found = re.search(r"window=\{([^}]*)\}", rest)
  dims = [
    dict(size=1, stride=1, low=0, high=0, lhs_dilate=1, rhs_dilate=1)
    for _ in range(rank)
  ]
  for entry in found.group(1).split() if found else ():
    name, _, value = entry.partition("=")
    for dim, each in zip(dims, value.split("x"), strict=False):
      if name == "pad":
        low, high = each.split("_")
        dim.update(low=int(low), high=int(high))
      elif name in dim:
        dim[name] = int(each)
  return dims


def _convolution_flops(i: Instruction, types: dict[str, str]) -> float:
  """As XLA counts: places that only see padding or dilation are no work."""
  left, right = (_shapes(types[name])[0][1] for name in i.operands[:2])
  out = _shapes(i.type)[0][1]
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest)
  lhs, rhs, result = labels.groups()
  spatial = [c for c in lhs if c.isdigit()]
  work = 2.0 * out[result.index("b")] * out[result.index("f")]
  work *= right[rhs.index("i")]
  for digit, dim in zip(
    sorted(spatial), _window(i.rest, len(spatial)), strict=True
  ):
    size, count = left[lhs.index(digit)], out[result.index(digit)]
    # Of kernel place k, the outputs o with 0 <= o * stride + k * rhs_dilate -
    # low < dilated size, on a place that dilation has not made.
    dilate, stride = dim["lhs_dilate"], dim["stride"]
    last = (size - 1) * dilate
    hits = 0
    for k in range(dim["size"]):
      offset = k * dim["rhs_dilate"] - dim["low"]
      first_o = max(0, -(offset // stride)) if offset < 0 else 0
      last_o = min(count - 1, (last - offset) // stride)
      if last_o < first_o:
        continue
      if dilate == 1:
        hits += last_o - first_o + 1
      else:
        hits += sum(
          (o * stride + offset) % dilate == 0
          for o in range(first_o, last_o + 1)
        )
    work *= hits
  return work


def _group_size(rest: str, num_devices: int) -> int:
  """Devices of one group, in any of the ways in which groups are written."""
  mesh = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest)
  if mesh:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh.group(1)))
    used = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", mesh.group(2))
    return math.prod(int(part or sizes[name]) for name, _, part in used)
  iota = re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest)
  if iota:
    return int(iota.group(1))
  listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
  if listed:
    return len(listed.group(1).split(","))
  return num_devices


def count(
  text: str,
  *,
  num_devices: int = 1,
  open_rounds: int = 1,
  flops_per_s: float = math.inf,
  bytes_per_s: float = math.inf,
  kernel_flops: Callable[[str, list[tuple[int, ...]]], float | None]
  | None = None,
) -> Cost:
  """What the program does on each device, from its optimized HLO as text.

  Args:
    text: of a compiled program.
    num_devices: that it runs on.
    open_rounds: rounds of a loop whose end depends on the data.
    flops_per_s: of a device.
    bytes_per_s: between it and its main memory.
    kernel_flops: of a hand-written kernel that does not say it: the call's
      name and text, and the shapes of its operands -> operations, None where
      they are unknown.
  """
  program = computations(text)
  types_of = {
    name: {i.name: i.type for i in body} for name, body in program.items()
  }
  inner_cache, cache = {}, {}

  def computed(name: str) -> Cost:
    """Matmuls, kernels and collectives of a fused computation."""
    if name not in inner_cache:
      total = Cost()
      for i in program[name]:
        total = total.plus(of_instruction(i, name))
      inner_cache[name] = total
    return inner_cache[name]

  def of_instruction(i: Instruction, name: str) -> Cost:
    types = types_of[name]
    if i.opcode == "dot":
      return Cost(flops=_dot_flops(i, types))
    if i.opcode == "convolution":
      return Cost(flops=_convolution_flops(i, types))
    if i.opcode == "fusion" or i.opcode == "async-start":
      called = dict(_CALLED.findall(i.rest))
      return computed(called["calls"]) if "calls" in called else Cost()
    if i.opcode == "custom-call" and "tpu_custom_call" in i.rest:
      said = _KERNEL.search(i.rest)
      if said:
        return Cost(flops=float(said.group(1)))
      shapes = [_shapes(types[name])[0][1] for name in i.operands]
      made = kernel_flops and kernel_flops(f"{i.name} {i.rest}", shapes)
      return Cost(kernels=1) if made is None else Cost(flops=made)
    kind = i.opcode.removesuffix("-start")
    if kind in COLLECTIVES:
      group = _group_size(i.rest, num_devices)
      size = sum(_all_bytes(types.get(name, "")) for name in i.operands)
      if kind == "all-gather":
        size *= group
      if kind == "collective-permute":
        group = 2
      return Cost(transfers={Transfer(kind, group): (1.0, float(size))})
    return Cost()

  def visit(name: str) -> Cost:
    if name in cache:
      return cache[name]
    types, total = types_of[name], Cost()
    for i in program[name]:
      if i.opcode in _FREE or i.opcode.endswith(("-done", "-update")):
        continue
      called = dict(_CALLED.findall(i.rest))
      if i.opcode == "while":
        known = _TRIPS.search(i.rest)
        rounds = (
          int(known.group(1))
          if known
          else _rounds(program[called["condition"]], program[called["body"]])
        )
        total = total.plus(
          visit(called["body"]), open_rounds if rounds is None else rounds
        )
        total = total._replace(open_loops=total.open_loops + (rounds is None))
        continue
      if i.opcode == "call":
        total = total.plus(visit(called["to_apply"]))
        continue
      if i.opcode == "conditional":
        branches = [
          visit(other) for other in _NAME.findall(i.rest) if other in program
        ]
        total = total.plus(
          max(branches, key=lambda c: (c.busy_s, c.read + c.written))
        )
        continue
      own = of_instruction(i, name)
      background = i.opcode.endswith("-start")
      read = written = 0
      for number, operand in enumerate(i.operands):
        whole = _bytes(types.get(operand, ""))
        if whole and i.opcode in ("fusion", "async-start"):
          whole = _fetched(program[called["calls"]], number, whole)
        elif i.opcode in _SLICES and number == 0:
          whole = min(whole, _all_bytes(i.type))
        elif i.opcode == "dynamic-update-slice" and number == 0:
          whole = 0
        read += whole
      if i.opcode == "fusion":
        written = _stored(program[called["calls"]], i.type)
      elif i.opcode == "dynamic-update-slice":
        written = _all_bytes(types.get(i.operands[1], ""))
        written *= bool(_bytes(i.type))
      elif background:
        # (what is read, what is made, ...), or the two the other way round.
        parts = _shapes(i.type)
        after = 0 if i.opcode == "copy-start" else len(i.operands)
        made = parts[min(after, len(parts) - 1)]
        written = made[0] * made[2]
      else:
        written = _bytes(i.type)
      busy = max(own.flops / flops_per_s, (read + written) / bytes_per_s)
      total = total.plus(
        own._replace(
          read=read, written=written, busy_s=0.0 if background else busy
        )
      )
    cache[name] = total
    return total

  return visit("ENTRY")


def assigned(text: str) -> dict[str, int]:
  """Bytes of main memory on each device, from a buffer assignment as text.

  What the compiler's own `memory_analysis` says when it is done, but for the
  program's code.

  Args:
    text: "allocation 2: size 512, parameter 0, shape |bf16[6]| at ShapeIndex
      {}:" and the values in it; other memories than the main one have a colour.

  Raises:
    ValueError: there is no such line.
  """
  found = dict(arguments=0, results=0, temporary=0, code=0)
  line = re.compile(r"^allocation \d+: size (\d+), (.*)$", re.MULTILINE)
  lines = line.findall(text)
  if not lines:
    raise ValueError(
      "this buffer assignment names no allocation in a form known here; set"
      " config.machine_code=True"
    )
  for size, said in lines:
    if said.startswith("color ") or "thread-local" in said:
      continue
    kind = "temporary"
    if re.search(r"\bparameter \d", said):
      kind = "arguments"
    elif "maybe-live-out" in said:
      kind = "results"
    found[kind] += int(size)
  return found | {"peak": sum(found.values())}


class Refusal(NamedTuple):
  """What the TPU's compiler says of a program that it refuses.

  Attributes:
    said: its first sentences.
    space: "hbm" for main memory, "vmem" and others for those on the chip; ""
      where it names none.
    peak: bytes of main memory, arguments among them; None where it says none.
    beside_arguments: the same without arguments, in another form of message.
    largest: as of `largest_arrays`, where it lists them.
  """

  said: str
  space: str
  peak: float | None
  beside_arguments: float | None
  largest: list[tuple[int, str, str]]


_SIZE = r"([\d.]+)([KMGT]?)"
# "HLO temporaries" has the arguments in it: of a program that sums up one
# array, the message says the size of the array.
_WHOLE = re.compile(rf"required for HLO temporaries \({_SIZE}B?\)")
_USED = re.compile(rf"Used {_SIZE}B? of [\d.]+[KMGT]?B? hbm")
_LISTED = re.compile(rf"^\s*\d+\. Size: {_SIZE}", re.MULTILINE)
_SAID_LENGTH = 400


def _size_of(number: str, unit: str) -> float:
  return float(number) * 1024 ** " KMGT".index(unit or " ")


def refusal(message: str) -> Refusal:
  """Reads a RESOURCE_EXHAUSTED of the TPU's compiler.

  Args:
    message: "... HLO temporaries (17.39G) exceeds available HBM (15.75G)." or
      "... Used 63.80G of 30.75G hbm. ..." and a list of allocations.
  """
  space = re.search(r"memory space (\w+)|out of memory on (\w+)", message)
  space = (space.group(1) or space.group(2)).lower() if space else ""
  whole, used = _WHOLE.search(message), _USED.search(message)
  listed = message.partition("Largest program allocations in hbm:")[2]
  listed = listed.partition("Largest program allocations in")[0]
  # What is before an entry, then for each its size, its unit and its lines.
  _, *parts = _LISTED.split(listed)
  largest = []
  for number, unit, lines in zip(
    parts[::3], parts[1::3], parts[2::3], strict=True
  ):
    shape = re.search(r"Shape: ([^\s{]+)", lines)
    place = re.search(r'op_name="([^"]*)"', lines) or re.search(
      r"Allocation type: (.*)", lines
    )
    largest.append(
      (
        int(_size_of(number, unit)),
        shape.group(1) if shape else "",
        place.group(1) if place else "",
      )
    )
  said = " ".join(message.partition("\n\n")[0].split())
  if len(said) > _SAID_LENGTH:
    said = said[:_SAID_LENGTH] + " ..."
  return Refusal(
    said,
    space,
    _size_of(*whole.groups()) if whole else None,
    _size_of(*used.groups()) if used else None,
    largest,
  )


def largest_arrays(text: str, count: int) -> list[tuple[int, str, str]]:
  """The largest arrays that a program makes in main memory.

  Args:
    text: of a compiled program.
    count: how many.

  Returns:
    (bytes, shape, the place in the source program that made it), the largest
    first; equal arrays once.
  """
  found = {}
  program = computations(text)
  fused = {
    name
    for body in program.values()
    for i in body
    if i.opcode == "fusion"
    for name in _NAME.findall(i.rest)
  }
  for name, body in program.items():
    if name in fused:
      continue
    for i in body:
      if i.opcode in _FREE or i.opcode in ("while", "conditional", "call"):
        continue
      place = re.search(r'op_name="([^"]*)"', i.rest)
      for dtype, shape, layout in _ARRAY.findall(i.type):
        said = f"{dtype}[{shape}]"
        size = _bytes(f"{said}{{{layout}}}")
        if size and said not in found:
          found[said] = (size, said, place.group(1) if place else i.opcode)
  return sorted(found.values(), reverse=True)[:count]


def _rounds(
  condition: list[Instruction], body: list[Instruction]
) -> int | None:
  """N / step where the condition is `index < N`, else None."""
  fixed = [i for i in condition if i.opcode == "constant"]
  if len(fixed) != 1 or condition[-1].opcode != "compare":
    return None
  return -(-fixed[0].number // _step(condition, body))


def _step(condition: list[Instruction], body: list[Instruction]) -> int:
  """What a round adds to the index, 1 where the body does not say it plainly.

  The compiler writes two rounds of a matmul whose operand goes from device to
  device as one.
  """
  tested = {i.name: i for i in condition}[condition[-1].operands[0]]
  place = re.search(r"index=(\d+)", tested.rest)
  made = {i.name: i for i in body}
  ends = [i for i in body if i.is_root and i.opcode == "tuple"]
  if place is None or not ends:
    return 1
  added = made.get(ends[0].operands[int(place.group(1))])
  if added is None or added.opcode != "add":
    return 1
  parts = [made[name] for name in added.operands if name in made]
  steps = [i.number for i in parts if i.opcode == "constant" and i.number]
  return steps[0] if len(steps) == 1 else 1
