from __future__ import annotations

import sys
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.errors import InputError
from cotune.evaluation.text_metrics import (
    _rouge_scorer,
    accuracy,
    exact_match,
    normalize_answer,
    rouge_l,
    score_corpus,
    token_f1,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Eiffel-Tower!", "eiffeltower"),  # punctuation goes without leaving a space
        ("a  cat\tand\nthe dog", "cat and dog"),
        ("another theme", "another theme"),  # articles are whole words
        ("the-end", "theend"),  # punctuation before articles
        ("A.", ""),
        ("«Übung»", "«übung»"),  # only ASCII punctuation, as in the script
    ],
)
def test_normalises_like_squad(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


def test_exact_match_takes_the_best_reference() -> None:
    assert exact_match("the Seine.", ["Loire", "Seine"]) == 1.0
    assert exact_match("Seine river", ["Loire", "Seine"]) == 0.0


def test_token_f1_by_hand() -> None:
    # "big red red car" against "red car": 2 tokens shared, precision 2/4, recall 2/2, F1 2/3.
    assert token_f1("a big red red car", "red car") == pytest.approx(2 / 3)
    # Multiplicity counts: one "red" of the prediction meets two of the reference: 1 shared, F1 2/3.
    assert token_f1("red", "red red") == pytest.approx(2 / 3)
    assert token_f1("red", ["blue", "red"]) == 1.0
    assert token_f1("red", "blue") == 0.0


def test_empty_answers_as_in_the_squad_v1_script() -> None:
    assert exact_match("", "the") == 1.0
    assert token_f1("", "") == 0.0
    assert token_f1("", "red") == token_f1("red", "") == 0.0
    assert rouge_l("", "") == rouge_l("", "red") == rouge_l("red", "") == 0.0


def test_rouge_l_by_hand() -> None:
    # Longest common subsequence of "the cat sat" and "the cat is here" is "the cat": precision 2/3, recall 2/4.
    assert rouge_l("The cat sat.", "the cat is here") == pytest.approx(4 / 7)
    # Order matters: "b a" and "a b" share a subsequence of one token out of two.
    assert rouge_l("b a", "a b") == pytest.approx(0.5)
    assert rouge_l("b a", ["a b", "b a"]) == 1.0


def test_stemming_is_a_choice() -> None:
    assert rouge_l("walking", "walked") == 0.0
    assert rouge_l("walking", "walked", use_stemmer=True) == 1.0


def test_rouge_l_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    _rouge_scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(InputError, match=r"cotune\[train\]"):
        rouge_l("a", "a")


def test_accuracy() -> None:
    assert accuracy([1, 2, 3, 4], [1, 2, 0, 4]) == 0.75
    with pytest.raises(InputError, match="1 predictions met 2 labels"):
        accuracy([1], [1, 2])
    with pytest.raises(InputError, match="at least one"):
        accuracy([], [])


def test_corpus_score_is_the_mean_with_its_interval() -> None:
    score = score_corpus(exact_match, ["Rome", "Oslo", "Bern"], ["rome", ["Bergen", "Oslo"], "Basel"], seed=0)
    assert score.values == (1.0, 1.0, 0.0)
    assert score.mean == pytest.approx(2 / 3)
    assert score.interval == (0.0, 1.0)
    stemmed = score_corpus(partial(rouge_l, use_stemmer=True), ["walking"], ["walked"], seed=0)
    assert (stemmed.mean, stemmed.interval) == (1.0, (1.0, 1.0))


def test_corpus_score_says_what_is_wrong() -> None:
    with pytest.raises(InputError, match="2 predictions met 1 references"):
        score_corpus(token_f1, ["a", "b"], ["a"], seed=0)
    with pytest.raises(InputError, match="at least one reference"):
        score_corpus(token_f1, ["a"], [[]], seed=0)


words = st.lists(st.sampled_from(["red", "blue", "car", "the", "a", "Sea!", ""]), max_size=6).map(" ".join)


@settings(deadline=None)  # the first call imports rouge-score
@given(words, words, words)
def test_metrics_are_symmetric_bounded_and_gain_from_references(first: str, second: str, third: str) -> None:
    for metric in (exact_match, token_f1, rouge_l):
        alone = metric(first, second)
        assert 0.0 <= alone <= 1.0
        assert alone == pytest.approx(metric(second, first))
        assert metric(first, [second, third]) == max(alone, metric(first, third))
    assert exact_match(first, second) <= max(token_f1(first, second), float(not normalize_answer(first)))


@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalize_answer(text)
    assert normalize_answer(once) == once
