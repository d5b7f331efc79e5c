"""Trying rewrites: what is asked, what is thrown away, what they are worth."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from redactors import redactor_here
from rewriting_edges import Edge
from scripted_clouds import MemoryCloud

from cotune.errors import BudgetError, InputError
from cotune.evaluation import exact_match
from cotune.sandwich.budget import Budget, Purse
from cotune.sandwich.cloud_gate import CloudGate
from cotune.sandwich.examples import PrivateExample
from cotune.sandwich.pipeline import Pipeline, PipelineConfig
from cotune.sandwich.rewrite_trials import DrawConfig, RewriteRound, Trials, questions_of

EXAMPLE = PrivateExample("Where does Ann Lee live, of Red Fox House?", "Rome", ("Ann Lee", "Red Fox House"))


@pytest.fixture
def cloud() -> MemoryCloud:
    return MemoryCloud(lambda text: "Rome" if "Town" in text else "no idea")


@pytest.fixture
def trials(cloud: MemoryCloud) -> Iterator[Trials]:
    with redactor_here() as redactor:
        line = Pipeline(redactor, CloudGate(cloud, purse=Purse(Budget(calls=6))), PipelineConfig(model="m"))
        yield Trials(Edge(), line, [EXAMPLE], exact_match, "Ask: {request}", DrawConfig(), key=b"k")


def test_a_rewrite_is_worth_its_answer_and_what_would_be_sent(trials: Trials, cloud: MemoryCloud) -> None:
    request = trials.ask(0, "one", share=1.0)
    # The house stands in no dictionary, so that the request as it is leaks one of two units.
    assert (request.plain.loss, request.plain.leak, request.plain.is_sent) == (1.0, 0.5, True)
    assert request.read == f"Ask: {request.plain.text}" and "<PERSON_" in request.read
    texts = ["Town?", "Town?", "", "Red Fox House?", "Red, the foxy House: Fox?", request.plain.text]
    found = trials.try_texts(request, texts).rewrites
    # Of the house's three words all stand close together in the fourth: sent, since it does not stand there as it is.
    assert [(each.loss, each.leak, each.is_sent) for each in found] == [
        (0.0, 0.0, True),
        (1.0, 0.5, False),
        (1.0, 0.5, True),
        (1.0, 0.5, True),
    ]
    assert found[3] is request.plain and len(cloud.requests) == 3
    round_of = RewriteRound.of([trials.try_texts(request, texts)], margin=0.0)
    assert len(cloud.requests) == 3
    assert (round_of.num_rewrites, round_of.num_leaks, round_of.num_accepted) == (2, 1, 1)
    assert (round_of.loss, round_of.best_loss) == (1.0, 0.0)


def test_the_best_beats_the_request_by_more_than_a_margin(trials: Trials) -> None:
    request = trials.ask(0, "one", share=1.0)
    trial = trials.try_texts(request, ["Weather?", "Town?"])
    assert trial.best(0.99) is trial.rewrites[1] and trial.best(1.0) is None
    assert trials.try_texts(request, ["Weather?"]).best(0.0) is None and trials.try_texts(request, []).best(0.0) is None


def test_placeholders_depend_on_key_and_name(trials: Trials) -> None:
    one, same, other = (trials.ask(0, name, share=1.0).read for name in ("one", "one", "other"))
    assert one == same != other


def test_no_request_is_begun_once_the_share_is_spent(trials: Trials, cloud: MemoryCloud) -> None:
    trials.ask(0, "one", share=0.5)
    trials.try_texts(trials.ask(0, "one", share=0.5), ["Town?", "Weather?"])
    with pytest.raises(BudgetError, match="share of the budget's calls"):
        trials.ask(0, "two", share=0.5)
    assert len(cloud.requests) == 3


def test_what_a_rewriter_writes_is_a_question_a_line() -> None:
    assert questions_of("\n a?\n\nb?\n") == [" a?", "b?"]


@pytest.mark.parametrize("options", [{"num_samples": 0}, {"num_batch_examples": 0}, {"temperature": 0.0}])
def test_draws_that_cannot_be_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        DrawConfig(**options)  # type: ignore[arg-type]
