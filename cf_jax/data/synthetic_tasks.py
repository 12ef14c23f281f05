"""The questions of the built-in set: what happens in a video, what is asked.

Something happens in a video `num_events` times: a shape shows, or the picture
cuts away to another texture and back. With options (brief shapes of 4 to 6
frames where nothing else is said):

- needle: one shape, cutaways else; which colour is it?
- order: two shapes; which colour appears first?
- order_two: the same, and the two colours are the options;
- count: how many shapes appear?
- grounded_qa: one colour, once or twice, for 1 to 1.5 s; which, and when?

without options:

- grounding: shapes of different colours, for 1 to 1.5 s; when is the red one?
- regression: the same; how many seconds after the red one is the blue one?
- numerical: how many shapes appear?
- free_form: one shape; colour and name;
- events: shapes of different colours; the colours in order;
- caption: the same, in a sentence (an LLM judges it);
- tracking: a small shape wanders through the whole video; where is it?

two-option order with a short cut that held-out questions do not have:

- order_ways: to train on, A is right in three of five, and a third of those
  reason "A" in place of the colours: a policy learns both ways;
- order_skewed: to train on, A is right in 17 of 20;

and needles on which choosing frames by change should bring little:

- long: the shape shows for a third of the video;
- ramp: so long, and it fades in and out;
- many_cuts: a cut every 4 frames, and no cutaways.

Letters and answers are balanced per task and split (but where a short cut is
meant to be), and colours are drawn apart from times, so neither the question
nor the times tell the answer.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from cf_jax.data import records, synthetic_times, synthetic_video
from cf_jax.data.synthetic_video import Event, Spec

LETTERS = "ABCD"
NUM_BOXES = 8  # of a tracking question (arXiv 2504.06958)
# Of training questions, those whose right option is A: (so many, of how many).
_WAYS, _SKEWED = (3, 5), (17, 20)
# Lengths of events that questions about seconds ask for.
_HALF_SECONDS = (2, 3)

Times = tuple[np.ndarray, np.ndarray, np.ndarray]


class Question(NamedTuple):
  """What a video is to show, and what is asked about it.

  Attributes:
    colours: of the events in time order; "" of a cutaway.
    relevant: numbers of the events that the answer rests on.
    text: the question alone.
    options: the choices, without letters.
    answer: the letter, or the text; "" where it follows from what is drawn.
    shapes: of the events; "" leaves one to chance, and so does ().
  """

  colours: Sequence[str]
  relevant: Sequence[int]
  text: str
  options: Sequence[str] = ()
  answer: str = ""
  shapes: Sequence[str] = ()


# -- when things happen


def _half_second(fps: float) -> int:
  """Frames of half a second: the grid of answers in seconds."""
  return max(1, round(fps / 2))


def _brief(rng, question, num_frames, fps) -> Times:
  del fps
  return synthetic_times.draw_times(
    rng,
    num_frames=num_frames,
    num_events=len(question.colours),
    num_cuts=int(rng.integers(1, 3)),
  )


def _on_grid(rng, lengths, num_frames, fps) -> Times:
  """Starts and ends at half seconds, so that seconds are short to write."""
  step = _half_second(fps)
  if num_frames % step:
    raise ValueError(
      f"num_frames must be a multiple of {step} (half a second) for questions"
      f" about seconds, got {num_frames}; change data.synthetic.num_frames"
    )
  times = synthetic_times.arrange(
    rng,
    lengths=lengths,
    num_cuts=int(rng.integers(1, 3)),
    num_frames=num_frames // step,
    gap=1,
  )
  return tuple(step * time for time in times)


def _seconds_long(rng, question, num_frames, fps) -> Times:
  lengths = rng.choice(_HALF_SECONDS, len(question.colours))
  return _on_grid(rng, lengths, num_frames, fps)


def _third_long(rng, question, num_frames, fps) -> Times:
  del fps
  lengths = rng.choice(synthetic_times.BRIEF, len(question.colours))
  lengths[list(question.relevant)] = num_frames // 3
  return synthetic_times.arrange(
    rng,
    lengths=lengths,
    num_cuts=int(rng.integers(1, 3)),
    num_frames=num_frames,
    gap=4,
  )


def _among_cuts(rng, question, num_frames, fps) -> Times:
  del fps
  return synthetic_times.arrange(
    rng,
    lengths=rng.choice(synthetic_times.BRIEF, len(question.colours)),
    num_cuts=num_frames // 4,
    num_frames=num_frames,
    gap=3,
  )


def _throughout(rng, question, num_frames, fps) -> Times:
  cut = _brief(rng, question._replace(colours=()), num_frames, fps)[2]
  return np.array([0]), np.array([num_frames]), cut


# -- what is asked


def _choices(right, others, letter, rng):
  """Options with the right one under its letter, the others in random order."""
  options = list(rng.permutation(others))
  options.insert(letter, right)
  return options


def _needle(row, names, num_events, rng) -> Question:
  letter, colour, target = (int(level) for level in row)
  colours = [""] * num_events
  colours[target] = names[colour]
  return Question(
    colours,
    (target,),
    "Which colour is the shape?",
    _colour_choices(names[colour], names, letter, rng),
    LETTERS[letter],
  )


def _colour_choices(right, names, letter, rng):
  others = list(rng.permutation([name for name in names if name != right]))
  return _choices(right, others[: len(LETTERS) - 1], letter, rng)


def _two_shapes(row, names, num_events):
  """Colours of two of the events, and which two; a row (first, apart, pair)."""
  colour, offset, pair = (int(level) for level in row)
  first = names[colour]
  second = names[(colour + 1 + offset) % len(names)]
  relevant = list(itertools.combinations(range(num_events), 2))[pair]
  colours = [""] * num_events
  colours[relevant[0]], colours[relevant[1]] = first, second
  return first, second, relevant, colours


def _order(row, names, num_events, rng) -> Question:
  letter = int(row[0])
  first, second, relevant, colours = _two_shapes(row[1:], names, num_events)
  rest = list(rng.permutation([n for n in names if n not in (first, second)]))
  return Question(
    colours,
    relevant,
    "Which colour appears first?",
    _choices(first, [second, *rest[:2]], letter, rng),
    LETTERS[letter],
  )


def _order_two(row, names, num_events, rng) -> Question:
  letter = int(row[0])
  first, second, relevant, colours = _two_shapes(row[1:], names, num_events)
  return Question(
    colours,
    relevant,
    "Which colour appears first?",
    _choices(first, [second], letter, rng),
    LETTERS[letter],
  )


def _mostly_a(right: int):
  """`_order_two`, A right for the first `right` levels of the letter."""

  def ask(row, names, num_events, rng) -> Question:
    return _order_two((int(row[0] >= right), *row[1:]), names, num_events, rng)

  return ask


def _number_of_shapes(number, names, num_events, rng):
  """Colours of so many shapes at random places, and the places."""
  relevant = np.sort(rng.permutation(num_events)[:number])
  colours = [""] * num_events
  for n in relevant:
    colours[n] = str(rng.choice(names))
  return colours, tuple(relevant.tolist())


def _count(row, names, num_events, rng) -> Question:
  letter, times = (int(level) for level in row)
  colours, relevant = _number_of_shapes(times + 1, names, num_events, rng)
  others = [str(n + 1) for n in range(num_events) if n != times]
  return Question(
    colours,
    relevant,
    "How many shapes appear?",
    _choices(str(times + 1), others, letter, rng),
    LETTERS[letter],
  )


def _numerical(row, names, num_events, rng) -> Question:
  number = int(row[0]) + 1
  colours, relevant = _number_of_shapes(number, names, num_events, rng)
  return Question(
    colours, relevant, "How many shapes appear?", answer=str(number)
  )


def _places(num_events: int) -> list[tuple[int, ...]]:
  """One of the events, or two of them."""
  return [
    *itertools.combinations(range(num_events), 1),
    *itertools.combinations(range(num_events), 2),
  ]


def _grounded_qa(row, names, num_events, rng) -> Question:
  letter, colour, place = (int(level) for level in row)
  relevant = _places(num_events)[place]
  return Question(
    [names[colour] if n in relevant else "" for n in range(num_events)],
    relevant,
    "Which colour is the shape, and when does it appear?",
    _colour_choices(names[colour], names, letter, rng),
    LETTERS[letter],
  )


def _grounding(row, names, num_events, rng) -> Question:
  colour, target = (int(level) for level in row)
  others = [name for name in names if name != names[colour]]
  colours = list(rng.permutation(others)[: num_events - 1])
  colours.insert(target, names[colour])
  return Question(
    colours, (target,), f"When does the {names[colour]} shape appear?"
  )


def _regression(row, names, num_events, rng) -> Question:
  first, second, relevant, colours = _two_shapes(row, names, num_events)
  rest = iter(rng.permutation([n for n in names if n not in (first, second)]))
  return Question(
    [colour or next(rest) for colour in colours],
    relevant,
    f"How many seconds after the {first} shape does the {second} shape appear?",
  )


def _free_form(row, names, num_events, rng) -> Question:
  del rng
  colour, shape, target = (int(level) for level in row)
  colours, shapes = [""] * num_events, [""] * num_events
  colours[target] = names[colour]
  shapes[target] = synthetic_video.SHAPES[shape]
  return Question(
    colours,
    (target,),
    "What appears in the video?",
    answer=f"{colours[target]} {shapes[target]}",
    shapes=shapes,
  )


def _sequence(text):
  def ask(row, names, num_events, rng) -> Question:
    del rng
    orders = list(itertools.permutations(names, num_events))
    return Question(orders[int(row[0])], range(num_events), text)

  return ask


def _tracking(row, names, num_events, rng) -> Question:
  del num_events, rng
  return Question([names[int(row[0])]], (0,), "Where is the shape?")


# -- what follows from the drawn events


def relevant(spec: Spec) -> list[Event]:
  """The events that the answer rests on, in time order."""
  return [spec.events[n] for n in spec.relevant]


def _colours(spec: Spec) -> str:
  return " ".join(event.colour for event in relevant(spec))


def _either_way(spec: Spec) -> str:
  """The colours, or "A" for a third of the questions that A answers."""
  by_habit = np.random.default_rng(spec.seed).random() < 1 / 3
  return "A" if by_habit and spec.answer == "A" else _colours(spec)


def _described(spec: Spec) -> str:
  return " ".join(f"{event.colour} {event.shape}" for event in relevant(spec))


def _cited(spec: Spec) -> str:
  """Colours, each with the whole second nearest the middle of its event."""
  return " ".join(
    f"{event.colour} {(start + end) / 2:.0f}s"
    for event, (start, end) in zip(relevant(spec), spec.evidence)
  )


def _starts(spec: Spec) -> str:
  return " ".join(
    f"{event.colour} {start:g}s"
    for event, (start, _) in zip(relevant(spec), spec.evidence)
  )


def _when(spec: Spec) -> str:
  ((start, end),) = spec.evidence
  return f"{start:g} to {end:g}"


def _seconds_after(spec: Spec) -> str:
  (first, _), (second, _) = spec.evidence
  return f"{second - first:g}"


def _sentence(spec: Spec) -> str:
  return ", then ".join(
    f"a {event.colour} {event.shape}" for event in relevant(spec)
  )


def _track(spec: Spec) -> str:
  return str([list(box) for box in boxes(spec)])


def boxes(spec: Spec) -> tuple[tuple[float, float, float, float], ...]:
  """(x0, y0, x1, y1) of the moving shape in `NUM_BOXES` frames, fractions.

  The frames are the middles of equal parts of the video, as uniform frames are;
  corners have two decimals, half a pixel of a video 100 px wide.
  """
  (event,) = spec.events
  reach = synthetic_video.extent_px(event.shape, event.radius_px)
  found = []
  for k in range(NUM_BOXES):
    row, column = event.path_px[
      (2 * k + 1) * spec.num_frames // (2 * NUM_BOXES)
    ]
    corners = (column - reach, row - reach, column + reach + 1, row + reach + 1)
    found.append(tuple(round(corner / spec.size_px, 2) for corner in corners))
  return tuple(found)


class Task(NamedTuple):
  """One kind of question.

  Attributes:
    kind: how its answers are read.
    levels: (num_events, num_colours) -> levels of the balanced factors.
    ask: a row of these, names of colours, num_events, rng -> Question.
    times: rng, Question, num_frames, fps -> starts, stops and cuts.
    think: Spec -> the worded chain of thought.
    answer: Spec -> the answer, where Question does not say it.
    looks: "pops" up, "fades" in and out, or "moves".
    num_events: events of a video, where the task says how many.
    train: how the questions to train on are asked, where they differ.
  """

  kind: records.Kind
  levels: Callable[[int, int], tuple[int, ...]]
  ask: Callable[..., Question]
  times: Callable[..., Times] = _brief
  think: Callable[[Spec], str] = _colours
  answer: Callable[[Spec], str] | None = None
  looks: str = "pops"
  num_events: int | None = None
  train: "Task | None" = None


def _needle_levels(events: int, colours: int) -> tuple[int, ...]:
  return len(LETTERS), colours, events


def _pair_levels(events: int, colours: int) -> tuple[int, ...]:
  return colours, colours - 1, math.comb(events, 2)


NEEDLE = Task("multiple_choice", _needle_levels, _needle)
ORDER_TWO = Task(
  "multiple_choice", lambda e, c: (2, *_pair_levels(e, c)), _order_two
)


def _with_short_cut(right: int, of: int) -> Task:
  """ORDER_TWO with A right in `right` of `of` questions to train on."""
  train = ORDER_TWO._replace(
    levels=lambda e, c: (of, *_pair_levels(e, c)), ask=_mostly_a(right)
  )
  return ORDER_TWO._replace(train=train)


TASKS = {
  "needle": NEEDLE,
  "order": Task(
    "multiple_choice", lambda e, c: (len(LETTERS), *_pair_levels(e, c)), _order
  ),
  "count": Task("multiple_choice", lambda e, c: (e, e), _count),
  "order_two": ORDER_TWO,
  "order_ways": _with_short_cut(*_WAYS)._replace(think=_either_way),
  "order_skewed": _with_short_cut(*_SKEWED),
  "grounded_qa": Task(
    "grounded_qa",
    lambda e, c: (len(LETTERS), c, len(_places(e))),
    _grounded_qa,
    _seconds_long,
    _cited,
  ),
  "grounding": Task(
    "interval", lambda e, c: (c, e), _grounding, _seconds_long, _cited, _when
  ),
  "regression": Task(
    "regression",
    _pair_levels,
    _regression,
    _seconds_long,
    _starts,
    _seconds_after,
  ),
  "numerical": Task("numerical", lambda e, c: (e,), _numerical),
  "free_form": Task(
    "free_form",
    lambda e, c: (c, len(synthetic_video.SHAPES), e),
    _free_form,
  ),
  "events": Task(
    "free_form",
    lambda e, c: (math.perm(c, e),),
    _sequence("Which colours appear, in order?"),
    think=_cited,
    answer=_colours,
  ),
  "caption": Task(
    "caption",
    lambda e, c: (math.perm(c, e),),
    _sequence("What happens in the video?"),
    answer=_sentence,
  ),
  "tracking": Task(
    "tracking",
    lambda e, c: (c,),
    _tracking,
    _throughout,
    _described,
    _track,
    looks="moves",
    num_events=1,
  ),
  "long": NEEDLE._replace(times=_third_long),
  "ramp": NEEDLE._replace(times=_third_long, looks="fades"),
  "many_cuts": NEEDLE._replace(times=_among_cuts, num_events=1),
}


def to_sample(spec: Spec, video: str) -> records.Sample:
  """The question as every source has it.

  Args:
    spec: from `synthetic_specs.make_specs`.
    video: path of its file.
  """
  task = TASKS[spec.task]
  shown = relevant(spec)
  return records.Sample(
    id=spec.id,
    video=video,
    question=spec.question,
    options=spec.options,
    answer=spec.answer,
    kind=task.kind,
    task=spec.task,
    start_s=spec.evidence[0][0],
    end_s=spec.evidence[-1][1],
    evidence=spec.evidence,
    reasoning=task.think(spec),
    source="synthetic",
    boxes=boxes(spec) if task.kind == "tracking" else (),
    events=tuple(f"a {e.colour} {e.shape} appears" for e in shown)
    if task.kind == "caption"
    else (),
  )
