"""What greetings, refusals, feature requests and assets refuse, when they are made and when they come."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from cotune.errors import FrameError
from cotune.wire.frames import (
    Asset,
    AssetKind,
    AssetRequest,
    Error,
    ErrorCode,
    FeaturesRequest,
    Hello,
    Welcome,
    decode,
    encode,
)


def raw(number: int, payload: bytes = b"", *, pos: int = 0, value: int = 0) -> bytes:
    return struct.pack("<BBHIII", number, 0, 0, 0, pos, value) + payload


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "no valid JSON"),
        (b"{", "no valid JSON"),
        (b"\xff", "no valid JSON"),
        (b"[1]", "expected a JSON object, got list"),
        (b'{"a": NaN}', "NaN is not allowed"),
        (b'{"a": 1e999}', "1e999 is too large"),
        (b'{"a":' + b"[" * 50_000, "no valid JSON"),
        (b'{"a":' + b"9" * 5_000 + b"}", "no valid JSON"),
        (b'{"a": 1} x', "no valid JSON"),
    ],
)
def test_greetings_refuse_bad_json(number: int, payload: bytes, message: str) -> None:
    with pytest.raises(FrameError, match=message):
        decode(raw(number, payload))


def test_a_greeting_of_another_version_still_decodes() -> None:
    """So that the other side can be told which version is spoken here."""
    hello = decode(raw(1, b"{}", value=7))
    assert isinstance(hello, Hello)
    assert hello.version == 7
    assert Welcome().version == 3


def test_greetings_are_compact_and_sorted() -> None:
    assert encode(Hello(info={"b": 1, "a": "ü"}))[16:] == b'{"a":"\\u00fc","b":1}'
    with pytest.raises(FrameError, match="expected at most 65536"):
        encode(Hello(info={"a": "x" * 70_000}))


def test_long_error_messages_are_cut_between_characters() -> None:
    again = decode(encode(Error(code=ErrorCode.BUSY, message="ä" * 1000 + "\ud800")))
    assert isinstance(again, Error)
    assert again.message == "ä" * 512
    odd = decode(encode(Error(code=ErrorCode.BUSY, message="a" + "ä" * 1000)))
    assert isinstance(odd, Error)
    assert odd.message == "a" + "ä" * 511


def test_errors_refuse_unknown_codes_and_broken_text() -> None:
    with pytest.raises(FrameError, match="99 is no ErrorCode"):
        decode(raw(14, b"why", value=99))
    with pytest.raises(FrameError, match="no valid UTF-8"):
        decode(raw(14, b"\xff", value=1))


@pytest.mark.parametrize("pos", [0, 3, 4])
def test_feature_requests_need_a_token_before_and_a_target(pos: int) -> None:
    with pytest.raises(FrameError, match=f"first target {pos} of 3 tokens"):
        encode(FeaturesRequest(pos=pos, input_ids=np.arange(3), top_k=4))
    with pytest.raises(FrameError, match=f"first target {pos} of 3 tokens"):
        decode(raw(15, bytes(12), pos=pos))


def test_feature_requests_hold_whole_ids() -> None:
    with pytest.raises(FrameError, match="13 bytes of ids"):
        decode(raw(15, bytes(13), pos=1))


def test_assets_stay_inside_their_size() -> None:
    with pytest.raises(FrameError, match="bytes 5 to 15 of only 14"):
        encode(Asset(pos=5, chunk=bytes(10), total_bytes=14))
    with pytest.raises(FrameError, match="bytes 5 to 15 of only 14"):
        decode(raw(18, bytes(10), pos=5, value=14))
    empty = Asset(chunk=b"", total_bytes=0)
    assert decode(encode(empty)) == empty
    with pytest.raises(FrameError, match="expected at most 262144"):
        encode(Asset(chunk=bytes(262_145), total_bytes=2**20))


def test_asset_requests_name_a_known_kind() -> None:
    assert encode(AssetRequest(kind=AssetKind.OUTPUT_BASIS))[12] == 2
    with pytest.raises(FrameError, match="3 is no AssetKind; known are 1 tokenizer, 2 output_basis"):
        decode(raw(17, value=3))
