"""Settings of malloc, or none where the C library has none; what they do is tested where they are used."""

from __future__ import annotations

import pytest

from cotune import malloc


@pytest.mark.parametrize("refuses", (-1, -3, 0))
def test_both_settings_are_made_and_a_refusal_is_told(monkeypatch: pytest.MonkeyPatch, refuses: int) -> None:
    made: list[tuple[int, int]] = []

    class Libc:
        def mallopt(self, setting: int, value: int) -> int:
            made.append((setting, value))
            return int(setting != refuses)

    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda name: Libc())
    assert malloc.map_blocks(7, keep_bytes=5) is (refuses == 0)
    assert made == [(-3, 7), (-1, 5)][: 1 if refuses == -3 else 2]
