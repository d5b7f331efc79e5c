"""Sealed bytes: only the right key, and only in the right place."""

from __future__ import annotations

import sys

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.errors import InputError, MismatchError
from cotune.federation import sealing
from cotune.federation.sealing import OVERHEAD_BYTES, SealingKey, is_sealed, seal, unseal

KEY = SealingKey(bytes(range(32)))
BLOCK = seal(b"personal weights", KEY, "checkpoint-000012/state.json")


def test_the_layout_is_the_one_that_the_module_describes() -> None:
    assert BLOCK[:16] == b"cotune sealed 1\0"
    assert BLOCK[16:24] == KEY.public_id
    associated = b"cotune sealed 1\0checkpoint-000012/state.json"
    assert AESGCM(KEY.value).decrypt(BLOCK[24:36], BLOCK[36:], associated) == b"personal weights"
    assert len(BLOCK) == 16 + OVERHEAD_BYTES
    assert is_sealed(BLOCK)
    assert not is_sealed(b"{}")


@given(data=st.binary(max_size=100))
@settings(max_examples=25, deadline=None)
def test_what_is_sealed_comes_back_and_never_looks_the_same(data: bytes) -> None:
    one, other = seal(data, KEY, "a"), seal(data, KEY, "a")
    assert unseal(one, KEY, "a") == unseal(other, KEY, "a") == data
    assert one[36:] != other[36:]


@given(bit=st.integers(0, 8 * len(BLOCK) - 1), cut=st.integers(0, len(BLOCK) - 1))
@settings(max_examples=100, deadline=None)
def test_altered_and_cut_blocks_are_refused(bit: int, cut: int) -> None:
    altered = bytearray(BLOCK)
    altered[bit // 8] ^= 1 << bit % 8
    for block in (bytes(altered), BLOCK[:cut]):
        with pytest.raises(InputError):
            unseal(block, KEY, "checkpoint-000012/state.json")


def test_another_place_and_another_key_are_refused() -> None:
    with pytest.raises(InputError, match="belongs in another place"):
        unseal(BLOCK, KEY, "checkpoint-000013/state.json")
    with pytest.raises(MismatchError, match="give the key that it was sealed with"):
        unseal(BLOCK, SealingKey.generate(), "checkpoint-000012/state.json")


def test_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "MAX_DATA_BYTES", 15)
    with pytest.raises(InputError, match="at most 15"):
        seal(b"personal weights", KEY, "a")
    with pytest.raises(InputError, match="no whole sealed block"):
        unseal(BLOCK, KEY, "checkpoint-000012/state.json")


def test_a_missing_library_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    for act in (lambda: seal(b"x", KEY, "a"), lambda: unseal(BLOCK, KEY, "checkpoint-000012/state.json")):
        with pytest.raises(InputError, match=r"pip install 'cotune\[federated\]'"):
            act()
