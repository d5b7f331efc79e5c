from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest

from cotune.data.templates import Example
from cotune.errors import AuditError, InputError
from cotune.evaluation.canaries import SecretSpace, plant
from cotune.evaluation.memorisation import (
    Audit,
    AuditConfig,
    Limits,
    TextScore,
    audit,
    extraction,
    membership,
)

CONFIG = AuditConfig(num_prefix_tokens=1, num_next_tokens=2, num_candidates=63)


def text_score(nats: Sequence[float], likeliest: Sequence[bool]) -> TextScore:
    return TextScore(np.array(nats), np.array(likeliest))


def test_extraction_looks_at_the_next_tokens_alone() -> None:
    scores = [
        text_score([1.0] * 4, [False, True, True, False]),  # the second and third count
        text_score([1.0] * 3, [True, True, False]),
        text_score([1.0] * 3, [True, False, True]),
        text_score([1.0] * 2, [True, True]),  # too short
    ]
    found = extraction(scores, CONFIG)
    assert (found.num_texts, found.num_too_short, found.num_extracted) == (3, 1, 1)
    assert found.share == pytest.approx(1 / 3)
    with pytest.raises(InputError, match=r"no text has 5 \+ 2 target tokens, the longest has 4"):
        extraction(scores, AuditConfig(num_prefix_tokens=5, num_next_tokens=2))


def test_membership_by_hand() -> None:
    train = [text_score([1.0, 3.0], [True] * 2), text_score([4.0], [True])]  # means 2 and 4
    heldout = [text_score([4.0], [True]), text_score([3.0, 3.0, 3.0], [True] * 3)]  # means 4 and 3
    found = membership(train, heldout)
    assert found.train_nats == pytest.approx(8 / 3) and found.heldout_nats == pytest.approx(13 / 4)
    assert found.gap == pytest.approx(13 / 4 - 8 / 3)
    # Pairs: 2 < 4, 2 < 3, 4 = 4 (half), 4 > 3.
    assert found.auc == pytest.approx(2.5 / 4)
    with pytest.raises(InputError, match="at least one of each"):
        membership(train, [])


class Models:
    """One that knows some texts by heart, and one that knows nothing."""

    def __init__(self, known: set[tuple[str, str]]) -> None:
        self.known = known

    def __call__(self, examples: Sequence[Example]) -> dict[str, list[TextScore]]:
        rng = np.random.default_rng(len(examples))
        scores: dict[str, list[TextScore]] = {"tuned": [], "base": []}
        for example in examples:
            guess = text_score(5 + rng.random(4), [False] * 4)
            knows = (example.prompt, example.target) in self.known
            scores["tuned"].append(text_score([0.1] * 4, [True] * 4) if knows else guess)
            scores["base"].append(guess)
        return scores


TEXTS = [Example(f"p{number}", f" t{number}") for number in range(8)]
OTHERS = [Example(f"q{number}", f" t{number}") for number in range(4)]


def planted() -> tuple[Audit, Audit]:
    """An audit of a model that knows two texts and the canary that was planted 16 times, and one of an innocent."""
    texts, manifest = plant(TEXTS, (1, 16), space=SecretSpace(length=6), seed=0)
    loud = manifest.canaries[-1]
    known = {(each.prompt, each.target) for each in TEXTS[:2]} | {(loud.prompt, loud.secret)}
    return tuple(audit(Models(k), texts, CONFIG, heldout=OTHERS, manifest=manifest) for k in (known, set()))  # type: ignore[return-value]


def test_a_whole_audit() -> None:
    found, innocent = planted()
    tuned, base = found.models
    assert (tuned.name, base.name) == ("tuned", "base")
    assert tuned.extraction.num_texts == 8 and tuned.extraction.share == 0.25
    assert base.extraction.share == 0.0
    assert tuned.heldout_extraction is not None and tuned.heldout_extraction.num_texts == 4
    assert tuned.membership is not None and tuned.membership.gap > 1
    assert [each.times for each in tuned.exposures] == [0, 1, 16]
    assert tuned.exposures[-1].bits == tuned.exposures[-1].max_bits == 6.0
    assert base.exposures[-1].bits < 6.0
    largest = tuned.largest_exposure()
    assert largest is not None and largest.times == 16
    assert innocent.models[0].extraction.share == 0.0
    as_json = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert as_json["models"][0]["extraction"]["share"] == 0.25
    assert as_json["models"][0]["exposures"][2]["bits"] == 6.0
    assert as_json["models"][0]["membership"]["gap"] == tuned.membership.gap


def test_without_canaries_and_heldout_texts() -> None:
    found = audit(Models(set()), TEXTS, CONFIG)
    assert found.models[0].membership is None and found.models[0].exposures == ()
    assert found.models[0].largest_exposure() is None
    assert found.to_dict()["models"][0]["heldout_extraction"] is None


def test_a_limit_fails_what_breaks_it_and_nothing_else() -> None:
    found, innocent = planted()
    with pytest.raises(
        AuditError, match=r"a canary planted 16 times has exposure 6\.00 bits, allowed are 5\.9"
    ) as caught:
        found.check(Limits(max_exposure=5.9))
    assert caught.value.exit_code == 3
    with pytest.raises(AuditError, match=r"2 of 8 training texts \(25.0 %\) are reproduced, allowed are 20 %"):
        found.check(Limits(max_extraction=0.2))
    with pytest.raises(AuditError, match=r"6\.00 bits.*are reproduced"):
        found.check(Limits(max_exposure=1.0, max_extraction=0.0))
    found.check(Limits())
    found.check(Limits(max_exposure=6.0, max_extraction=0.25))
    innocent.check(Limits(max_extraction=0.0))


def test_what_was_left_out_does_not_break_a_limit() -> None:
    _, manifest = plant(TEXTS, (1,), space=SecretSpace(length=6), seed=0)
    out = manifest.canaries[0]
    found = audit(Models({(out.prompt, out.secret)}), TEXTS, CONFIG, manifest=manifest)
    assert found.models[0].exposures[0].bits == 6.0
    largest = found.models[0].largest_exposure()
    assert largest is not None and largest.times == 1


def test_limits_that_nothing_could_break() -> None:
    _, manifest = plant(TEXTS, (1,), space=SecretSpace(length=1), seed=0)
    with pytest.raises(InputError, match="there are no canaries in the texts"):
        Limits(max_exposure=1.0).check_possible(CONFIG, None)
    # A space of ten shows log2(10) bits, whatever the number of candidates is.
    with pytest.raises(InputError, match=r"show 3\.32 bits at most"):
        Limits(max_exposure=math.log2(10)).check_possible(CONFIG, manifest)
    Limits(max_exposure=3.3).check_possible(CONFIG, manifest)
    Limits(max_extraction=0.1).check_possible(CONFIG, None)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Limits(max_exposure=-1.0), "max_exposure is -1.0"),
        (lambda: Limits(max_exposure=math.nan), "max_exposure is nan"),
        (lambda: Limits(max_extraction=1.5), "max_extraction is 1.5"),
        (lambda: AuditConfig(num_prefix_tokens=-1), "num_prefix_tokens is -1"),
        (lambda: AuditConfig(num_next_tokens=0), "num_next_tokens is 0"),
        (lambda: AuditConfig(num_candidates=0), "num_candidates is 0"),
        (lambda: audit(Models(set()), [], CONFIG), "no training texts to audit"),
    ],
)
def test_bad_input(make: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        make()  # type: ignore[operator]
