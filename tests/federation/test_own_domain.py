"""Whose domain a question is of: the stated optimum in NumPy, 1/2 where nothing tells, and what cannot be learnt."""

from __future__ import annotations

import math
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from cotune.errors import InputError
from cotune.federation import own_domain
from cotune.federation.own_domain import STRENGTHS, OwnDomain

KITCHEN = ["Is the oven hot?", "Is the pan clean?", "Where is the oven glove?", "Is the kettle hot?"]
SUMS = ["2 + 2 =", "3 + 4 =", "7 + 1 =", "5 + 5 =", "Is 7 odd?"]


def terms_of(prompt: str) -> list[str]:
    words = re.findall(r"\w+|\S", prompt.lower())
    return [*words, *(f"{first} {second}" for first, second in pairwise(words))]


def features(prompt: str, document_count: Counter[str], num_documents: int) -> dict[str, float]:
    """tf-idf of words and pairs, of length 1, as the module says."""
    terms = Counter(terms_of(prompt))
    weighed = {
        term: count * (math.log((1 + num_documents) / (1 + document_count[term])) + 1)
        for term, count in terms.items()
        if term in document_count
    }
    length = math.sqrt(sum(value**2 for value in weighed.values()))
    return {term: value / length for term, value in weighed.items()}


def test_chances_are_those_of_the_stated_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    strength = 3.0
    monkeypatch.setattr(own_domain, "STRENGTHS", (strength,))
    prompts = [*KITCHEN, *SUMS]
    told = np.array(OwnDomain.of(KITCHEN, SUMS).chances(prompts))
    count: Counter[str] = Counter()
    for one in prompts:
        count.update(set(terms_of(one)))
    rows = [features(one, count, len(prompts)) for one in prompts]
    inputs = np.array([[row.get(term, 0.0) for term in count] for row in rows])
    is_own = np.arange(len(prompts)) < len(KITCHEN)
    # Both kinds weigh alike, and all together as many as there are.
    weights = np.where(is_own, len(prompts) / (2 * len(KITCHEN)), len(prompts) / (2 * len(SUMS)))
    # Where the derivative is 0, w is the sum of the texts by their errors, and the errors of both kinds are alike.
    errors = weights * (is_own - told)
    slopes = strength * inputs.T @ errors
    assert errors.sum() == pytest.approx(0, abs=1e-3)
    odds = np.log(told / (1 - told))
    assert odds - odds[0] == pytest.approx(inputs @ slopes - inputs[0] @ slopes, abs=2e-2)
    assert all(told[is_own] > 0.5) and all(told[~is_own] < 0.5)


def test_a_new_question_is_told_by_its_words_and_nothing_tells_where_texts_are_alike() -> None:
    domain = OwnDomain.of(KITCHEN, SUMS)
    ours, theirs = domain.chances(["Is the glove in the pan?", "4 + 9 ="])
    assert ours > 0.5 > theirs
    assert domain.chances([]) == []
    alike = OwnDomain.of(KITCHEN * 3, KITCHEN * 5)
    assert alike.chances(KITCHEN) == pytest.approx([0.5] * len(KITCHEN), abs=0.05)
    # The same whatever each kind's number.
    many = OwnDomain.of(KITCHEN, SUMS * 20).chances(["Is the glove in the pan?", "4 + 9 ="])
    assert many[0] > 0.5 > many[1]


def test_what_is_written_without_spaces_has_words_too() -> None:
    own, others = ["台所はどこですか", "鍋はどこですか", "台所の鍋"], ["二足す二", "三足す四", "五足す一"]
    ours, theirs = OwnDomain.of(own, others).chances(["鍋は台所ですか", "四足す二"])
    assert ours > 0.5 > theirs


def test_the_strength_is_that_of_the_least_loss_on_prompts_that_were_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[float] = []
    real = own_domain._classifier
    monkeypatch.setattr(own_domain, "_classifier", lambda strength: tried.append(strength) or real(strength))
    # Of labels by chance nothing can be learnt, of others much.
    words = [f"word{number} tail{number}" for number in range(40)]
    OwnDomain.of(words[::2], words[1::2])
    assert tried[:-1] == list(STRENGTHS) and tried[-1] == min(STRENGTHS)
    tried.clear()
    OwnDomain.of([f"pan {one}" for one in words], [f"sum {one}" for one in words])
    assert tried[-1] == max(STRENGTHS)


@pytest.mark.parametrize(
    ("own", "others", "said"),
    [
        (["one"], SUMS, "own has 1 prompts"),
        (KITCHEN, ["two", "  "], "others has 1 prompts"),
        ([], [], "own has 0 prompts"),
    ],
)
def test_too_little_to_learn_from_is_refused(own: list[str], others: list[str], said: str) -> None:
    with pytest.raises(InputError, match=f"{said}.*weigh both models alike"):
        OwnDomain.of(own, others)
