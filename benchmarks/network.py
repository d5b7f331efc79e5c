"""What each way of working together makes of a network: tokens per second, stalls, bytes and wasted steps.

LoRA and adapters on the device (`split_layers.py`), the ladder, SPA, and integration blocking and optimistic, all over
WebSockets behind an emulated network with a delay and a bandwidth, beside what theory predicts from measured parts:

    SPA (arXiv 2403.07088), equations 3 to 5     T = T_device + T_cloud + T_net,  T_net = M (tau + T_data)
    optimistic                                   T = c + q R

M, q, c, the device's time and the bytes are counted or measured in the same text; no rate enters. The prediction comes
twice: with the round trip that is emulated, and with that of an empty frame sent the same way, software included.

Each cell decodes as many tokens as its time allows; the row says how many. Cells of one network take turns.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np
from finished_cells import FinishedCells, Row
from measurement import Spread, describe_machine, finish, make_parser
from persona import cloud_process, heldout_prompts, load_plugin
from split_layers import DeviceAdapter, DeviceLora, DeviceModules, LayerShape, SplitGeneration, generate_split, ping

from cotune.cli.demo.plan import DemoFolder
from cotune.cli.demo.processes import started
from cotune.device.client import ClientConfig, CloudClient
from cotune.device.runtime import Device, GenerationOptions
from cotune.device.stream import DeviceStream
from cotune.errors import CotuneError, InputError
from cotune.generation.request import Decision
from cotune.plugin import Plugin
from cotune.wire.emulator import EmulatedConnection, NetworkProfile
from cotune.wire.event_loop import run_coroutine
from cotune.wire.transport import Connection
from cotune.wire.websocket import connect

SPLIT = ("lora", "adapter")
# By name: mode and schedule.
WITH_PLUGIN = {
    "ladder": ("ladder", "blocking"),
    "spa": ("spa", "gated"),
    "integration, blocking": ("integration", "blocking"),
    "integration, optimistic": ("integration", "optimistic"),
}
# M and q of these depend on the text: they read the same ones behind all networks, however long that takes.
WHOLE_TEXTS = ("spa", "integration, optimistic")
METHODS = (*SPLIT, *WITH_PLUGIN)
# Colour, marker, its size, and whether it is hollow: the ladder's points lie under those of blocking integration.
STYLES = {
    "lora": ("tab:blue", "v", 5, False),
    "adapter": ("tab:orange", "^", 5, False),
    "ladder": ("black", "s", 8, True),
    "integration, blocking": ("tab:purple", "o", 4, False),
    "spa": ("tab:red", "D", 4, False),
    "integration, optimistic": ("tab:green", "o", 5, False),
}
FEWEST_TOKENS = 3
QUICK = {"rtt_ms": [0.0, 50.0], "mbps": [10.0], "turns": 2, "seconds": 0.8}
_GUESSED_STEP_MS = 5.0
_NUM_PINGS = 3
_KEYS = ("mbps", "rtt_ms", "method")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One text; what is per token leaves the first one out, except for stalls and wasted steps, which count all.

    Attributes:
        num_tokens: of the text.
        tokens_per_s: from the first token to the last.
        first_token_ms: from asking to the first token.
        step_ms: c, one forward pass of the cloud.
        device_ms: computing on the device, per token.
        trips: M, blocking round trips per token.
        changed_rate: q, tokens that the device changed, the last one left out.
        stall_ms: the cloud waiting for the device, per token.
        wasted_rate: passes that were thrown away, per token.
        bytes_down, bytes_up: between the first token and the last, per token.
        text_bytes: all bytes of the text, both ways, the prompt's included.
        ping_ms: the round trip of an empty frame just before.
    """

    num_tokens: int
    tokens_per_s: float
    first_token_ms: float
    step_ms: float
    device_ms: float
    trips: float
    changed_rate: float
    stall_ms: float
    wasted_rate: float
    bytes_down: float
    bytes_up: float
    text_bytes: int
    ping_ms: float

    @classmethod
    def of(
        cls, times_s: Sequence[float], bytes_at: Sequence[tuple[int, int]], text_bytes: int, **measured: float
    ) -> Self:
        """From when each token came, and the bytes received and sent by then.

        Raises:
            CotuneError: one token has no rate.
        """
        gaps = len(times_s) - 1
        if gaps < 1:
            raise CotuneError(f"a text of {len(times_s)} tokens has no rate, expected at least 2; take other prompts")
        return cls(
            num_tokens=len(times_s),
            tokens_per_s=gaps / (times_s[-1] - times_s[0]),
            first_token_ms=1e3 * times_s[0],
            bytes_down=(bytes_at[-1][0] - bytes_at[0][0]) / gaps,
            bytes_up=(bytes_at[-1][1] - bytes_at[0][1]) / gaps,
            text_bytes=text_bytes,
            **measured,
        )


def predict_paper(turn: Turn, rtt_ms: float, mbps: float, *, trips: float | None = None) -> float:
    """Tokens per second by equations 3 to 5, with M = `trips`, by default the measured one.

    T = T_device + T_cloud + M (tau + T_data). T_device and T_cloud are measured; tau is the round trip, and M T_data
    the time that a token's bytes take.

    Example:
        >>> turn = Turn(num_tokens=3, tokens_per_s=1, first_token_ms=1, step_ms=20, device_ms=1, trips=0.5,
        ...     changed_rate=0.1, stall_ms=0, wasted_rate=0, bytes_down=1000, bytes_up=250, text_bytes=1, ping_ms=38)
        >>> predict_paper(turn, rtt_ms=38, mbps=1)  # 1 + 20 + 0.5 * 38 + 1250 * 8 / 1000 ms
        20.0
    """
    waits = turn.trips if trips is None else trips
    network_ms = waits * rtt_ms + _ms_of(turn.bytes_down + turn.bytes_up, mbps)
    return 1e3 / (turn.device_ms + turn.step_ms + network_ms)


def predict_optimistic(turn: Turn, rtt_ms: float, mbps: float) -> float:
    """Tokens per second by c + q R, where R has the round trip, the device, and the bytes of one question and answer.

    Steps stream without waiting: where one's bytes take longer than c, the network sets the pace, and stands for c.

    Example:
        >>> turn = Turn(num_tokens=3, tokens_per_s=1, first_token_ms=1, step_ms=6, device_ms=1, trips=0.5,
        ...     changed_rate=0.1, stall_ms=0, wasted_rate=1.0, bytes_down=1000, bytes_up=250, text_bytes=1, ping_ms=34)
        >>> predict_optimistic(turn, rtt_ms=34, mbps=1)  # 6 + 0.1 * (34 + 1 + 4 + 1)
        100.0
    """
    # A step's own share of the bytes, those that were wasted not counted.
    steps = 1.0 + turn.wasted_rate
    down_ms, up_ms = _ms_of(turn.bytes_down / steps, mbps), _ms_of(turn.bytes_up / steps, mbps)
    trip_ms = rtt_ms + turn.device_ms + down_ms + up_ms
    return 1e3 / (max(turn.step_ms, down_ms) + turn.changed_rate * trip_ms)


def predict(method: str, turn: Turn, rtt_ms: float, mbps: float) -> float:
    """What the theory of that method says."""
    if method == "integration, optimistic":
        return predict_optimistic(turn, rtt_ms, mbps)
    return predict_paper(turn, rtt_ms, mbps)


def num_tokens_for(method: str, rtt_ms: float, mbps: float, shape: LayerShape, seconds: float, most: int) -> int:
    """How many tokens of that method fit into `seconds`, roughly; at least three, at most `most`.

    Example:
        >>> shape = LayerShape(num_layers=6, hidden_size=192, q_width=192, kv_width=64)
        >>> num_tokens_for("integration, blocking", 95.0, 10.0, shape, seconds=1.0, most=48)  # 5 ms and a trip
        10
    """
    if method in SPLIT:
        num_bytes = sum(shape.bytes_per_token(method))
        token_ms = _GUESSED_STEP_MS + shape.num_places(method) * (rtt_ms + 0.5) + _ms_of(num_bytes, mbps)
    elif method in WHOLE_TEXTS:
        return most
    else:
        token_ms = _GUESSED_STEP_MS + rtt_ms
    return max(FEWEST_TOKENS, min(most, int(1e3 * seconds / token_ms)))


def summarise(method: str, rtt_ms: float, mbps: float, turns: Sequence[Turn]) -> Row:
    """One row: the spread over the turns of everything measured, of the predictions, and of measured / predicted."""
    predicted = [predict(method, turn, rtt_ms, mbps) for turn in turns]
    is_optimistic = method == "integration, optimistic"
    papers = [predict_paper(turn, rtt_ms, mbps, trips=1.0 if is_optimistic else None) for turn in turns]
    with_pings = [predict(method, turn, turn.ping_ms, mbps) for turn in turns]
    rates = [turn.tokens_per_s for turn in turns]
    names = list(asdict(turns[0]))
    return {
        "mbps": mbps,
        "rtt_ms": rtt_ms,
        "method": method,
        **{name: Spread.of([getattr(turn, name) for turn in turns]) for name in names},
        "predicted_by": "c + q R" if is_optimistic else "equations 3 to 5",
        "predicted_tokens_per_s": Spread.of(predicted),
        "of_prediction": Spread.of([rate / p for rate, p in zip(rates, predicted, strict=True)]),
        # The same with the measured round trip of an empty frame instead of the emulated one.
        "predicted_with_ping_tokens_per_s": Spread.of(with_pings),
        "of_prediction_with_ping": Spread.of([rate / p for rate, p in zip(rates, with_pings, strict=True)]),
        # Of the optimistic schedule: had it waited for the device at each token.
        "equations_3_to_5_tokens_per_s": Spread.of(papers),
    }


class Bench:
    """Both clouds, the plugins for the first, and the modules for the second.

    Args:
        cloud_url, split_url: where they are.
        shape: of the backbone's layers.
        parallel, serial: plugins of both families.
        prompts: one for each turn.
        args: seeds and limits.
    """

    def __init__(
        self,
        cloud_url: str,
        split_url: str,
        shape: LayerShape,
        parallel: Plugin,
        serial: Plugin,
        prompts: Sequence[str],
        args: argparse.Namespace,
    ) -> None:
        self._urls = {"cloud": cloud_url, "split": split_url}
        self._shape, self._prompts, self._args = shape, prompts, args
        self._devices = {
            family: Device(plugin, lambda: connect(cloud_url))
            for family, plugin in (("parallel", parallel), ("serial", serial))
        }
        self._modules: dict[str, DeviceModules] = {
            "lora": DeviceLora.random(shape, rank=args.lora_rank, seed=args.seed),
            "adapter": DeviceAdapter.random(shape, bottleneck=args.adapter_width, seed=args.seed),
        }
        self._known: dict[tuple[str, str], list[int]] = {}

    async def run_network(self, rtt_ms: float, mbps: float, methods: Sequence[str], num_turns: int) -> list[Row]:
        """All methods behind one network, in turns.

        Raises:
            CotuneError: a text is not the same as behind another network.
        """
        turns: dict[str, list[Turn]] = {method: [] for method in methods}
        profile = NetworkProfile(delay_ms=rtt_ms / 2, bandwidth_mbps=mbps)

        async def make(which: str) -> Connection:
            return EmulatedConnection(await connect(self._urls[which]), profile)

        async with AsyncExitStack() as stack:
            split = await make("split")
            stack.push_async_callback(split.close)
            client = await stack.enter_async_context(CloudClient(lambda: make("cloud"), ClientConfig(timeout_s=60.0)))
            for turn in range(num_turns):
                prompt = self._prompts[turn % len(self._prompts)]
                ping_ms = 1e3 * statistics.median(await ping(split, _NUM_PINGS))
                for method in methods:
                    most = self._args.max_new_tokens
                    num = num_tokens_for(method, rtt_ms, mbps, self._shape, self._args.seconds, most)
                    if method in SPLIT:
                        measured = await self._run_split(split, method, prompt, num, ping_ms)
                    else:
                        measured = await self._run_plugin(client, method, prompt, num, ping_ms)
                    turns[method].append(measured)
        return [summarise(method, rtt_ms, mbps, turns[method]) for method in methods]

    async def _run_split(self, connection: Connection, method: str, prompt: str, num: int, ping_ms: float) -> Turn:
        before = connection.bytes_received + connection.bytes_sent
        prompt_ids = self._devices["parallel"].text.encode_prompt(prompt)
        made: SplitGeneration = await generate_split(connection, self._modules[method], self._shape, prompt_ids, num)
        self._check(method, prompt, made.token_ids)
        counters, count = made.counters, len(made.token_ids)
        return Turn.of(
            made.times_s,
            made.bytes_at,
            connection.bytes_received + connection.bytes_sent - before,
            step_ms=counters.cloud_ms / counters.num_steps,
            device_ms=1e3 * made.device_s / max(1, count - 1),
            trips=counters.num_trips / counters.num_steps,
            changed_rate=0.0,
            stall_ms=counters.stall_ms / count,
            wasted_rate=0.0,
            ping_ms=ping_ms,
        )

    async def _run_plugin(self, client: CloudClient, method: str, prompt: str, num: int, ping_ms: float) -> Turn:
        mode, schedule = WITH_PLUGIN[method]
        device = self._devices["serial" if mode == "ladder" else "parallel"]
        options = GenerationOptions(mode=mode, schedule=schedule, answer="correction", max_new_tokens=num)
        device.check(options)
        description = client.description
        device.check_cloud(description)
        stream = DeviceStream(
            device.request_for(prompt, options, description.stop_token_ids),
            device.personal,
            tap_shape=(description.num_taps, description.tap_dim),
            schedule=schedule,
            answer="correction",
            window=options.window,
        )
        before = client.bytes_received, client.bytes_sent
        times_s: list[float] = []
        bytes_at: list[tuple[int, int]] = []
        started_s = time.perf_counter()

        def on_decision(decision: Decision) -> None:
            times_s.append(time.perf_counter() - started_s)
            bytes_at.append((client.bytes_received - before[0], client.bytes_sent - before[1]))

        await client.generate(stream, on_decision)
        self._check(mode, prompt, stream.token_ids)
        assert stream.cloud_counters is not None
        cloud = {name: float(str(value)) for name, value in stream.cloud_counters.items()}
        count = len(times_s)
        # A pass that is given up in the middle counts as half a pass.
        given_up = min(cloud["num_rollbacks"], cloud["num_wasted_steps"])
        return Turn.of(
            times_s,
            bytes_at,
            client.bytes_received + client.bytes_sent - sum(before),
            step_ms=cloud["cloud_ms"] / (cloud["num_steps"] - given_up / 2),
            device_ms=1e3 * stream.device_s / count,
            trips=self._trips(schedule, stream.decisions[1:], cloud["num_delayed"] / count),
            changed_rate=sum(decision.changed for decision in stream.decisions[:-1]) / max(1, count - 1),
            stall_ms=cloud["stall_ms"] / count,
            wasted_rate=cloud["num_wasted_steps"] / count,
            ping_ms=ping_ms,
        )

    @staticmethod
    def _trips(schedule: str, decisions: Sequence[Decision], delayed_rate: float) -> float:
        """M: a schedule that waits does so at each consulted token; one that runs ahead, as the cloud counted."""
        if schedule == "optimistic":
            return delayed_rate
        return sum(decision.consulted for decision in decisions) / max(1, len(decisions))

    def _check(self, what: str, prompt: str, token_ids: Sequence[int]) -> None:
        """The same text for the same weights, whatever the network and the schedule; a shorter one is its beginning."""
        known = self._known.setdefault((what, prompt), list(token_ids))
        num = min(len(known), len(token_ids))
        if known[:num] != list(token_ids[:num]):
            raise CotuneError(f"{what} gave other tokens than behind another network")
        if len(token_ids) > len(known):
            self._known[(what, prompt)] = list(token_ids)


@contextmanager
def split_cloud(model: str, threads: int, log: Path) -> Iterator[tuple[str, LayerShape]]:
    """URL and shape of the cloud of `split_layers.py`, in a process of its own that ends with the block."""
    log.parent.mkdir(parents=True, exist_ok=True)
    script = Path(__file__).parent / "split_layers.py"
    with started("split cloud", [str(script), model, str(threads)], log) as child:
        first = child.first(timeout_s=300)
        yield str(first["url"]), LayerShape(**first["shape"])


async def run_all(bench: Bench, cells: FinishedCells, args: argparse.Namespace) -> None:
    """All cells that are not finished, network after network; the fastest network first."""
    networks = [(rtt_ms, mbps) for mbps in sorted(args.mbps, reverse=True) for rtt_ms in sorted(args.rtt_ms)]
    is_warm = False
    for done, (rtt_ms, mbps) in enumerate(networks, start=1):
        missing = [method for method in args.methods if (mbps, rtt_ms, method) not in cells]
        if missing and not is_warm:
            await bench.run_network(0.0, max(args.mbps), args.methods, 1)
            is_warm = True
        if missing:
            cells.keep(await bench.run_network(rtt_ms, mbps, missing, args.turns))
        print(f"network {done} of {len(networks)}, {rtt_ms:g} ms, {mbps:g} Mbit/s: done, same tokens", flush=True)


def print_rows(rows: Sequence[Row]) -> None:
    """The medians as a table; `ratio` is measured over predicted, `pinged` the same with the measured trip."""
    print(
        f"{'Mbit/s':>6s} {'rtt':>5s}  {'method':24s} {'tokens/s (quartiles)':>27s} {'predicted':>9s} {'ratio':>6s} "
        f"{'pinged':>6s} {'M':>5s} {'q':>5s} {'c ms':>6s} {'stall ms':>8s} {'down B':>7s} {'up B':>7s} {'wasted':>6s} "
        f"{'tokens':>6s}"
    )
    for row in rows:
        median = {name: value["median"] for name, value in row.items() if isinstance(value, dict)}
        rate = row["tokens_per_s"]
        rates = f"{rate['median']:.2f} ({rate['lower_quartile']:.2f} to {rate['upper_quartile']:.2f})"
        print(
            f"{row['mbps']:6g} {row['rtt_ms']:5g}  {row['method']:24s} {rates:>27s} "
            f"{median['predicted_tokens_per_s']:9.2f} {median['of_prediction']:6.2f} "
            f"{median['of_prediction_with_ping']:6.2f} {median['trips']:5.2f} "
            f"{median['changed_rate']:5.2f} {median['step_ms']:6.2f} {median['stall_ms']:8.1f} "
            f"{median['bytes_down']:7.0f} {median['bytes_up']:7.0f} {median['wasted_rate']:6.2f} "
            f"{median['num_tokens']:6.0f}"
        )


def plot(rows: Sequence[Row], path: Path) -> None:
    """Measured and predicted rates over the round-trip time, one panel for each bandwidth."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    bandwidths = sorted({row["mbps"] for row in rows})
    size = (1.5 + 3.5 * len(bandwidths), 5.5)
    figure, panels = pyplot.subplots(1, len(bandwidths), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for panel, mbps in zip(panels[0], bandwidths, strict=True):
        for method, (colour, marker, size_pt, is_hollow) in STYLES.items():
            chosen = sorted(
                (row for row in rows if row["method"] == method and row["mbps"] == mbps), key=lambda row: row["rtt_ms"]
            )
            rtt_ms = [row["rtt_ms"] for row in chosen]
            rate = [row["tokens_per_s"] for row in chosen]
            low = [each["median"] - each["lower_quartile"] for each in rate]
            high = [each["upper_quartile"] - each["median"] for each in rate]
            medians = [each["median"] for each in rate]
            fill = "none" if is_hollow else colour
            panel.errorbar(
                rtt_ms,
                medians,
                yerr=[low, high],
                fmt=marker,
                markersize=size_pt,
                markerfacecolor=fill,
                color=colour,
                label=method,
                linewidth=1,
            )
            predicted = [row["predicted_tokens_per_s"]["median"] for row in chosen]
            panel.plot(rtt_ms, predicted, "--", color=colour, alpha=0.6, linewidth=1)
        panel.set(title=f"{mbps:g} Mbit/s", xlabel="round trip, ms", yscale="log")
        ticks = sorted({row["rtt_ms"] for row in rows})
        # Proportional to the root, so that short round trips have room.
        panel.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x + 4, 0)), lambda y: y**2 - 4))
        panel.set_xlim(-2, 1.1 * ticks[-1] + 1)
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.yaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.3, which="both")
    panels[0][0].set_ylabel("tokens per second")
    handles, labels = panels[0][0].get_legend_handles_labels()
    legend = "points: measured; lines: predicted by equations 3 to 5, optimistic by c + q R"
    figure.legend(handles, labels, loc="outside lower center", ncols=3, title=legend)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def make_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; `--quick` sets those that are not given."""
    parser = make_parser(
        "network",
        "Measure LoRA and adapters on the device, ladder, SPA and integration behind emulated networks.",
        "  python benchmarks/network.py\n"
        "  python benchmarks/network.py --quick --out quick.json\n"
        "  python benchmarks/network.py --resume      after an interruption\n"
        "  python benchmarks/network.py --plugin runs/demo/plugin --serial-plugin runs/demo/plugin-serial",
    )
    parser.add_argument("--model", default="starter", help="what the clouds host (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each cloud (default: %(default)s)")
    parser.add_argument("--plugin", type=Path, help="a plugin for that model; without it one is tuned once")
    parser.add_argument("--serial-plugin", type=Path, help="one of the serial family; goes with --plugin")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"), help="keeps the tuned plugins")
    parser.add_argument("--rtt-ms", type=float, nargs="+", default=[0, 10, 25, 50, 100, 200], help="round trips")
    parser.add_argument("--mbps", type=float, nargs="+", default=[1, 10, 100], help="bandwidths, Mbit/s each way")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="(default: all)")
    parser.add_argument("--turns", type=int, default=3, help="texts of each cell (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="for one text, about (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="most of a text (default: %(default)s)")
    parser.add_argument("--lora-rank", type=int, default=16, help="of LoRA on q, k, v (default: %(default)s)")
    parser.add_argument("--adapter-width", type=int, default=48, help="of the adapters (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two networks, under a minute where there is a plugin")
    parser.add_argument("--resume", action="store_true", help="keep the finished cells of the result file")
    args = parser.parse_args(argv)
    if args.quick:
        for name, value in QUICK.items():
            if getattr(args, name) == parser.get_default(name):
                setattr(args, name, value)
    if (args.plugin is None) != (args.serial_plugin is None):
        raise InputError(
            "one of --plugin and --serial-plugin was given, expected both or none: ladder needs the second"
        )
    if args.turns < 1 or min(args.mbps) <= 0 or min(args.rtt_ms) < 0 or args.max_new_tokens < FEWEST_TOKENS:
        raise InputError(
            f"turns is {args.turns}, mbps {args.mbps}, rtt_ms {args.rtt_ms}, max_new_tokens {args.max_new_tokens}; "
            f"expected at least 1, above 0, from 0 on, and at least {FEWEST_TOKENS}"
        )
    return args


def main() -> None:
    """Entry point."""
    args = make_args()
    machine = describe_machine()
    settings = copy.copy(args)
    settings.model = args.model.rstrip("/").rsplit("/", 1)[-1]  # paths say where somebody works
    cells = FinishedCells("network", settings, _KEYS, free=("rtt_ms", "mbps", "methods", "quick"))
    with (
        cloud_process(args.model, args.threads, args.work / "cloud.log") as url,
        split_cloud(args.model, args.threads, args.work / "split-cloud.log") as (split_url, shape),
    ):
        parallel = load_plugin(args.plugin, url, args.work, args.seed)
        serial = Plugin.load(args.serial_plugin or DemoFolder(args.work / "persona").serial_plugin)
        prompts = heldout_prompts(parallel, args.turns, args.seed)
        bench = Bench(url, split_url, shape, parallel, serial, prompts, args)
        run_coroutine(run_all(bench, cells, args))
    print_rows(cells.rows)
    plot(cells.rows, args.out.with_suffix(".svg"))
    results = {
        "rows": cells.rows,
        "layers": asdict(shape),
        "split_bytes_per_token": {method: shape.bytes_per_token(method) for method in SPLIT},
        "same_token_ids_behind_all_networks": True,
    }
    finish("network", settings, machine, results, [])


def _ms_of(num_bytes: float, mbps: float) -> float:
    return num_bytes * 8 / (mbps * 1e3)


if __name__ == "__main__":
    main()
