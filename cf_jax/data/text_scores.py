"""How alike two texts are: word error rate and ROUGE, on the host.

Edit distance and longest common subsequence are rapidfuzz's, the stems
Snowball's; both take time linear in the length of the answer for a given truth.
"""

import collections
import functools
import re
from collections.abc import Sequence

import rapidfuzz.distance
import snowballstemmer

_WORD = re.compile(r"[a-z0-9]+")
_STEMMER = snowballstemmer.stemmer("english")


def word_accuracy(answer: str, truth: str) -> float:
  """`1 - word error rate`, at least 0 (arXiv 2503.21776, answers by OCR).

  The word error rate is the edit distance in words over the words of the truth;
  case and punctuation count.

  Args:
    answer: what was said.
    truth: what was to be read.

  Returns:
    A number in [0, 1].
  """
  said, meant = answer.split(), truth.split()
  distance = rapidfuzz.distance.Levenshtein.distance(meant, said)
  return max(0.0, 1 - distance / max(1, len(meant)))


@functools.lru_cache(maxsize=65536)
def _stem(word: str) -> str:
  return _STEMMER.stemWord(word) if len(word) > 3 else word


def stems(text: str) -> list[str]:
  """The words of ROUGE: runs of a to z and digits, stemmed from 4 letters on.

  Other scripts have none, as in the reference implementation.
  """
  return [_stem(word) for word in _WORD.findall(text.lower())]


def _f_measure(shared: int, said: int, meant: int) -> float:
  return 2 * shared / (said + meant) if shared else 0.0


def _shared_ngrams(said: Sequence[str], meant: Sequence[str], n: int) -> float:
  counts = [
    collections.Counter(zip(*(words[i:] for i in range(n))))
    for words in (said, meant)
  ]
  shared = sum((counts[0] & counts[1]).values())
  return _f_measure(shared, counts[0].total(), counts[1].total())


def rouge(answer: str, truth: str) -> tuple[float, float, float]:
  """F measures of ROUGE-1, ROUGE-2 and ROUGE-L (Lin, 2004), with stems.

  Differs from the package `rouge-score` only where the stemmers do (Snowball's
  English against NLTK's Porter).

  Args:
    answer: what was said.
    truth: what was meant.

  Returns:
    Three numbers in [0, 1].
  """
  said, meant = stems(answer), stems(truth)
  common = rapidfuzz.distance.LCSseq.similarity(said, meant)
  return (
    _shared_ngrams(said, meant, 1),
    _shared_ngrams(said, meant, 2),
    _f_measure(common, len(said), len(meant)),
  )


def mean_rouge(answer: str, truth: str) -> float:
  """Mean of the three F measures of `rouge` (arXiv 2503.21776, free form)."""
  return sum(rouge(answer, truth)) / 3
