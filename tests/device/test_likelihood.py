from __future__ import annotations

import numpy as np
import pytest
from toy import VOCAB, ToyBackbone, toy_personal

from cotune.device.likelihood import base_nats, token_nats
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
