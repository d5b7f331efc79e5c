"""Tokens per second of every schedule and answer form at several round-trip times, beside what theory predicts.

A cloud process hosts the model; the device in this process reaches it over a WebSocket behind an emulated network.

Targets at a round trip of 50 ms: optimistic reaches 90 % of 1 / (c + q R), and twice the blocking rate.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measurement import Spread, Target, describe_machine, finish, make_parser
from persona import cloud_process, heldout_prompts, load_plugin
from timed_generation import TimedGeneration, Totals, generate_timed

from cotune.device.client import CloudClient
from cotune.device.runtime import Device, GenerationOptions
from cotune.errors import CotuneError
from cotune.generation.request import ANSWERS, PLAIN_SCHEDULES
from cotune.plugin import Plugin
from cotune.wire.emulator import EmulatedConnection, NetworkProfile
from cotune.wire.event_loop import run_coroutine
from cotune.wire.transport import Connection
from cotune.wire.websocket import connect

TARGET_RTT_MS = 50.0
LEAST_OF_PREDICTION = 0.9
LEAST_OVER_BLOCKING = 2.0

# (rtt_ms, schedule, answer)
Setting = tuple[float, str, str]


async def run_settings(
    url: str, plugin: Plugin, prompts: Sequence[str], args: argparse.Namespace
) -> dict[Setting, Any]:
    """All settings in turns, `args.repeats` times; the texts of each turn, by setting.

    Raises:
        CotuneError: two settings gave other tokens.
    """
    made: dict[Setting, list[list[TimedGeneration]]] = {}
    expected: list[list[int]] = []
    for repeat in range(-1, args.repeats):  # the first turn warms up
        for rtt_ms in args.rtt_ms if repeat >= 0 else args.rtt_ms[:1]:

            async def make(rtt_ms: float = rtt_ms) -> Connection:
                connection = await connect(url)
                return EmulatedConnection(connection, NetworkProfile.of_rtt(rtt_ms)) if rtt_ms else connection

            device = Device(plugin, make)
            async with CloudClient(make) as client:
                for schedule in PLAIN_SCHEDULES:
                    for answer in ANSWERS:
                        options = GenerationOptions(
                            schedule=schedule, answer=answer, max_new_tokens=args.max_new_tokens
                        )
                        texts = [await generate_timed(client, device, prompt, options) for prompt in prompts]
                        token_ids = [text.token_ids for text in texts]
                        expected = expected or token_ids
                        if token_ids != expected:
                            raise CotuneError(f"{schedule}, {answer} form at {rtt_ms:g} ms gave other tokens")
                        if repeat >= 0:
                            made.setdefault((rtt_ms, schedule, answer), []).append(texts)
            print(f"turn {max(0, repeat + 1)} of {args.repeats}, {rtt_ms:g} ms: done, same tokens", flush=True)
    return made


def predict(totals: Totals, schedule: str, rtt_ms: float) -> float:
    """Tokens per second: 1 / (c + M R), and for the optimistic schedule 1 / (c + q R); R is round trip and device."""
    trips = totals.changed_rate if schedule == "optimistic" else totals.delayed_rate
    return 1e3 / (totals.step_ms + trips * (rtt_ms + totals.device_ms))


def predict_text(totals: Totals, schedule: str, rtt_ms: float, num_texts: int) -> float:
    """As `predict`, for whole texts: two more round trips each, to open it and to hear of its last token."""
    decoding_s = totals.num_tokens / predict(totals, schedule, rtt_ms)
    return totals.num_tokens / (decoding_s + 2 * num_texts * rtt_ms / 1e3)


def summarise(setting: Setting, turns: Sequence[Sequence[TimedGeneration]]) -> dict[str, Any]:
    """One row: the spread over the turns of every total, of the prediction, and of measured / predicted."""
    rtt_ms, schedule, answer = setting
    totals = [Totals.of(texts) for texts in turns]
    predictions = [predict(each, schedule, rtt_ms) for each in totals]
    text_predictions = [predict_text(each, schedule, rtt_ms, len(turns[0])) for each in totals]
    by_name = {name: Spread.of([getattr(each, name) for each in totals]) for name in asdict(totals[0])}
    return {
        "rtt_ms": rtt_ms,
        "schedule": schedule,
        "answer": answer,
        **by_name,
        "predicted_tokens_per_s": Spread.of(predictions),
        "of_prediction": Spread.of([t.tokens_per_s / p for t, p in zip(totals, predictions, strict=True)]),
        "text_of_prediction": Spread.of(
            [t.text_tokens_per_s / p for t, p in zip(totals, text_predictions, strict=True)]
        ),
    }


def over_blocking(made: dict[Setting, Any], rtt_ms: float, answer: str, rate: str) -> Spread:
    """Optimistic rate over blocking rate, turn by turn."""
    optimistic, blocking = (
        [getattr(Totals.of(texts), rate) for texts in made[(rtt_ms, schedule, answer)]]
        for schedule in ("optimistic", "blocking")
    )
    return Spread.of([a / b for a, b in zip(optimistic, blocking, strict=True)])


def make_targets(made: dict[Setting, Any], rows: Sequence[dict[str, Any]]) -> list[Target]:
    """The targets, where their round-trip time was measured; whole texts are held to the same numbers."""
    targets = []
    for row in rows:
        if row["rtt_ms"] != TARGET_RTT_MS or row["schedule"] != "optimistic":
            continue
        answer = row["answer"]
        for what, key, rate in (
            ("decoding", "of_prediction", "tokens_per_s"),
            ("whole texts", "text_of_prediction", "text_tokens_per_s"),
        ):
            name = f"optimistic, {answer} form, 50 ms, {what}"
            targets += [
                Target(
                    what=f"{name}, share of the predicted rate",
                    measured=row[key].median,
                    limit=LEAST_OF_PREDICTION,
                    unit="",
                    is_upper=False,
                ),
                Target(
                    what=f"{name}, times the blocking rate",
                    measured=over_blocking(made, TARGET_RTT_MS, answer, rate).median,
                    limit=LEAST_OVER_BLOCKING,
                    unit="",
                    is_upper=False,
                ),
            ]
    return targets


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Measured and predicted rates over the round-trip time, one panel for each answer form."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(ANSWERS), figsize=(10, 4), sharey=True, layout="constrained")
    for panel, answer in zip(panels, ANSWERS, strict=True):
        for schedule, colour in zip(PLAIN_SCHEDULES, ("tab:red", "tab:blue", "tab:green"), strict=True):
            chosen = sorted(
                (row for row in rows if row["schedule"] == schedule and row["answer"] == answer),
                key=lambda row: row["rtt_ms"],
            )
            rtt_ms = [row["rtt_ms"] for row in chosen]
            rate = [row["tokens_per_s"] for row in chosen]
            low = [each.median - each.lower_quartile for each in rate]
            high = [each.upper_quartile - each.median for each in rate]
            panel.errorbar(
                rtt_ms, [each.median for each in rate], yerr=[low, high], fmt="o", color=colour, label=schedule
            )
            panel.plot(rtt_ms, [row["predicted_tokens_per_s"].median for row in chosen], "--", color=colour, alpha=0.6)
        panel.set(title=f"{answer} form", xlabel="round trip, ms", yscale="log")
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("tokens per second")
    panels[0].legend(title="points measured, lines predicted")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """The medians as a table; `ratio` is measured over predicted, `whole` the same for whole texts."""
    names = ("tokens/s (quartiles)", "predicted", "ratio", "whole", "c ms", "M", "q", "R ms")
    widths = (30, 9, 6, 6, 6, 5, 5, 7)
    titles = "  ".join(f"{name:>{width}s}" for name, width in zip(names, widths, strict=True))
    print(f"{'rtt':>6s}  {'schedule':10s}  {'answer':10s}  {titles}")
    for row in rows:
        median = {name: value.median for name, value in row.items() if isinstance(value, Spread)}
        numbers = (
            median["predicted_tokens_per_s"],
            median["of_prediction"],
            median["text_of_prediction"],
            median["step_ms"],
            median["delayed_rate"],
            median["changed_rate"],
            row["rtt_ms"] + median["device_ms"],
        )
        cells = "  ".join(f"{number:{width}.2f}" for number, width in zip(numbers, widths[1:], strict=True))
        print(
            f"{row['rtt_ms']:6.0f}  {row['schedule']:10s}  {row['answer']:10s}  {row['tokens_per_s']!s:>30s}  {cells}"
        )


def main() -> None:
    """Entry point."""
    parser = make_parser(
        "schedules",
        "Measure every schedule and answer form at several round-trip times, and compare with the prediction.",
        "  python benchmarks/schedules.py\n"
        "  python benchmarks/schedules.py --model path/to/llama --plugin my-plugin --rtt-ms 0 50 --repeats 5",
    )
    parser.add_argument("--model", default="starter", help="what the cloud hosts (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the cloud (default: %(default)s)")
    parser.add_argument("--plugin", type=Path, help="a plugin for that model; without it one is tuned once")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/benchmarks"), help="keeps the tuned plugin (default: %(default)s)"
    )
    parser.add_argument(
        "--rtt-ms", type=float, nargs="+", default=[0, 10, 25, 50, 100, 200], help="round trips (default: 0 to 200)"
    )
    parser.add_argument("--prompts", type=int, default=4, help="texts of each setting (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="of each text (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="turns through all settings (default: %(default)s)")
    args = parser.parse_args()
    machine = describe_machine()
    with cloud_process(args.model, args.threads, args.work / "cloud.log") as url:
        plugin = load_plugin(args.plugin, url, args.work, args.seed)
        prompts = heldout_prompts(plugin, args.prompts, args.seed)
        made = run_coroutine(run_settings(url, plugin, prompts, args))
    rows = [summarise(setting, turns) for setting, turns in sorted(made.items())]
    print_rows(rows)
    plot(rows, args.out.with_suffix(".svg"))
    texts = [text.num_tokens for text in next(iter(made.values()))[0]]
    finish(
        "schedules",
        args,
        machine,
        {"settings": rows, "tokens_of_each_text": texts, "same_token_ids_in_all_runs": True},
        make_targets(made, rows),
    )


if __name__ == "__main__":
    main()
