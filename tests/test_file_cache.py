"""What features and teachers' answers share; eviction, damage and leftovers are in `test_feature_cache.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from cotune.errors import InputError
from cotune.file_cache import CHECKSUM_BYTES, FileCache, sealed, unsealed


def test_bytes_come_back_and_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.other").write_bytes(bytes(10_000))
    cache = FileCache(tmp_path, suffix=".a", what="answer", max_bytes=2 * (CHECKSUM_BYTES + 5))
    cache.put("one", b"first")
    cache.put("two", b"secon")
    assert (cache.get("one"), cache.get("two"), cache.get("three")) == (b"first", b"secon", None)
    cache.put("two", b"other")  # in its own place
    assert cache.get("one") == b"first" and cache.size_bytes == cache.max_bytes
    cache.drop("one")
    cache.drop("one")
    assert cache.get("one") is None and cache.size_bytes == CHECKSUM_BYTES + 5 == cache.stored_bytes("two")
    assert (tmp_path / "mine.other").stat().st_size == 10_000


def test_a_damaged_file_is_removed(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, suffix=".a", what="answer")
    cache.put("one", b"first")
    (tmp_path / "one.a").write_bytes(b"no seal")
    assert cache.get("one") is None and not (tmp_path / "one.a").exists()


def test_a_seal_breaks_at_any_change() -> None:
    data = sealed(b"contents")
    assert unsealed(data) == b"contents" and unsealed(sealed(b"")) == b""
    for index in range(len(data)):
        assert unsealed(data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]) is None
    assert unsealed(data[:-1]) is None and unsealed(b"") is None


def test_messages_say_which_cache(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="positive number of bytes for the answer cache"):
        FileCache(tmp_path, suffix=".a", what="answer", max_bytes=-1)
    with pytest.raises(InputError, match=r"the answer cache .* needs about 1,000,001"):
        FileCache(tmp_path, suffix=".a", what="answer", max_bytes=10**6).check_bound(1_000_001)
