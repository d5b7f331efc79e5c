"""How long a device computes for one token, and how much memory its process takes.

Target: under 1 ms for 33 taps, side width 32 and 32,000 words, on one core without torch; under 120 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measurement import Target, Timed, describe_machine, finish, interleave, make_parser, time_call
from peak_memory import run_with_peak
from synthetic_cloud import synthetic_cloud
from synthetic_model import SyntheticBackbone, SyntheticShape, synthetic_features, synthetic_plugin

from cotune.device.side_network import open_side_network
from cotune.device.stream import DeviceStream
from cotune.generation.output_basis import OutputBasis
from cotune.generation.protocols import StepFeatures
from cotune.generation.reference import Personal
from cotune.generation.request import GenerationRequest
from cotune.generation.sampling import Sampling, choose, choose_certified, top_logits
from cotune.plugin import Plugin
from cotune.wire.codec import pack_taps, quantise
from cotune.wire.frames import Frame, Logits, More, Object, Opened, Step, Tokens, decode, encode

SAMPLINGS = {
    "greedy": Sampling(),
    "temperature 1": Sampling(temperature=1.0, seed=7),
    "temperature 1, top-p 0.9": Sampling(temperature=1.0, top_p=0.9, seed=7),
}
MOST_MS = 1.0
MOST_MB = 120.0
NUM_PROMPT = 16
_ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class StreamedDevice:
    """A device in the middle of a generation, without a network: each call is one token, from bytes to bytes.

    Attributes:
        num_steps, num_misses: tokens so far, and those that the top-k logits did not prove. These ask for more
            logits, and only their first part is timed.
    """

    def __init__(
        self,
        personal: Personal,
        features: list[StepFeatures],
        answer: str,
        sampling: Sampling,
        *,
        top_k: int,
        length: int,
    ) -> None:
        self.num_steps = 0
        self.num_misses = 0
        self._personal = personal
        self._features = features
        self._answer = answer
        self._sampling = sampling
        self._top_k = top_k
        self._length = length
        self._stream = self._new_stream()
        self._epoch = 0

    def __call__(self) -> float:
        """Seconds for the next token."""
        if len(self._stream.decisions) == self._length:
            self._stream, self._epoch = self._new_stream(), 0
        pos = self._stream.next_position
        features = self._features[self.num_steps % len(self._features)]
        base_token = choose(features.logits, self._sampling, pos)
        place = {"epoch": self._epoch, "session": self._stream.session, "pos": pos}
        self.num_steps += 1
        taps = pack_taps(*quantise(features.taps))
        if self._answer == "correction":
            # What the cloud decides costs the device the same, whatever it is.
            ids, flags = np.array([base_token]), np.array([True])
            tokens = Tokens(**place, tokens=ids, consulted=flags, changed=~flags, late=~flags)
            return self._feed(Step(**place, base_token=base_token, taps=taps))[0] + self._feed(tokens)[0]
        top = top_logits(features.logits, self._top_k, self._sampling)
        step = Step(
            **place, base_token=base_token, taps=taps, ids=top.ids, logits=top.logits, log_normalizer=top.log_normalizer
        )
        seconds, replies = self._feed(step)
        if isinstance(replies[0], More):
            self.num_misses += 1
            everything = top_logits(features.logits, len(features.logits), self._sampling)
            normalizer = everything.log_normalizer or 0.0
            _, replies = self._feed(
                Logits(**place, ids=everything.ids, logits=everything.logits, log_normalizer=normalizer)
            )
        self._epoch += isinstance(replies[0], Object)
        return seconds

    def _feed(self, frame: Frame) -> tuple[float, list[Frame]]:
        data = encode(frame)
        started_s = time.perf_counter()
        replies = self._stream.on_frame(decode(data))
        for reply in replies:
            encode(reply)
        return time.perf_counter() - started_s, replies

    def _new_stream(self) -> DeviceStream:
        request = GenerationRequest(
            prompt_ids=np.arange(NUM_PROMPT), max_new_tokens=self._length, sampling=self._sampling
        )
        stream = DeviceStream(
            request,
            self._personal,
            tap_shape=self._features[0].taps.shape,
            answer=self._answer,
            top_k=self._top_k,
        )
        stream.open_frame()
        stream.on_frame(Opened(session=5, epoch=0, pos=NUM_PROMPT, ticket=bytes(16)))
        return stream


def part_calls(personal: Personal, features: list[StepFeatures], top_k: int) -> dict[str, Timed]:
    """The arithmetic in a step, piece by piece."""
    quantised = [quantise(one.taps) for one in features]
    side = personal.corrector.open()
    corrections = [side.correct(NUM_PROMPT + i, *taps) for i, taps in enumerate(quantised)]
    deltas = [personal.output_basis.delta(correction) for correction in corrections]
    count = {"now": 0}

    def each(work: Callable[[int], object]) -> Timed:
        def one() -> None:
            count["now"] = (count["now"] + 1) % len(features)
            work(count["now"])

        return time_call(one)

    calls = {
        "side network": each(lambda i: side.correct(NUM_PROMPT + i, *quantised[i])),
        "output basis": each(lambda i: personal.output_basis.delta(corrections[i])),
    }
    for name, sampling in SAMPLINGS.items():
        top = [top_logits(one.logits, top_k, sampling) for one in features]
        calls[f"choice, {name}"] = each(
            lambda i, top=top, sampling=sampling: choose_certified(top[i], deltas[i], sampling, NUM_PROMPT + i)
        )
    return calls


def measure_steps(shape: SyntheticShape, args: argparse.Namespace, plugin: Plugin) -> dict[str, Any]:
    """Times of the parts and of whole steps; milliseconds."""
    personal = Personal(corrector=open_side_network(plugin), output_basis=OutputBasis.from_bytes(plugin.output_basis))
    features = [synthetic_features(shape, [i]) for i in range(64)]
    devices = {
        f"whole step, {answer} form, {name}": StreamedDevice(
            personal, features, answer, sampling, top_k=args.top_k, length=args.tokens
        )
        for answer in ("correction", "token")
        for name, sampling in SAMPLINGS.items()
        if answer == "token" or sampling.is_greedy  # a device that corrects draws nothing
    }
    calls = {**part_calls(personal, features, args.top_k), **devices}
    measured = interleave(calls, runs=args.runs, calls_per_run=args.calls, warm_up=20)
    for name, device in devices.items():
        measured[name]["certificate_miss_rate"] = device.num_misses / device.num_steps
    assert "torch" not in sys.modules, "the device's code loaded torch"
    return measured


def measure_memory(shape: SyntheticShape, args: argparse.Namespace, plugin_folder: Path, log: Path) -> dict[str, Any]:
    """Peak memory of device processes that generate with a cloud over a WebSocket; megabytes."""
    here = Path(__file__).parent
    found: dict[str, Any] = {}
    with synthetic_cloud(shape, log) as url:
        for answer in ("correction", "token"):
            options = {"answer": answer, "max_new_tokens": args.tokens, "top_k": args.top_k}
            commands = [{"do": "generate", "prompts": ["Hello!"], "options": options}, {"do": "modules"}]
            out, peak_mb = run_with_peak(
                [str(here / "device_process.py"), str(plugin_folder), url],
                stdin="".join(json.dumps(command) + "\n" for command in commands),
            )
            generated, modules = map(json.loads, out.splitlines())
            assert not modules["torch"], "the device process loaded torch"
            found[f"device runtime, {answer} form"] = {
                "peak_mb": peak_mb,
                "num_tokens": len(generated["generations"][0]["token_ids"]),
            }
        for answer in ("correction", "token"):
            command = ["-m", "cotune", "device", "generate", str(plugin_folder), "Hello!", "--cloud", url, "--json"]
            out, peak_mb = run_with_peak([*command, "--answer", answer, "--max-new-tokens", str(args.tokens)])
            name = f"cotune device generate, {answer} form"
            found[name] = {"peak_mb": peak_mb, "num_tokens": json.loads(out)["num_tokens"]}
    return found


def restart_on_one_core() -> None:
    """Start this script anew with one BLAS thread, since NumPy reads the number when it loads, and on one core."""
    if any(os.environ.get(name) != value for name, value in _ONE_THREAD.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **_ONE_THREAD})


def main() -> None:
    """Entry point."""
    parser = make_parser(
        "device_step",
        "Time one device step on one core without torch, and the memory of a device process.",
        "  python benchmarks/device_step.py\n  python benchmarks/device_step.py --vocab-size 128256 --taps 33 --runs 5",
    )
    parser.add_argument("--taps", type=int, default=33, help="taps of one position (default: %(default)s)")
    parser.add_argument("--tap-dim", type=int, default=32, help="width of a tap (default: %(default)s)")
    parser.add_argument("--side-width", type=int, default=32, help="width of the side state (default: %(default)s)")
    parser.add_argument("--inner-width", type=int, default=128, help="width inside a rung (default: %(default)s)")
    parser.add_argument("--basis-dim", type=int, default=64, help="length of a correction (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=32_000, help="words (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=32, help="base logits in a step (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=200, help="length of a generation (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=15, help="turns of each measurement (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=200, help="calls in one turn (default: %(default)s)")
    args = parser.parse_args()
    restart_on_one_core()
    machine = describe_machine()
    shape = SyntheticShape(
        num_taps=args.taps,
        tap_dim=args.tap_dim,
        side_width=args.side_width,
        inner_width=args.inner_width,
        basis_dim=args.basis_dim,
        vocab_size=args.vocab_size,
        seed=args.seed,
    )
    model = SyntheticBackbone(shape)
    plugin = synthetic_plugin(shape, model.description, model.tokenizer_json)
    with tempfile.TemporaryDirectory() as folder:
        plugin.save(Path(folder) / "plugin")
        memory = measure_memory(shape, args, Path(folder) / "plugin", Path(folder) / "cloud.log")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    steps = measure_steps(shape, args, plugin)
    for name, found in steps.items():
        miss = f"  {found['certificate_miss_rate']:.0%} not proved" if "certificate_miss_rate" in found else ""
        print(f"{name:48s} {found['ms']} ms, 95 % under {found['p95_ms']:.3f}{miss}")
    for name, found in memory.items():
        print(f"{name:48s} {found['peak_mb']:.1f} MB")
    targets = [
        Target(what=name, measured=found["ms"].median, limit=MOST_MS, unit="ms")
        for name, found in steps.items()
        if name.startswith("whole")
    ]
    targets += [
        Target(what=name, measured=found["peak_mb"], limit=MOST_MB, unit="MB") for name, found in memory.items()
    ]
    finish("device_step", args, machine, {"steps": steps, "memory": memory}, targets)


if __name__ == "__main__":
    main()
