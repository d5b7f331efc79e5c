"""Many devices for a long time, over networks that delay and cut, on a cloud that is killed and restarted now and then.

Every text is compared with the single-process reference. At the end no text may have had a wrong token, the cloud may
hold no session and no block of its cache, and its memory may not have grown.

A cloud process is killed (SIGKILL) or told to end (SIGTERM) at random and started again on the same port; devices find
it by themselves. What each device asks, its schedule, answer form and network change from text to text.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measurement import Target, describe_machine, finish, make_parser
from rich.console import Console
from synthetic_plugin import random_plugin

from cotune.device.client import ClientConfig, CloudClient
from cotune.device.runtime import Device, GenerationOptions
from cotune.device.stream import DeviceStream
from cotune.errors import CotuneError
from cotune.generation.reference import Generation, Personal, generate
from cotune.generation.request import ANSWERS, GenerationRequest
from cotune.generation.sampling import Sampling
from cotune.models.backbone import Backbone
from cotune.wire.emulator import EmulatedConnection, NetworkProfile
from cotune.wire.event_loop import run_coroutine
from cotune.wire.transport import Connection
from cotune.wire.websocket import connect

SCHEDULES = ("blocking", "gated", "optimistic", "auto")
# For a session whose device never comes back, seconds: short, so that leaks show at the end of a run.
SESSION_TTL_S = 5.0
STUBBORN = ClientConfig(timeout_s=60.0, first_backoff_s=0.05, max_backoff_s=1.0, max_attempts=10_000)
MOST_GROWTH = 1.10


@dataclass(frozen=True)
class Case:
    """One text: who asks what, and what the reference says."""

    personal: Personal
    request: GenerationRequest
    expected: Generation


@dataclass
class Tally:
    """What came of the run."""

    num_texts: int = 0
    num_tokens: int = 0
    num_wrong: int = 0
    num_reconnects: int = 0
    num_kills: int = 0
    num_terms: int = 0
    memory_mb: list[tuple[float, float]] = field(default_factory=list)
    """(seconds since this cloud process started, its resident memory)."""


class Cloud:
    """`cotune cloud` on one port, again and again."""

    def __init__(self, model: str, threads: int, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self._model, self._threads, self._log = model, threads, log
        self._process: asyncio.subprocess.Process | None = None
        self.started_s = 0.0

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Returns when it listens."""
        arguments = ["-m", "cotune", "cloud", self._model, "--port", str(self.port), "--threads", str(self._threads)]
        arguments += ["--session-ttl-s", str(SESSION_TTL_S), "--drain-s", "2", "--json"]
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, *arguments, stdout=asyncio.subprocess.PIPE, stderr=log
            )
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), 120)
        if not line:
            raise CotuneError(f"the cloud ended before it listened; see {self._log}")
        json.loads(line)
        self.started_s = time.monotonic()

    async def stop(self, number: int) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)
        await asyncio.wait_for(self._process.wait(), 30)

    def memory_mb(self) -> float:
        """Resident memory now."""
        assert self._process is not None
        pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def metrics(self) -> dict[str, float]:
        """Its counters, those with labels added up."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as response:
            text = response.read().decode()
        found: dict[str, float] = {}
        for line in text.splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                name = name.partition("{")[0]
                found[name] = found.get(name, 0.0) + float(value)
        return found


def make_cases(backbone: Backbone, num: int, seed: int, num_tokens: int) -> list[Case]:
    """Texts of `num` different people, half of them sampled, in both gated and ungated mode."""
    cases = []
    for i in range(num):
        rng = np.random.default_rng([seed, i])
        device = Device(random_plugin(backbone, float(rng.uniform(0.3, 2.0)), seed + i), _nowhere)
        request = GenerationRequest(
            prompt_ids=rng.integers(3, backbone.spec.vocab_size, int(rng.integers(2, 200))),
            mode=("integration", "spa")[i % 2],
            max_new_tokens=num_tokens,
            sampling=Sampling() if i % 4 < 2 else Sampling(temperature=0.9, top_p=0.95, seed=i),
            stop_token_ids=backbone.spec.eos_token_ids,
        )
        cases.append(Case(device.personal, request, generate(backbone, device.personal, request)))
    return cases


async def _nowhere() -> Connection:
    raise CotuneError("this device has no cloud")


async def run_device(
    number: int, cloud: Cloud, backbone: Backbone, cases: list[Case], tally: Tally, ends_s: float
) -> None:
    """Text after text until the time is over."""
    rng = random.Random(number)
    shape = backbone.description.num_taps, backbone.description.tap_dim
    options = GenerationOptions()
    while time.monotonic() < ends_s:
        case = rng.choice(cases)

        async def connector() -> Connection:
            profile = NetworkProfile(
                delay_ms=rng.choice([0.0, 2.0, 10.0, 40.0]),
                duplicate_probability=rng.choice([0.0, 0.05]),
                disconnect_every_frames=rng.choice([None, None, rng.randint(30, 300)]),
            )
            return EmulatedConnection(await connect(cloud.url), profile, seed=rng.getrandbits(32))

        stream = DeviceStream(
            case.request,
            case.personal,
            tap_shape=shape,
            schedule=rng.choice(SCHEDULES),
            answer=rng.choice(ANSWERS),
            window=options.window,
        )
        # Not as `async with`, which wants the cloud to be there at the start.
        client = CloudClient(connector, STUBBORN)
        try:
            await client.generate(stream)
        finally:
            await client.close()
        tally.num_reconnects += client.num_reconnects
        tally.num_texts += 1
        tally.num_tokens += len(stream.token_ids)
        pairs = zip(stream.token_ids, case.expected.token_ids, strict=False)
        wrong = sum(ours != theirs for ours, theirs in pairs)
        tally.num_wrong += wrong + abs(len(stream.token_ids) - len(case.expected.token_ids))


async def disturb(cloud: Cloud, tally: Tally, every_s: float, rng: random.Random, until_s: float) -> None:
    """Kill or end the cloud now and then, and start it again."""
    while True:
        wait_s = rng.uniform(0.6, 1.4) * every_s
        if time.monotonic() + wait_s > until_s:
            return
        await asyncio.sleep(wait_s)
        if rng.random() < 0.5:
            tally.num_kills += 1
            await cloud.stop(signal.SIGKILL)
        else:
            tally.num_terms += 1
            await cloud.stop(signal.SIGTERM)
        await cloud.start()


async def watch(cloud: Cloud, tally: Tally) -> None:
    """Note the cloud's memory."""
    while True:
        await asyncio.sleep(1.0)
        with contextlib.suppress(OSError, IndexError):
            tally.memory_mb.append((time.monotonic() - cloud.started_s, cloud.memory_mb()))


async def soak(args: argparse.Namespace) -> tuple[Tally, dict[str, Any]]:
    """The run, and what is left afterwards."""
    torch.set_num_threads(1)
    backbone = Backbone.from_pretrained(args.model)
    cases = make_cases(backbone, args.cases, args.seed, args.max_new_tokens)
    cloud, tally = Cloud(args.model, args.threads, args.work / "soak-cloud.log"), Tally()
    args.work.mkdir(parents=True, exist_ok=True)
    await cloud.start()
    rng = random.Random(args.seed)
    side = [asyncio.create_task(watch(cloud, tally))]
    # A calm last third shows whether memory is flat, and leaves the cloud that is asked at the end in peace.
    ends_s = time.monotonic() + 60 * args.minutes
    chaos = asyncio.create_task(disturb(cloud, tally, args.restart_every_s, rng, ends_s - 20 * args.minutes))
    devices = [asyncio.create_task(run_device(i, cloud, backbone, cases, tally, ends_s)) for i in range(args.devices)]
    with Console(stderr=True).status("soaking") as status:
        while time.monotonic() < ends_s and not all(task.done() for task in devices):
            await asyncio.sleep(0.5)
            left = max(0.0, ends_s - time.monotonic())
            status.update(
                f"{left:.0f} s left; {tally.num_texts} texts, {tally.num_wrong} wrong tokens, "
                f"{tally.num_reconnects} reconnects, {tally.num_kills + tally.num_terms} restarts"
            )
    await asyncio.gather(chaos, *devices)
    await asyncio.sleep(SESSION_TTL_S + 2)
    for task in side:
        task.cancel()
    left = cloud.metrics()
    await cloud.stop(signal.SIGTERM)
    return tally, left


def growth(memory_mb: list[tuple[float, float]]) -> float:
    """Memory at the end over memory after a warm-up, of the last cloud process."""
    last: list[float] = []
    before = -1.0
    for age_s, megabytes in memory_mb:
        if age_s < before:
            last = []
        before = age_s
        if age_s > 5.0:
            last.append(megabytes)
    if len(last) < 4:
        return 1.0
    quarter = max(1, len(last) // 4)
    return float(np.median(last[-quarter:]) / np.median(last[:quarter]))


def main() -> None:
    parser = make_parser(
        "soak", __doc__ or "", "  python benchmarks/soak.py\n  python benchmarks/soak.py --minutes 10\n"
    )
    parser.add_argument("--model", default="starter")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--devices", type=int, default=32)
    parser.add_argument("--cases", type=int, default=48, help="different texts")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--restart-every-s", type=float, default=12.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"))
    args = parser.parse_args()
    machine = describe_machine()
    tally, left = run_coroutine(soak(args))
    grown = growth(tally.memory_mb)
    results = {
        "texts": tally.num_texts,
        "tokens": tally.num_tokens,
        "wrong_tokens": tally.num_wrong,
        "reconnects": tally.num_reconnects,
        "kills": tally.num_kills,
        "terms": tally.num_terms,
        "memory_growth": grown,
        "memory_mb": [megabytes for _, megabytes in tally.memory_mb][:: max(1, len(tally.memory_mb) // 60)],
        "metrics_at_the_end": left,
    }
    print(json.dumps({name: value for name, value in results.items() if not isinstance(value, list | dict)}, indent=1))
    targets = [
        Target(what="wrong tokens", measured=float(tally.num_wrong), limit=0, unit="tokens"),
        Target(what="sessions left", measured=left.get("cotune_sessions", 0.0), limit=0, unit="sessions"),
        Target(what="blocks left", measured=left.get("cotune_kv_blocks_used", 0.0), limit=0, unit="blocks"),
        Target(what="memory at the end over that at the start", measured=grown, limit=MOST_GROWTH, unit=""),
    ]
    args.model = args.model.rstrip("/").rsplit("/", 1)[-1]
    finish("soak", args, machine, results, targets)


if __name__ == "__main__":
    main()
