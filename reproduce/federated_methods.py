"""Federated methods compared: held-out loss against bytes, device memory and time, on IID, Dirichlet and domain splits.

Every algorithm that `cotune federate` knows, at its own best learning rate, between two bounds with the same optimiser
and the same number of local steps: devices that tune alone, and one machine that has all texts. The three protocols
are EdgeFlowerTune's (arXiv 2605.08636): quality under a budget, cost to a target, and robustness.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from adaptation_study import best_rate, edge_notes, weight_bytes, worded
from cells import OutOfTimeError, Value
from federated_memory import measured_memory, predicted_bytes
from federated_study import LOST, STRAGGLERS, FederatedStudy, Scene, make_parser, run_study, upwards
from federated_texts import ALPHA, IID, SPLITS
from lora_init import plots_of
from mean import Mean
from page import Page
from result_folder import grid
from study_options import positive

from cotune.errors import CotuneError, InputError, NonFiniteLossError
from cotune.evaluation.markup import Html, bullets, join
from cotune.evaluation.report import Section
from cotune.federation.algorithms import ALGORITHMS
from cotune.federation.arrays import Arrays
from cotune.federation.local_model import LocalSteps

NAME = "federated_methods"
LOCAL, CENTRAL = "local only", "centralised"
BOUNDS = (LOCAL, CENTRAL)
FAULTS = (STRAGGLERS, LOST)
EXPECTED = {
    "issue 6": "rolora at least FedIT's quality at half the bytes; seed mode within 5 % of inference memory",
    "RoLoRA, NeurIPS 2025": "better than averaging both factors, and than FFA-LoRA",
    "EdgeFlowerTune, arXiv 2605.08636": "protocols: quality under a budget, cost to a target, robustness",
    "FlowerTune, arXiv 2506.02961": "the model matters more than the method",
}
NUM_BUDGETS = 6
MB = 1e6


def parser() -> argparse.ArgumentParser:
    """Of this command."""
    made = make_parser(
        NAME,
        __doc__ or "",
        examples=("--algorithms fedit rolora seed --splits iid", "--data-root my-data --datasets trec sciq"),
    )
    made.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS), help="(default: all)")
    made.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS), help="(default: all)")
    made.add_argument("--faults", nargs="*", choices=FAULTS, default=list(FAULTS), help="(default: all)")
    made.add_argument(
        "--target-share",
        type=positive,
        default=0.5,
        help="of what the centralised bound gains on the start, which is the target (default: %(default)s)",
    )
    made.add_argument("--rouge-texts", type=int, default=0, help="test texts to be written (default: %(default)s)")
    made.add_argument(
        "--measure-memory", action="store_true", help="of one device, in a process of its own; Linux and CPU only"
    )
    return made


# What curves say.


def within(curve: Sequence[Mapping[str, Any]], budget: float, what: Sequence[str]) -> float:
    """The loss of the last round that costs at most `budget`, the sum of the cumulative columns `what`.

    Example:
        >>> curve = [{"loss": 3.0, "up": 0}, {"loss": 2.0, "up": 10}, {"loss": 1.0, "up": 20}]
        >>> within(curve, 19, ["up"]), within(curve, 20, ["up"])
        (2.0, 1.0)
    """
    return float(max((one for one in curve if cost(one, what) <= budget), key=lambda one: cost(one, what))["loss"])


def cost(point: Mapping[str, Any], what: Sequence[str]) -> float:
    """Of a point of a curve."""
    return float(sum(point[name] for name in what))


def first_at(curve: Sequence[Mapping[str, Any]], target: float) -> tuple[int, Mapping[str, Any]] | None:
    """The first round, counted from 1, whose loss is at most `target`, and its point; None where there is none.

    Example:
        >>> curve = [{"loss": 3.0}, {"loss": 2.0}, {"loss": 1.0}]
        >>> first_at(curve, 2.0), first_at(curve, 0.5)
        ((1, {'loss': 2.0}), None)
    """
    return next(((number, one) for number, one in enumerate(curve) if one["loss"] <= target), None)


def budgets_of(
    curves: Sequence[Sequence[Mapping[str, Any]]], what: Sequence[str], num: int = NUM_BUDGETS
) -> list[float]:
    """Budgets in equal ratios, from the cheapest first round to the dearest whole run, two digits each.

    Example:
        >>> cheap = [{"up": 0}, {"up": 1}, {"up": 4}]
        >>> dear = [{"up": 0}, {"up": 50}, {"up": 100}]
        >>> budgets_of([cheap, dear], ["up"], 3)
        [1.0, 10.0, 100.0]
    """
    least = min(cost(curve[1], what) for curve in curves)
    most = max(cost(curve[-1], what) for curve in curves)
    if not 0 < least < most:
        return [most]
    # Rounded up, so that the first budget pays for a round and the last one for everything.
    return [_up(float(one)) for one in np.geomspace(least, most, num)]


def _up(value: float) -> float:
    step = 10.0 ** (np.floor(np.log10(value)) - 1)
    # What is whole but for the last bits is not raised.
    return float(f"{np.ceil(value / step - 1e-9) * step:.12g}")


def mean_within(curves: Sequence[Sequence[Mapping[str, Any]]], budget: float, what: Sequence[str]) -> Mean:
    """Over the curves of all seeds."""
    return Mean.of([within(curve, budget, what) for curve in curves])


def cost_to(curves: Sequence[Sequence[Mapping[str, Any]]], target: float) -> dict[str, Any]:
    """Means over the seeds that reach the target, and how many do."""
    found = [one for one in (first_at(curve, target) for curve in curves) if one is not None]
    if not found:
        return {"num_reached": 0, "rounds": None, "bytes": None, "device_s": None}
    return {
        "num_reached": len(found),
        "rounds": Mean.of([float(number) for number, _ in found]),
        "bytes": Mean.of([cost(point, ("up", "down")) for _, point in found]),
        "device_s": Mean.of([float(point["device_s"]) for _, point in found]),
    }


def above_inference(weights: int, measured: Mapping[str, float]) -> float:
    """What a device's round takes beyond inference, as a share of inference, weights and all.

    Example:
        >>> above_inference(80, {"inference_bytes": 20, "peak_bytes": 25})
        0.05
    """
    return (measured["peak_bytes"] - measured["inference_bytes"]) / (weights + measured["inference_bytes"])


def memory_goal(memory: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """What the issue asks of seed mode's memory, in words.

    Example:
        >>> memory_goal({"seed": {"more_than_inference": 0.012}, "fedit": {"more_than_inference": 2.0}})
        ['A device in seed mode takes 1.2 % more memory than inference, weights and all.']
    """
    more = memory.get("seed", {}).get("more_than_inference")
    if more is None:
        return []
    than = "more" if more >= 0 else "less"
    return [f"A device in seed mode takes {100 * abs(more):.1f} % {than} memory than inference, weights and all."]


def is_first_order(passes: Mapping[str, float]) -> bool:
    """Whether a device went backwards through the model."""
    return passes.get("backward", 0) > 0


def goal(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the issue asks of rolora, in words.

    Args:
        rows: of one split: by method `losses`, of each seed, and `bytes`, means of one device for the whole run.
    """
    if not {"rolora", "fedit"} <= rows.keys():
        return []
    ours, theirs = rows["rolora"], rows["fedit"]
    less = Mean.of([a - b for a, b in zip(ours["losses"], theirs["losses"], strict=True)])
    share = ours["bytes"] / theirs["bytes"]
    # An interval that holds 0 shows no difference; it shows equality only as far as it is narrow.
    quality = (
        "better" if less.high is not None and less.high < 0 else "worse" if (less.low or 0) > 0 else "not told apart"
    )
    return [
        f"rolora less fedit: {worded(less)} nats per held-out token ({quality}) at {100 * share:.0f} % of its bytes."
    ]


class Runs:
    """The cells of this study."""

    def __init__(self, study: FederatedStudy) -> None:
        self.study = study

    def final(self, name: str, factor: float, split: str, fault: str | None = None) -> list[Value]:
        """One for each seed.

        Raises:
            InputError: a run diverged.
        """
        found = []
        for seed in self.study.seeds():
            scene = Scene(algorithm=name, factor=factor, split=split, seed=seed, fault=fault)
            num = self.study.args.rouge_texts if fault is None else 0
            key = {"what": "final", "algorithm": name, "factor": factor, "split": split, "seed": seed, "fault": fault}
            found.append(
                self.study.cell(
                    {**key, "rouge_texts": num},
                    lambda scene=scene, num=num: self.study.federate(scene, rouge_texts=num),
                )
            )
        if any(value["diverged"] for value in found):
            raise InputError(f"a run diverged at the best learning rate of seed 0, {factor:g} times its own")
        if any(value["remark"] and fault is None for value in found):
            raise InputError(next(f"{value['remark']} ({value['refused']})" for value in found if value["remark"]))
        return found

    def search_bound(self, name: str) -> dict[float, float | None]:
        """As `FederatedStudy.search`."""

        def nats(factor: float) -> float | None:
            value = self.study.cell(
                {"what": "search", "bound": name, "factor": factor},
                lambda: self._bound(name, factor, IID, 0, on_test=False),
            )
            return None if value["diverged"] else float(value["curve"][-1]["server"])

        return upwards(self.study.args.rate_factors, nats)

    def final_bound(self, name: str, factor: float, split: str) -> list[Value]:
        """One for each seed."""
        if name == CENTRAL:
            # All texts are in one place, whoever held them.
            split = IID
        found = []
        for seed in self.study.seeds():
            key = {"what": "final", "bound": name, "factor": factor, "split": split, "seed": seed}
            found.append(self.study.cell(key, lambda seed=seed: self._bound(name, factor, split, seed, on_test=True)))
        if any(value["diverged"] for value in found):
            raise InputError(f"a run diverged at the best learning rate of seed 0, {factor:g} times LoRA's")
        return found

    def _bound(self, name: str, factor: float, split: str, seed: int, *, on_test: bool) -> Value:
        """Local steps without a federation: each device alone, or all texts in one place."""
        study, args = self.study, self.study.args
        base = LocalSteps(num_steps=args.local_steps, batch_size=args.batch_size)
        rate = base.learning_rate * factor
        with study.stage(split, seed) as stage:
            judge = stage.test if on_test else stage.server
            if name == CENTRAL:
                machines: list[Any] = [stage.resident.with_texts(study.encode(study.texts.devices))]
                num_steps = base.num_steps * len(stage.models)
            else:
                machines, num_steps = list(stage.models.values()), base.num_steps
            adapters: list[Arrays] = [stage.start for _ in machines]
            curve, device_s = [self._point(judge, adapters, 0.0, on_test)], 0.0
            for number in range(1, args.rounds + 1):
                begun_s = time.perf_counter()
                now = rate * study.rate_share(number)
                steps = LocalSteps(num_steps=num_steps, batch_size=base.batch_size, learning_rate=now)
                for place, machine in enumerate(machines):
                    seed_of = hash_seed(seed, place, number)
                    adapters[place] = machine.descend(adapters[place], sorted(stage.start), steps, seed=seed_of).arrays
                device_s += (time.perf_counter() - begun_s) / len(machines)
                # Every device's own adapter is judged, which is dear: of a local run only the end is.
                if name == CENTRAL or number == args.rounds:
                    curve.append(self._point(judge, adapters, device_s, on_test))
            return {"curve": curve}

    @staticmethod
    def _point(judge: Any, adapters: Sequence[Arrays], device_s: float, on_test: bool) -> dict[str, Any]:
        same = all(one is adapters[0] for one in adapters)
        losses = [judge(one) for one in (adapters[:1] if same else adapters)]
        if not np.isfinite(losses).all():
            raise NonFiniteLossError(0, next(one for one in losses if not np.isfinite(one)))
        loss = float(np.mean(losses))
        found = {"server": None, "loss": None, "up": 0.0, "down": 0.0, "device_s": device_s, "server_s": 0.0}
        return {**found, "loss" if on_test else "server": loss}


def hash_seed(*parts: int) -> int:
    """A seed below 2^31 of some numbers, the same on every machine.

    Example:
        >>> hash_seed(0, 1) == hash_seed(0, 1) != hash_seed(1, 0)
        True
    """
    return int(np.random.SeedSequence(parts).generate_state(1)[0] >> 1)


# The page.


def summarise(values: Sequence[Value]) -> dict[str, Any]:
    """Of one method on one split: its losses, and what a device spent on the whole run.

    Args:
        values: of all seeds.
    """
    curves = [value["curve"] for value in values]
    ends = [curve[-1] for curve in curves]
    return {
        "losses": [one["loss"] for one in ends],
        "loss": Mean.of([one["loss"] for one in ends]),
        "up": float(np.mean([one["up"] for one in ends])),
        "down": float(np.mean([one["down"] for one in ends])),
        "bytes": float(np.mean([cost(one, ("up", "down")) for one in ends])),
        "device_s": float(np.mean([one["device_s"] for one in ends])),
        "server_s": float(np.mean([one["server_s"] for one in ends])),
        "num_rejected": sum(value.get("num_rejected", 0) for value in values),
        "rouge_l": Mean.of([value["rouge_l"] for value in values]) if "rouge_l" in values[0] else None,
    }


class Table:
    """What is finished, by split and method."""

    def __init__(self, study: FederatedStudy) -> None:
        self.study, self.runs = study, Runs(study)
        self.factors: dict[str, float] = {}
        self.searched: dict[str, dict[float, float | None]] = {}
        self.refused: dict[str, str] = {}
        self.unfinished: list[str] = []
        self.values: dict[str, dict[str, list[Value]]] = {}
        self.faults: dict[str, dict[str, list[Value]]] = {}
        self.memory: dict[str, dict[str, float | None]] = {}

    def fill(self) -> None:
        """Measure what is missing."""
        args = self.study.args
        for name in (*BOUNDS, *args.algorithms):
            try:
                found = self.runs.search_bound(name) if name in BOUNDS else self.study.search(name)
                self.factors[name], self.searched[name] = best_rate(found), found
            except OutOfTimeError:
                self.unfinished.append(f"the search for {name}")
            except CotuneError as error:
                self.refused[name] = str(error)
        for split in args.splits:
            for name in self.factors:
                self._try(f"{name} on {split}", self._final, name, split)
        first = args.splits[0]
        for fault in args.faults:
            for name in self.values.get(first, {}):
                if name not in BOUNDS:
                    self._try(f"{name} with {fault}", self._fault, name, first, fault)
        for name in self.values.get(first, {}):
            self._try(f"memory of {name}", self._memory, name, first)

    def _try(self, what: str, run: Any, *arguments: str) -> None:
        try:
            run(*arguments)
        except OutOfTimeError:
            self.unfinished.append(what)
        except CotuneError as error:
            self.refused[what] = str(error)

    def _final(self, name: str, split: str) -> None:
        run = self.runs.final_bound if name in BOUNDS else self.runs.final
        self.values.setdefault(split, {})[name] = run(name, self.factors[name], split)

    def _fault(self, name: str, split: str, fault: str) -> None:
        self.faults.setdefault(fault, {})[name] = self.runs.final(name, self.factors[name], split, fault)

    def _memory(self, name: str, split: str) -> None:
        passes = {"backward": 1.0} if name in BOUNDS else self.values[split][name][0]["passes"]
        predicted = predicted_bytes(self.study, first_order=is_first_order(passes))
        measured: dict[str, float] = {}
        if self.study.args.measure_memory and name not in BOUNDS:
            key = {"what": "memory", "algorithm": name}
            measured = self.study.cell(key, lambda: measured_memory(self.study.args, name))
        weights = weight_bytes(self.study.backbone.model)
        self.memory[name] = {
            "predicted_mb": None if predicted is None else predicted / MB,
            "measured_mb": measured["peak_bytes"] / MB if measured else None,
            "inference_mb": measured["inference_bytes"] / MB if measured else None,
            "more_than_inference": above_inference(weights, measured) if measured else None,
        }


def by_budget(
    name: str, methods: Mapping[str, Sequence[Value]], what: Sequence[str], x_label: str, *, unit: float = 1.0
) -> tuple[Html, dict[str, dict[str, Mean]]]:
    """Quality under budgets: a plot and a table in this unit, and its numbers by method and budget."""
    curves = {one: [value["curve"] for value in values] for one, values in methods.items() if one not in BOUNDS}
    budgets = budgets_of([curve for own in curves.values() for curve in own], what)
    means = {one: {f"{b:g}": mean_within(own, b, what) for b in budgets} for one, own in curves.items()}
    lines = {one: [row[f"{b:g}"].point(b / unit) for b in budgets] for one, row in means.items()}
    plots = plots_of(
        name,
        "Loss after the last round that the budget pays for; means over seeds with 95 % intervals.",
        lines,
        x_label=f"{x_label}, log scale",
        y_label="held-out nats per token",
        is_log_x=True,
    )
    columns = {f"{b / unit:g}": [worded(means[one][f"{b:g}"]) for one in means] for b in budgets}
    return join([plots, grid(f"Nats per held-out token by {x_label}", "method", list(means), columns)]), means


def split_section(split: str, table: Table, share: float) -> tuple[Section, dict[str, Any], list[str]]:
    """A section, its numbers, and what they say."""
    methods = table.values[split]
    rows = {name: summarise(values) for name, values in methods.items()}
    federated = [name for name in rows if name not in BOUNDS]
    measured: dict[str, Any] = {"rows": rows}
    said = [f"{split}: {one}" for one in goal(rows)]
    columns = {
        "nats per token": [worded(row["loss"]) for row in rows.values()],
        "KB up": [f"{row['up'] / 1e3:.1f}" for row in rows.values()],
        "KB down": [f"{row['down'] / 1e3:.1f}" for row in rows.values()],
        "device, s": [f"{row['device_s']:.2f}" for row in rows.values()],
        "server, s": [f"{row['server_s']:.2f}" for row in rows.values()],
        "rounds rejected": [str(row["num_rejected"]) for row in rows.values()],
    }
    if any(row["rouge_l"] for row in rows.values()):
        columns["Rouge-L"] = [worded(row["rouge_l"], 1) for row in rows.values()]
    parts = [grid("The whole run, of one device", "method", list(rows), columns)]
    if federated:
        by_bytes, measured["by_bytes"] = by_budget(
            f"bytes_{split}", methods, ("up", "down"), "KB of one device", unit=1e3
        )
        by_time, measured["by_time"] = by_budget(f"time_{split}", methods, ("device_s",), "seconds of one device")
        parts += [by_bytes, by_time]
    if CENTRAL in methods and federated:
        starts = [value["curve"][0]["loss"] for value in methods[CENTRAL]]
        ends = rows[CENTRAL]["losses"]
        target = float(np.mean(starts)) - share * float(np.mean(starts) - np.mean(ends))
        costs = {name: cost_to([value["curve"] for value in methods[name]], target) for name in federated}
        measured |= {"target": target, "cost_to_target": costs}
        parts.append(
            grid(
                f"Cost to {target:.3f} nats, {100 * share:g} % of what the centralised bound gains",
                "method",
                list(costs),
                {
                    "seeds that reach it": [f"{one['num_reached']} of {len(starts)}" for one in costs.values()],
                    "rounds": [worded(one["rounds"], 1) for one in costs.values()],
                    "bytes of one device": [worded(one["bytes"], 0) for one in costs.values()],
                    "seconds of one device": [worded(one["device_s"], 2) for one in costs.values()],
                },
            )
        )
    return (
        Section(name=split, short=split, heading=f"Split: {split}", content=Html(bullets(said) + join(parts))),
        measured,
        said,
    )


def fault_section(table: Table, split: str) -> tuple[Section, dict[str, Any]]:
    """Robustness: loss with faults less that without, seed by seed."""
    clean = {name: summarise(values)["losses"] for name, values in table.values[split].items()}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for fault, methods in table.faults.items():
        for name, values in methods.items():
            row = summarise(values)
            more = [a - b for a, b in zip(row["losses"], clean[name], strict=True)]
            found.setdefault(name, {})[fault] = {
                "loss": row["loss"],
                "more": Mean.of(more),
                "num_void": sum(value["num_void"] for value in values),
            }
    faults = list(table.faults)
    columns = {}
    for fault in faults:
        columns[f"{fault}: nats"] = [worded(one[fault]["loss"]) if fault in one else "-" for one in found.values()]
        columns[f"{fault}: more"] = [worded(one[fault]["more"]) if fault in one else "-" for one in found.values()]
        columns[f"{fault}: void rounds"] = [
            str(one[fault]["num_void"]) if fault in one else "-" for one in found.values()
        ]
    content = grid("A fifth of the devices too late, or a fifth of the replies lost", "method", list(found), columns)
    return Section(name="faults", short="Robustness", heading="Robustness", content=content), found


def memory_section(table: Table, split: str) -> Section:
    """Quality against the memory of one device."""
    rows = {name: summarise(values) for name, values in table.values[split].items() if name in table.memory}
    points = {}
    for name, row in rows.items():
        x = table.memory[name]["measured_mb"] or table.memory[name]["predicted_mb"]
        if x and name not in BOUNDS:
            points[name] = [row["loss"].point(round(x, 2))]
    plot = plots_of(
        "memory",
        "Memory of one device above the weights, measured where it is, else predicted from shapes.",
        points,
        x_label="MB above the weights, log scale",
        y_label="held-out nats per token",
        is_log_x=True,
    )

    def column(name: str) -> list[str]:
        values = [table.memory[one][name] for one in rows]
        return ["-" if value is None else f"{value:.1f}" for value in values]

    columns = {
        "predicted MB": column("predicted_mb"),
        "measured MB": column("measured_mb"),
        "measured inference MB": column("inference_mb"),
        "more than inference, %": [
            "-" if (more := table.memory[one]["more_than_inference"]) is None else f"{100 * more:.1f}" for one in rows
        ],
        "nats per token": [worded(row["loss"]) for row in rows.values()],
    }
    content = join([plot, grid("Above the weights; in the share they are counted", "method", list(rows), columns)])
    return Section(name="memory", short="Memory", heading="Device memory", content=content)


def build(study: FederatedStudy) -> Page:
    """Measure what is missing and show what there is."""
    args, table = study.args, Table(study)
    if not 0 < args.target_share <= 1:
        raise InputError(f"--target-share is {args.target_share}, expected above 0 and at most 1")
    table.fill()
    if not table.values:
        if table.unfinished:
            raise OutOfTimeError("the budget is spent before any method is finished; run again to go on")
        raise InputError(f"no method could be run: {next(iter(table.refused.values()), 'none was asked for')}")
    sections, measured, said = [], {}, []
    for split in table.values:
        section, measured[split], words = split_section(split, table, args.target_share)
        sections.append(section)
        said += words
    first = next(iter(table.values))
    faults: dict[str, Any] = {}
    if table.faults:
        section, faults = fault_section(table, first)
        sections.append(section)
    if table.memory:
        sections.append(memory_section(table, first))
        said += memory_goal(table.memory)
    if table.refused:
        reasons = grid("What the product said", "method", list(table.refused), {"reason": list(table.refused.values())})
        sections.append(Section(name="refused", short="Refused", heading="Not run", content=reasons))
    passes = {name: values[0]["passes"] for name, values in table.values[first].items() if name not in BOUNDS}
    return Page(
        title="Federated methods by bytes, memory and time",
        lead=" ".join(said),
        expected=EXPECTED,
        measured={
            "splits": measured,
            "faults": faults,
            "memory": table.memory,
            "factors": table.factors,
            "search": table.searched,
            "passes": passes,
            "refused": table.refused,
            "said": said,
        },
        sections=sections,
        deviations=[
            *edge_notes(table.factors, {name: list(found) for name, found in table.searched.items()}),
            f"Forward-only methods take {args.directions} directions a round, the others {args.local_steps} steps: "
            "equal bytes, memory and time are compared, not equal numbers of steps; the bounds take the steps of the "
            "methods with gradients.",
            f"Dirichlet has alpha {ALPHA:g} over targets, or data sets where there are several; a domain is a data "
            "set, a target, or a kind of the persona's requests.",
            "Predicted memory is that of a LoRA step, or of a zeroth-order step on LoRA, with the longest text; a "
            "method's own arrays beside the adapter are in the measured one alone.",
            "Replies that are lost have no bytes in the table. Stragglers are the same devices in all rounds, so "
            "their texts are never learnt.",
        ],
        lines=[
            *(
                f"{split:10s} {name:14s} {worded(row['loss'])} nats, {row['bytes'] / 1e3:.1f} KB, "
                f"{row['device_s']:.2f} s"
                for split, one in measured.items()
                for name, row in one["rows"].items()
            ),
            *(f"{name:14s} not run: {reason}" for name, reason in table.refused.items()),
            *said,
        ],
        unfinished=table.unfinished,
    )


if __name__ == "__main__":
    run_study(NAME, parser(), build)
