"""The frames of protocol version 2: what a device and a cloud say to each other, and their bytes.

Every frame starts with one 16-byte little-endian header, `<BBHIII`:

    type u8 | flags u8 | epoch u16 | session u32 | pos u32 | value u32

and goes on with a payload by type. `pos` is a position in the token stream (or an offset, where a frame says
so); `epoch` counts the rollbacks of a session, modulo 2^16; `value` and the flags are what each class says.
`LAYOUTS` lists all types with their size limits, which `decode` checks before it allocates anything.

A device opens with `Hello`, the cloud answers `Welcome`. For a generation: `Open`, `Opened`, a stream of
`Step` from the cloud with `Ack`, `Object`, `Correct` and `More` (answered by `Logits`) from the device, and
`Close` or `End`. `Tokens` reports decided tokens, `Taps` are of positions that are decided already, `Draft` is what
the device expects. A beam search has `BeamStep`, `BeamCorrect` and `BeamTokens` in their place.
For training: `FeaturesRequest`, `Features`. For public files: `AssetRequest`, `Asset`. `Error` may come at any
time.

Example:
    >>> decode(encode(Ack(session=7, epoch=1, pos=12)))
    Ack(epoch=1, session=7, pos=12)
"""

from __future__ import annotations

from typing import NamedTuple

from cotune.errors import FrameError
from cotune.wire.beam_frames import (
    BEAM_CORRECT_BYTES,
    BEAM_TOKENS_BYTES,
    MAX_BASIS_DIM,
    MAX_BEAM_TOKENS,
    MAX_BEAMS,
    BeamCorrect,
    BeamStep,
    BeamTokens,
)
from cotune.wire.codes import AnswerCode, AssetKind, EndReason, ErrorCode, ModeCode, ScheduleCode
from cotune.wire.frame import HEADER, HEADER_BYTES, KIB, MAX_FRAME_BYTES, PROTOCOL_VERSION, Frame, Header
from cotune.wire.payload import FLOAT64, PayloadReader, pack_struct
from cotune.wire.service_frames import (
    MAX_ASSET_CHUNK_BYTES,
    MAX_MESSAGE_BYTES,
    Asset,
    AssetRequest,
    Error,
    Features,
    FeaturesRequest,
    Hello,
    Welcome,
)
from cotune.wire.session_frames import (
    MAX_DRAFT_TOKENS,
    MAX_VOCAB_SIZE,
    TICKET_BYTES,
    Ack,
    Close,
    Correct,
    Draft,
    End,
    Logits,
    More,
    Object,
    Open,
    Opened,
    Step,
    Taps,
    Tokens,
)

__all__ = [
    "HEADER_BYTES", "LAYOUTS", "MAX_ASSET_CHUNK_BYTES", "MAX_BASIS_DIM", "MAX_BEAMS", "MAX_BEAM_TOKENS",
    "MAX_DRAFT_TOKENS", "MAX_FRAME_BYTES", "MAX_VOCAB_SIZE", "PROTOCOL_VERSION", "TICKET_BYTES", "Ack", "AnswerCode",
    "Asset", "AssetKind", "AssetRequest", "BeamCorrect", "BeamStep", "BeamTokens", "Close", "Correct", "Draft", "End",
    "EndReason", "Error", "ErrorCode", "Features", "FeaturesRequest", "Frame", "Hello", "Logits", "ModeCode", "More",
    "Object", "Open", "Opened", "ScheduleCode", "Step", "Taps", "Tokens", "Welcome", "decode", "encode", "kind_of",
]  # fmt: skip


class Layout(NamedTuple):
    """What `encode` and `decode` check before they look into a frame."""

    name: str
    frame: type[Frame]
    max_payload_bytes: int
    flags: int = 0
    """The flag bits that mean something."""
    uses_value: bool = True


LAYOUTS: dict[int, Layout] = {
    1: Layout("hello", Hello, 64 * KIB),
    2: Layout("welcome", Welcome, 64 * KIB),
    3: Layout("open", Open, 1280 * KIB, flags=1, uses_value=False),
    4: Layout("opened", Opened, TICKET_BYTES, uses_value=False),
    5: Layout("step", Step, 1024 * KIB, flags=15),
    6: Layout("ack", Ack, 0, uses_value=False),
    7: Layout("object", Object, 0),
    8: Layout("more", More, 0),
    9: Layout("logits", Logits, 7 * MAX_VOCAB_SIZE + FLOAT64.size),
    10: Layout("correct", Correct, 2 + MAX_BASIS_DIM, uses_value=False),
    11: Layout("tokens", Tokens, 320 * KIB),
    12: Layout("close", Close, 0),
    13: Layout("end", End, 16 * KIB),
    14: Layout("error", Error, MAX_MESSAGE_BYTES),
    15: Layout("features request", FeaturesRequest, 512 * KIB, flags=1),
    16: Layout("features", Features, MAX_FRAME_BYTES - HEADER_BYTES),
    17: Layout("asset request", AssetRequest, 0),
    18: Layout("asset", Asset, MAX_ASSET_CHUNK_BYTES),
    19: Layout("draft", Draft, 4 * MAX_DRAFT_TOKENS),
    20: Layout("taps", Taps, MAX_FRAME_BYTES - HEADER_BYTES),
    21: Layout("beam step", BeamStep, 1024 * KIB),
    22: Layout("beam correct", BeamCorrect, BEAM_CORRECT_BYTES),
    23: Layout("beam tokens", BeamTokens, BEAM_TOKENS_BYTES),
}
_TYPES: dict[type[Frame], int] = {layout.frame: number for number, layout in LAYOUTS.items()}


def encode(frame: Frame) -> bytes:
    """The bytes of a frame.

    Raises:
        FrameError: a field is out of its range, or the payload is larger than its type allows.
    """
    number = _TYPES[type(frame)]
    name, _, max_payload_bytes, _, _ = LAYOUTS[number]
    payload = frame.payload()
    if len(payload) > max_payload_bytes:
        raise _too_large(name, len(payload), max_payload_bytes)
    fields = (number, frame.flag_bits(), frame.epoch, frame.session, frame.pos, frame.header_value())
    return pack_struct(HEADER, fields, name) + payload


def decode(data: bytes | memoryview) -> Frame:
    """The frame in `data`; its arrays and bytes are copies.

    Raises:
        FrameError: `data` is no valid frame of this version; never anything else, whatever the bytes.
    """
    size = memoryview(data).nbytes
    if size > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {size} bytes came, expected at most {MAX_FRAME_BYTES}")
    if size < HEADER_BYTES:
        raise FrameError(f"a frame of {size} bytes came, expected a header of {HEADER_BYTES}")
    data = bytes(data)
    header = Header._make(HEADER.unpack_from(data))
    layout = LAYOUTS.get(header.type)
    if layout is None:
        raise FrameError(f"frame type {header.type} is unknown, expected 1 to {len(LAYOUTS)}")
    if size - HEADER_BYTES > layout.max_payload_bytes:
        raise _too_large(layout.name, size - HEADER_BYTES, layout.max_payload_bytes)
    if header.flags & ~layout.flags:
        raise FrameError(f"{layout.name} frame: flags {header.flags:#x} are unknown")
    if header.value and not layout.uses_value:
        raise FrameError(f"{layout.name} frame: value is {header.value}, expected 0")
    payload = PayloadReader(data, layout.name, offset=HEADER_BYTES)
    frame = layout.frame.parse(header, payload)
    payload.end()
    return frame


def kind_of(data: bytes | memoryview) -> str:
    """The name of a frame's type from its first byte alone, `unknown` if it has none."""
    layout = LAYOUTS.get(data[0]) if len(data) else None
    return "unknown" if layout is None else layout.name


def _too_large(name: str, num_bytes: int, limit: int) -> FrameError:
    return FrameError(f"{name} frame: a payload of {num_bytes} bytes, expected at most {limit}")
