"""How many bytes a token costs on the wire, each way: counted from encoded frames, and on a real socket.

Target: at most 1,400 bytes per token downstream for 33 taps of width 32 with the top 32 logits.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from measurement import Target, describe_machine, finish, make_parser
from synthetic_cloud import synthetic_cloud
from synthetic_model import SyntheticBackbone, SyntheticShape, synthetic_features, synthetic_plugin
from timed_generation import Totals, generate_timed

from cotune.device.client import CloudClient
from cotune.device.runtime import Device, GenerationOptions
from cotune.generation.request import ANSWERS
from cotune.generation.sampling import Sampling, choose, top_logits
from cotune.plugin import Plugin
from cotune.wire.codec import CODECS
from cotune.wire.emulator import EmulatedConnection, NetworkProfile
from cotune.wire.event_loop import run_coroutine
from cotune.wire.frames import Ack, Correct, Frame, Logits, More, Object, Step, Tokens, encode, kind_of
from cotune.wire.recorder import RecordingConnection
from cotune.wire.transport import Connection
from cotune.wire.websocket import connect

MOST_BYTES = 1400
STEP = "step"
MASK_BYTES = 4
TLS_RECORD_BYTES = 22
TCP_IPV4_BYTES = 52
PLACE = {"epoch": 3, "session": 2**31, "pos": 500}


def framing_bytes(num_bytes: int, *, up: bool) -> int:
    """What WebSocket adds to one message."""
    length = 2 if num_bytes < 126 else 4 if num_bytes < 65_536 else 10
    return length + (MASK_BYTES if up else 0)


def on_wire(*frames: Frame, up: bool) -> int:
    """Bytes of these frames with WebSocket framing, one message each."""
    sizes = [len(encode(frame)) for frame in frames]
    return sum(size + framing_bytes(size, up=up) for size in sizes)


def count_frames(shape: SyntheticShape, top_k: int) -> list[dict[str, Any]]:
    """Bytes of one consulted token, by answer form, sampling and tap codec, from real encoded frames."""
    features = synthetic_features(shape, [0])
    rows = []
    for answer in ANSWERS:
        for sampling_name, sampling in (("greedy", Sampling()), ("top-p", Sampling(temperature=1.0, top_p=0.9))):
            if answer == "correction" and sampling_name != "greedy":
                continue
            for codec_name, codec in CODECS.items():
                base_token = choose(features.logits, sampling, PLACE["pos"])
                step = Step(**PLACE, base_token=base_token, taps=codec.encode(features.taps))
                if answer == "token":
                    top = top_logits(features.logits, top_k, sampling)
                    step = replace(step, ids=top.ids, logits=top.logits, log_normalizer=top.log_normalizer)
                correct = Correct(**PLACE, codes=np.ones(shape.basis_dim, np.int8), scale=np.float16(1))
                down = [step, _tokens(1)] if answer == "correction" else [step]
                up: Frame = correct if answer == "correction" else Ack(**PLACE)
                rows.append(
                    {
                        "answer": answer,
                        "sampling": sampling_name,
                        "codec": codec_name,
                        "down": on_wire(*down, up=False),
                        "up": on_wire(up, up=True),
                        "down_over_tls_and_tcp": on_wire(*down, up=False)
                        + len(down) * (TLS_RECORD_BYTES + TCP_IPV4_BYTES),
                    }
                )
    return rows


def count_other_frames(shape: SyntheticShape, top_k: int) -> dict[str, int]:
    """Bytes of each frame by itself, with its framing."""
    features = synthetic_features(shape, [0])

    def more_logits(k: int) -> Logits:
        top = top_logits(features.logits, k, Sampling())
        return Logits(**PLACE, ids=top.ids, logits=top.logits, log_normalizer=0.0)

    return {
        "step without consultation, down": on_wire(Step(**PLACE, base_token=5, consult=False), up=False),
        "tokens frame of 1, down": on_wire(_tokens(1), up=False),
        "tokens frame of 8, down": on_wire(_tokens(8), up=False),
        f"logits frame of {4 * top_k}, down": on_wire(more_logits(4 * top_k), up=False),
        "logits frame of all, down": on_wire(more_logits(shape.vocab_size), up=False),
        "correct frame, up": on_wire(
            Correct(**PLACE, codes=np.ones(shape.basis_dim, np.int8), scale=np.float16(1)), up=True
        ),
        "ack frame, up": on_wire(Ack(**PLACE), up=True),
        "object frame, up": on_wire(Object(**PLACE, token=5), up=True),
        "more frame, up": on_wire(More(**PLACE), up=True),
    }


def _tokens(count: int) -> Tokens:
    ids, flags = np.arange(count), np.ones(count, np.bool_)
    return Tokens(**PLACE, tokens=ids, consulted=flags, changed=flags, late=~flags)


class SocketCounter:
    """A relay between device and cloud that counts every byte of the TCP stream."""

    def __init__(self) -> None:
        self.url = ""
        self.down = 0
        self.up = 0

    @asynccontextmanager
    async def before(self, url: str) -> AsyncIterator[SocketCounter]:
        """Listen in front of the cloud at `url`."""
        host, port = urlsplit(url).hostname, urlsplit(url).port

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there_reader, there_writer = await asyncio.open_connection(host, port)
            await asyncio.gather(self._copy(reader, there_writer, up=True), self._copy(there_reader, writer, up=False))

        server = await asyncio.start_server(relay, "127.0.0.1", 0)
        self.url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server:
            yield self

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool) -> None:
        while data := await reader.read(65_536):
            if up:
                self.up += len(data)
            else:
                self.down += len(data)
            writer.write(data)
            await writer.drain()
        writer.close()


async def measure_generations(url: str, plugin: Plugin, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Whole generations, their socket's bytes per kept token: rolled back steps and all else included."""
    rows = []
    async with SocketCounter().before(url) as counter:
        for rtt_ms in args.rtt_ms:
            recorder = RecordingConnection(
                EmulatedConnection(await connect(counter.url), NetworkProfile.of_rtt(rtt_ms))
            )

            async def make(recorder: RecordingConnection = recorder) -> Connection:
                return recorder

            device = Device(plugin, make)
            async with CloudClient(make) as client:
                for schedule in ("blocking", "gated", "optimistic"):
                    for answer in ANSWERS:
                        options = GenerationOptions(
                            schedule=schedule, answer=answer, max_new_tokens=args.tokens, top_k=args.top_k
                        )
                        recorder.frames.clear()
                        down, up = counter.down, counter.up
                        made = await generate_timed(client, device, "Hello!", options)
                        await asyncio.sleep(0.05 + rtt_ms / 1e3)  # until the last bytes have passed
                        totals = Totals.of([made])
                        num_steps = sum(kind_of(data) == STEP for data in recorder.received)
                        rows.append(
                            {
                                "rtt_ms": rtt_ms,
                                "schedule": schedule,
                                "answer": answer,
                                "num_tokens": made.num_tokens,
                                "down_per_step": (counter.down - down) / num_steps,
                                "down_per_token": (counter.down - down) / made.num_tokens,
                                "up_per_token": (counter.up - up) / made.num_tokens,
                                "changed_rate": totals.changed_rate,
                                "wasted_rate": totals.wasted_rate,
                                "certificate_miss_rate": totals.certificate_miss_rate,
                            }
                        )
    return rows


def print_counts(counted: Sequence[dict[str, Any]], frames: dict[str, int], measured: Sequence[dict[str, Any]]) -> None:
    """All numbers as tables."""
    print("one consulted token, from its frames with WebSocket framing")
    for row in counted:
        print(f"  {row['answer']:11s} {row['sampling']:7s} {row['codec']:8s} down {row['down']:5d}  up {row['up']:3d}")
    print("other frames")
    for name, num_bytes in frames.items():
        print(f"  {name:34s} {num_bytes:6d}")
    print("whole generations on a socket, bytes per kept token; in brackets down per step sent")
    for row in measured:
        print(
            f"  {row['rtt_ms']:5.0f} ms  {row['schedule']:10s} {row['answer']:10s} "
            f"down {row['down_per_token']:7.1f} ({row['down_per_step']:6.1f})  up {row['up_per_token']:6.1f}   "
            f"q {row['changed_rate']:.2f}, wasted steps {row['wasted_rate']:.2f}, "
            f"not proved {row['certificate_miss_rate']:.2f}"
        )


def main() -> None:
    """Entry point."""
    parser = make_parser(
        "wire_bytes",
        "Count the bytes that a token costs on the wire, each way.",
        "  python benchmarks/wire_bytes.py\n  python benchmarks/wire_bytes.py --taps 41 --top-k 64 --vocab-size 151936",
    )
    parser.add_argument("--taps", type=int, default=33, help="taps of one position (default: %(default)s)")
    parser.add_argument("--tap-dim", type=int, default=32, help="width of a tap (default: %(default)s)")
    parser.add_argument("--basis-dim", type=int, default=64, help="length of a correction (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=32_000, help="words (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=32, help="base logits in a step (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=200, help="length of each generation (default: %(default)s)")
    parser.add_argument("--step-ms", type=float, default=10.0, help="time of a cloud step (default: %(default)s)")
    parser.add_argument(
        "--rtt-ms", type=float, nargs="+", default=[0.0, 50.0], help="emulated round trips (default: 0 50)"
    )
    args = parser.parse_args()
    machine = describe_machine()
    shape = SyntheticShape(
        num_taps=args.taps,
        tap_dim=args.tap_dim,
        basis_dim=args.basis_dim,
        vocab_size=args.vocab_size,
        step_ms=args.step_ms,
        seed=args.seed,
    )
    counted = count_frames(shape, args.top_k)
    frames = count_other_frames(shape, args.top_k)
    model = SyntheticBackbone(shape)
    plugin = synthetic_plugin(shape, model.description, model.tokenizer_json)
    with tempfile.TemporaryDirectory() as folder, synthetic_cloud(shape, Path(folder) / "cloud.log") as url:
        measured = run_coroutine(measure_generations(url, plugin, args))

    print_counts(counted, frames, measured)
    targets = [
        Target(what=f"a token's frames, {row['answer']} form, {row['sampling']}, down",
               measured=row["down"], limit=MOST_BYTES, unit="bytes")
        for row in counted
        if row["codec"] == "int8"
    ]  # fmt: skip
    targets += [
        Target(
            what=f"on the socket per step sent, {answer} form, all schedules, down",
            measured=max(row["down_per_step"] for row in measured if row["answer"] == answer),
            limit=MOST_BYTES,
            unit="bytes",
        )
        for answer in ANSWERS
    ]
    targets += [
        Target(
            what=f"on the socket per kept token, {row['schedule']}, {row['answer']} form, {row['rtt_ms']:g} ms, down",
            measured=row["down_per_token"],
            limit=MOST_BYTES,
            unit="bytes",
        )
        for row in measured
    ]
    finish("wire_bytes", args, machine, {"frames": counted, "other_frames": frames, "generations": measured}, targets)


if __name__ == "__main__":
    main()
