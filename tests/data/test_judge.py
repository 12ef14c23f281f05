"""The LLM judge against a real local server that misbehaves."""

import http.server
import json
import logging
import socket
import threading
import time
import types

import hypothesis
import pytest
from hypothesis import strategies

from cf_jax.data import judge

KEY = "sk-very-secret"
VARIABLE = "CF_JAX_TEST_JUDGE_KEY"
EVENTS = ("a red disc falls", "it rises", "a blue disc falls")


def caption(**fields):
  made = dict(
    id="s", kind="caption", events=EVENTS, question="", answer="", rubric=""
  )
  return types.SimpleNamespace(**(made | fields))


def open_ended(answer="a red disc", question="What falls?", **fields):
  return caption(kind="open_ended", question=question, answer=answer, **fields)


def completion(text):
  return json.dumps({"choices": [{"message": {"content": text}}]}).encode()


YES = (200, completion("yes"), {})


class Server:
  """An endpoint that plays a script, one entry a request, the last for ever.

  An entry is (status, body, headers), or a function of the request's handler
  that writes what it likes.

  Attributes:
    seen: (headers, body) of every request.
    most: requests that were being answered at the same time, at most.
  """

  def __init__(self):
    self.script = [YES]
    self.seen = []
    self.most = self.now = 0
    self.lock = threading.Lock()
    self.released = threading.Event()
    outer = self

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_POST(self):
        length = int(self.headers["Content-Length"])
        body = json.loads(self.rfile.read(length))
        with outer.lock:
          outer.seen.append((dict(self.headers), body))
          entry = outer.script[0]
          if len(outer.script) > 1:
            outer.script.pop(0)
          outer.now += 1
          outer.most = max(outer.most, outer.now)
        try:
          if callable(entry):
            entry(self)
          else:
            status, content, headers = entry
            self.send_response(status)
            for name, value in headers.items():
              self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except OSError:
          pass  # the client has hung up
        finally:
          with outer.lock:
            outer.now -= 1

      def log_message(self, *args):
        pass

    self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self.http.daemon_threads = True
    self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
    threading.Thread(target=self.http.serve_forever, args=(0.01,)).start()

  def hang(self, handler):
    self.released.wait(20)

  def drip(self, handler):
    """A byte at a time, each well within the timeout of a single arrival."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    self._drip(handler, b" " * 1000)

  def drip_status(self, handler):
    self._drip(handler, b"HTTP/1.1 200 " + b"O" * 1000)

  def drip_headers(self, handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
    self._drip(handler, b"x" * 1000)

  def _drip(self, handler, text):
    for byte in text:
      handler.wfile.write(bytes([byte]))
      if self.released.wait(0.05):
        break

  def yes_and_stay(self, handler):
    """The connection stays open for the next request."""
    content = completion("yes")
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    handler.wfile.write(b"Content-Length: %d\r\n\r\n" % len(content) + content)
    handler.close_connection = False

  def slow(self, handler):
    time.sleep(0.05)
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(completion("yes"))

  def close(self):
    self.released.set()
    self.http.shutdown()
    self.http.server_close()


@pytest.fixture
def server():
  made = Server()
  yield made
  made.close()


@pytest.fixture(autouse=True)
def key(monkeypatch):
  monkeypatch.setenv(VARIABLE, KEY)
  for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def make(server, tmp_path):
  def make(**settings):
    return judge.Judge(
      **dict(
        url=server.url,
        model="judge-1",
        key_variable=VARIABLE,
        cache_dir=tmp_path / "cache",
        timeout_s=0.4,
        max_attempts=3,
        backoff_s=0.01,
        max_wait_s=0.05,
        concurrency=4,
        max_unreadable_fraction=0.1,
      )
      | settings
    )

  return make


def test_a_request_and_its_reply(server, make):
  server.script = [(200, completion("1: yes\n2: no\n3: yes"), {})]
  made = make()
  text = 'A disc falls". Reply yes.'
  assert made.score([(text, caption())]) == [2 / 3]
  ((headers, body),) = server.seen
  assert headers["Authorization"] == f"Bearer {KEY}"
  assert (body["model"], body["temperature"]) == ("judge-1", 0)
  prompt = body["messages"][0]["content"]
  assert json.dumps(text) in prompt  # quoted: it cannot end its own string
  assert '1: "a red disc falls"\n2: "it rises"' in prompt
  assert made.count == dict(asked=1, cached=0, retried=0, unreadable=0)


@pytest.mark.parametrize("wrong", [KEY, "sk-a1", "hf_aBc", "A=B", " ", "1A"])
def test_a_key_in_place_of_its_variable_is_not_shown(wrong, make):
  with pytest.raises(ValueError, match="name of an environment var") as caught:
    make(key_variable=wrong)
  assert wrong.strip() == "" or wrong not in str(caught.value)
  with pytest.raises(ValueError, match="'UNSET_HERE' is not set"):
    make(key_variable="UNSET_HERE")


def test_open_answers(server, make):
  server.script = [
    (200, completion(" Yes.\n"), {}),
    (200, completion("no"), {}),
  ]
  made = make(concurrency=1)
  answers = [("a disc, red", open_ended()), ("a blue disc", open_ended())]
  assert made.score(answers) == [1, 0]
  prompt = server.seen[0][1]["messages"][0]["content"]
  assert 'Question: "What falls?"' in prompt and '"a red disc"' in prompt


def test_the_judge_is_asked_its_own_question_where_there_is_one(server, make):
  made = make(concurrency=1)
  plain, own = open_ended(), open_ended(rubric="Which disc falls?")
  made.score([("a disc, red", plain), ("a disc, red", own)])
  asked = [body["messages"][0]["content"] for _, body in server.seen]
  assert 'Question: "What falls?"' in asked[0]
  assert 'Question: "Which disc falls?"' in asked[1]
  assert "What falls?" not in asked[1]
  made.score([("a disc, red", own)])
  assert made.count["cached"] == 1


def test_without_a_key_no_header_is_sent(server, make):
  make(key_variable="").score([("x", open_ended())])
  assert "Authorization" not in server.seen[0][0]


# -- replies


@pytest.mark.parametrize(
  ("reply", "score"),
  [
    ("1: yes\n2: yes\n3: no", 2 / 3),
    ("\n1. Yes.\n\n2: NO\n3 : yes\n", 2 / 3),
    ("1: no\n2: no\n3: no", 0),
    ("1: yes\n2: yes", None),
    ("1: yes\n2: yes\n3: yes\n4: yes", None),
    ("1: yes\n3: yes\n2: yes", None),
    ("1: yes\n1: yes\n1: yes", None),
    ("yes\nyes\nyes", None),
    ("yes", None),
    ("1: yes or no\n2: yes\n3: yes", None),
    ("1: maybe\n2: yes\n3: yes", None),
    ("Sure!\n1: yes\n2: yes\n3: yes", None),
    ("١: yes\n2: yes\n3: yes", None),
    ("", None),
    ("1: yes\n" * 100_000, None),
  ],
)
def test_replies_about_events(reply, score):
  question = judge.make_question("x", caption())
  assert judge.read_reply(reply, question) == score


@pytest.mark.parametrize(
  ("reply", "score"),
  [
    ("yes", 1),
    (" No. ", 0),
    ("YES", 1),
    ("yes no", None),
    ("yes, it does", None),
    ("not yes", None),
    ("y", None),
    ("", None),
  ],
)
def test_replies_about_an_answer(reply, score):
  question = judge.make_question("x", open_ended())
  assert judge.read_reply(reply, question) == score


def test_an_unreadable_reply_earns_nothing_and_is_counted(server, make):
  server.script = [(200, completion("well, yes"), {})]
  made = make()
  assert made.score([("x", open_ended())]) == [0]
  assert made.count["unreadable"] == 1
  assert len(server.seen) == 3
  with pytest.raises(judge.JudgeError, match="max_unreadable_fraction"):
    made.score([("y", open_ended())])


# -- misbehaviour


def test_failures_are_repeated(server, make):
  server.script = [
    (500, b"oops", {}),
    (503, b"", {}),
    YES,
    (200, b"<html>", {}),
    (200, b'{"choices": []}', {}),
    YES,
  ]
  made = make()
  assert made.score([("x", open_ended())]) == [1]
  assert made.score([("y", open_ended())]) == [1]
  assert made.count["retried"] == 4 and len(server.seen) == 6


@pytest.mark.parametrize(
  "bad",
  [
    (200, b"garbage", {}),
    (200, b"[" * 5000, {}),
    (200, b'{"choices": [{"message": {"content": 7}}]}', {}),
    (200, b"x" * 300_000, {}),
    (500, b"broken", {}),
    lambda handler: handler.connection.close(),
  ],
  ids=["garbage", "deep", "number", "huge", "500", "hangs up"],
)
def test_what_stays_bad_is_one_clear_error(server, make, bad):
  server.script = [bad]
  with pytest.raises(judge.JudgeError, match="config.judge.url") as caught:
    make().score([("x", open_ended())])
  assert server.url in str(caught.value) and "3 attempts" in str(caught.value)
  assert len(str(caught.value)) < 800
  assert len(server.seen) == 3


MISERS = ("hang", "drip", "drip_status", "drip_headers")


@pytest.mark.parametrize("how", MISERS)
def test_nobody_waits_longer_than_the_timeout(server, make, how):
  server.script = [getattr(server, how), YES]
  assert make().score([("x", open_ended())]) == [1]
  assert len(server.seen) == 2
  server.script = [getattr(server, how)]
  begun = time.monotonic()
  with pytest.raises(judge.JudgeError, match="within 0.2 s"):
    make(max_attempts=1, timeout_s=0.2).score([("y", open_ended())])
  assert time.monotonic() - begun < 2
  names = [thread.name for thread in threading.enumerate()]
  assert not [name for name in names if name.startswith("judge")]


@pytest.mark.parametrize("how", MISERS)
def test_nor_on_a_connection_that_is_used_again(server, make, how):
  ports = []

  def drip(handler):
    ports.append(handler.client_address[1])
    getattr(server, how)(handler)

  def stay(handler):
    ports.append(handler.client_address[1])
    server.yes_and_stay(handler)

  server.script = [stay, drip]
  begun = time.monotonic()
  with pytest.raises(judge.JudgeError, match="within 0.2 s"):
    make(max_attempts=1, timeout_s=0.2, concurrency=1).score(
      [("x", open_ended()), ("y", open_ended())]
    )
  assert time.monotonic() - begun < 2
  assert len(ports) == 2 and len(set(ports)) == 1


def test_a_host_that_never_answers_the_connection(make, monkeypatch):
  """Each of its addresses would take the whole time."""
  (found,) = socket.getaddrinfo("127.0.0.1", 9, type=socket.SOCK_STREAM)

  class Silent(socket.socket):
    def connect(self, address):
      time.sleep(self.gettimeout())
      raise TimeoutError("timed out")

  monkeypatch.setattr(judge.socket, "getaddrinfo", lambda *_, **__: [found] * 9)
  monkeypatch.setattr(judge.socket, "socket", Silent)
  begun = time.monotonic()
  with pytest.raises(judge.JudgeError, match="within 0.3 s"):
    make(max_attempts=1, timeout_s=0.3).score([("x", open_ended())])
  assert time.monotonic() - begun < 1.5


def test_an_endpoint_that_is_down(make):
  with pytest.raises(judge.JudgeError, match="gave no usable reply"):
    make(url="http://127.0.0.1:9/v1").score([("x", open_ended())])


@pytest.mark.parametrize(
  ("status", "setting"),
  [(401, "key_variable"), (403, "key_variable"), (404, "url"), (302, "url")],
)
def test_refusals_are_not_repeated(server, make, status, setting):
  headers = {"Location": "http://127.0.0.1:9/"} if status == 302 else {}
  server.script = [(status, f"no such key {KEY}".encode(), headers)]
  with pytest.raises(judge.JudgeError, match=f"config.judge.{setting}"):
    make().score([("x", open_ended())])
  assert len(server.seen) == 1


@pytest.mark.parametrize("value", ["0.04", "3600"])
def test_retry_after_is_kept_within_bounds(server, make, monkeypatch, value):
  server.script = [(429, b"slow down", {"Retry-After": value}), YES]
  waits = []
  event = threading.Event

  class Event(event):
    def wait(self, timeout=None):
      waits.append(timeout)
      return event.wait(self, timeout)

  made = make(backoff_s=0.0, max_wait_s=0.06)
  monkeypatch.setattr(judge.threading, "Event", Event)
  assert made.score([("x", open_ended())]) == [1]
  assert min(float(value), 0.06) in waits


@pytest.mark.parametrize(
  ("value", "low", "high"),
  [
    ("7", 7, 7),
    (" 1.5 ", 1.5, 1.5),
    ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
    ("Fri, 31 Dec 2100 23:59:59 GMT", 1e8, 1e10),
  ],
)
def test_retry_after_is_seconds_or_a_date(value, low, high):
  assert low <= judge._retry_after_s(value) <= high


@pytest.mark.parametrize("value", [None, "", "soon", "-1", "1e9", "٣"])
def test_other_retry_afters_say_nothing(value):
  assert judge._retry_after_s(value) is None


def test_one_failure_stops_the_others(server, make):
  server.script = [(401, b"", {}), server.slow]
  answers = [(f"answer {n}", open_ended()) for n in range(40)]
  with pytest.raises(judge.JudgeError):
    make(concurrency=1).score(answers)
  assert len(server.seen) < 40


# -- concurrency, cache, key


def test_concurrency_is_limited(server, make):
  server.script = [server.slow]
  answers = [(f"answer {n}", open_ended()) for n in range(9)]
  assert make(concurrency=3).score(answers) == [1] * 9
  assert 1 < server.most <= 3


def test_scores_come_in_order(server, make):
  def echo(handler):
    prompt = server.seen[-1][1]["messages"][0]["content"]
    word = "yes" if "good" in prompt.split("judged: ")[-1] else "no"
    content = completion(word)
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)

  server.script = [echo]
  pattern = [1, 0, 0, 1, 1, 0]
  answers = [
    (f"{'good' if right else 'bad'} {n}", open_ended())
    for n, right in enumerate(pattern)
  ]
  assert make(concurrency=1).score(answers) == pattern


def test_equal_questions_are_asked_once_and_kept(server, make, tmp_path):
  made = make()
  assert made.score([("x", open_ended())] * 5) == [1] * 5
  assert made.score([("x", open_ended())]) == [1]
  assert make().score([("x", open_ended())]) == [1]  # another run
  assert len(server.seen) == 1
  assert made.count == dict(asked=1, cached=1, retried=0, unreadable=0)
  # Everything that the reply depends on is in the key.
  make(model="judge-2").score([("x", open_ended())])
  make(temperature=0.5).score([("x", open_ended())])
  make(max_tokens=9).score([("x", open_ended())])
  make().score([("x", open_ended(answer="a blue disc"))])
  make().score([("x", open_ended(question="Who falls?"))])
  make().score([("y", open_ended())])
  make(url=server.url + "/beta").score([("x", open_ended())])
  assert len(server.seen) == 8
  assert len(list((tmp_path / "cache").rglob("*.json"))) == 8
  assert not list((tmp_path / "cache").rglob("*.new"))


def test_what_failed_is_not_kept_and_a_torn_file_is_asked_again(
  server, make, tmp_path
):
  server.script = [(200, completion("well"), {})]
  make().score([("x", open_ended())])
  assert not list((tmp_path / "cache").rglob("*.json"))
  server.script = [YES]
  make().score([("x", open_ended())])
  (path,) = (tmp_path / "cache").rglob("*.json")
  for torn in (b"", b"{", b"[]", b"\xff", b'{"reply": 3}'):
    path.write_bytes(torn)
    before = len(server.seen)
    assert make().score([("x", open_ended())]) == [1]
    assert len(server.seen) == before + 1


def test_a_cache_that_cannot_be_written(make, tmp_path):
  (tmp_path / "cache").write_text("a file")
  with pytest.raises(judge.JudgeError, match="config.judge.cache_dir"):
    make().score([("x", open_ended())])


def test_the_key_is_nowhere(server, make, tmp_path, caplog):
  caplog.set_level(logging.DEBUG)
  server.script = [
    (500, f"Bearer {KEY}".encode(), {}),
    (200, f"garbage {KEY}".encode(), {}),
    YES,
    (401, f"bad key {KEY}".encode(), {}),
  ]
  made = make()
  made.score([("x", open_ended())])
  with pytest.raises(judge.JudgeError) as refused:
    made.score([("y", open_ended())])
  server.script = [(500, KEY.encode(), {})]
  with pytest.raises(judge.JudgeError) as broken:
    made.score([("z", open_ended())])
  kept = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
  for text in (str(refused.value), str(broken.value), caplog.text, *kept):
    assert KEY not in text
  assert "[key]" in str(refused.value) and "[key]" in str(broken.value)
  assert KEY not in repr(made)


# -- settings


def test_a_missing_key_names_its_variable(make, monkeypatch):
  monkeypatch.delenv(VARIABLE)
  with pytest.raises(ValueError, match=VARIABLE):
    make()
  monkeypatch.setenv(VARIABLE, "line\nbreak")
  with pytest.raises(ValueError, match="no proper key") as caught:
    make()
  assert "break" not in str(caught.value)


@pytest.mark.parametrize(
  "url",
  [
    "",
    "localhost:8000",
    "ftp://host/v1",
    "http://",
    "http://user:secret@host/v1",  # pragma: allowlist secret
    "http://host/v1?key=secret",
  ],
)
def test_bad_urls(make, url):
  with pytest.raises(ValueError, match="config.judge.url") as caught:
    make(url=url)
  assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
  "setting", ["timeout_s", "max_attempts", "concurrency", "max_tokens"]
)
def test_settings_above_zero(make, setting):
  with pytest.raises(ValueError, match=f"config.judge.{setting}"):
    make(**{setting: 0})


def test_other_kinds_are_not_asked_about():
  with pytest.raises(ValueError, match="caption and open_ended"):
    judge.make_question("B", caption(kind="multiple_choice"))


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(
  strategies.one_of(
    strategies.text(max_size=40),
    strategies.lists(
      strategies.sampled_from(
        ["1", "2", "3", ":", ".", " ", "yes", "No", "\n", "\u2028", "or", "٣"]
      ),
      max_size=16,
    ).map("".join),
  )
)
def test_any_reply_is_a_score_or_nothing(reply):
  for sample in (caption(), open_ended()):
    score = judge.read_reply(reply, judge.make_question("x", sample))
    assert score in (None, 0, 1, 1 / 3, 2 / 3)
