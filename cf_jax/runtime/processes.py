"""Several processes of one run: how they start, agree, and end together.

What is computed together goes through arrays on the mesh. What is known on the
host alone (how far a loader is, what a process read in its completions, that it
failed) goes through the key/value store of `jax.distributed`, which needs no
device and answers while one is busy.

A process that raises tells the others why, and they end within seconds. One
that is killed is missed: by the next collective at once where the network says
so, else after `HEARTBEAT_S`.
"""

import atexit
import itertools
import json
import os
import re
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging
from jax._src import distributed

# Seconds without a sign of life after which a process counts as dead, and those
# that processes wait for each other at the end.
HEARTBEAT_S, SHUTDOWN_S = 30, 60
# Longest wait for what another process has to say: it may be compiling.
_ANSWER_S = 3600
_WATCH_S = 2  # between two looks for another process's failure
_HEARD_S = 10  # a process that failed waits so long for the others to hear it
_FAILED, _DONE = "cf_jax/failed", "cf_jax/done"
_LOST = re.compile(
  r"(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED)\b"
  r".*(gloo|nccl|connection|coordination|heartbeat|peer)",
  re.IGNORECASE | re.DOTALL,
)
# What jaxlib raises for a status depends on the status.
_STORE_ERRORS = (RuntimeError, ValueError)
_turns = itertools.count()
_heard = threading.Event()  # another one's failure: the watch ends this process

# A process that another one's end has ended; but by what a user has to put
# right all end with the same code, or scripts would start the others again.
EXIT_PEER, EXIT_USER = 76, 2


def start(environ: Mapping[str, str] = os.environ) -> None:
  """Joins the processes of a run; before anything else of jax.

  A TPU VM and Slurm say to jax who they are. Elsewhere JAX_COORDINATOR_ADDRESS
  (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID do, which
  launch/local_pod.sh sets.

  Args:
    environ: the environment.

  Raises:
    ValueError: nothing says who the processes are.
  """
  names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
  place = {key: int(environ[n]) for key, n in names.items() if n in environ}
  # Without it CPUs of several processes cannot compute together.
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  try:
    jax.distributed.initialize(
      **place,
      heartbeat_timeout_seconds=HEARTBEAT_S,
      shutdown_timeout_seconds=SHUTDOWN_S,
    )
  except ValueError as error:
    raise ValueError(
      "config.distributed=True, and nothing says which processes there are"
      f" ({error}); start it with launch/local_pod.sh or on a cluster that jax"
      " knows, set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and"
      " JAX_PROCESS_ID, or leave config.distributed False"
    ) from error
  if jax.process_count() > 1:
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(over,), daemon=True)
    watch.start()

    def end():
      over.set()
      watch.join()

    # Before jax leaves its service, which the watch listens to.
    atexit.register(end)
  if not is_first():
    logging.set_verbosity(logging.WARNING)


def is_first() -> bool:
  """Is this the process that writes and shows?

  Asks for no device where there is one process.
  """
  return not jax.distributed.is_initialized() or jax.process_index() == 0


def count() -> int:
  """How many processes the run has."""
  return jax.process_count() if jax.distributed.is_initialized() else 1


def exchange(value: Any) -> list[Any]:
  """Every process's value, in their order; each calls it equally often.

  Args:
    value: JSON-able.
  """
  if count() == 1:
    return [value]
  client, me = distributed.global_state.client, jax.process_index()
  turn = next(_turns)
  client.key_value_set(f"cf_jax/{turn}/{me}", json.dumps(value))
  found = [
    json.loads(
      client.blocking_key_value_get(f"cf_jax/{turn}/{n}", 1000 * _ANSWER_S)
    )
    for n in range(jax.process_count())
  ]
  # Who has said something in this turn has read all of the one before.
  if turn:
    client.key_value_delete(f"cf_jax/{turn - 1}/{me}")
  return found


def part() -> None:
  """Waits until every process is done; the last call of a run that went well.

  The first one may write reports for minutes after the others are done, and
  jax gives those who leave no more than `SHUTDOWN_S` between them. One that
  fails or dies meanwhile ends the wait as it ends anything else.
  """
  if count() == 1:
    return
  client, me = distributed.global_state.client, jax.process_index()
  client.key_value_set(f"{_DONE}/{me}", "")
  left = list(range(jax.process_count()))
  while left:
    try:
      client.blocking_key_value_get(f"{_DONE}/{left[-1]}", 1000 * _ANSWER_S)
      left.pop()
    except _STORE_ERRORS as error:
      if "DEADLINE_EXCEEDED" not in str(error):
        raise


def lost(error: BaseException | None) -> str:
  """What an error says of another process that is gone; "" of another error.

  Such errors come in several types; their text begins with XLA's status. Others
  may stand around them: of a checkpoint that could not be written together.
  """
  seen = []
  while error is not None and error not in seen:
    if _LOST.match(str(error)):
      return str(error).strip().partition("\n")[0]
    seen.append(error)
    error = error.__cause__ or error.__context__
  return ""


def leave(message: str, code: int) -> None:
  """Ends this process, and by `_watch` all others, with a message.

  Not by an exception: the others may wait for this one in a collective, and it
  for them at the end.

  Args:
    message: why, on one line.
    code: exit code.
  """
  if _heard.is_set():  # what this one met follows from that
    time.sleep(_HEARD_S)
  client, me = distributed.global_state.client, jax.process_index()
  print(f"error: {message}", file=sys.stderr)
  try:
    client.key_value_set(_FAILED, json.dumps([me, message, code]))
    # Once this one is gone, collectives fail and say less than the message.
    end = time.monotonic() + _HEARD_S
    for n in set(range(jax.process_count())) - {me}:
      left_s = max(end - time.monotonic(), 0.1)
      client.blocking_key_value_get(f"{_FAILED}/{n}", int(1000 * left_s))
  except _STORE_ERRORS:  # another failed first, or is gone
    logging.debug("not all processes were told", exc_info=True)
  _end(code)


def _watch(over: threading.Event) -> None:
  """Ends this process when another one has failed."""
  client, me = distributed.global_state.client, jax.process_index()
  found = None
  while found is None:
    if over.is_set():
      return
    try:
      found = client.blocking_key_value_get(_FAILED, 1000 * _WATCH_S)
    except _STORE_ERRORS as error:
      if "DEADLINE_EXCEEDED" not in str(error):
        return  # the service is gone; jax itself says so
  number, message, code = json.loads(found)
  if number == me:
    return
  _heard.set()
  print(
    f"error: process {number} of {jax.process_count()} failed: {message}; this"
    " process ends too",
    file=sys.stderr,
  )
  client.key_value_set(f"{_FAILED}/{me}", "")
  if me == 0:
    time.sleep(1)  # the store goes with it, and who failed looks there
  _end(code if code == EXIT_USER else EXIT_PEER)


def _end(code: int) -> None:
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)
