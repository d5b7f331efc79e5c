"""LoRA and adapters on the device, one round trip for each place where they sit: the baselines of `network.py`.

The cloud runs the frozen backbone. At each place it sends the hidden states of the pass's tokens to the device and
waits for what the device's low-rank module adds:

    lora     q, k, v of each layer      delta_j = (alpha / rank) B_j A_j x        one trip a layer
    adapter  after attention and MLP    delta   = B relu(A y + a) + b             two trips a layer

x, y: the hidden states (hidden,) sent down; deltas at their full width come up, as in SPA (arXiv 2403.07088, Table 1).
Numbers travel as float16, as the paper's bytes are counted, or as float32. Weights never leave the device.

    python benchmarks/split_layers.py MODEL THREADS     the cloud's part, for `network.py`; says its URL
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from cotune.errors import ConnectionLostError, FrameError, InputError
from cotune.wire.frame import HEADER, HEADER_BYTES
from cotune.wire.transport import Connection

if TYPE_CHECKING:
    from cotune.models.backbone import Backbone

BEGIN, STATES, DELTAS, TOKEN, END, PING = 1, 2, 3, 4, 5, 6
METHODS = ("lora", "adapter")
DTYPES = {2: np.dtype("<f2"), 4: np.dtype("<f4")}
TIMEOUT_S = 60.0
MAX_PROMPT = 4096
MAX_NEW_TOKENS = 4096
_MAX_PART_BYTES = 1024 * 1024

Rows = NDArray[np.float32]

# What the device's modules add at a place, (rows, width), to the hidden states (rows, hidden) there.
Ask = Callable[[int, Rows], Rows]


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """What a device has to know of a backbone to build modules for it."""

    num_layers: int
    hidden_size: int
    q_width: int
    kv_width: int

    @classmethod
    def of(cls, model: Any) -> Self:
        """Of a Llama-like model."""
        from cotune.models.anatomy import decoder_layers

        layers = decoder_layers(model)
        attention = layers[0].self_attn
        return cls(
            num_layers=len(layers),
            hidden_size=int(model.config.hidden_size),
            q_width=int(attention.q_proj.out_features),
            kv_width=int(attention.k_proj.out_features),
        )

    def delta_width(self, method: str) -> int:
        """Numbers that come up for one token at one place."""
        return self.q_width + 2 * self.kv_width if method == "lora" else self.hidden_size

    def num_places(self, method: str) -> int:
        """Round trips in one pass."""
        return self.num_layers * (1 if method == "lora" else 2)

    def bytes_per_token(self, method: str, item_bytes: int = 2) -> tuple[int, int]:
        """Down and up for one generated token, headers included, without the 20 bytes that announce the token."""
        places = self.num_places(method)
        down, up = self.hidden_size * item_bytes, self.delta_width(method) * item_bytes
        return places * (HEADER_BYTES + down), places * (HEADER_BYTES + up)


class DeviceModules(Protocol):
    """Private low-rank modules."""

    method: str

    def answer(self, place: int, states: Rows) -> Rows:
        """What is added at `place`, float32 (rows, width), for float32 (rows, hidden)."""
        ...


@dataclass(frozen=True)
class DeviceLora:
    """LoRA on q, k and v.

    Attributes:
        layers: for each layer three pairs A (rank, hidden), B (out, rank), float32.
        scale: alpha / rank.
    """

    layers: list[list[tuple[Rows, Rows]]]
    scale: float
    method: str = field(default="lora", init=False)

    @classmethod
    def random(cls, shape: LayerShape, *, rank: int = 16, strength: float = 0.1, seed: int = 0) -> Self:
        """Random weights: from inputs of unit size the deltas have about the size `strength`."""
        rng = np.random.default_rng(seed)
        layers = []
        for _ in range(shape.num_layers):
            pairs = []
            for width in (shape.q_width, shape.kv_width, shape.kv_width):
                a = _normal(rng, (rank, shape.hidden_size), shape.hidden_size**-0.5)
                pairs.append((a, _normal(rng, (width, rank), strength * rank**-0.5)))
            layers.append(pairs)
        return cls(layers, 1.0)

    @classmethod
    def from_peft(cls, params: Mapping[str, Rows], num_layers: int, scale: float) -> Self:
        """The tensors of a peft adapter with targets q_proj, k_proj and v_proj, by their names there."""

        def tensor(layer: int, target: str, side: str) -> Rows:
            ending = f"layers.{layer}.self_attn.{target}.lora_{side}.default.weight"
            return next(value for name, value in params.items() if name.endswith(ending))

        targets = ("q_proj", "k_proj", "v_proj")
        layers = [[(tensor(i, t, "A"), tensor(i, t, "B")) for t in targets] for i in range(num_layers)]
        return cls(layers, scale)

    def answer(self, place: int, states: Rows) -> Rows:
        deltas = [(states @ a.T) @ b.T for a, b in self.layers[place]]
        return np.float32(self.scale) * np.concatenate(deltas, axis=1)


@dataclass(frozen=True)
class DeviceAdapter:
    """Houlsby's adapters, after attention (even places) and after the MLP (odd places).

    Attributes:
        places: A (bottleneck, hidden), a (bottleneck,), B (hidden, bottleneck), b (hidden,) of each, float32.
    """

    places: list[tuple[Rows, Rows, Rows, Rows]]
    method: str = field(default="adapter", init=False)

    @classmethod
    def random(cls, shape: LayerShape, *, bottleneck: int = 48, strength: float = 0.1, seed: int = 0) -> Self:
        """Random weights; see `DeviceLora.random`."""
        rng, hidden = np.random.default_rng(seed), shape.hidden_size
        return cls(
            [
                (
                    _normal(rng, (bottleneck, hidden), hidden**-0.5),
                    _normal(rng, (bottleneck,), 0.1),
                    _normal(rng, (hidden, bottleneck), strength * bottleneck**-0.5),
                    np.zeros(hidden, np.float32),
                )
                for _ in range(shape.num_places("adapter"))
            ]
        )

    def answer(self, place: int, states: Rows) -> Rows:
        a_weight, a_bias, b_weight, b_bias = self.places[place]
        return np.maximum(states @ a_weight.T + a_bias, np.float32(0)) @ b_weight.T + b_bias


def narrow(rows: Rows, item_bytes: int) -> NDArray[Any]:
    """Numbers as they travel.

    Raises:
        FrameError: too large for them.
    """
    with np.errstate(over="ignore"):
        data = rows.astype(DTYPES[item_bytes])
    if not np.isfinite(data).all():
        raise FrameError(f"hidden states do not fit numbers of {item_bytes} bytes; exchange float32")
    return data


def local_ask(modules: DeviceModules, item_bytes: int) -> Ask:
    """The same modules in the same process: what the protocol has to reproduce."""

    def ask(place: int, states: Rows) -> Rows:
        deltas = modules.answer(place, narrow(states, item_bytes).astype(np.float32))
        return narrow(deltas, item_bytes).astype(np.float32)

    return ask


def pack_rows(kind: int, place: int, rows: Rows, item_bytes: int) -> list[bytes]:
    """Rows as frames of at most a megabyte: the header has the place, the first row and the number of all rows."""
    data = narrow(rows, item_bytes)
    step = max(1, _MAX_PART_BYTES // max(1, data[:1].nbytes))
    return [
        HEADER.pack(kind, item_bytes, place, 0, first, len(rows)) + data[first : first + step].tobytes()
        for first in range(0, len(rows), step)
    ]


class RowCollector:
    """Puts the rows of one place together again.

    Args:
        kind: which frames they come in.
        width: numbers in a row.
        max_rows: the most that are accepted.
    """

    def __init__(self, kind: int, width: int, max_rows: int) -> None:
        self._kind, self._width, self._max_rows = kind, width, max_rows
        self._parts: list[Rows] = []
        self._num_rows = 0
        self._place = 0

    def add(self, data: bytes) -> tuple[int, Rows] | None:
        """One more frame; the place and float32 (rows, width) with the last.

        Raises:
            FrameError: another frame than the next of these rows.
        """
        if len(data) < HEADER_BYTES:
            raise FrameError(f"a frame of {len(data)} bytes came, expected at least {HEADER_BYTES}")
        kind, item_bytes, place, _, first, total = HEADER.unpack(data[:HEADER_BYTES])
        if kind != self._kind or item_bytes not in DTYPES or not 1 <= total <= self._max_rows:
            raise FrameError(f"a frame of kind {kind} with {total} rows came, expected {self._kind} with 1 or more")
        if first != self._num_rows or (self._parts and place != self._place):
            raise FrameError(f"row {first} of place {place} came, expected row {self._num_rows} of {self._place}")
        dtype = DTYPES[item_bytes]
        num_bytes = len(data) - HEADER_BYTES
        if num_bytes == 0 or num_bytes % (self._width * dtype.itemsize):
            raise FrameError(f"{num_bytes} bytes of rows came, expected whole rows of {self._width} numbers")
        rows = np.frombuffer(data, dtype, offset=HEADER_BYTES).reshape(-1, self._width).astype(np.float32)
        self._parts.append(rows)
        self._num_rows += len(rows)
        self._place = place
        if self._num_rows > total:
            raise FrameError(f"{self._num_rows} rows came, expected {total}")
        if self._num_rows < total:
            return None
        whole = np.concatenate(self._parts)
        self._parts, self._num_rows = [], 0
        return place, whole


@dataclass(kw_only=True)
class Exchange:
    """What the modules in the backbone share: whom to ask, and how many rows of the pass are tokens.

    Attributes:
        ask: gives the deltas.
        num_rows: rows of tokens in the pass; those beyond are padding, and get nothing.
        waited_s: time spent asking.
        num_trips: how often.
    """

    ask: Ask
    num_rows: int = 0
    waited_s: float = 0.0
    num_trips: int = 0

    def deltas(self, place: int, states: Any) -> Any:
        """Tensor (1, all rows, width) for a tensor (1, all rows, hidden)."""
        import torch

        started_s = time.perf_counter()
        rows = self.ask(place, states[0, : self.num_rows].float().cpu().numpy())
        self.waited_s += time.perf_counter() - started_s
        self.num_trips += 1
        whole = states.new_zeros((1, states.shape[1], rows.shape[1]))
        whole[0, : self.num_rows] = torch.from_numpy(rows).to(states)
        return whole


@contextmanager
def modules_on_device(model: Any, method: str, exchange: Exchange) -> Iterator[None]:
    """Inside, the layers of a Llama-like `model` add what `exchange` gives; afterwards it is as before."""
    from torch import nn

    from cotune.models.anatomy import decoder_layers

    class Asking(nn.Module):
        """A linear layer that asks with its input (LoRA) or its output (adapter), and adds its part."""

        def __init__(self, linear: nn.Module, place: int, part: slice, shared: dict[int, Any]) -> None:
            super().__init__()
            self.linear = linear
            self.place, self.part, self.shared = place, part, shared

        def forward(self, x: Any) -> Any:
            y = self.linear(x)
            if method == "adapter":
                return y + exchange.deltas(self.place, y)
            # q, k and v read the same states: the first of them makes the trip for all.
            if self.part.start == 0:
                self.shared[self.place] = exchange.deltas(self.place, x)
            return y + self.shared[self.place][..., self.part]

    shape = LayerShape.of(model)
    q, kv = shape.q_width, shape.kv_width
    replaced: list[tuple[Any, str, Any]] = []

    def replace(parent: Any, name: str, place: int, part: slice) -> None:
        linear = getattr(parent, name)
        replaced.append((parent, name, linear))
        setattr(parent, name, Asking(linear, place, part, shared))

    shared: dict[int, Any] = {}
    try:
        for i, layer in enumerate(decoder_layers(model)):
            if method == "lora":
                replace(layer.self_attn, "q_proj", i, slice(0, q))
                replace(layer.self_attn, "k_proj", i, slice(q, q + kv))
                replace(layer.self_attn, "v_proj", i, slice(q + kv, q + 2 * kv))
            else:
                replace(layer.self_attn, "o_proj", 2 * i, slice(None))
                replace(layer.mlp, "down_proj", 2 * i + 1, slice(None))
        yield
    finally:
        for parent, name, linear in replaced:
            setattr(parent, name, linear)


@dataclass(kw_only=True)
class SplitCounters:
    """What the cloud counted: passes, trips, its own computing, and waiting for the device, milliseconds."""

    num_steps: int = 0
    num_trips: int = 0
    cloud_ms: float = 0.0
    stall_ms: float = 0.0


def decode_split(
    backbone: Backbone,
    method: str,
    ask: Ask,
    prompt_ids: NDArray[np.int64],
    max_new_tokens: int,
    on_token: Callable[[int], None],
    stop_token_ids: tuple[int, ...] = (),
) -> SplitCounters:
    """Greedy decoding with modules elsewhere; blocks while they are asked."""
    from cotune.generation.protocols import RowWork
    from cotune.generation.sampling import Sampling, choose

    exchange, counters = Exchange(ask=ask), SplitCounters()
    _ = backbone.row_floor  # measured on the plain model
    chunk = backbone.prompt_chunk
    cursor = backbone.cursor(len(prompt_ids))
    tokens = prompt_ids
    try:
        with modules_on_device(backbone.model, method, exchange):
            for _ in range(max_new_tokens):
                started_s = time.perf_counter()
                waited_s = exchange.waited_s
                for first in range(0, len(tokens), chunk):
                    piece = tokens[first : first + chunk]
                    exchange.num_rows = len(piece)
                    ((features,),) = backbone.extend([RowWork(cursor=cursor, token_ids=piece)])
                stall_s = exchange.waited_s - waited_s
                counters.num_steps += 1
                counters.stall_ms += 1e3 * stall_s
                counters.cloud_ms += 1e3 * (time.perf_counter() - started_s - stall_s)
                token_id = choose(features.logits, Sampling(), cursor.length)
                on_token(token_id)
                if token_id in stop_token_ids:
                    break
                tokens = np.array([token_id], np.int64)
    finally:
        cursor.close()
    counters.num_trips = exchange.num_trips
    return counters


class SplitCloud:
    """Serves devices that keep low-rank modules, one generation at a time."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._shape = LayerShape.of(backbone.model)
        self._free = asyncio.Lock()

    async def handle(self, connection: Connection) -> None:
        """Until the device hangs up."""
        while True:
            try:
                begin = await connection.receive(TIMEOUT_S)
            except ConnectionLostError:
                return
            if begin[:1] == bytes([PING]):
                await connection.send(begin)
                continue
            async with self._free:
                await self._generate(connection, begin)

    async def _generate(self, connection: Connection, begin: bytes) -> None:
        method, item_bytes, max_new_tokens, prompt_ids = parse_begin(begin)
        loop = asyncio.get_running_loop()
        collector = RowCollector(DELTAS, self._shape.delta_width(method), MAX_PROMPT)

        async def trip(place: int, states: Rows) -> Rows:
            for part in pack_rows(STATES, place, states, item_bytes):
                await connection.send(part)
            while (answer := collector.add(await connection.receive(TIMEOUT_S))) is None:
                pass
            if answer[0] != place or len(answer[1]) != len(states):
                raise FrameError(f"{len(answer[1])} rows of place {answer[0]} came, expected {len(states)} of {place}")
            return answer[1]

        def ask(place: int, states: Rows) -> Rows:
            return asyncio.run_coroutine_threadsafe(trip(place, states), loop).result(2 * TIMEOUT_S)

        def on_token(token_id: int) -> None:
            data = HEADER.pack(TOKEN, 0, 0, 0, 0, token_id)
            asyncio.run_coroutine_threadsafe(connection.send(data), loop).result(TIMEOUT_S)

        stop_token_ids = self._backbone.spec.eos_token_ids
        counters = await asyncio.to_thread(
            decode_split, self._backbone, method, ask, prompt_ids, max_new_tokens, on_token, stop_token_ids
        )
        await connection.send(HEADER.pack(END, 0, 0, 0, 0, 0) + json.dumps(asdict(counters)).encode())


async def ping(connection: Connection, num: int) -> list[float]:
    """Seconds of `num` round trips of a frame without content: what a trip takes on this network and this machine."""
    seconds = []
    for _ in range(num):
        started_s = time.perf_counter()
        await connection.send(HEADER.pack(PING, 0, 0, 0, 0, 0))
        await connection.receive(TIMEOUT_S)
        seconds.append(time.perf_counter() - started_s)
    return seconds


def pack_begin(method: str, item_bytes: int, max_new_tokens: int, prompt_ids: NDArray[np.int64]) -> bytes:
    """The frame that asks for a generation."""
    header = HEADER.pack(BEGIN, item_bytes, METHODS.index(method), 0, max_new_tokens, len(prompt_ids))
    return header + prompt_ids.astype("<u4").tobytes()


def parse_begin(data: bytes) -> tuple[str, int, int, NDArray[np.int64]]:
    """Method, bytes of a number, tokens wanted, prompt int64 (seq,).

    Raises:
        FrameError: no such frame.
    """
    if len(data) < HEADER_BYTES:
        raise FrameError(f"a frame of {len(data)} bytes came, expected at least {HEADER_BYTES}")
    kind, item_bytes, method, _, max_new_tokens, num_prompt = HEADER.unpack(data[:HEADER_BYTES])
    if kind != BEGIN or method >= len(METHODS) or item_bytes not in DTYPES:
        raise FrameError(f"a frame of kind {kind}, method {method} came, expected {BEGIN} with a method of {METHODS}")
    if not 1 <= num_prompt <= MAX_PROMPT or not 1 <= max_new_tokens <= MAX_NEW_TOKENS:
        raise FrameError(f"{num_prompt} prompt tokens and {max_new_tokens} new ones came, expected 1 to {MAX_PROMPT}")
    if len(data) != HEADER_BYTES + 4 * num_prompt:
        raise FrameError(f"{len(data)} bytes came, expected {HEADER_BYTES + 4 * num_prompt} for the prompt")
    return METHODS[method], item_bytes, max_new_tokens, np.frombuffer(data, "<u4", offset=16).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class SplitGeneration:
    """A generation as the device saw it.

    Attributes:
        token_ids: what came out.
        times_s: when each token came, after the first frame was sent.
        bytes_at: bytes received and sent by then.
        device_s: computing on the device after the first token.
        counters: the cloud's.
    """

    token_ids: list[int]
    times_s: list[float]
    bytes_at: list[tuple[int, int]]
    device_s: float
    counters: SplitCounters


async def generate_split(
    connection: Connection,
    modules: DeviceModules,
    shape: LayerShape,
    prompt_ids: NDArray[np.int64],
    max_new_tokens: int,
    *,
    item_bytes: int = 2,
) -> SplitGeneration:
    """The device's part: answers each place until the text is complete."""
    collector = RowCollector(STATES, shape.hidden_size, MAX_PROMPT)
    token_ids: list[int] = []
    times_s: list[float] = []
    bytes_at: list[tuple[int, int]] = []
    device_s = 0.0
    before = connection.bytes_received, connection.bytes_sent
    started_s = time.perf_counter()
    await connection.send(pack_begin(modules.method, item_bytes, max_new_tokens, prompt_ids))
    while True:
        data = await connection.receive(TIMEOUT_S)
        if len(data) < HEADER_BYTES:
            raise FrameError(f"a frame of {len(data)} bytes came, expected at least {HEADER_BYTES}")
        kind, *_, value = HEADER.unpack(data[:HEADER_BYTES])
        if kind == END:
            counters = SplitCounters(**json.loads(data[HEADER_BYTES:]))
            break
        if kind == TOKEN:
            token_ids.append(value)
            times_s.append(time.perf_counter() - started_s)
            bytes_at.append((connection.bytes_received - before[0], connection.bytes_sent - before[1]))
            continue
        computing_s = time.perf_counter()
        whole = collector.add(data)
        if whole is None:
            continue
        place, states = whole
        parts = pack_rows(DELTAS, place, modules.answer(place, states), item_bytes)
        device_s += (time.perf_counter() - computing_s) * bool(token_ids)
        for part in parts:
            await connection.send(part)
    return SplitGeneration(
        token_ids=token_ids, times_s=times_s, bytes_at=bytes_at, device_s=device_s, counters=counters
    )


def _normal(rng: np.random.Generator, size: tuple[int, ...], std: float) -> Rows:
    return rng.standard_normal(size, np.float32) * np.float32(std)


def main(model: str, threads: int) -> None:
    """Host `model` until the process is ended; the first line says where."""
    # Before PyTorch is loaded, as the `cotune` command does.
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    import torch
    from raw_server import raw_server

    from cotune.models.backbone import Backbone
    from cotune.wire.event_loop import run_coroutine

    torch.set_num_threads(threads)
    backbone = Backbone.from_pretrained(model)
    if not hasattr(backbone.model.base_model, "layers"):
        raise InputError(f"{model} is a {type(backbone.model).__name__}, expected a Llama-like model")
    cloud = SplitCloud(backbone)

    async def run() -> None:
        async with raw_server(cloud.handle) as url:
            print(json.dumps({"url": url, "shape": asdict(LayerShape.of(backbone.model))}), flush=True)
            await asyncio.Event().wait()

    run_coroutine(run())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
