"""How much host memory and time a Qwen2.5-VL directory takes to read and write.

  python -m benchmarks.load_hf [--out=FILE.json]

A random checkpoint with the widths of the 3B model, fewer layers and bfloat16
weights (1.8 GB, several files) is written into a temporary folder, then read in
fresh processes: by `hf_weights.load_hf`, by a plain loader that reads all and
then converts, and by transformers where it is installed. Files are dropped from
the page cache before each first read.

Memory is a process's anonymous memory (RssAnon: pages of mapped files do not
count), watched from outside every 2 ms, above what it was when everything was
imported. On a CPU the parameters themselves lie in that memory, so the column
that counts is the peak less the parameters. transformers maps the files and
copies nothing until a parameter is used: its row has a time and no such column.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy
from absl import app, flags

from cf_jax.models import config as model_config
from cf_jax.models import hf_config, hf_weights

_OUT = flags.DEFINE_string("out", "", "also write the results as JSON here")
_LAYERS = flags.DEFINE_integer("layers", 6, "of the decoder and of the tower")
_CHILD = flags.DEFINE_string("child", "", "what a child process does")
_FOLDER = flags.DEFINE_string("folder", "", "of a child process")

SHARD_BYTES = 500 * 10**6
POLL_S = 0.002
TITLES = {
  "load_hf": "load_hf",
  "plain": "read all, then convert",
  "transformers": "transformers from_pretrained",
  # What it writes lies in memory before it starts.
  "save_hf": "save_hf",
}


def make_config() -> model_config.VLMConfig:
  return model_config.make(
    size="qwen2_5_vl_3b",
    num_hidden_layers=_LAYERS.value,
    dtype="bfloat16",
    param_dtype="bfloat16",
    vision=dict(depth=_LAYERS.value, fullatt_block_indexes=(1,)),
  )


def write_checkpoint(folder: pathlib.Path) -> None:
  """Random weights under the published names, file by file."""
  config = make_config()
  block = np.random.default_rng(0).normal(0, 0.02, 1 << 20)
  block = block.astype(ml_dtypes.bfloat16)
  groups, filled = [{}], 0
  weight_map = {}

  def flush():
    safetensors.numpy.save_file(
      groups[-1], folder / f"{len(groups)}.safetensors", {"format": "pt"}
    )

  for name, shape in hf_weights.tensor_shapes(config).items():
    tensor = np.resize(block, shape)
    if groups[-1] and filled + tensor.nbytes > SHARD_BYTES:
      flush()
      groups[-1] = None
      groups.append({})
      filled = 0
    groups[-1][name] = tensor
    weight_map[name] = f"{len(groups)}.safetensors"
    filled += tensor.nbytes
  flush()
  index = {"metadata": {}, "weight_map": weight_map}
  (folder / hf_weights.INDEX).write_text(json.dumps(index))
  (folder / "config.json").write_text(
    json.dumps(hf_config.to_hf(config, dtype="bfloat16"))
  )


def load_plainly(folder: pathlib.Path) -> dict:
  """Everything into the host's memory, then into the tree, then to a device."""
  config = hf_weights.read_config(folder)
  tensors = {}
  for path in folder.glob("*.safetensors"):
    tensors |= safetensors.numpy.load_file(path)
  params = {}
  for row in hf_weights.ROWS:
    depth = (
      config.vision.depth
      if row.path.startswith("vision")
      else config.num_hidden_layers
    )
    if row.name not in tensors and "{}" not in row.name:
      continue  # the head of a tied model
    layers = []
    for layer in range(depth if "{}" in row.name else 1):
      tensor = tensors[row.name.format(layer)]
      if row.part is not None:
        tensor = np.split(tensor, 3)[row.part]
      if row.path.endswith("kernel"):
        tensor = tensor.reshape(len(tensor), -1).T
      layers.append(tensor)
    params[row.path] = np.stack(layers) if "{}" in row.name else layers[0]
  return jax.block_until_ready(jax.device_put(params))


def load_with_transformers(folder: pathlib.Path) -> object:
  import transformers

  transformers.utils.logging.disable_progress_bar()
  return transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
    folder, dtype="auto"
  )


def run_child(kind: str, folder: pathlib.Path) -> None:
  """Says "ready", waits for a line, works, and prints the seconds."""
  loaders = {
    "load_hf": hf_weights.load_hf,
    "plain": load_plainly,
    "transformers": load_with_transformers,
  }
  if kind == "save_hf":
    config, params = hf_weights.load_hf(folder)

    def work():
      hf_weights.save_hf(
        folder / "out", config, params, max_shard_bytes=SHARD_BYTES
      )

  else:
    if kind == "transformers":
      from transformers import Qwen2_5_VLForConditionalGeneration  # noqa: F401

    def work():
      loaders[kind](folder)

  jax.block_until_ready(jax.numpy.zeros(1) + 1)
  seconds = []
  for _ in range(1 if kind == "save_hf" else 2):
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    work()
    seconds.append(time.perf_counter() - start)
  print(json.dumps(seconds), flush=True)


def anonymous(pid: int) -> int:
  """Bytes of a process's memory that no file backs."""
  for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
    if line.startswith("RssAnon"):
      return int(line.split()[1]) * 1024
  return 0  # it has just ended


def drop_cache(folder: pathlib.Path) -> None:
  for path in folder.glob("*.safetensors"):
    with path.open("rb") as file:
      os.fsync(file.fileno())
      os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(kind: str, folder: pathlib.Path) -> dict:
  """Seconds of the first and second turn, and the peak of the first."""
  drop_cache(folder)
  command = [sys.executable, "-m", "benchmarks.load_hf"]
  child = subprocess.Popen(
    [
      *command,
      f"--child={kind}",
      f"--folder={folder}",
      f"--layers={_LAYERS.value}",
    ],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
  )

  def expect_ready():
    line = child.stdout.readline()
    if line.strip() != "ready":
      raise RuntimeError(f"{kind} failed; run: {' '.join(child.args)}")
    return line

  expect_ready()
  drop_cache(folder)
  before = peak = anonymous(child.pid)
  os.set_blocking(child.stdout.fileno(), False)
  child.stdin.write("go\n")
  child.stdin.flush()
  while not (said := child.stdout.readline()) and child.poll() is None:
    peak = max(peak, anonymous(child.pid))
    time.sleep(POLL_S)
  os.set_blocking(child.stdout.fileno(), True)
  said = said or child.stdout.readline()
  if said.strip() == "ready":
    child.stdin.write("go\n")
    child.stdin.flush()
    said = child.stdout.readline()
  if child.wait():
    raise RuntimeError(f"{kind} failed; run: {' '.join(child.args)}")
  return {"seconds": json.loads(said), "peak_bytes": peak - before}


def read_rate(folder: pathlib.Path) -> float:
  """Bytes a second of reading the files into one buffer."""
  drop_cache(folder)
  buffer = bytearray(1 << 24)
  start, count = time.perf_counter(), 0
  for path in folder.glob("*.safetensors"):
    with path.open("rb", buffering=0) as file:
      while got := file.readinto(buffer):
        count += got
  return count / (time.perf_counter() - start)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  if _CHILD.value:
    run_child(_CHILD.value, pathlib.Path(_FOLDER.value))
    return
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    write_checkpoint(folder)
    sizes = [
      2 * int(np.prod(shape))
      for shape in hf_weights.tensor_shapes(make_config()).values()
    ]
    result = {
      "checkpoint_bytes": sum(sizes),
      "largest_tensor_bytes": max(sizes),
      "files": len(list(folder.glob("*.safetensors"))),
      "read_bytes_per_s": read_rate(folder),
    }
    kinds = ["load_hf", "plain", "save_hf"]
    if importlib.util.find_spec("transformers"):
      kinds.append("transformers")
    for kind in kinds:
      result[kind] = measure(kind, folder)
  total = result["checkpoint_bytes"]
  print(
    f"{total / 1e9:.2f} GB in {result['files']} files, largest tensor"
    f" {result['largest_tensor_bytes'] / 1e6:.0f} MB; bare read"
    f" {result['read_bytes_per_s'] / 1e9:.2f} GB/s"
  )
  print(
    f"{'':30}{'first s':>9}{'again s':>9}{'GB/s':>7}{'peak MB':>9}"
    f"{'less params':>13}"
  )
  for kind in kinds:
    row = result[kind]
    extra = row["peak_bytes"] - (total if kind in ("load_hf", "plain") else 0)
    shown = "-" if kind == "transformers" else f"{extra / 1e6:.0f}"
    first, again = row["seconds"][0], row["seconds"][-1]
    print(
      f"{TITLES[kind]:30}{first:9.2f}{again:9.2f}{total / again / 1e9:7.2f}"
      f"{row['peak_bytes'] / 1e6:9.0f}{shown:>13}"
    )
  if _OUT.value:
    pathlib.Path(_OUT.value).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
  app.run(main)
