"""What a side network with a memory is given: every position once, in order, and again what was dropped."""

from __future__ import annotations

import numpy as np
import pytest
from toy import TAP_DIM, TAPS, ToyCorrector, ToyMemory

from cotune.device.pushed_taps import PushedTaps
from cotune.errors import FrameError, WireError
from cotune.wire.codec import pack_taps, quantise

SHAPE = (TAPS, TAP_DIM)


def taps(*positions: int) -> bytes:
    def one(position: int) -> bytes:
        values = np.random.default_rng(position).standard_normal(SHAPE).astype(np.float32)
        return pack_taps(*quantise(values))

    return b"".join(map(one, positions))


def pushed(num_prompt: int = 10) -> PushedTaps:
    """Of a network that reads 3 positions up to the first generated one: 8, 9 and 10 for a prompt of 10."""
    return PushedTaps(ToyMemory(ToyCorrector(), prompt_window=3), SHAPE, num_prompt)


def test_it_asks_for_the_prompts_last_positions_and_goes_on_where_it_was() -> None:
    one = pushed()
    assert one.open(10) == 8
    one.read(8, taps(8, 9))
    one.correct(10, taps(10))
    assert one.open(11) == 11


def test_a_short_prompt_is_read_from_its_first_position_on() -> None:
    assert pushed(num_prompt=2).open(2) == 1


def test_corrections_do_not_depend_on_how_the_positions_came() -> None:
    whole, parts = pushed(), pushed()
    whole.read(8, taps(8, 9))
    parts.read(8, taps(8))
    parts.read(8, taps(8, 9))
    first = whole.correct(10, taps(10))
    parts.read(10, taps(10))
    second, other = whole.correct(11, taps(11)), parts.correct(11, taps(11))
    assert np.array_equal(second.codes, other.codes) and second.scale == other.scale
    assert not np.array_equal(first.codes, second.codes)


def test_after_another_token_what_came_later_is_read_again() -> None:
    one, undisturbed = pushed(), pushed()
    for side in (one, undisturbed):
        side.read(8, taps(8, 9, 10))
    one.correct(11, taps(77))
    one.correct(12, taps(78))
    one.forget_after(10)
    assert not one.is_repeated(11) and one.is_repeated(10)
    assert one.open(15) == 11
    again = one.correct(11, taps(11))
    assert np.array_equal(again.codes, undisturbed.correct(11, taps(11)).codes)


def test_positions_that_are_missing_are_named() -> None:
    one = pushed()
    with pytest.raises(WireError, match="position 9 of the text, expected 8"):
        one.correct(9, taps(9))
    with pytest.raises(WireError, match="position 9 of the text, expected 8"):
        one.read(9, taps(9))


def test_half_a_position_is_refused_and_nothing_is_read() -> None:
    one = pushed()
    with pytest.raises(FrameError, match="taps"):
        one.read(8, taps(8)[:-1])
    assert one.open(10) == 8


def test_without_a_memory_any_position_may_come() -> None:
    one = PushedTaps(ToyCorrector(), SHAPE, 10)
    assert one.open(10) == 0
    far = one.correct(500, taps(1))
    near = one.correct(10, taps(1))
    assert np.array_equal(far.codes, near.codes)
    assert not one.is_repeated(1)
    one.read(7, b"")
