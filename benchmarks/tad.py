"""The keyframe layer: how fast it scores and selects, and how that grows.

  python -m benchmarks.tad [--out=FILE.json] [--plot=docs/images/tad_growth.png]
    [--videos=../shared/data/videos]
  python -m benchmarks.tad --tpu_aot=v5e:2x2 --out=FILE.json

The first needs torch (the `parity` extra); compiled torch needs a C++ compiler
too, and is left out where it fails. Eight videos of 1,024 float32 frames, each
1,280 wide, are scored in two variants, the layer's defaults and the plain
cosine of neighbours, by the same formula in numpy, torch, compiled torch and
here, forward and with the gradient of the sum of the squared scores. All
results are compared before anything is timed; then the forms take turns.
Selecting 16 keyframes (the soft selection, and the gradient of its embedding
and weights) has no peer and is timed beside them. The bound is one read of the
videos, `jnp.sum`.

Then one video of 64 numbers a frame grows from 128 to 262,144 frames, and an
hour of real video at two frames a second, the clips of `--videos` again and
again, is embedded, scored and selected; decoding is apart. Memory is that of a
process of its own, chunk by chunk, for one hour and for ten.

`--tpu_aot` compiles for a TPU that need not be there (it needs libtpu) and
prints how many bytes of its main memory the program moves, over those of the
videos (`cf_jax.runtime.hlo`).
"""

import concurrent.futures
import functools
import multiprocessing
import os
import pathlib
import re
import time
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.experimental import topologies

from benchmarks import peers
from cf_jax import descriptor, tad
from cf_jax.data import video
from cf_jax.runtime import hlo

_OUT = flags.DEFINE_string("out", "", "results as JSON, read if it is there")
_PLOT = flags.DEFINE_string("plot", "", "write the growth as a PNG file")
_VIDEOS = flags.DEFINE_string("videos", "../shared/data/videos", "real clips")
_TINY = flags.DEFINE_bool("tiny", False, "few small points: is all in order?")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "of the timed forms")
_CORES = flags.DEFINE_integer("cores", 2, "of all forms")
_TPU_AOT = flags.DEFINE_string("tpu_aot", "", "topology, such as v5e:2x2")

VARIANTS = {
  "default": dict(scales=(2, 4), median=True),
  "neighbours": dict(scales=(1,), median=False),
}
OURS = "cf_jax"
NUM_KEYFRAMES = 16
GROWTH = tuple(2**n for n in range(7, 19))
GROWTH_WIDTH = 64
CHUNK = 1_024
HOUR = 7_200  # frames


# ---------------------------------------------------------- the same, elsewhere


def numpy_scores(
  frame: np.ndarray, scales: tuple[int, ...], median: bool
) -> np.ndarray:
  """`tad.variation_scores` of float32[B, T, E]; einsum makes no products."""
  videos, size, width = frame.shape
  lead = max(scales)
  if scales == (1,) and not median:
    square = np.einsum("bte,bte->bt", frame, frame)
    dot = np.einsum("bte,bte->bt", frame[:, 1:], frame[:, :-1])
    norm = np.sqrt(square[:, 1:] * square[:, :-1])
    return np.pad(np.maximum(1 - dot / norm, 0), ((0, 0), (1, 0)))
  padded = np.zeros((videos, size + 2 * lead, width), frame.dtype)
  source = padded[:, lead : lead + size]
  source[...] = frame
  if median:
    before, own, after = frame[:, :-2], frame[:, 1:-1], frame[:, 2:]
    middle = source[:, 1:-1]
    np.maximum(before, after, out=middle)
    np.minimum(middle, own, out=middle)
    np.maximum(middle, np.minimum(before, after), out=middle)
  total = np.zeros((videos, size), frame.dtype)
  for scale in scales:
    count = padded.shape[1] - scale + 1
    window = padded[:, :count].copy()
    for step in range(1, scale):
      window += padded[:, step : step + count]
    square = np.einsum("bte,bte->bt", window, window)
    after = slice(lead, lead + size)
    before = slice(lead - scale, lead - scale + size)
    dot = np.einsum("bte,bte->bt", window[:, after], window[:, before])
    norm = square[:, after] * square[:, before]
    norm[:, 0] = 1
    total += np.maximum(1 - dot / np.sqrt(norm), 0)
  total[:, 0] = 0
  return total / len(scales)


def torch_scores(frame, scales: tuple[int, ...], median: bool):
  """The same on a tensor, differentiable."""
  import torch

  def distance(dot, before, after):
    return torch.clamp(1 - dot / torch.sqrt(before * after), min=0)

  def row_dot(left, right):
    return (left * right).sum(-1)

  size, lead = frame.shape[1], max(scales)
  if scales == (1,) and not median:
    square = row_dot(frame, frame)
    dot = row_dot(frame[:, 1:], frame[:, :-1])
    score = distance(dot, square[:, :-1], square[:, 1:])
    return torch.nn.functional.pad(score, (1, 0))
  if median:
    before, own, after = frame[:, :-2], frame[:, 1:-1], frame[:, 2:]
    low, high = torch.minimum(before, after), torch.maximum(before, after)
    middle = torch.maximum(low, torch.minimum(high, own))
    frame = torch.cat([frame[:, :1], middle, frame[:, -1:]], 1)
  padded = torch.nn.functional.pad(frame, (0, 0, lead, lead))
  total = 0
  for scale in scales:
    count = size + 2 * lead - scale + 1
    window = padded[:, :count]
    for step in range(1, scale):
      window = window + padded[:, step : step + count]
    square = row_dot(window, window)
    after = slice(lead + 1, lead + size)
    before = slice(lead - scale + 1, lead - scale + size)
    dot = row_dot(window[:, after], window[:, before])
    total = total + distance(dot, square[:, before], square[:, after])
  return torch.nn.functional.pad(total / len(scales), (1, 0))


# --------------------------------------------------------------- the comparison


def torch_forms(frame: np.ndarray, settings: dict) -> dict[str, dict]:
  """form -> phase -> function without arguments, for torch."""
  import torch

  torch.set_num_threads(_CORES.value)
  score = functools.partial(torch_scores, **settings)
  whole = torch.from_numpy(frame)
  leaf = torch.from_numpy(frame).clone().requires_grad_()

  def phases(score):
    def forward():
      with torch.no_grad():
        return score(whole)

    def backward():
      leaf.grad = None
      (score(leaf) ** 2).sum().backward()
      return leaf.grad

    return {"forward": forward, "forward and backward": backward}

  forms = {"torch eager": phases(score)}
  try:
    compiled = phases(torch.compile(score))
    compiled["forward"]()
    forms["torch.compile"] = compiled
  except Exception as error:  # whatever the compiler says, eager is measured
    print(f"torch.compile is left out: {str(error).splitlines()[0]}")
  return forms


def our_forms(frame: np.ndarray, settings: dict) -> dict[str, dict]:
  """form -> phase -> function without arguments, for the layer."""
  array = jnp.asarray(frame)
  score = jax.jit(jax.vmap(functools.partial(tad.variation_scores, **settings)))
  one = functools.partial(
    tad.select_keyframes, num_keyframes=NUM_KEYFRAMES, **settings
  )
  select = jax.jit(jax.vmap(one))

  @jax.jit
  @jax.grad
  def score_slope(array):
    return jnp.sum(score(array) ** 2)

  @jax.jit
  @jax.grad
  def select_slope(array):
    chosen = select(array)
    return jnp.sum(chosen.embedding**2) + jnp.sum(chosen.weight**2)

  return {
    OURS: {
      "forward": lambda: score(array),
      "forward and backward": lambda: score_slope(array),
    },
    f"{OURS}, all of select_keyframes": {
      "forward": lambda: select(array),
      "forward and backward": lambda: select_slope(array),
    },
  }


def compare(name: str, settings: dict, shape: tuple[int, int, int]) -> dict:
  """Checks that all forms agree, then times them in turn."""
  rng = np.random.default_rng(0)
  frame = rng.standard_normal(shape, np.float32)
  read = jax.jit(jnp.sum)
  array = jnp.asarray(frame)
  forms = {
    "one read": {"forward": lambda: read(array)},
    "numpy": {"forward": lambda: numpy_scores(frame, **settings)},
  }
  forms |= torch_forms(frame, settings) | our_forms(frame, settings)
  slack = {"forward": 2e-6, "forward and backward": 2e-5}
  worst = {}
  for phase in slack:
    want = np.asarray(forms[OURS][phase]())
    for form in ("numpy", "torch eager", "torch.compile"):
      if phase in forms.get(form, {}):
        got = np.asarray(forms[form][phase]())
        worst[f"{form}, {phase}"] = float(np.max(np.abs(got - want)))
        if not worst[f"{form}, {phase}"] <= slack[phase]:
          raise SystemExit(f"{name}: {form} differs, {phase}: {worst}")
  for phases in forms.values():  # compiles
    for run in phases.values():
      peers.seconds(run)
  cases = {
    form: lambda phases=phases: {
      phase: peers.seconds(run) for phase, run in phases.items()
    }
    for form, phases in forms.items()
  }
  taken = peers.interleave(cases, _ROUNDS.value)
  return {"largest_difference": worst, "seconds": taken}


def rows_of(result: dict) -> list[list]:
  """Lines of the table."""
  rows = []
  for name in VARIANTS:
    if name not in result["compared"]:
      continue
    taken = result["compared"][name]["seconds"]
    for form, phases in taken.items():
      line = [name, form]
      for phase in ("forward", "forward and backward"):
        if phase not in phases:
          line += ["-", "-", "-"]
          continue
        ours = taken[OURS][phase]
        line += [1e3 * min(phases[phase])]
        line += [min(phases[phase]) / min(ours)]
        line += [peers.ratio(phases[phase], ours)]
      rows.append(line)
  return rows


# --------------------------------------------------------------------- growth


def grow(size: int) -> dict[str, float]:
  """Best seconds of one video of so many frames, and its temporary memory."""
  rng = np.random.default_rng(0)
  frame = jnp.asarray(rng.standard_normal((size, GROWTH_WIDTH), np.float32))
  select = functools.partial(tad.select_keyframes, num_keyframes=NUM_KEYFRAMES)

  def loss(frame):
    chosen = select(frame)
    return jnp.sum(chosen.embedding**2) + jnp.sum(chosen.weight**2)

  def chunked():
    chunks = (frame[n : n + CHUNK] for n in range(0, size, CHUNK))
    return tad.score_chunks(chunks)

  point = {}
  for phase, function in (
    ("scores", tad.variation_scores),
    ("selection", select),
    ("selection and its gradient", jax.grad(loss)),
  ):
    program = jax.jit(function).lower(frame).compile()
    memory = program.memory_analysis()
    point[f"{phase} bytes"] = memory.temp_size_in_bytes
    run = functools.partial(program, frame)
    peers.seconds(run)
    point[phase] = min(peers.seconds(run) for _ in range(3))
  chunked()
  point["scores in chunks of 1,024"] = peers.seconds(chunked)
  return point


def slopes(points: dict[str, dict]) -> dict[str, float]:
  """Exponents of T: of the seconds of each phase from 4,096 frames on."""
  sizes = [int(size) for size in points if int(size) >= 4_096]
  if len(sizes) < 2:
    return {}
  return {
    phase: float(
      np.polyfit(
        np.log(sizes), np.log([points[str(n)][phase] for n in sizes]), 1
      )[0]
    )
    for phase in points[str(sizes[0])]
    if "bytes" not in phase
  }


def real_frames(folder: str) -> tuple[np.ndarray, float]:
  """uint8[n, 64, 64, 3] of all clips at two frames a second; and seconds."""
  begin, frames = time.perf_counter(), []
  for path in sorted(pathlib.Path(folder).iterdir()):
    if path.suffix not in (".mp4", ".avi"):
      continue
    try:
      number = round(2 * video.probe(path).duration_s)
      scan = video.scan_frames(path, max(1, number), (64, 64))
    except video.VideoError:  # one of the clips is there to be refused
      continue
    frames.append(scan.frames[scan.mask])
  return np.concatenate(frames), time.perf_counter() - begin


def measure_hour(folder: str) -> dict[str, float]:
  """Seconds and peak memory of an hour; in a process of its own."""
  size = HOUR
  clips, decoding = real_frames(folder)
  describe = jax.jit(descriptor.pixel_descriptor)

  def chunks(size: int) -> Iterator[jax.Array]:
    """Embeddings of the clips, again and again, a chunk at a time."""
    for start in range(0, size, CHUNK):
      place = np.arange(start, min(start + CHUNK, size)) % len(clips)
      yield describe(clips[place])

  def peak() -> int:
    """Of this process since it began; ru_maxrss knows its parent's, too."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1))

  def chunked(size: int) -> jax.Array:
    return tad.score_chunks(chunks(size))

  found = {"clips' frames": len(clips), "their decoding": decoding}
  first = 3 * CHUNK + size % CHUNK  # every shape of chunk that will come
  chunked(first).block_until_ready()
  found["peak bytes of three chunks"] = peak()
  found["embedding and scores in chunks"] = peers.seconds(lambda: chunked(size))
  found["peak bytes of an hour in chunks"] = peak()
  score = chunked(10 * size)
  found["peak bytes of ten hours in chunks"] = peak()

  embedding = jnp.concatenate(list(chunks(size)))
  held = [embedding[n : n + CHUNK] for n in range(0, size, CHUNK)]
  select = functools.partial(
    tad.select_videos, embedding[None], num_keyframes=NUM_KEYFRAMES
  )
  for name, run in (
    ("scores in chunks", lambda: tad.score_chunks(held)),
    ("scores of the whole", lambda: tad.score_videos(embedding[None])),
    ("all of select_keyframes", select),
  ):
    peers.seconds(run)
    found[name] = min(peers.seconds(run) for _ in range(3))
  whole = tad.score_videos(embedding[None])[0]
  found["largest difference of chunks and whole"] = float(
    jnp.max(jnp.abs(whole - tad.score_chunks(held)))
  )
  found["apexes"] = int(jnp.sum(select().apex))
  assert np.all(np.isfinite(score))
  return found


def hour(folder: str) -> dict[str, float]:
  with concurrent.futures.ProcessPoolExecutor(
    1, multiprocessing.get_context("spawn")
  ) as pool:
    return pool.submit(measure_hour, folder).result()


def plot(path: str, points: dict[str, dict]) -> None:
  """Seconds over frames, both logarithmic, beside a line of slope one."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  sizes = [int(size) for size in points]
  figure, panel = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
  phases = [name for name in points[str(sizes[0])] if "bytes" not in name]
  for phase, marker in zip(phases, "osD^"):
    values = [points[str(size)][phase] for size in sizes]
    panel.plot(
      sizes, values, marker=marker, markersize=4, linewidth=1.5, label=phase
    )
  last = points[str(sizes[-1])][phases[0]] / 2
  panel.plot(
    sizes,
    [last * size / sizes[-1] for size in sizes],
    color="0.5",
    linestyle="--",
    linewidth=1,
    label="linear",
  )
  panel.set_xscale("log", base=2)
  panel.set_yscale("log")
  panel.set_xlabel("frames, T")
  panel.set_ylabel("seconds")
  panel.grid(alpha=0.3)
  panel.legend(frameon=False, fontsize=8)
  figure.savefig(path, dpi=110)


# ------------------------------------------------------------------------ TPU


def tpu_traffic(
  topology: str, shape: tuple[int, int, int], name: str, phase: str
) -> dict:
  """Bytes that a program compiled for a TPU moves, over the videos' own."""
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  device = topologies.get_topology_desc(
    platform="tpu", topology_name=topology
  ).devices[0]
  place = jax.sharding.SingleDeviceSharding(device)
  frame = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
  size = 4 * int(np.prod(shape))
  function, more = {
    "scores": (tad.variation_scores, {}),
    "selection": (tad.select_keyframes, {"num_keyframes": NUM_KEYFRAMES}),
  }[phase]
  one = functools.partial(function, **VARIANTS[name], **more)
  program = jax.jit(jax.vmap(one)).trace(frame)
  program = program.lower(lowering_platforms=("tpu",)).compile()
  traffic = hlo.count(program.as_text())
  return {
    "read": traffic.read / size,
    "written": traffic.written / size,
    "loops_counted_once": traffic.open_loops,
    "temporary": program.memory_analysis().temp_size_in_bytes / size,
  }


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  peers.use_cores(_CORES.value)
  shape = (2, 64, 128) if _TINY.value else (8, 1_024, 1_280)
  result = peers.read(_OUT.value)
  if _TPU_AOT.value:
    topology = _TPU_AOT.value
    found = result.setdefault("tpu", {"topology": topology})
    for phase, videos in (
      ("scores", shape[0]),
      ("scores", 8 * shape[0]),
      ("selection", shape[0]),
    ):
      for name in VARIANTS:
        key = f"{name}, {phase} of {videos} videos"
        if key not in found:
          batch = (videos, *shape[1:])
          found[key] = tpu_traffic(topology, batch, name, phase)
          peers.write(_OUT.value, result)
    print(result["tpu"])
    return
  if "machine" not in result:
    result |= {
      "machine": peers.machine(),
      "shape": shape,
      "rounds": _ROUNDS.value,
      "compared": {},
      "growth": {},
    }
  begin = time.perf_counter()
  for name, settings in VARIANTS.items():
    if name not in result["compared"]:
      result["compared"][name] = compare(name, settings, shape)
      result["load_average_end"] = os.getloadavg()[0]
      peers.write(_OUT.value, result)
  for size in GROWTH[:3] if _TINY.value else GROWTH:
    if str(size) not in result["growth"]:
      result["growth"][str(size)] = grow(size)
      result["growth_cores"] = _CORES.value
      peers.write(_OUT.value, result)
  if "hour" not in result and not _TINY.value:
    if pathlib.Path(_VIDEOS.value).is_dir():
      result["hour"] = hour(_VIDEOS.value)
    else:
      print(f"no folder {_VIDEOS.value}: no hour; change --videos")
  result["slopes"] = slopes(result["growth"])
  peers.write(_OUT.value, result)
  print(
    f"{' x '.join(map(str, result['shape']))} float32, {_CORES.value} cores,"
    f" {result['rounds']} rounds, {time.perf_counter() - begin:.0f} s\n"
  )
  head = ["variant", "form"]
  for phase in ("forward", "forward and backward"):
    head += [f"{phase}, ms", f"over {OURS}, best", "median ratio"]
  print(peers.table(head, rows_of(result)))
  phases = list(next(iter(result["growth"].values())))
  units = {p: (2**-20, "MiB") if "bytes" in p else (1e3, "ms") for p in phases}
  print()
  print(
    peers.table(
      ["frames"] + [f"{p}, {units[p][1]}" for p in phases],
      [
        [size] + [units[p][0] * point[p] for p in phases]
        for size, point in result["growth"].items()
      ],
    )
  )
  print(
    f"\nexponents of T: {result['slopes']}\n\nan hour: {result.get('hour')}"
  )
  if _PLOT.value:
    plot(_PLOT.value, result["growth"])


if __name__ == "__main__":
  app.run(main)
