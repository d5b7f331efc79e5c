"""Stop strings never show, however the text is cut into pieces."""

from __future__ import annotations

from collections.abc import AsyncIterator

from hypothesis import example, given, settings
from hypothesis import strategies as st

from cotune.openai_api.source import Finish, Piece
from cotune.openai_api.stop_text import cut_at_stops

FINISH = Finish(reason="length", num_prompt_tokens=1, num_completion_tokens=3)


async def pieces_of(texts: list[str]) -> AsyncIterator[Piece | Finish]:
    for number, text in enumerate(texts):
        yield Piece(text=text, token_id=number)
    yield FINISH


async def cut(texts: list[str], stops: list[str]) -> tuple[list[str], str]:
    *pieces, finish = [item async for item in cut_at_stops(pieces_of(texts), stops)]
    assert isinstance(finish, Finish)
    assert [piece.token_id for piece in pieces if isinstance(piece, Piece)] == list(range(len(pieces)))
    return [piece.text for piece in pieces if isinstance(piece, Piece)], finish.reason


async def test_without_a_stop_string_everything_passes_at_once() -> None:
    assert await cut(["a", "", "b"], []) == (["a", "", "b"], "length")
    assert await cut(["a", "b"], ["X"]) == (["a", "b"], "length")


async def test_a_stop_string_over_pieces_is_cut_out() -> None:
    assert await cut(["ab", "cS", "TO", "P", "more"], ["STOP"]) == (["ab", "c"], "stop")
    assert await cut(["STOP"], ["STOP"]) == ([], "stop")


async def test_what_only_began_like_a_stop_string_comes_late_but_whole() -> None:
    assert await cut(["a", "ST", "OX", "b"], ["STOP"]) == (["a", "ST", "OX", "b"], "length")
    assert await cut(["a", "ST"], ["STOP"]) == (["a", "ST"], "length")


async def test_a_piece_is_shown_as_soon_as_it_is_no_beginning() -> None:
    arrived: list[str] = []

    async def source() -> AsyncIterator[Piece | Finish]:
        for text, known in (("a", []), ("S", ["a"]), ("x", ["a"]), ("y", ["a", "S", "x"])):
            assert arrived == known
            yield Piece(text=text)
        yield FINISH

    async for item in cut_at_stops(source(), ["STOP"]):
        if isinstance(item, Piece):
            arrived.append(item.text)


@settings(max_examples=200, deadline=None)
@example(["ba", "b"], ["a", "bab"])
@given(st.lists(st.text("ab", max_size=3), max_size=8), st.lists(st.text("ab", min_size=1, max_size=3), max_size=2))
async def test_the_text_is_always_that_before_the_first_stop(texts: list[str], stops: list[str]) -> None:
    whole = "".join(texts)
    # After each character: the longest stop string that ends with it, if any.
    cuts = [(end, end - len(stop)) for end in range(len(whole) + 1) for stop in stops if whole[:end].endswith(stop)]
    shown, reason = await cut(texts, stops)
    assert "".join(shown) == (whole[: min(cuts)[1]] if cuts else whole)
    assert reason == ("stop" if cuts else "length")
