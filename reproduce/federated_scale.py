"""Federations of 10 to 500 devices and models of several sizes: bytes, time of server and devices, memory.

Every cell is a process of its own: some rounds in which each device has a text or two and takes a few local steps, so
that what is measured is the federation, not the tuning. Seed mode's bytes must not grow with the model.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from adaptation_study import worded
from cells import Cells, OutOfTimeError, Value
from federated_study import options_at
from lora_init import plots_of
from mean import Mean
from page import Page, about_run
from result_folder import grid
from study_options import add_run_options, at_least_one, open_cells, plain_endings, results_of, study_parser
from study_texts import persona_texts

from cotune.errors import CotuneError, InputError
from cotune.evaluation.markup import Html, bullets, join
from cotune.evaluation.measured_memory import run_measured
from cotune.evaluation.report import Section
from cotune.federation.algorithm import Algorithm, Combine, Plan, Update
from cotune.federation.algorithms import ALGORITHMS, KINDS
from cotune.federation.arrays import Arrays
from cotune.federation.backbone_model import ResidentBackbone
from cotune.federation.coordinator import Coordinator, Progress, RoundRules
from cotune.federation.device_agent import DeviceAgent
from cotune.federation.fresh_adapter import fresh_adapter
from cotune.federation.in_process import InProcess, SimulatedDevice
from cotune.federation.local_model import LocalModel
from cotune.federation.progress_checkpoint import save_progress
from cotune.federation.run_parts import algorithm_of, rule_of, with_num_layers
from cotune.federation.run_secret import RunSecret
from cotune.federation.settings import AdapterSettings, DataSettings, FederationSettings
from cotune.federation.signing import DeviceKey, Registry
from cotune.federation.simulation import start_of
from cotune.models.backbone import Backbone
from cotune.tuning.personal import encode_examples

NAME = "federated_scale"
# The meaning of a cell: one more, and all are run again.
PROTOCOL = 1
SEED_MODE = "seed"
TEXTS_EACH = 2
DIFFERENT_TEXTS = 64
RUN_ID = "scale"
MAX_BYTES = 18_000
"""Of seed mode, up and down, of a device and round: FedKSeed's figure."""
MAX_BYTES_512 = 5_000
"""The same with at most 512 directions."""
CHILD_TIMEOUT_S = 3600.0
# The round and the names of devices have as many digits everywhere; the loss that a reply reports may not.
SLACK_BYTES = 64
EXPECTED = {
    "issue 6": "seed mode under 18 kB per device and round at any model size, under 5 kB with K = 512",
    "FedKSeed, arXiv 2312.06353": "less than 18 kB per round at any model size",
}


def parser() -> argparse.ArgumentParser:
    """Of this command."""
    made = study_parser(
        NAME,
        __doc__,
        "examples:\n"
        f"  python reproduce/{NAME}.py\n"
        f"  python reproduce/{NAME}.py --budget-minutes 30 --num-devices 10 100\n"
        f"  python reproduce/{NAME}.py --models starter ./llama-1b --algorithms seed rolora\n\n"
        "Texts are those that cotune makes. Finished cells are kept in --cells and never run again.",
    )
    made.add_argument("--models", nargs="+", help="several folders, smallest first (default: --model alone)")
    made.add_argument(
        "--num-devices",
        type=at_least_one,
        nargs="+",
        default=[10, 30, 100, 300, 500],
        help="simulated; the first is that of the comparison of models (default: %(default)s)",
    )
    made.add_argument(
        "--algorithms",
        nargs="+",
        choices=ALGORITHMS,
        default=["seed", "rolora", "fedit"],
        help="(default: %(default)s)",
    )
    made.add_argument("--rounds", type=at_least_one, default=3, help="the first is not counted (default: %(default)s)")
    made.add_argument("--local-steps", type=at_least_one, default=1, help="with gradients (default: %(default)s)")
    made.add_argument(
        "--directions", type=at_least_one, default=512, help="of forward-only methods (default: %(default)s)"
    )
    made.add_argument("--rank", type=at_least_one, default=8, help="of LoRA (default: %(default)s)")
    made.add_argument("--max-length", type=at_least_one, default=64, help="tokens of one text (default: %(default)s)")
    made.add_argument("--seeds", type=at_least_one, default=3, help="runs of every cell (default: %(default)s)")
    made.add_argument("--measure", help=argparse.SUPPRESS)
    add_run_options(made, NAME)
    return made


class Timed:
    """An algorithm whose server half is timed. `plan_s` and `merge_s` are of the last round."""

    def __init__(self, algorithm: Algorithm) -> None:
        self._algorithm = algorithm
        self.plan_s = self.merge_s = 0.0

    def start(self, adapter: Arrays) -> Arrays:
        return self._algorithm.start(adapter)

    def plan(self, state: Arrays, round_number: int, device: str, since: int | None) -> Plan:
        begun_s = time.perf_counter()
        made = self._algorithm.plan(state, round_number, device, since)
        self.plan_s += time.perf_counter() - begun_s
        return made

    def merge(self, state: Arrays, round_number: int, updates: Sequence[Update], combine: Combine) -> Arrays:
        begun_s = time.perf_counter()
        merged = self._algorithm.merge(state, round_number, updates, combine)
        self.merge_s += time.perf_counter() - begun_s
        return merged

    def adapter(self, state: Arrays) -> Any:
        return self._algorithm.adapter(state)


@dataclass
class Clock:
    """Seconds of all devices together."""

    device_s: float = 0.0


class TimedAgent(DeviceAgent):
    """A device whose whole work, reading and signing included, is added to a clock."""

    def __init__(self, name: str, model: LocalModel, *, clock: Clock, **options: Any) -> None:
        super().__init__(name, model, **options)
        self._clock = clock

    def handle(self, data: bytes) -> bytes:
        begun_s = time.perf_counter()
        try:
            return super().handle(data)
        finally:
            self._clock.device_s += time.perf_counter() - begun_s


def options_of(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Little work for every algorithm."""
    sizes = {"local_steps": args.local_steps, "directions": args.directions, "pool": 1024, "batch_size": TEXTS_EACH}
    kind: Any = ALGORITHMS[name]
    return options_at(kind, 1.0, sizes)


def measure(args: argparse.Namespace, model: str, name: str, num_devices: int, seed: int) -> Value:
    """Rounds of one federation in this process.

    Raises:
        InputError: it cannot be run.
    """
    torch.set_num_threads(args.threads)
    backbone = Backbone.from_pretrained(model, dtype=args.dtype, device=args.device)
    secret, clock = RunSecret(bytes([seed % 256] * 32)), Clock()
    texts, _ = persona_texts(DIFFERENT_TEXTS, 1)
    longest = min(args.max_length, backbone.spec.max_context)
    encoded = encode_examples(backbone.tokenizer_json, texts, backbone.description, longest)
    settings = FederationSettings(
        algorithm=name,
        seed=seed,
        data=DataSettings(num_devices=num_devices),
        adapter=AdapterSettings(kind=KINDS.get(name, "lora"), rank=args.rank, alpha=2.0 * args.rank),
        options={name: options_of(name, args)},
    )
    timed = Timed(algorithm_of(with_num_layers(settings, backbone.spec.num_layers), secret))
    adapter = fresh_adapter(settings.adapter, backbone, seed=seed)
    digest = backbone.spec.backbone_digest
    with ResidentBackbone(backbone, adapter) as resident, TemporaryDirectory() as folder:
        names = [f"device-{index:03d}" for index in range(num_devices)]
        keys = {one: DeviceKey.generate() for one in names}
        # Devices share texts, which costs nothing here: what they learn is not looked at.
        agents = [
            TimedAgent(
                one,
                resident.with_texts([encoded[(index + k) % len(encoded)] for k in range(TEXTS_EACH)]),
                clock=clock,
                base_digest=digest,
                secret=secret,
                key=keys[one],
                seed=seed,
            )
            for index, one in enumerate(names)
        ]
        saved_s: list[float] = []

        def save(progress: Progress) -> None:
            begun_s = time.perf_counter()
            save_progress(Path(folder), progress, run_id=RUN_ID, base_digest=digest)
            saved_s.append(time.perf_counter() - begun_s)

        coordinator = Coordinator(
            timed,
            rule_of(settings, num_devices=settings.data.num_devices),
            InProcess([SimulatedDevice(agent=agent) for agent in agents]),
            RoundRules(num_rounds=args.rounds),
            registry=Registry({one: key.public_key for one, key in keys.items()}),
            run_id=RUN_ID,
            base_digest=digest,
            save=save,
        )
        progress = coordinator.begin(start_of(resident.arrays, settings))
        rounds: list[dict[str, float]] = []
        begun_s = time.perf_counter()
        for reached in coordinator.run(progress):
            wall_s = time.perf_counter() - begun_s
            last = reached.records[-1]
            if last.verdict != "accepted":
                reason = next(iter(last.refused.values()), last.remark)
                raise InputError(f"round {last.round_number} was {last.verdict}: {reason}")
            rounds.append(
                {
                    "up": sum(last.bytes_up.values()) / num_devices,
                    "down": sum(last.bytes_down.values()) / num_devices,
                    "framing": (last.bytes_up["framing"] + last.bytes_down["framing"]) / num_devices,
                    "server_s": wall_s - clock.device_s,
                    "plan_s": timed.plan_s,
                    "merge_s": timed.merge_s,
                    "checkpoint_s": saved_s[-1],
                    "device_s": clock.device_s / num_devices,
                }
            )
            timed.plan_s = timed.merge_s = clock.device_s = 0.0
            begun_s = time.perf_counter()
    return {
        "rounds": rounds,
        "num_parameters": sum(p.numel() for p in backbone.model.parameters()),
        "num_adapter": adapter.num_parameters,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def per_round(value: Value) -> dict[str, float]:
    """Medians over the rounds after the first, in which everyone is new and gets everything; and the first's bytes.

    `check_s` is what is left of the server's time: reading, verifying and checking replies, and writing tasks.

    Example:
        >>> one = {"up": 1.0, "down": 9.0, "framing": 0.5, "server_s": 4.0, "plan_s": 1.0, "merge_s": 1.0,
        ...        "checkpoint_s": 0.5, "device_s": 2.0}
        >>> found = per_round({"rounds": [one, {**one, "down": 1.0}]})
        >>> found["bytes"], found["first_bytes"], found["check_s"]
        (2.0, 10.0, 1.5)
    """
    later = value["rounds"][1:] or value["rounds"]
    found = {key: median(one[key] for one in later) for key in later[0]}
    # In two-round turns, as rolora's, bytes differ from round to round: the mean is what a device pays.
    for key in ("up", "down", "framing"):
        found[key] = sum(one[key] for one in later) / len(later)
    first = value["rounds"][0]
    found["bytes"], found["first_bytes"] = found["up"] + found["down"], first["up"] + first["down"]
    found["check_s"] = max(0.0, found["server_s"] - found["plan_s"] - found["merge_s"] - found["checkpoint_s"])
    return found


def seed_goals(rows: Sequence[Mapping[str, Any]], num_directions: int) -> list[str]:
    """Whether seed mode's bytes stay where they are as the model grows, and under the goal, in words.

    Args:
        rows: of seed mode: `model`, `num_devices`, `num_parameters` and `bytes` of a device and round.
        num_directions: K.
    """
    if not rows:
        return []
    most, limit = max(row["bytes"].mean for row in rows), MAX_BYTES_512 if num_directions <= 512 else MAX_BYTES
    said = [
        f"Seed mode with K = {num_directions}: at most {most:,.0f} bytes per device and round, all counted; "
        f"{'holds' if most < limit else 'missed'}: under {limit:,}."
    ]
    by_model: dict[str, float] = {}
    for row in rows:
        if row["num_devices"] == rows[0]["num_devices"]:
            by_model[row["model"]] = row["bytes"].mean
    if len(by_model) > 1:
        spread = max(by_model.values()) - min(by_model.values())
        said.append(
            f"From {min(row['num_parameters'] for row in rows):,} to {max(row['num_parameters'] for row in rows):,} "
            f"parameters they change by {spread:,.0f} bytes; {'holds' if spread <= SLACK_BYTES else 'missed'}: they do "
            "not grow with the model."
        )
    return said


def summarise(values: Sequence[Value], key: Mapping[str, Any]) -> dict[str, Any]:
    """Means over seeds of one federation."""
    rounds = [per_round(value) for value in values]
    return {
        **key,
        "num_parameters": values[0]["num_parameters"],
        "num_adapter": values[0]["num_adapter"],
        "peak_mb": Mean.of([value["peak_bytes"] / 1e6 for value in values]),
        **{name: Mean.of([one[name] for one in rounds]) for name in rounds[0]},
    }


def build(args: argparse.Namespace, cells: Cells) -> Page:
    """Measure what is missing and show what there is."""
    models = args.models or [args.model]
    places = {Path(model).name: model for model in models}
    if len(places) < len(models):
        raise InputError("two of --models have the same name, expected different ones; rename a folder")
    # Models are compared at the first number of devices, numbers of devices on the first model.
    wanted = [(next(iter(places)), num) for num in args.num_devices]
    wanted += [(model, args.num_devices[0]) for model in list(places)[1:]]
    rows: list[dict[str, Any]] = []
    refused: dict[str, str] = {}
    unfinished: list[str] = []
    for name in args.algorithms:
        for model, num in wanted:
            what = f"{name}, {model}, {num} devices"
            try:
                values = [_cell(args, cells, places[model], name, num, seed) for seed in range(args.seeds)]
                rows.append(summarise(values, {"algorithm": name, "model": model, "num_devices": num}))
            except OutOfTimeError:
                unfinished.append(what)
            except CotuneError as error:
                refused[what] = str(error)
    if not rows:
        if unfinished:
            raise OutOfTimeError("the budget is spent before any federation is finished; run again to go on")
        raise InputError(f"no federation could be run: {next(iter(refused.values()))}")
    said = seed_goals([row for row in rows if row["algorithm"] == SEED_MODE], args.directions)
    return _page(args, rows, said, refused, unfinished)


def _cell(args: argparse.Namespace, cells: Cells, model: str, name: str, num: int, seed: int) -> Value:
    words = ("dtype", "rounds", "local_steps", "directions", "rank", "max_length", "threads")
    key = {"algorithm": name, "num_devices": num, "seed": seed, "protocol": PROTOCOL}
    key |= {word: getattr(args, word) for word in words}
    options = ["--measure", json.dumps([model, name, num, seed]), "--device", args.device]
    for word in words:
        options += [f"--{word.replace('_', '-')}", str(getattr(args, word))]
    group = f"{NAME}-{Path(model).name}"
    return cells.get(group, key, lambda: run_measured([str(Path(__file__)), *options], timeout_s=CHILD_TIMEOUT_S))


def _page(
    args: argparse.Namespace,
    rows: Sequence[dict[str, Any]],
    said: Sequence[str],
    refused: Mapping[str, str],
    unfinished: Sequence[str],
) -> Page:
    first = rows[0]["model"]
    by_devices = [row for row in rows if row["model"] == first]
    by_model = [row for row in rows if row["num_devices"] == args.num_devices[0]]
    sections = [
        Section(
            name="devices",
            short="Devices",
            heading=f"By number of devices, {first}",
            content=Html(bullets(said) + join([_plots("devices", by_devices, "num_devices"), _table(by_devices)])),
        )
    ]
    if len({row["model"] for row in by_model}) > 1:
        sections.append(
            Section(
                name="models",
                short="Models",
                heading=f"By size of the model, {args.num_devices[0]} devices",
                content=join([_plots("models", by_model, "num_parameters"), _table(by_model)]),
            )
        )
    if refused:
        reasons = grid("What the product said", "what", list(refused), {"reason": list(refused.values())})
        sections.append(Section(name="refused", short="Refused", heading="Not run", content=reasons))
    return Page(
        title="Federations by devices and model size",
        lead=" ".join(said),
        expected=EXPECTED,
        measured={"rows": list(rows), "refused": refused, "said": said},
        sections=sections,
        deviations=[
            "Bytes are those of messages, without what a transport adds; the first round, in which everyone is new, "
            "has a column of its own and is in no other.",
            "Devices take turns in one process on one loaded model, so device seconds are those of this machine, and "
            "the process's memory has one model and all devices' adapters in it.",
            "Memory is the largest resident set of the process, libraries included.",
            f"Each device has {TEXTS_EACH} short texts and takes as few steps as the settings say; the judge is off.",
        ],
        lines=[
            *(
                f"{row['algorithm']:10s} {row['model']:12s} {row['num_devices']:4d} devices: "
                f"{worded(row['bytes'], 0)} bytes, server {worded(row['server_s'])} s, "
                f"device {worded(row['device_s'])} s, {row['peak_mb'].mean:.0f} MB"
                for row in rows
            ),
            *(f"{name}: not run: {reason}" for name, reason in refused.items()),
            *said,
        ],
        unfinished=unfinished,
    )


def _plots(name: str, rows: Sequence[Mapping[str, Any]], x: str) -> Html:
    parts = []
    for key, label in (
        ("bytes", "bytes of one device and round"),
        ("server_s", "seconds of the server, a round"),
        ("peak_mb", "MB of the process"),
    ):
        lines: dict[str, list[Any]] = {}
        for row in sorted(rows, key=lambda row: row[x]):
            lines.setdefault(row["algorithm"], []).append(row[key].point(row[x]))
        words = "devices" if x == "num_devices" else "parameters of the model"
        parts.append(
            plots_of(
                f"{name}_{key}",
                "Means over seeds with 95 % intervals.",
                lines,
                x_label=f"{words}, log scale",
                y_label=label,
                is_log_x=True,
            )
        )
    return join(parts)


def _table(rows: Sequence[Mapping[str, Any]]) -> Html:
    columns = {
        "model": [row["model"] for row in rows],
        "parameters": [f"{row['num_parameters']:,}" for row in rows],
        "devices": [str(row["num_devices"]) for row in rows],
        "bytes up": [worded(row["up"], 0) for row in rows],
        "bytes down": [worded(row["down"], 0) for row in rows],
        "of them framing": [worded(row["framing"], 0) for row in rows],
        "first round": [worded(row["first_bytes"], 0) for row in rows],
        "server, s": [worded(row["server_s"]) for row in rows],
        "merge, s": [worded(row["merge_s"]) for row in rows],
        "plans, s": [worded(row["plan_s"]) for row in rows],
        "checks, s": [worded(row["check_s"]) for row in rows],
        "checkpoint, s": [worded(row["checkpoint_s"]) for row in rows],
        "device, s": [worded(row["device_s"]) for row in rows],
        "process, MB": [worded(row["peak_mb"], 0) for row in rows],
    }
    return grid("Of one round", "method", [row["algorithm"] for row in rows], columns)


def main() -> None:
    """Entry point."""
    args = parser().parse_args()
    with plain_endings():
        if args.measure:
            model, name, num_devices, seed = json.loads(args.measure)
            print(json.dumps(measure(args, model, name, num_devices, seed)))
            return
        page = build(args, open_cells(args))
    args.model = (args.models or [args.model])[0]
    first = page.measured["rows"][0]
    names = [Path(model).name for model in args.models or [args.model]]
    page.publish(
        results_of(args, NAME),
        about=about_run(
            {**vars(args), "model": Path(args.model).name, "models": names},
            device=args.device,
            threads=args.threads,
            backbone_parameters=first["num_parameters"],
        ),
        lead=f"Models {', '.join(names)}.",
    )


if __name__ == "__main__":
    main()
