"""JSON values in arrays: whole, bounded, and refused where they are none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotune.errors import InputError
from cotune.federation.json_array import from_json_array, to_json_array

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@given(value=st.recursive(TEXTS | st.integers(), lambda own: st.lists(own) | st.dictionaries(TEXTS, own), max_leaves=9))
def test_values_come_out_as_they_went_in(value: object) -> None:
    array = to_json_array(value, "they")
    assert array.dtype == np.uint8 and from_json_array(array, "they") == value


def test_too_long_a_value_is_refused_by_its_bytes() -> None:
    assert len(to_json_array(["日本"], "they", max_bytes=10)) == 10
    with pytest.raises(InputError, match="they have 10 bytes, at most 9; give fewer"):
        to_json_array(["日本"], "they", max_bytes=9)


@pytest.mark.parametrize("written", [b"", b"[", b'"\xff"', b"[" * 100_000])
def test_what_is_no_json_is_refused(written: bytes) -> None:
    with pytest.raises(InputError, match=r"they are no JSON .*; use one version of cotune"):
        from_json_array(np.frombuffer(written, np.uint8), "they")
