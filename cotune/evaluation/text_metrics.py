"""How close a generated text is to its references: Rouge-L, exact match, token F1, accuracy.

Each metric takes one prediction and its references (a string, or several of which the best counts) and gives
a score in [0, 1]; `score_corpus` turns any of them into a mean with an interval. Exact match and F1 follow the
official SQuAD v1.1 script (Rajpurkar et al., 2016, `evaluate-v1.1.py`), which reports them times 100.

Empty texts, after normalisation, as in that script: exact match of two empty answers is 1, since they are
equal; F1 is 0 as soon as no token is shared, so two empty answers have F1 0 (the v2.0 script gives 1). Rouge-L
with an empty side is 0, as in the rouge-score package.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.evaluation.intervals import bootstrap_interval

References: TypeAlias = str | Sequence[str]
TextMetric: TypeAlias = Callable[[str, References], float]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, kw_only=True)
class CorpusScore:
    """One metric over a set of examples."""

    mean: float
    """Mean over the examples."""
    interval: tuple[float, float]
    """Bootstrap interval of the mean, (low, high)."""
    values: tuple[float, ...]
    """The score of each example, in order."""


def normalize_answer(text: str) -> str:
    """SQuAD's answer form: lower case, no ASCII punctuation, no articles, single spaces.

    The order matters: punctuation goes before articles, so "the-end" becomes "theend" and keeps its "the".

    Example:
        >>> normalize_answer("  The  Eiffel-Tower, a tower! ")
        'eiffeltower tower'
    """
    bare = text.lower().translate(_WITHOUT_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact_match(prediction: str, references: References) -> float:
    """1.0 if the normalised prediction equals a normalised reference, else 0.0.

    Example:
        >>> exact_match("the Seine.", ["Loire", "Seine"])
        1.0
    """
    answer = normalize_answer(prediction)
    return max(float(answer == normalize_answer(reference)) for reference in _as_list(references))


def token_f1(prediction: str, references: References) -> float:
    """Harmonic mean of token precision and recall after normalisation, the best over the references.

    Tokens are counted with multiplicity: F1 = 2 s / (n_prediction + n_reference), s tokens shared.

    Example:
        >>> token_f1("a red red car", "red car")
        0.8
    """
    return max(_pair_f1(prediction, reference) for reference in _as_list(references))


def rouge_l(prediction: str, references: References, *, use_stemmer: bool = False) -> float:
    """Rouge-L F1 (Lin, 2004) by the rouge-score package, the best over the references.

    The longest common subsequence of length l gives precision l / n_prediction and recall l / n_reference.
    Tokens are runs of a-z and 0-9 after lower-casing: a text without any (another script, say) scores 0.

    Args:
        use_stemmer: strip English word endings with the Porter stemmer first. Off by default: a personal
            style lives in the endings too. Say so when comparing with tables that stem.

    Raises:
        InputError: no reference, or rouge-score is not installed.

    Example:
        >>> round(rouge_l("the cat sat", "the cat is here"), 4)
        0.5714
    """
    scorer = _rouge_scorer(use_stemmer)
    return max(float(scorer.score(reference, prediction)["rougeL"].fmeasure) for reference in _as_list(references))


def accuracy(predictions: Sequence[object], labels: Sequence[object]) -> float:
    """Share of `predictions` that equal their label, compared as Python values without normalisation.

    Raises:
        InputError: no example, or not as many predictions as labels.
    """
    _check_paired(len(predictions), len(labels), "labels")
    hits = sum(bool(prediction == label) for prediction, label in zip(predictions, labels, strict=True))
    return hits / len(labels)


def score_corpus(
    metric: TextMetric,
    predictions: Sequence[str],
    references: Sequence[References],
    *,
    seed: int,
    level: float = 0.95,
) -> CorpusScore:
    """Mean of `metric` over examples, with its bootstrap interval.

    Args:
        metric: `rouge_l`, `exact_match`, `token_f1`, or one of them wrapped with `functools.partial`.
        predictions: one text for each example.
        references: one reference, or a list of them, for each example.
        seed: of the bootstrap.
        level: confidence of the interval.

    Raises:
        InputError: no example, or not as many predictions as references.

    Example:
        >>> score_corpus(exact_match, ["Rome", "Oslo"], ["rome", "Bergen"], seed=0).mean
        0.5
    """
    _check_paired(len(predictions), len(references), "references")
    values = [metric(*pair) for pair in zip(predictions, references, strict=True)]
    scores: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    return CorpusScore(
        mean=float(scores.mean()),
        interval=bootstrap_interval(scores, seed, level),
        values=tuple(values),
    )


def _pair_f1(prediction: str, reference: str) -> float:
    answer, truth = normalize_answer(prediction).split(), normalize_answer(reference).split()
    num_shared = sum((Counter(answer) & Counter(truth)).values())
    if num_shared == 0:
        return 0.0
    return 2.0 * num_shared / (len(answer) + len(truth))


def _as_list(references: References) -> Sequence[str]:
    if isinstance(references, str):
        return [references]
    if not references:
        raise InputError("references is empty, expected at least one reference text for each prediction")
    return references


def _check_paired(num_predictions: int, num_others: int, name: str) -> None:
    if num_predictions != num_others:
        raise InputError(f"{num_predictions} predictions met {num_others} {name}, expected as many of each")
    if num_predictions == 0:
        raise InputError("predictions is empty, expected at least one example")


@lru_cache(maxsize=2)
def _rouge_scorer(use_stemmer: bool) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise InputError("Rouge-L needs the rouge-score package; pip install 'cotune[train]'") from error
    return RougeScorer(["rougeL"], use_stemmer=use_stemmer)
