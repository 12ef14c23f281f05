"""The caption recipe, judged by a local HTTP server, at the smallest size.

The server looks for an event's words in the description. So small a policy
writes no caption, so the first completion of each group is read as if it were
what is wanted. The cold start packs its samples and trains on the prompts too.
"""

import json
import re

import numpy as np
import pytest

from cf_jax.data import targets
from cf_jax.programs import train, verdicts
from cf_jax.runtime import telemetry
from tests.conftest import load_config, shrink
from tests.data import test_judge


@pytest.fixture(scope="module")
def server():
  made = test_judge.Server()

  def answer(handler):
    (message,) = made.seen[-1][1]["messages"]  # one request at a time
    description = re.search('^Description: "(.*)"', message["content"], re.M)
    events = re.findall(r'^(\d+): "a (.*) appears"', message["content"], re.M)
    lines = [
      f"{number}: {'yes' if event in description[1] else 'no'}"
      for number, event in events
    ]
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(test_judge.completion("\n".join(lines)))

  made.script = [answer]
  yield made
  made.close()


def _one_caption(experiment, make_judge=verdicts.make_judge):
  """The judge, for whom the first of each group is the sample's target."""
  read = make_judge(experiment)

  def judge(prepared, token, mask):
    wanted = targets.target_rollout(
      experiment.tokenizer, prepared.batch.samples, token.shape[2]
    )
    token, mask = np.array(token), np.array(mask)
    token[:, :1], mask[:, :1] = wanted.token, wanted.mask
    return read(prepared, token, mask)

  return judge


@pytest.fixture(scope="module")
def run(server, cache_dir, tmp_path_factory):
  """Workdir of a run of two updates, and one of the reinforcement."""
  workdir = tmp_path_factory.mktemp("caption")
  config = shrink(
    load_config("configs/videochat_r1.py", "caption,smoke"), cache_dir
  )
  config.data.synthetic.update(num_train=8, num_dev=2, num_test=2)
  config.prompt.max_tokens = 112
  config.sampling.max_tokens = 40
  config.sft.update(max_steps=2, eval_every=2, pack=2, loss_on="all")
  config.rl.update(steps=1, prompts_per_step=2)
  config.evaluation.update(batch_size=2, arms=("keyframes", "blind"))
  config.judge.update(
    url=server.url,
    model="judge-1",
    cache_dir=str(workdir / "judge"),
    backoff_s=0.01,
    concurrency=1,
  )
  with pytest.MonkeyPatch.context() as patch:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
      patch.delenv(name, raising=False)
    patch.setenv("NO_PROXY", "127.0.0.1")
    patch.setattr(verdicts, "make_judge", _one_caption)
    train.run(config.lock(), workdir / "run")
  return workdir / "run"


def test_captions_earn_what_the_judge_says(run, server):
  rows = telemetry.read_rows(run / "rollouts.jsonl")
  assert {row["task"] for row in rows} == {"caption"}
  assert [row["rewards"]["event_recall"] for row in rows] == [1, 0]
  assert [row["rewards"]["total"] for row in rows] == [2, 0]  # and the format
  assert rows[0]["advantage"] > 0 > rows[1]["advantage"]
  results = json.loads((run / "results.json").read_text())
  scores = [
    row["score"] for row in results["evaluations"] if row["task"] == "caption"
  ]
  assert scores == [1] * 4
  # Every caption was asked about once, then the reply was known.
  asked = [json.dumps(body["messages"]) for _, body in server.seen]
  assert len(set(asked)) == len(asked) >= 2
  assert {body["model"] for _, body in server.seen} == {"judge-1"}


def test_the_cold_start_was_packed(run):
  rows = telemetry.read_rows(run / "metrics.jsonl")
  first, *_ = (row for row in rows if row["stage"] == "sft")
  assert first["pack/rows"] == 2 and 0.3 < first["pack/filled"] < 1
  # A policy that knows nothing: the whole vocabulary.
  assert first["loss"] == pytest.approx(np.log(1000), rel=0.1)
  assert all(row["recompiles"] == 0 for row in rows)


def test_the_report_names_the_method(run):
  page = (run / "report.html").read_text("utf-8")
  assert "cold start → GRPO" in page and "KF-GRPO" not in page
  assert "uniform keyframes" in page and "TAD keyframes" not in page
