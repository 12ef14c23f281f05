"""A policy on a benchmark: predictions, official scores, and what was set.

Everything lies in WORKDIR/BENCHMARK/KEY, whose KEY says the main settings and
ends with a hash of all that decide: other settings are another folder.
  predictions.jsonl   the answer to every question, in the benchmark's order
  questions.jsonl     every question with its truth, what was read, its scores
  scores.json         the official figures, unrounded
  table.md            the same for people, with what was left out
  eval_manifest.json  settings, prompts, hashes, versions, videos not read
  parts/              answers so far, a file for each process; gone at the end

Interrupted, the same call goes on: a question in `parts` is not asked again.
Several processes take every n-th video each and write to one file system; the
last to finish, or process 0 of jax.distributed, puts the parts together.

With `config.clue.frames` questions are asked twice (`programs/clue.py`): all of
a process's share once, then those that gave a clue again. A question between
its passes lies in `parts` and is not asked the first time again.

Questions are grouped by the size and number of their frames and the length of
their prompts, the costliest first, so that a few programs serve and memory that
does not suffice shows at once.

Axes: `B` questions, `K` frames shown.
"""

import concurrent.futures
import contextlib
import json
import pathlib
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from cf_jax import disk, views
from cf_jax.data import (
  datasets,
  footage,
  judge,
  pipeline,
  prompts,
  records,
  video,
)
from cf_jax.evals import benchmarks
from cf_jax.models import config as model_config
from cf_jax.programs import (
  answering,
  clue,
  eval_settings,
  policies,
  questions,
  score,
)
from cf_jax.runtime import lifecycle, optim, sharding, telemetry

PREDICTIONS_FILE = "predictions.jsonl"
TABLE_FILE = "table.md"
MANIFEST_FILE = "eval_manifest.json"
# The samples of "run" and "synthetic" as a manifest, to score them again.
ANNOTATIONS_FILE = "annotations.jsonl"
_PARTS = "parts"

# -------------------------------------------------------------- what is kept


def open_folder(
  folder: pathlib.Path,
  settings: Mapping[str, Any],
  *,
  where: Mapping[str, Any],
  example: Mapping[str, Any],
  writes: bool,
) -> dict[str, Any]:
  """The manifest of a folder, with this start in it.

  Args:
    folder: of the evaluation.
    settings: of `eval_settings.decides`.
    where: what was read from which paths.
    example: one whole prompt.
    writes: False leaves the file to another process.

  Raises:
    ValueError: the folder holds an evaluation with other settings.
  """
  path = folder / MANIFEST_FILE
  starts = []
  if path.exists():
    held = json.loads(path.read_text("utf-8"))
    if held["settings"] != settings:
      changed = eval_settings.differences(held["settings"], settings)
      said = [f"{k} (there {a!r}, now {b!r})" for k, a, b in changed[:5]]
      raise ValueError(
        f"{folder} holds an evaluation with other settings: {'; '.join(said)};"
        " give another --workdir"
      )
    starts = held["starts"]
  start = dict(
    versions=telemetry.versions(),
    git=telemetry.git_revision(),
    devices=[str(device.device_kind) for device in jax.local_devices()],
    time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
  )
  if starts and starts[-1]["versions"] != start["versions"]:
    logging.warning(
      "%s was begun with other versions of packages; its manifest has both",
      folder,
    )
  manifest = dict(
    settings=dict(settings),
    settings_hash=eval_settings.digest_of(settings),
    where=dict(where),
    example=dict(example),
    starts=[*starts, start],
    results=None,
  )
  if writes:
    telemetry.write_json(path, manifest)
  return manifest


def read_answers(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
  """id -> row of everything that was answered so far, in whatever file.

  What could not be read, or waits for its second pass, is in it where nothing
  better is.
  """

  def rank(row):
    return 0 if "unreadable" in row else 1 if clue.waits(row) else 2

  found = {}
  # The parts go when the whole is there, so they are read first.
  paths = [*sorted((folder / _PARTS).glob("*.jsonl"))]
  for path in [*paths, folder / PREDICTIONS_FILE]:
    for row in telemetry.read_rows(path):
      known = found.get(row["id"])
      if known is None or rank(known) < 2 and rank(row) >= rank(known):
        found[row["id"]] = row
  return found


def _is_open(row: Mapping[str, Any] | None) -> bool:
  """Is there something to ask yet?"""
  return row is None or "unreadable" in row or clue.waits(row)


def _line(row: Mapping[str, Any]) -> str:
  return json.dumps(telemetry.to_jsonable(row), ensure_ascii=False) + "\n"


# ------------------------------------------------------------------------ run


def run(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> dict[str, Any] | None:
  """Answers what is not answered yet, and scores when everything is.

  Args:
    config: of configs/evaluate.py.
    workdir: gets the folder of this evaluation, among others.

  Returns:
    What scores.json holds, with the folder under "folder"; None in a process
    that does not score.

  Raises:
    ValueError: a setting, the policy or the annotations are not as they should
      be, too many videos cannot be read, or another process answers the same
      share.
  """
  eval_settings.check_settings(config)
  begin = time.monotonic()
  index, count = config.shard.index, config.shard.count
  if config.distributed:
    index, count = jax.process_index(), jax.process_count()

  # ---- what is asked, by whom ----
  # Every process has the whole policy: none waits for another's videos.
  mesh = sharding.make_mesh(**config.mesh, devices=jax.local_devices())
  described = policies.describe(config.policy, config.init_from)
  model, tokenizer = described
  config = eval_settings.settle(config, model)
  samples = questions.read_questions(config)
  judged = [s for s in samples if s.kind in ("open_ended", "caption")]
  if judged and not config.judge.url:
    logging.warning(
      "%d questions are scored by an LLM and config.judge.url is empty: the"
      " answers will be kept, but not scored",
      len(judged),
    )
  parts = mesh.shape["data"] * mesh.shape["fsdp"]
  batch_size = parts * -(-config.batch_size // parts)
  wording = questions.Wording(config)
  put, twice = [(config, wording)], {}
  if config.clue.frames:
    clue.check(config, samples)
    first = questions.Wording(config, form=clue.FORM)
    second = clue.second_pass(config, **config.clue)
    put = [(config, first), (second, wording)]
    twice = dict(config.clue) | dict(template=first.templates[clue.FORM])
  passes = [
    answering.Pass(
      settled,
      words,
      answering.Planner(settled, model, tokenizer, words),
      eval_settings.open_chooser(settled, mesh, model, batch_size),
    )
    for settled, words in put
  ]
  chooser = passes[0].chooser
  policy = policies.load_policy(
    config.policy,
    mesh,
    dtype=config.dtype,
    init_from=config.init_from,
    described=described,
  )
  weights = optim.fingerprint(policy.params)
  answerer = answering.Answerer(
    policy, mesh, seed=config.seed, **config.sampling
  )
  settings = eval_settings.decides(
    config,
    model=policy.model,
    tokenizer=tokenizer,
    wording=wording,
    chooser=chooser,
    samples=samples,
    weights=weights,
    eos_id=answerer.eos_id,
    clue=twice,
  )
  folder = (
    workdir
    / config.benchmark
    / eval_settings.key_of(config, eval_settings.digest_of(settings))
  )
  manifest = open_folder(
    folder,
    settings,
    where=dict(
      policy=policy.source,
      selector=chooser.source,
      root=config.root,
      annotations=_annotation_hashes(config),
    ),
    example=_example(samples[0], passes, tokenizer),
    writes=index == 0,
  )
  del policy

  # ---- this process's share, less what is done ----
  answered = read_answers(folder)
  ids = {sample.id for sample in samples}
  foreign = sorted(answered.keys() - ids)
  if foreign:
    raise ValueError(
      f"{folder} has answers to {len(foreign)} questions that are not asked"
      f" ({', '.join(foreign[:3])}); remove them, or give another --workdir"
    )
  videos = list(dict.fromkeys(map(footage.of_sample, samples)))
  mine = set(videos[index::count])
  numbers = [
    n for n, sample in enumerate(samples) if footage.of_sample(sample) in mine
  ]
  left = [n for n in numbers if _is_open(answered.get(samples[n].id))]
  waiting = {
    n: answered[samples[n].id]
    for n in left
    if clue.waits(answered.get(samples[n].id, {}))
  }
  part = folder / _PARTS / f"{index}.jsonl"
  with lifecycle.locked(folder, f"run_{index}.lock"):
    if left:
      kept = [
        row for row in telemetry.read_rows(part) if "unreadable" not in row
      ]
      disk.write_text(part, "".join(map(_line, kept)))  # no half a line
    telemetry.startup_table(
      f"{config.benchmark}: {len(samples)} questions about {len(videos)}"
      " videos",
      {
        "policy": manifest["where"]["policy"],
        "weights": weights,
        "devices": f"{len(mesh.devices.flat)} x"
        f" {jax.local_devices()[0].device_kind}, mesh {dict(mesh.shape)}",
        "frames": eval_settings.key_of(
          config, eval_settings.digest_of(settings)
        ),
        "done before": f"{len(numbers) - len(left)} of {len(numbers)}"
        + (f" (process {index} of {count})" if count > 1 else ""),
        "kept in": str(folder),
      },
    )
    _answer(
      config,
      samples,
      left,
      waiting,
      passes=passes,
      answerer=answerer,
      model=model,
      tokenizer=tokenizer,
      part=part,
      batch_size=batch_size,
      num_before=len(numbers) - len(left),
      max_unreadable=int(config.data.max_skip_fraction * len(mine)),
      show=index == 0,
    )
  if config.distributed and count > 1:
    multihost_utils.sync_global_devices("every share is answered")
    if index:
      return None

  # ---- all shares together ----
  answered = read_answers(folder)
  missing = [
    sample.id
    for sample in samples
    if sample.id not in answered or clue.waits(answered[sample.id])
  ]
  if missing and config.distributed:
    raise ValueError(
      f"{len(missing)} of {len(samples)} answers of the other processes are not"
      f" in {folder / _PARTS}; all need one file system: put --workdir there,"
      " or copy their parts and start again"
    )
  if missing:
    logging.info(
      "%d of %d questions are answered; the last share to finish scores",
      len(samples) - len(missing),
      len(samples),
    )
    return None
  return finish(
    config, samples, answered, folder, manifest, time.monotonic() - begin
  )


def _annotation_hashes(config: ml_collections.ConfigDict) -> dict[str, str]:
  """Path of each annotation file -> its SHA-256."""
  if config.benchmark == "jsonl":
    files = [pathlib.Path(config.annotations).expanduser()]
  elif config.benchmark in questions.OWN:
    files = []
  else:
    files = datasets.annotation_files(
      config.benchmark,
      config.annotations,
      root=config.root,
      split=config.split,
    )
  return {str(path): score.file_hash(path) for path in files}


def _example(sample, passes, tokenizer) -> dict:
  """A whole prompt, with frames at 0, 1, 2, ... seconds; pads as one each."""

  def prompt(how):
    config = how.config
    count = config.num_keyframes // config.prompt.frames_per_slice
    row = prompts.build_prompt(
      tokenizer,
      how.wording(sample, np.arange(count)),
      (),
      frame_time_s=np.arange(count),
      grid=(1, 1),
      **how.planner.build,
    )
    return tokenizer.decode(row.token)

  made = dict(id=sample.id, prompt=prompt(passes[-1]))
  return made | ({"first": prompt(passes[0])} if len(passes) > 1 else {})


def _answer(
  config: ml_collections.ConfigDict,
  samples: Sequence[records.Sample],
  left: Sequence[int],
  waiting: dict[int, dict[str, Any]],
  *,
  passes: Sequence[answering.Pass],
  answerer: answering.Answerer,
  model: model_config.VLMConfig,
  tokenizer: prompts.Tokenizer,
  part: pathlib.Path,
  batch_size: int,
  num_before: int,
  max_unreadable: int,
  show: bool,
) -> None:
  """Adds the answers to the questions `left` to a file, batch by batch.

  Those in `waiting` have a row of the first pass; others come to them.

  Raises:
    ValueError: more videos than `max_unreadable` cannot be read.
  """
  if not left:
    return
  turn = threading.Lock()
  lost = {}

  def lose(number, reason):
    """The row of a question whose video cannot be read."""
    lost[footage.of_sample(samples[number])] = reason
    if len(lost) > max_unreadable:
      said = "; ".join(list(lost.values())[:5])
      raise ValueError(
        f"{len(lost)} videos cannot be read, at most {max_unreadable} may be"
        f" (config.data.max_skip_fraction={config.data.max_skip_fraction}):"
        f" {said}"
      )
    sample = samples[number]
    return dict(id=sample.id, response="", unreadable=reason)

  decoder = pipeline.make_decoder(
    decode=config.data.decode,
    limits=config.data.limits,
    frame_cache=config.data.frame_cache,
    contained=not questions.is_built_in(config),
  )

  def asked(how, numbers, **parts):
    """Rows by number, and why others have none, batch after batch."""
    preparer = answering.Preparer(
      how,
      model,
      tokenizer,
      samples,
      decoder=decoder,
      batch_size=batch_size,
      turn=turn,
      **parts,
    )
    for ready in preparer.batches(how.planner(samples, numbers, infos)):
      rows = {}
      if ready.prepared is not None:
        said = answerer(
          ready.prepared,
          ready.make_views,
          ready.prepared.batch.sample_index,
          turn,
        )
        rows = {
          n: _row(samples[n], ready.prepared, k, said[k])
          for k, n in enumerate(ready.numbers)
        }
      yield rows, ready.unreadable

  with contextlib.closing(decoder), open(part, "ab") as file:

    def write(rows):
      file.write("".join(map(_line, rows)).encode("utf-8", "replace"))
      file.flush()

    infos, broken = {}, {}
    looked = list(dict.fromkeys(footage.of_sample(samples[n]) for n in left))

    def probe(one):
      try:
        return decoder.probe(one)
      except video.VideoError as error:
        return error

    with (
      concurrent.futures.ThreadPoolExecutor(max(1, decoder.processes)) as pool,
      telemetry.progress(
        "headers", len(looked), unit="video", active=show
      ) as bar,
    ):
      for one, found in zip(looked, pool.map(probe, looked)):
        if isinstance(found, video.VideoError):
          broken[one] = str(found)
        else:
          infos[one] = found
        bar.advance()
    fine = [n for n in left if footage.of_sample(samples[n]) in infos]
    for how in passes[1:]:
      how.planner(samples, fine, infos)  # what is too long shows now
    gone = {
      n: broken[footage.of_sample(samples[n])]
      for n in left
      if footage.of_sample(samples[n]) in broken
    }
    write(
      [
        clue.stands(waiting.pop(n), reason) if n in waiting else lose(n, reason)
        for n, reason in gone.items()
      ]
    )
    num_before += len(gone)
    with telemetry.progress(
      "answer",
      num_before + len(fine),
      start=num_before,
      unit="question",
      active=show,
    ) as bar:
      for rows, lacking in asked(
        passes[0], [n for n in fine if n not in waiting]
      ):
        if len(passes) > 1:
          for n, row in rows.items():
            info = infos[footage.of_sample(samples[n])]
            row |= clue.read(row["response"], info.duration_s)
            if clue.waits(row):
              waiting[n] = row
        write([lose(n, reason) for n, reason in lacking.items()])
        write(rows.values())
        bar.advance(len(lacking) + len(rows.keys() - waiting.keys()))
      if not waiting:
        return
      for rows, lacking in asked(
        passes[-1],
        sorted(waiting),
        within={n: clue.intervals(row) for n, row in waiting.items()},
      ):
        write([clue.stands(waiting[n], why) for n, why in lacking.items()])
        write([clue.answered_twice(waiting[n], row) for n, row in rows.items()])
        bar.advance(len(lacking) + len(rows))


def _row(
  sample: records.Sample, prepared: views.Prepared, k: int, said: dict
) -> dict[str, Any]:
  """A line of predictions.jsonl: row k of a batch."""
  keyframes, batch = prepared.keyframes, prepared.batch
  scanned = keyframes.index[k][keyframes.mask[k]]
  return dict(
    id=sample.id,
    response=said["response"],
    frames=batch.frame_index[k, scanned].tolist(),
    time_s=[round(float(s), 3) for s in batch.scan_time_s[k, scanned]],
    size_px=list(prepared.frames.shape[2:4]),
    prompt_tokens=said["prompt_tokens"],
    new_tokens=said["new_tokens"],
    ended=said["ended"],
  )


def finish(
  config: ml_collections.ConfigDict,
  samples: Sequence[records.Sample],
  answered: Mapping[str, Mapping[str, Any]],
  folder: pathlib.Path,
  manifest: dict[str, Any],
  seconds: float,
) -> dict[str, Any]:
  """Puts the answers together, scores them, and says what came out.

  Args:
    config: settled.
    samples: the questions.
    answered: id -> row, of every question.
    folder: of the evaluation.
    manifest: of it; gets the results.
    seconds: that this start took.

  Returns:
    What scores.json holds, with the folder under "folder".
  """
  rows = [answered[sample.id] for sample in samples]
  lost = {
    sample.video: row["unreadable"]
    for sample, row in zip(samples, rows)
    if "unreadable" in row
  }
  num_lost = sum("unreadable" in row for row in rows)
  left_out = config.unreadable == "left_out"
  kept = [r for r in rows if not (left_out and "unreadable" in r)]
  own = config.benchmark in questions.OWN
  # Before the scoring, which may want a judge that is not there.
  disk.write_text(folder / PREDICTIONS_FILE, "".join(map(_line, kept)))
  if own:
    disk.write_text(folder / ANNOTATIONS_FILE, records.to_jsonl(samples))
  ask_judge = judge.Judge(**config.judge).score if config.judge.url else None
  scores = benchmarks.score(
    "jsonl" if own else config.benchmark,
    list(samples),
    {row["id"]: row["response"] for row in kept},
    allow_partial=left_out and bool(num_lost),
    ask=ask_judge,
  )
  disk.write_text(
    folder / score.QUESTIONS_FILE,
    "".join(_line(_question(sample, scores)) for sample in samples),
  )
  made = benchmarks.to_json(scores)
  telemetry.write_json(folder / score.SCORES_FILE, made)
  cut = sum(not row.get("ended", True) for row in rows)
  # Video-MME's script divides by the questions that have an answer.
  answered_alone = any(row.metric == "accuracy_all" for row in scores.figures)
  notes = _notes(config, len(samples), num_lost, len(lost), cut, answered_alone)
  passes = {}
  if config.clue.frames:
    passes["clue"] = clue.account(rows, config.clue.frames)
    notes += clue.notes(passes["clue"], config.clue.frames)
  head = f"# {config.benchmark}: {folder.name}\n\n"
  foot = "".join(f"- {note}\n" for note in notes)
  disk.write_text(
    folder / TABLE_FILE,
    f"{head}{benchmarks.markdown(scores).strip()}\n\n{foot}"
    f"- policy: `{manifest['where']['policy']}`, weights"
    f" {manifest['settings']['policy']['weights']}\n",
  )
  manifest["results"] = dict(
    answered=len(rows) - num_lost,
    unreadable=lost,
    unreadable_questions=num_lost,
    cut_off=cut,
    seconds=round(seconds, 1),
    **passes,
  )
  telemetry.write_json(folder / MANIFEST_FILE, manifest)
  for path in (folder / _PARTS).glob("*.jsonl"):
    path.unlink(missing_ok=True)
  with contextlib.suppress(OSError):
    (folder / _PARTS).rmdir()
  columns, lines = benchmarks.table(scores)
  telemetry.closing_table(config.benchmark, columns, lines)
  for note in notes:
    logging.info("%s", note)
  logging.info("kept in %s", folder)
  return made | dict(folder=str(folder))


def _notes(
  config, count, num_lost, num_videos, cut, answered_alone
) -> list[str]:
  """What a reader of the table has to know."""
  notes = []
  if config.num_questions or config.only:
    notes.append(
      f"a part of the benchmark alone: {count} questions"
      f" (config.num_questions={config.num_questions},"
      f" config.only={tuple(config.only)})"
    )
  if num_lost:
    how = "count as wrong"
    if answered_alone:
      how += " in accuracy_all; accuracy leaves them out, as its authors do"
    if config.unreadable == "left_out":
      how = "are left out of all figures"
    notes.append(
      f"{num_lost} of {count} questions are about {num_videos} videos that"
      f" cannot be read; they {how} (config.unreadable), see"
      f" {MANIFEST_FILE}"
    )
  else:
    notes.append(f"all {count} questions were asked, every video was read")
  if cut:
    notes.append(
      f"{cut} answers were cut off at {config.sampling.max_tokens} tokens"
      " (config.sampling.max_tokens)"
    )
  return notes


def _question(sample: records.Sample, scores: Any) -> dict[str, Any]:
  """A line of questions.jsonl."""
  row = dict(
    id=sample.id,
    video=sample.video,
    clip=sample.clip,
    fps=sample.fps,
    kind=sample.kind,
    task=sample.task,
    groups=dict(sample.groups),
    question=sample.question,
    options=list(sample.options),
    labels=list(sample.labels),
    answer=sample.answer,
    read=scores.answer.get(sample.id),
    score=scores.question.get(sample.id, {}),
  )
  return row | dict(evidence=[list(pair) for pair in sample.evidence])
