"""How an attached model is updated, by name: one entry for each; all of them go with all of `ADAPTATIONS`."""

from __future__ import annotations

from typing import Any

from cotune.errors import InputError
from cotune.tuning.attached import AttachedTuner, MakeTuner

ESTIMATORS: dict[str, MakeTuner[Any]] = {"backprop": AttachedTuner}


def tuner_named(name: str) -> MakeTuner[Any]:
    """What makes the `Tuner` of that name.

    Raises:
        InputError: an unknown name.
    """
    if name not in ESTIMATORS:
        raise InputError(f"estimator is {name!r}, expected one of {', '.join(ESTIMATORS)}")
    return ESTIMATORS[name]
