"""How near a generated answer is to the right ones: exact match and F1 as the script of SQuAD 1.1 defines them, ROUGE-L.

    F1 = 2 P R / (P + R), P and R over the words that answer and reference share, counted with repeats

Several right answers: the best of them counts.

References:
    Rajpurkar et al. 2016, SQuAD: 100,000+ Questions for Machine Comprehension of Text (arXiv 1606.05250) and its evaluation script.
    Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from edgezo.errors import ConfigError

Metric = Callable[[str, str], float]


def normalize_answer(text: str) -> str:
    """Lower case, no punctuation, no English articles, single spaces."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(answer: str, reference: str) -> float:
    """1 where the normalized texts are equal."""
    return float(normalize_answer(answer) == normalize_answer(reference))


def f1(answer: str, reference: str) -> float:
    """F1 over the words of the normalized texts."""
    found, wanted = normalize_answer(answer).split(), normalize_answer(reference).split()
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted)) if shared else 0.0


def rouge_l(answer: str, reference: str) -> float:
    """F of the longest common subsequence of words, by the rouge-score library, without stemming; see `require_rouge`."""
    return float(_rouge_scorer().score(reference, answer)["rougeL"].fmeasure)


METRICS: dict[str, Metric] = {"f1": f1, "exact-match": exact_match, "rouge-l": rouge_l}


def require_rouge() -> None:
    """Say what rouge-l needs before any forward is made.

    Raises:
        ConfigError: rouge-score is not installed.
    """
    _rouge_scorer()


def best_of(metric: Metric, answer: str, references: Sequence[str]) -> float:
    """The metric against the reference that is nearest."""
    return max(metric(answer, reference) for reference in references)


@cache
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ConfigError("rouge-l needs the library rouge-score; install it with: pip install rouge-score") from None
    return RougeScorer(["rougeL"], use_stemmer=False)
