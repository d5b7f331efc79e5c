from __future__ import annotations

from typing import Any

import pytest

from cotune.errors import InputError
from cotune.evaluation.workload import Workload


def test_numbers_of_a_step() -> None:
    load = Workload(batch=3, length=10, targets=4, dtype="bfloat16")
    assert (load.num_tokens, load.num_targets, load.number_bytes) == (30, 12, 2)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"length": -1}, "length is -1"),
        ({"length": 5, "targets": 6}, "targets is 6, expected 1 to the length, 5"),
        ({"dtype": "int3"}, "dtype is 'int3', expected one of float32, bfloat16, float16"),
    ],
)
def test_impossible_steps_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Workload(**wrong)
