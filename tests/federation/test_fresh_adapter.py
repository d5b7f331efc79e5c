"""The adapter of a run: sizes that no model bears are refused before room is taken, numbers come back as they were."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_models import tiny_backbone

from cotune.errors import InputError
from cotune.federation.backbone_model import to_arrays
from cotune.federation.fresh_adapter import fresh_adapter, trained_adapter
from cotune.federation.settings import AdapterSettings


@pytest.mark.parametrize(
    ("own", "words"),
    [
        # Each would take hundreds of gigabytes.
        (AdapterSettings(rank=10**9), r"adapter\.rank is 1000000000"),
        (
            AdapterSettings(kind="prefix", virtual_tokens=10**9),
            r"adapter\.virtual_tokens is 1000000000, expected fewer",
        ),
    ],
)
def test_sizes_that_no_model_bears_are_refused_before_room_is_taken(own: AdapterSettings, words: str) -> None:
    with pytest.raises(InputError, match=words):
        fresh_adapter(own, tiny_backbone("llama"), seed=0)


def test_numbers_of_a_federation_become_the_adapters() -> None:
    backbone = tiny_backbone("llama")
    fresh = fresh_adapter(AdapterSettings(rank=2), backbone, seed=0)
    arrays = {name: array + np.float32(1) for name, array in to_arrays(dict(fresh.params)).items()}
    made = trained_adapter(fresh, arrays)
    assert all(np.array_equal(made.params[name].numpy(), array) for name, array in arrays.items())
    assert not any(np.array_equal(fresh.params[name].numpy(), array) for name, array in arrays.items())
