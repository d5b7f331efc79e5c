"""Names and shapes in one array: there and back, and nothing else is taken for them."""

from __future__ import annotations

import numpy as np
import pytest

from cotune.errors import InputError
from cotune.federation.array_layout import LAYOUT, from_layout, to_layout


def test_there_and_back_with_names_sorted() -> None:
    shapes = {"q.lora_B.weight": (7, 2), "q.lora_A.weight": (2, 9)}
    arrays = to_layout(shapes) | {"codes": np.zeros(3, np.uint8)}
    assert from_layout(arrays) == shapes and list(from_layout(arrays)) == sorted(shapes)
    assert arrays[LAYOUT].dtype == np.uint8 and arrays[LAYOUT].nbytes < 60


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "are no JSON"),
        ("[1]", "expected two sizes"),
        ('{"a":[2]}', "expected two sizes"),
        ('{"a":[2,true]}', "expected two sizes"),
        ('{"a":[2,-1]}', "expected two sizes"),
    ],
)
def test_anything_else_is_refused(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        from_layout({LAYOUT: np.frombuffer(text.encode(), np.uint8)})
    with pytest.raises(InputError, match="have no 'layout'"):
        from_layout({})
