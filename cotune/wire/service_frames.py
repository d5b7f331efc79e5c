"""The frames around a generation: greeting, refusal, features for training, public files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cotune.errors import FrameError
from cotune.wire.codes import AssetKind, ErrorCode
from cotune.wire.frame import KIB, PROTOCOL_VERSION, Frame, Header
from cotune.wire.payload import PayloadReader, member, pack_json, pack_u32

MAX_ASSET_CHUNK_BYTES = 256 * KIB
MAX_MESSAGE_BYTES = KIB


@dataclass(frozen=True, kw_only=True, eq=False)
class Hello(Frame):
    """Device: the first frame. Value: protocol version. Payload: a JSON object."""

    version: int = PROTOCOL_VERSION
    info: dict[str, object] = field(default_factory=dict)

    def header_value(self) -> int:
        return self.version

    def payload(self) -> bytes:
        return pack_json(self.info, "hello")

    @classmethod
    def parse(cls, header: Header, payload: PayloadReader) -> Self:
        return cls(**header.place(), version=header.value, info=payload.json_object())


@dataclass(frozen=True, kw_only=True, eq=False)
class Welcome(Frame):
    """Cloud: the answer to `Hello`, with what it hosts. Value: protocol version. Payload: a JSON object."""

    version: int = PROTOCOL_VERSION
    info: dict[str, object] = field(default_factory=dict)

    def header_value(self) -> int:
        return self.version

    def payload(self) -> bytes:
        return pack_json(self.info, "welcome")

    @classmethod
    def parse(cls, header: Header, payload: PayloadReader) -> Self:
        return cls(**header.place(), version=header.value, info=payload.json_object())


@dataclass(frozen=True, kw_only=True, eq=False)
class Error(Frame):
    """Either side: refused. Value: the code. Payload: one sentence in UTF-8, cut off at 1 KiB.

    `pos` is the time in ms after which to try again; 0 where trying again does not help.
    """

    code: ErrorCode
    message: str

    def header_value(self) -> int:
        return member(ErrorCode, self.code, "error")

    def payload(self) -> bytes:
        data = self.message.encode(errors="replace")[:MAX_MESSAGE_BYTES]
        return data.decode(errors="ignore").encode()

    @classmethod
    def parse(cls, header: Header, payload: PayloadReader) -> Self:
        try:
            message = payload.rest().decode()
        except UnicodeDecodeError:
            raise FrameError("error frame: the message is no valid UTF-8") from None
        return cls(**header.place(), code=member(ErrorCode, header.value, "error"), message=message)


@dataclass(frozen=True, kw_only=True, eq=False)
class FeaturesRequest(Frame):
    """Device: teacher-force these ids; features of the targets from index `pos` on. Value: top_k.

    Flag bit 0: send the final hidden states too. Payload: all ids as u32. Answered by one or more `Features`.
    """

    input_ids: NDArray[np.int64]
    top_k: int
    want_hidden: bool = False

    def flag_bits(self) -> int:
        return int(self.want_hidden)

    def header_value(self) -> int:
        return self.top_k

    def payload(self) -> bytes:
        self._check()
        return pack_u32(self.input_ids, "features request")

    def _check(self) -> None:
        if not 1 <= self.pos < len(self.input_ids):
            raise FrameError(
                f"features request frame: first target {self.pos} of {len(self.input_ids)} tokens, "
                "expected at least one token before it and one from it on"
            )

    @classmethod
    def parse(cls, header: Header, payload: PayloadReader) -> Self:
        if payload.num_left % 4:
            raise FrameError(f"features request frame: {payload.num_left} bytes of ids, expected a multiple of 4")
        frame = cls(
            **header.place(),
            input_ids=payload.u32(payload.num_left // 4),
            top_k=header.value,
            want_hidden=bool(header.flags),
        )
        frame._check()
        return frame


@dataclass(frozen=True, kw_only=True, eq=False)
class Features(Frame):
    """Cloud: features of some targets, `pos` is the index of the first. Value: how many targets.

    Payload: arrays packed by `cotune.wire.feature_frames`, which knows their dimensions.
    """

    num_targets: int
    packed: bytes

    def header_value(self) -> int:
        return self.num_targets

    def payload(self) -> bytes:
        return self.packed

    @classmethod
    def parse(cls, header: Header, payload: PayloadReader) -> Self:
        return cls(**header.place(), num_targets=header.value, packed=payload.rest())


@dataclass(frozen=True, kw_only=True, eq=False)
class AssetRequest(Frame):
    """Device: send the public part `kind` from byte offset `pos` on. Value: the kind."""

    kind: AssetKind

    def header_value(self) -> int:
        return member(AssetKind, self.kind, "asset request")

    @classmethod
    def parse(cls, header: Header, payload: PayloadReader) -> Self:
        return cls(**header.place(), kind=member(AssetKind, header.value, "asset request"))


@dataclass(frozen=True, kw_only=True, eq=False)
class Asset(Frame):
    """Cloud: bytes of a public part from offset `pos` on, at most 256 KiB. Value: its total size in bytes."""

    total_bytes: int
    chunk: bytes

    def header_value(self) -> int:
        return self.total_bytes

    def payload(self) -> bytes:
        self._check()
        return self.chunk

    def _check(self) -> None:
        if self.pos + len(self.chunk) > self.total_bytes:
            raise FrameError(
                f"asset frame: bytes {self.pos} to {self.pos + len(self.chunk)} of only {self.total_bytes}"
            )

    @classmethod
    def parse(cls, header: Header, payload: PayloadReader) -> Self:
        frame = cls(**header.place(), total_bytes=header.value, chunk=payload.rest())
        frame._check()
        return frame
