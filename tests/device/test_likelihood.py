from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from toy import VOCAB, ToyBackbone, toy_personal

from cotune.device.likelihood import base_nats, score_tokens, token_nats
from cotune.errors import InputError
from cotune.wire.features import SequenceFeatures


@pytest.fixture
def features() -> SequenceFeatures:
    return ToyBackbone().features(np.arange(3, 12), 4, VOCAB)


def _nats(logits: np.ndarray, target: int) -> float:
    return float(np.log(np.exp(logits.astype(np.float64)).sum()) - logits[target])


def test_each_mode_by_its_formula(features: SequenceFeatures) -> None:
    personal = toy_personal(0.5)
    assert personal.gate is not None
    asked = [personal.gate.consults(h.astype(np.float32)) for h in features.hidden]
    assert 0 < sum(asked) < len(asked)
    for t, target in enumerate(features.target_ids):
        correction = personal.corrector.open().correct(1, features.tap_codes[t], features.tap_scales[t])
        z, delta = features.top_logits[t], personal.output_basis.delta(correction)
        expected = {
            "integration": z + delta,
            "ladder": delta,
            "spa": z + delta if asked[t] else z,
            "separation": delta if asked[t] else z,
        }
        for mode, logits in expected.items():
            assert token_nats(features, personal, mode)[t] == pytest.approx(_nats(logits, target), abs=1e-5)
        assert base_nats(features)[t] == pytest.approx(_nats(z, target), abs=1e-4)


def test_partial_logits_are_refused() -> None:
    partial = ToyBackbone().features(np.arange(3, 12), 4, 8)
    with pytest.raises(InputError, match="expected all 97"):
        token_nats(partial, toy_personal(), "integration")


def test_the_likeliest_token_is_that_of_the_mode(features: SequenceFeatures) -> None:
    personal = toy_personal(2.0)
    logits = [
        features.top_logits[t]
        + personal.output_basis.delta(
            personal.corrector.open().correct(1, features.tap_codes[t], features.tap_scales[t])
        )
        for t in range(len(features))
    ]
    likeliest = np.array([each.argmax() for each in logits])
    targets = np.where(np.arange(len(features)) % 2 == 0, likeliest, (likeliest + 1) % VOCAB)
    asked = replace(features, target_ids=targets)
    nats, is_likeliest = score_tokens(asked, personal, "integration")
    assert is_likeliest.tolist() == [t % 2 == 0 for t in range(len(features))]
    np.testing.assert_array_equal(nats, token_nats(asked, personal, "integration"))
    np.testing.assert_array_equal(score_tokens(asked, personal, "integration", num_lead=2)[1], is_likeliest[2:])
