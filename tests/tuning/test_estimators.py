from __future__ import annotations

import pytest

from cotune.errors import InputError
from cotune.tuning.attached import AttachedTuner
from cotune.tuning.estimators import tuner_named


def test_names() -> None:
    assert tuner_named("backprop") is AttachedTuner
    with pytest.raises(InputError, match="estimator is 'magic', expected one of backprop"):
        tuner_named("magic")
