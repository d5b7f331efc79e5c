"""The frames of a beam search: all beams of a step one way, all corrections the other, the texts at the end.

Positions count as everywhere: the beams at `pos` are texts of `pos` tokens, and their next token is searched. Each beam
names its parent among the beams at `pos - 1`, so that both sides know at each step which text is meant, and refuse
what does not fit.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cotune.errors import FrameError
from cotune.wire.frame import Frame, Header
from cotune.wire.payload import PayloadReader, check_finite, pack_struct, pack_u32

MAX_BEAMS = 8
MAX_BEAM_TOKENS = 65_536
MAX_BASIS_DIM = 4_096

_BEAM = np.dtype([("parent", "u1"), ("consult", "u1"), ("token", "<u4")])
_WHERE = struct.Struct("<BB")
_SCALE = struct.Struct("<e")
_RANKING = struct.Struct("<BBdd")
_DECISION = np.dtype([("token", "<u4"), ("base_token", "<u4"), ("consulted", "u1")])

BEAM_STEP_BYTES = MAX_BEAMS * _BEAM.itemsize
BEAM_CORRECT_BYTES = MAX_BEAMS * (_WHERE.size + _SCALE.size + MAX_BASIS_DIM)
BEAM_TOKENS_BYTES = _RANKING.size + MAX_BEAM_TOKENS * _DECISION.itemsize


@dataclass(frozen=True, kw_only=True, eq=False)
class BeamStep(Frame):
    """Cloud: the running beams at `pos`, the best first, and the taps of those that consult the device.

    Value: how many beams, 1 to 8. Payload: for each beam its parent u8, consult u8 and last token u32; then the taps of
    the consulting beams, one after the other.

    Attributes:
        parents: which beam of the step before each goes on from.
        tokens: the last token of each, that of `pos - 1`.
        consult: sigma of each; the device answers if any is set.
        taps: of each consulting beam, as the codec of the session encodes them, all of one length.
    """

    parents: tuple[int, ...]
    tokens: tuple[int, ...]
    consult: tuple[bool, ...]
    taps: tuple[bytes, ...] = ()

    def header_value(self) -> int:
        return len(self.parents)

    def _check(self) -> None:
        if not len(self.parents) == len(self.tokens) == len(self.consult):
            raise FrameError(
                f"beam step frame: {len(self.parents)} parents, {len(self.tokens)} tokens and {len(self.consult)} "
                "consults, expected as many of each"
            )
        _check_count(len(self.parents), "beams", "beam step")
        _check_beam_ids(self.parents, "parent", "beam step")
        if len(self.taps) != sum(self.consult) or len({len(taps) for taps in self.taps}) > 1 or b"" in self.taps:
            raise FrameError(
                f"beam step frame: taps of {[len(taps) for taps in self.taps]} bytes for {sum(self.consult)} beams "
                "that consult, expected as many bytes for each"
            )

    def payload(self) -> bytes:
        self._check()
        rows = np.zeros(len(self.parents), _BEAM)
        rows["parent"], rows["consult"] = self.parents, self.consult
        rows["token"] = np.frombuffer(pack_u32(np.array(self.tokens, np.int64), "beam step"), "<u4")
        return rows.tobytes() + b"".join(self.taps)

    @classmethod
    def parse(cls, header: Header, payload: PayloadReader) -> Self:
        _check_count(header.value, "beams", "beam step")
        rows = np.frombuffer(payload.take(header.value * _BEAM.itemsize), _BEAM)
        if (rows["consult"] > 1).any():
            raise FrameError("beam step frame: a consult is neither 0 nor 1")
        frame = cls(
            **header.place(),
            parents=tuple(rows["parent"].tolist()),
            tokens=tuple(rows["token"].tolist()),
            consult=tuple(map(bool, rows["consult"])),
            taps=_take_equal(payload, int(rows["consult"].sum()), "beam step"),
        )
        frame._check()
        return frame


@dataclass(frozen=True, kw_only=True, eq=False)
class BeamCorrect(Frame):
    """Device: its corrections for all consulting beams at `pos`, in their order. Value: how many, 1 to 8.

    Payload: for each beam its index u8 and its parent u8; then for each a float16 scale and int8 codes (basis_dim,).

    Attributes:
        beams: index of each among the beams at `pos`, ascending.
        parents: the parent that the device knows of each.
        codes: int8 (n, basis_dim).
        scales: float16 (n,).
    """

    beams: tuple[int, ...]
    parents: tuple[int, ...]
    codes: NDArray[np.int8]
    scales: NDArray[np.float16]

    def header_value(self) -> int:
        return len(self.beams)

    def _check(self) -> None:
        num = len(self.beams)
        _check_count(num, "corrections", "beam correct")
        if not num == len(self.parents) == len(self.codes) == len(self.scales) or self.codes.ndim != 2:
            raise FrameError(
                f"beam correct frame: {num} beams, {len(self.parents)} parents, codes {self.codes.shape} and "
                f"{len(self.scales)} scales, expected as many of each"
            )
        _check_beam_ids(self.beams, "beam", "beam correct")
        _check_beam_ids(self.parents, "parent", "beam correct")
        if any(a >= b for a, b in zip(self.beams, self.beams[1:], strict=False)):
            raise FrameError(f"beam correct frame: beams are {self.beams}, expected them in ascending order")
        if not 1 <= self.codes.shape[1] <= MAX_BASIS_DIM:
            raise FrameError(f"beam correct frame: {self.codes.shape[1]} codes, expected 1 to {MAX_BASIS_DIM}")
        if self.codes.dtype != np.int8 or self.codes.min() == -128:
            raise FrameError("beam correct frame: a code is not of int8, or -128, expected -127 to 127")
        if not ((self.scales >= 0) & np.isfinite(self.scales)).all():
            raise FrameError("beam correct frame: a scale is negative, nan or infinite")

    def payload(self) -> bytes:
        self._check()
        where = [pack_struct(_WHERE, pair, "beam correct") for pair in zip(self.beams, self.parents, strict=True)]
        scales = self.scales.astype("<f2")
        return b"".join((*where, *(scales[i].tobytes() + self.codes[i].tobytes() for i in range(len(where)))))

    @classmethod
    def parse(cls, header: Header, payload: PayloadReader) -> Self:
        _check_count(header.value, "corrections", "beam correct")
        where = [payload.unpack(_WHERE) for _ in range(header.value)]
        parts = _take_equal(payload, header.value, "beam correct")
        if len(parts[0]) < _SCALE.size:
            raise FrameError("beam correct frame is truncated: a correction has no scale")
        frame = cls(
            **header.place(),
            beams=tuple(beam for beam, _ in where),
            parents=tuple(parent for _, parent in where),
            codes=np.stack([np.frombuffer(part, np.int8, offset=_SCALE.size) for part in parts]),
            scales=np.array([_SCALE.unpack_from(part)[0] for part in parts], np.float16),
        )
        frame._check()
        return frame


@dataclass(frozen=True, kw_only=True, eq=False)
class BeamTokens(Frame):
    """Cloud: one finished text; `pos` is its first position. All come before `End`. Value: how many tokens.

    Payload: its rank u8 and how many texts there are u8, 0 the best, score and log P as float64; for each token, token
    u32, base token u32 and consulted u8.

    Attributes:
        rank, num_texts: its place among the finished texts.
        score, log_prob: what it was ranked by, and log P of its tokens.
        tokens, base_tokens: int64 (n,).
        consulted: bool (n,).
    """

    rank: int
    num_texts: int
    score: float
    log_prob: float
    tokens: NDArray[np.int64]
    base_tokens: NDArray[np.int64]
    consulted: NDArray[np.bool_]

    def header_value(self) -> int:
        return len(self.tokens)

    def _check(self) -> None:
        _check_count(self.num_texts, "texts", "beam tokens")
        if not 0 <= self.rank < self.num_texts:
            raise FrameError(f"beam tokens frame: rank is {self.rank}, expected 0 to {self.num_texts - 1}")
        if not len(self.tokens) == len(self.base_tokens) == len(self.consulted):
            raise FrameError(
                f"beam tokens frame: {len(self.tokens)} tokens, {len(self.base_tokens)} base tokens and "
                f"{len(self.consulted)} consulted, expected as many of each"
            )
        _check_num_tokens(len(self.tokens))
        check_finite(self.score, "score", "beam tokens")
        check_finite(self.log_prob, "log_prob", "beam tokens")

    def payload(self) -> bytes:
        self._check()
        rows = np.zeros(len(self.tokens), _DECISION)
        rows["token"] = np.frombuffer(pack_u32(self.tokens, "beam tokens"), "<u4")
        rows["base_token"] = np.frombuffer(pack_u32(self.base_tokens, "beam tokens"), "<u4")
        rows["consulted"] = self.consulted
        ranking = (self.rank, self.num_texts, self.score, self.log_prob)
        return pack_struct(_RANKING, ranking, "beam tokens") + rows.tobytes()

    @classmethod
    def parse(cls, header: Header, payload: PayloadReader) -> Self:
        _check_num_tokens(header.value)
        rank, num_texts, score, log_prob = payload.unpack(_RANKING)
        rows = np.frombuffer(payload.take(header.value * _DECISION.itemsize), _DECISION)
        if (rows["consulted"] > 1).any():
            raise FrameError("beam tokens frame: a consulted is neither 0 nor 1")
        frame = cls(
            **header.place(),
            rank=rank,
            num_texts=num_texts,
            score=score,
            log_prob=log_prob,
            tokens=rows["token"].astype(np.int64),
            base_tokens=rows["base_token"].astype(np.int64),
            consulted=rows["consulted"].astype(np.bool_),
        )
        frame._check()
        return frame


def _take_equal(payload: PayloadReader, num_parts: int, what: str) -> tuple[bytes, ...]:
    """The rest, in parts of one length; none where no part is wanted."""
    if num_parts == 0:
        return ()
    size, left = divmod(payload.num_left, num_parts)
    if left:
        raise FrameError(f"{what} frame: {payload.num_left} bytes for {num_parts} beams, expected as many for each")
    return tuple(payload.take(size) for _ in range(num_parts))


def _check_count(count: int, what: str, frame: str) -> None:
    if not 1 <= count <= MAX_BEAMS:
        raise FrameError(f"{frame} frame: {count} {what}, expected 1 to {MAX_BEAMS}")


def _check_beam_ids(ids: tuple[int, ...], what: str, frame: str) -> None:
    if not all(0 <= i < MAX_BEAMS for i in ids):
        raise FrameError(f"{frame} frame: a {what} is out of range in {ids}, expected 0 to {MAX_BEAMS - 1}")


def _check_num_tokens(num_tokens: int) -> None:
    if not 1 <= num_tokens <= MAX_BEAM_TOKENS:
        raise FrameError(f"beam tokens frame: {num_tokens} tokens, expected 1 to {MAX_BEAM_TOKENS}")
