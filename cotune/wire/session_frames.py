"""The frames of a generation: open a session, steps one way, answers the other, the end."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cotune.errors import FrameError
from cotune.wire.beam_frames import MAX_BASIS_DIM, MAX_BEAMS
from cotune.wire.codes import AnswerCode, EndReason, ModeCode, ScheduleCode
from cotune.wire.frame import Frame, Header
from cotune.wire.payload import (
    FLOAT64,
    PayloadReader,
    check_finite,
    member,
    pack_json,
    pack_logit_ids,
    pack_logits,
    pack_struct,
    pack_u32,
    vector,
)

MAX_VOCAB_SIZE = 262_144
TICKET_BYTES = 16
MAX_DRAFT_TOKENS = 256
MAX_GATE_UNITS = 64

_OPEN = struct.Struct("<BBBBHHIQdddd16sIIIIIdI")
_SCALE = struct.Struct("<e")
_COUNT = struct.Struct("<H")
_U32 = struct.Struct("<I")
_TOKEN = np.dtype([("token", "<u4"), ("flags", "u1")])


@dataclass(frozen=True, kw_only=True, eq=False)
class Open(Frame):
    """Device: start a generation, or resume one. Flag bit 0: resume. Epoch: numbers the opens of a connection.

    Payload: 100 bytes as `<BBBBHHIQdddd16sIIIIIdI`, then prompt ids u32, generated ids u32, gate weights f32, and where
    the gate has a hidden layer its weight f16 and bias f32.

    Attributes:
        top_k: base logits in each step, 0 for none.
        window: how many tokens the cloud may run ahead of the last acknowledged one, at least 1.
        seed: 0 .. 2^64-1, of the counter-based noise.
        temperature: 0 to 100, 0 is greedy.
        top_p: in (0, 1].
        gate_threshold: sigma = 1 where w.f + gate_bias > gate_threshold.
        ticket: 16 bytes that resume this session; zeros for a new one.
        deadline_ms: go on with the base token where an answer is later than this; 0 waits for ever.
        taps_from: send the taps of every position from this one on, consulted or not; 0 for consulted ones only.
        num_beams: how many texts to search among, 2 to 8; 0 or 1 for no beam search.
        length_penalty: of the beam search, -10 to 10.
        prompt_ids: int64 (num_prompt,), at least one.
        generated_ids: int64 (num_generated,), what the device holds, to resume without state on the cloud.
        gate_weights: float32 (hidden,), (units,) behind a hidden layer, or (0,) for no gate.
        gate_layer: float16 (units, hidden), the hidden layer of the gate; (0, 0) for none.
        gate_layer_bias: float32 (units,), or (0,).
    """

    mode: ModeCode
    schedule: ScheduleCode
    answer: AnswerCode
    prompt_ids: NDArray[np.int64]
    max_new_tokens: int
    resume: bool = False
    top_k: int = 32
    window: int = 8
    seed: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    gate_threshold: float = 0.0
    gate_bias: float = 0.0
    ticket: bytes = bytes(TICKET_BYTES)
    deadline_ms: int = 0
    taps_from: int = 0
    num_beams: int = 0
    length_penalty: float = 1.0
    generated_ids: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    gate_weights: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    gate_layer: NDArray[np.float16] = field(default_factory=lambda: np.empty((0, 0), np.float16))
    gate_layer_bias: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))

    def flag_bits(self) -> int:
        return int(self.resume)

    def _check(self) -> None:
        for name in ("temperature", "top_p", "gate_threshold", "gate_bias"):
            check_finite(getattr(self, name), name, "open")
        if not 0 <= self.temperature <= 100:
            raise FrameError(f"open frame: temperature is {self.temperature}, expected 0 to 100")
        if not 0 < self.top_p <= 1:
            raise FrameError(f"open frame: top_p is {self.top_p}, expected more than 0, at most 1")
        if self.window < 1:
            raise FrameError(f"open frame: window is {self.window}, expected at least 1")
        if self.max_new_tokens < 1:
            raise FrameError(f"open frame: max_new_tokens is {self.max_new_tokens}, expected at least 1")
        if len(self.prompt_ids) < 1:
            raise FrameError("open frame: prompt_ids is empty, expected at least one token")
        if not 0 <= self.num_beams <= MAX_BEAMS:
            raise FrameError(f"open frame: num_beams is {self.num_beams}, expected 0 to {MAX_BEAMS}")
        if not -10 <= self.length_penalty <= 10:
            raise FrameError(f"open frame: length_penalty is {self.length_penalty}, expected -10 to 10")
        for array in (self.gate_weights, self.gate_layer, self.gate_layer_bias):
            if not np.isfinite(array).all():
                raise FrameError("open frame: a gate weight is nan or infinite")
        if self.gate_layer.size and len(self.gate_weights) > MAX_GATE_UNITS:
            raise FrameError(
                f"open frame: the gate's layer has {len(self.gate_weights)} units, expected at most {MAX_GATE_UNITS}"
            )

    def payload(self) -> bytes:
        gate = vector(self.gate_weights, np.float32, "gate_weights", "open")
        layer = vector(self.gate_layer.reshape(-1), np.float16, "gate_layer", "open")
        layer_bias = vector(self.gate_layer_bias, np.float32, "gate_layer_bias", "open")
        if layer.size and not self.gate_layer.shape[0] == len(gate) == len(layer_bias):
            raise FrameError(
                f"open frame: gate_layer is {self.gate_layer.shape}, gate_layer_bias {layer_bias.shape}, expected "
                f"{len(gate)} rows as in gate_weights"
            )
        num_inputs = self.gate_layer.shape[1] if layer.size else 0
        prompt, generated = pack_u32(self.prompt_ids, "open"), pack_u32(self.generated_ids, "open")
        self._check()
        codes = [member(ModeCode, self.mode, "open"), member(ScheduleCode, self.schedule, "open")]
        codes.append(member(AnswerCode, self.answer, "open"))
        limits = (self.top_k, self.window, self.max_new_tokens, self.seed)
        reals = (self.temperature, self.top_p, self.gate_threshold, self.gate_bias)
        counts = (len(self.prompt_ids), len(self.generated_ids), len(gate))
        extras = (self.deadline_ms, self.taps_from)
        ticket = _ticket(self.ticket, "open")
        fields = (*codes, self.num_beams, *limits, *reals, ticket, *extras, *counts, self.length_penalty, num_inputs)
        arrays = [gate.astype("<f4").tobytes()]
        if num_inputs:
            arrays += [layer.astype("<f2").tobytes(), layer_bias.astype("<f4").tobytes()]
        return pack_struct(_OPEN, fields, "open") + prompt + generated + b"".join(arrays)

    @classmethod
    def parse(cls, header: Header, payload: PayloadReader) -> Self:
        mode, schedule, answer, num_beams, *rest = payload.unpack(_OPEN)
        top_k, window, max_new_tokens, seed, temperature, top_p, threshold, bias, ticket, *counts = rest
        deadline_ms, taps_from, *counts, length_penalty, num_inputs = counts
        num_prompt, num_generated, gate_dim = counts
        num_units = gate_dim if num_inputs else 0
        frame = cls(
            **header.place(),
            resume=bool(header.flags),
            mode=member(ModeCode, mode, "open"),
            schedule=member(ScheduleCode, schedule, "open"),
            answer=member(AnswerCode, answer, "open"),
            top_k=top_k,
            window=window,
            max_new_tokens=max_new_tokens,
            seed=seed,
            temperature=temperature,
            top_p=top_p,
            gate_threshold=threshold,
            gate_bias=bias,
            ticket=ticket,
            deadline_ms=deadline_ms,
            taps_from=taps_from,
            num_beams=num_beams,
            length_penalty=length_penalty,
            prompt_ids=payload.u32(num_prompt),
            generated_ids=payload.u32(num_generated),
            gate_weights=payload.array("<f4", gate_dim).astype(np.float32),
            gate_layer=payload.array("<f2", num_units * num_inputs).astype(np.float16).reshape(num_units, num_inputs),
            gate_layer_bias=payload.array("<f4", num_units).astype(np.float32),
        )
        frame._check()
        return frame


@dataclass(frozen=True, kw_only=True, eq=False)
class Opened(Frame):
    """Cloud: the session runs; `pos` is where the stream goes on. Payload: the ticket that resumes it."""

    ticket: bytes

    def payload(self) -> bytes:
        return _ticket(self.ticket, "opened")

    @classmethod
    def parse(cls, header: Header, payload: PayloadReader) -> Self:
        return cls(**header.place(), ticket=payload.take(TICKET_BYTES))


@dataclass(frozen=True, kw_only=True, eq=False)
class Step(Frame):
    """Cloud: features to predict the token at `pos`. Value: the base token.

    Flags: bit 0 consult, bit 1 provisional end, bit 2 a log normalizer is there, bit 3 an assumed token is there.
    Payload: if flagged the assumed token u32, count of logits u16, their ids of 3 bytes, ascending, float32 logits,
    if flagged a float64 log normalizer, the taps.

    Attributes:
        base_token: what the backbone alone would say.
        consult: sigma, as the cloud's gate sees it.
        provisional_end: the token that the cloud goes on with ends the text, if the device agrees.
        assumed_token: what the cloud goes on with, where that is a draft's token; None where it is the base token.
        ids, logits: int64 and float32 (top_k,), the largest base logits.
        log_normalizer: log sum exp of all base logits, where asked for.
        taps: the taps of this position as the codec of the session encodes them.
    """

    base_token: int
    consult: bool = True
    provisional_end: bool = False
    ids: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    logits: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    log_normalizer: float | None = None
    taps: bytes = b""
    assumed_token: int | None = None

    @property
    def running_token(self) -> int:
        """The token that the cloud goes on with."""
        return self.base_token if self.assumed_token is None else self.assumed_token

    def flag_bits(self) -> int:
        known = (self.log_normalizer is not None) << 2 | (self.assumed_token is not None) << 3
        return self.consult | self.provisional_end << 1 | known

    def header_value(self) -> int:
        return self.base_token

    def payload(self) -> bytes:
        count = pack_struct(_COUNT, (len(self.ids),), "step")
        assumed = b"" if self.assumed_token is None else pack_struct(_U32, (self.assumed_token,), "step")
        parts = [assumed, count, pack_logit_ids(self.ids, "step"), pack_logits(self.logits, len(self.ids), "step")]
        if self.log_normalizer is not None:
            parts.append(_pack_log_normalizer(self.log_normalizer, "step"))
        return b"".join((*parts, self.taps))

    @classmethod
    def parse(cls, header: Header, payload: PayloadReader) -> Self:
        assumed = payload.unpack(_U32)[0] if header.flags & 8 else None
        (count,) = payload.unpack(_COUNT)
        return cls(
            **header.place(),
            base_token=header.value,
            assumed_token=assumed,
            consult=bool(header.flags & 1),
            provisional_end=bool(header.flags & 2),
            ids=payload.ascending_u24(count),
            logits=payload.logits(count),
            log_normalizer=payload.finite() if header.flags & 4 else None,
            taps=payload.rest(),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Ack(Frame):
    """Device: every token before `pos` that the cloud went on with is confirmed. Cumulative."""

    @classmethod
    def parse(cls, header: Header, payload: PayloadReader) -> Self:
        return cls(**header.place())


@dataclass(frozen=True, kw_only=True, eq=False)
class Object(Frame):
    """Device: at `pos` another token belongs, everything before is confirmed. Value: that token."""

    token: int

    def header_value(self) -> int:
        return self.token

    @classmethod
    def parse(cls, header: Header, payload: PayloadReader) -> Self:
        return cls(**header.place(), token=header.value)


@dataclass(frozen=True, kw_only=True, eq=False)
class More(Frame):
    """Device: the sent logits of `pos` do not decide the token. Value: how many are wanted, 0 for all."""

    num_wanted: int = 0

    def header_value(self) -> int:
        return self.num_wanted

    @classmethod
    def parse(cls, header: Header, payload: PayloadReader) -> Self:
        return cls(**header.place(), num_wanted=header.value)


@dataclass(frozen=True, kw_only=True, eq=False)
class Logits(Frame):
    """Cloud: the answer to `More`. Value: how many logits.

    Payload: ids of 3 bytes, ascending, float32 logits, float64 log sum exp of all base logits.
    """

    ids: NDArray[np.int64]
    logits: NDArray[np.float32]
    log_normalizer: float

    def header_value(self) -> int:
        return len(self.ids)

    def payload(self) -> bytes:
        if len(self.ids) > MAX_VOCAB_SIZE:
            raise FrameError(f"logits frame: {len(self.ids)} logits, expected at most {MAX_VOCAB_SIZE}")
        ids, logits = pack_logit_ids(self.ids, "logits"), pack_logits(self.logits, len(self.ids), "logits")
        return ids + logits + _pack_log_normalizer(self.log_normalizer, "logits")

    @classmethod
    def parse(cls, header: Header, payload: PayloadReader) -> Self:
        if header.value > MAX_VOCAB_SIZE:
            raise FrameError(f"logits frame: {header.value} logits, expected at most {MAX_VOCAB_SIZE}")
        ids, logits = payload.ascending_u24(header.value), payload.logits(header.value)
        return cls(**header.place(), ids=ids, logits=logits, log_normalizer=payload.finite())


@dataclass(frozen=True, kw_only=True, eq=False)
class Correct(Frame):
    """Device: its correction for `pos` in the shared output basis.

    Payload: float16 scale, int8 codes (basis_dim,).
    """

    codes: NDArray[np.int8]
    scale: np.float16

    def payload(self) -> bytes:
        codes = vector(self.codes, np.int8, "codes", "correct")
        _check_correction(codes, float(self.scale))
        return pack_struct(_SCALE, (float(self.scale),), "correct") + codes.tobytes()

    @classmethod
    def parse(cls, header: Header, payload: PayloadReader) -> Self:
        (scale,) = payload.unpack(_SCALE)
        codes = payload.array("i1", payload.num_left).astype(np.int8)
        _check_correction(codes, scale)
        return cls(**header.place(), codes=codes, scale=np.float16(scale))


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens(Frame):
    """Decided tokens from `pos` on. Value: how many. Payload: for each, token u32 and flags u8.

    Attributes:
        tokens: int64 (n,).
        consulted: bool (n,), flag bit 0: the side network was consulted.
        changed: bool (n,), flag bit 1: its answer differs from the base token.
        late: bool (n,), flag bit 2: its answer did not come before the deadline, and this is the base token.
    """

    tokens: NDArray[np.int64]
    consulted: NDArray[np.bool_]
    changed: NDArray[np.bool_]
    late: NDArray[np.bool_]

    def header_value(self) -> int:
        return len(self.tokens)

    def payload(self) -> bytes:
        rows = np.zeros(len(self.tokens), dtype=_TOKEN)
        rows["token"] = np.frombuffer(pack_u32(self.tokens, "tokens"), dtype="<u4")
        consulted = vector(self.consulted, np.bool_, "consulted", "tokens")
        changed = vector(self.changed, np.bool_, "changed", "tokens")
        late = vector(self.late, np.bool_, "late", "tokens")
        if not len(rows) == len(consulted) == len(changed) == len(late):
            raise FrameError(
                f"tokens frame: {len(rows)} tokens, {len(consulted)} consulted, {len(changed)} changed and "
                f"{len(late)} late, expected as many of each"
            )
        rows["flags"] = consulted | changed.astype(np.uint8) << 1 | late.astype(np.uint8) << 2
        return rows.tobytes()

    @classmethod
    def parse(cls, header: Header, payload: PayloadReader) -> Self:
        rows = np.frombuffer(payload.take(header.value * _TOKEN.itemsize), dtype=_TOKEN)
        flags = rows["flags"]
        if (flags > 7).any():
            raise FrameError("tokens frame: a token has unknown flags")
        return cls(
            **header.place(),
            tokens=rows["token"].astype(np.int64),
            consulted=(flags & 1).astype(np.bool_),
            changed=(flags & 2).astype(np.bool_),
            late=(flags & 4).astype(np.bool_),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Draft(Frame):
    """Device: it expects these tokens from `pos` on, after the tokens that it holds. Value: how many.

    A hint: the cloud may read them in one pass, and every token is confirmed or replaced as any other. Payload: a u32
    for each.
    """

    tokens: NDArray[np.int64]

    def header_value(self) -> int:
        return len(self.tokens)

    def payload(self) -> bytes:
        if not 1 <= len(self.tokens) <= MAX_DRAFT_TOKENS:
            raise FrameError(f"draft frame: {len(self.tokens)} tokens, expected 1 to {MAX_DRAFT_TOKENS}")
        return pack_u32(self.tokens, "draft")

    @classmethod
    def parse(cls, header: Header, payload: PayloadReader) -> Self:
        if not 1 <= header.value <= MAX_DRAFT_TOKENS:
            raise FrameError(f"draft frame: {header.value} tokens, expected 1 to {MAX_DRAFT_TOKENS}")
        return cls(**header.place(), tokens=payload.u32(header.value))


@dataclass(frozen=True, kw_only=True, eq=False)
class Taps(Frame):
    """Cloud: taps of positions whose tokens are decided, those of the prompt too; `pos` is the first of them.

    Value: how many positions. Payload: their taps, one after the other.
    """

    num_positions: int
    taps: bytes

    def header_value(self) -> int:
        return self.num_positions

    def payload(self) -> bytes:
        self._check()
        return self.taps

    def _check(self) -> None:
        if self.num_positions < 1 or len(self.taps) % self.num_positions:
            raise FrameError(
                f"taps frame: {len(self.taps)} bytes for {self.num_positions} positions, expected as many for each"
            )

    @classmethod
    def parse(cls, header: Header, payload: PayloadReader) -> Self:
        frame = cls(**header.place(), num_positions=header.value, taps=payload.rest())
        frame._check()
        return frame


@dataclass(frozen=True, kw_only=True, eq=False)
class Close(Frame):
    """Device: stop this session; `pos` tokens are kept. Value: the reason."""

    reason: EndReason = EndReason.CANCELLED

    def header_value(self) -> int:
        return member(EndReason, self.reason, "close")

    @classmethod
    def parse(cls, header: Header, payload: PayloadReader) -> Self:
        return cls(**header.place(), reason=member(EndReason, header.value, "close"))


@dataclass(frozen=True, kw_only=True, eq=False)
class End(Frame):
    """Cloud: the session is over, `pos` tokens are kept. Value: the reason. Payload: counters as JSON."""

    reason: EndReason
    counters: dict[str, object] = field(default_factory=dict)

    def header_value(self) -> int:
        return member(EndReason, self.reason, "end")

    def payload(self) -> bytes:
        return pack_json(self.counters, "end")

    @classmethod
    def parse(cls, header: Header, payload: PayloadReader) -> Self:
        reason = member(EndReason, header.value, "end")
        return cls(**header.place(), reason=reason, counters=payload.json_object())


def _ticket(ticket: bytes, what: str) -> bytes:
    if len(ticket) != TICKET_BYTES:
        raise FrameError(f"{what} frame: a ticket of {len(ticket)} bytes, expected {TICKET_BYTES}")
    return bytes(ticket)


def _pack_log_normalizer(value: float, what: str) -> bytes:
    return FLOAT64.pack(check_finite(value, "log_normalizer", what))


def _check_correction(codes: NDArray[np.int8], scale: float) -> None:
    if not 1 <= len(codes) <= MAX_BASIS_DIM:
        raise FrameError(f"correct frame: {len(codes)} codes, expected 1 to {MAX_BASIS_DIM}")
    if codes.min() == -128:  # would break the bound under which the cloud's integer sums are exact
        raise FrameError("correct frame: a code is -128, expected -127 to 127")
    if check_finite(scale, "scale", "correct") < 0:
        raise FrameError(f"correct frame: scale is {scale}, expected at least 0")
