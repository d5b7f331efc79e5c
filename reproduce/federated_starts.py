"""Where A begins in a federation: every start that keeps the shared base, each at its own learning rate.

The third open question of arXiv 2408.10691: does a start that is worth something on one machine survive many devices
and averaging? EVA, LoRA-GA and the directions of the last update against orthonormal rows, peft's random ones, rsLoRA
and PiSSA, with both factors averaged (FedIT) and with A frozen (FFA-LoRA), where A is sent once and never again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from adaptation_study import best_rate, edge_notes, worded
from cells import OutOfTimeError, Value
from federated_methods import summarise
from federated_study import PISSA, FederatedStudy, Scene, Start, make_parser, run_study
from federated_texts import IID, SPLITS
from lora_init import plots_of
from mean import Mean
from page import Page
from result_folder import Point, grid

from cotune.errors import CotuneError, InputError
from cotune.evaluation.markup import Html, bullets, join
from cotune.evaluation.report import Section

NAME = "federated_starts"
REFERENCE = "random"
EXPECTED = {
    "issue 6": "EVA with A frozen equals LoRA at 53 % of the bytes",
    "design study, one seed": {"default": 5.064, "EVA": 4.980, "EVA, A frozen": 5.061, "default, A frozen": 5.150},
    "arXiv 2602.04998": "on one machine variants are within 1 to 2 % of each other once the learning rate is tuned",
}


STARTS: dict[str, Start] = {
    REFERENCE: Start(method="random"),
    "orthonormal": Start(),
    "eva": Start(method="eva"),
    "lora_ga": Start(method="lora_ga"),
    "update_svd": Start(method="update_svd"),
    PISSA: Start(method=PISSA),
    "rslora": Start(method="random", scale="rslora"),
    "eva, rslora": Start(method="eva", scale="rslora"),
}
ALGORITHMS = ("fedit", "ffa_lora", "rolora")


def parser() -> argparse.ArgumentParser:
    """Of this command."""
    made = make_parser(
        NAME,
        __doc__ or "",
        examples=(
            "--starts random eva --algorithms ffa_lora",
            "--data-root my-data --datasets trec sciq --split domains",
        ),
    )
    made.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS), help="(default: all)")
    made.add_argument(
        "--algorithms", nargs="+", choices=ALGORITHMS, default=["fedit", "ffa_lora"], help="(default: %(default)s)"
    )
    made.add_argument("--split", choices=SPLITS, default=IID, help="(default: %(default)s)")
    return made


class Table:
    """What is finished, by row: an algorithm and a start."""

    def __init__(self, study: FederatedStudy) -> None:
        self.study = study
        self.searched: dict[str, dict[float, float | None]] = {}
        self.factors: dict[str, float] = {}
        self.values: dict[str, list[Value]] = {}
        self.refused: dict[str, str] = {}
        self.unfinished: list[str] = []

    def fill(self) -> None:
        """Measure what is missing."""
        for algorithm in self.study.args.algorithms:
            for start in self.study.args.starts:
                name = row_name(algorithm, start)
                try:
                    found = self._search(algorithm, start)
                    factor = best_rate(found)
                    self.values[name] = self._final(algorithm, start, factor)
                    self.searched[name], self.factors[name] = found, factor
                except OutOfTimeError:
                    self.unfinished.append(name)
                except CotuneError as error:
                    self.refused[name] = str(error)

    def _search(self, algorithm: str, start: str) -> dict[float, float | None]:
        """Nats per token on the server's texts by factor, seed 0; None where it diverged."""
        return self.study.search_rates(lambda factor: self._cell(algorithm, start, factor, 0, "search"))

    def _final(self, algorithm: str, start: str, factor: float) -> list[Value]:
        """One for each seed.

        Raises:
            InputError: a run diverged, or ended early.
        """
        found = [self._cell(algorithm, start, factor, seed, "final") for seed in self.study.seeds()]
        for value in found:
            if value["diverged"] or value["remark"]:
                told = value.get("remark") or "a run diverged"
                raise InputError(f"{told}, at the best learning rate of seed 0, {factor:g} times its own")
        return found

    def _cell(self, algorithm: str, start: str, factor: float, seed: int, what: str) -> Value:
        split = self.study.args.split
        scene = Scene(algorithm=algorithm, factor=factor, split=split, seed=seed, start=STARTS[start])
        key = {"what": what, "algorithm": algorithm, "start": start, "factor": factor, "split": split, "seed": seed}
        return self.study.cell(key, lambda: self.study.federate(scene, on_test=what == "final"))


def row_name(algorithm: str, start: str) -> str:
    """Of a row.

    Example:
        >>> row_name("fedit", "eva")
        'fedit, eva'
    """
    return f"{algorithm}, {start}"


def add_differences(rows: Mapping[str, dict[str, Any]]) -> None:
    """To each row `difference`: its losses less those of the random start under the same algorithm, seed by seed."""
    for name, row in rows.items():
        reference = rows.get(row_name(name.split(", ")[0], REFERENCE))
        row["difference"] = (
            None
            if reference is None or reference is row
            else Mean.of([a - b for a, b in zip(row["losses"], reference["losses"], strict=True)])
        )


def verdicts(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the numbers say, in words.

    Args:
        rows: by `row_name`, from `summarise`, with `difference`.
    """
    said = []
    for algorithm in dict.fromkeys(name.split(", ")[0] for name in rows):
        own = {name: row for name, row in rows.items() if name.split(", ")[0] == algorithm}
        best = min(own, key=lambda name: own[name]["loss"].mean)
        said.append(
            f"Least loss with {algorithm}: {best.split(', ', 1)[1]}, {worded(own[best]['loss'])} nats per token."
        )
        others = {name.split(", ", 1)[1]: row["difference"] for name, row in own.items() if row["difference"]}
        if others and all(one.low is not None for one in others.values()):
            better = [name for name, one in others.items() if one.high < 0]
            worse = [name for name, one in others.items() if one.low > 0]
            said.append(
                f"{algorithm}: better than the random start, with a 95 % interval without 0: "
                f"{', '.join(better) or 'none'}; worse: {', '.join(worse) or 'none'}."
            )
    frozen, tuned = rows.get(row_name("ffa_lora", "eva")), rows.get(row_name("fedit", REFERENCE))
    if frozen and tuned:
        less = Mean.of([a - b for a, b in zip(frozen["losses"], tuned["losses"], strict=True)])
        share = 100 * frozen["up"] / tuned["up"]
        said.append(
            f"EVA with A frozen less LoRA with both factors: {worded(less)} nats per token at {share:.0f} % of the "
            "bytes up."
        )
    return said


def build(study: FederatedStudy) -> Page:
    """Measure what is missing and show what there is."""
    table = Table(study)
    table.fill()
    if not table.values:
        if table.unfinished:
            raise OutOfTimeError("the budget is spent before any start is finished; run again to go on")
        raise InputError(f"no start could be run: {next(iter(table.refused.values()), 'none was asked for')}")
    rows = {name: summarise(values) for name, values in table.values.items()}
    add_differences(rows)
    said = verdicts(rows)
    sections = [
        Section(
            name="starts", short="Starts", heading="Each at its best learning rate", content=ends(table, rows, said)
        ),
        Section(name="rates", short="Rates", heading="The same learning rate for all", content=by_rate(table)),
    ]
    if table.refused:
        reasons = {"reason": list(table.refused.values())}
        content = grid("What the product said", "algorithm, start", list(table.refused), reasons)
        sections.append(Section(name="refused", short="Refused", heading="Not run", content=content))
    return Page(
        title="Where A begins in a federation",
        lead=" ".join(said),
        expected=EXPECTED,
        measured={
            "rows": rows,
            "factors": table.factors,
            "search": table.searched,
            "refused": table.refused,
            "said": said,
        },
        sections=sections,
        deviations=[
            *edge_notes(table.factors, {name: list(found) for name, found in table.searched.items()}),
            "EVA and LoRA-GA take one round of sums before the first one that learns: all have the same number of "
            "rounds that learn, and the bytes of that round are in the table.",
            "PiSSA is not in the product: its B is not zero, so that a device has to hold the residual of the base. "
            "Here all devices take it from the base in the same process; on different processors they would not agree "
            "to the bit, and A and B would have to be sent.",
        ],
        lines=[
            *(f"{name:22s} {worded(row['loss'])} nats, {row['up'] / 1e3:.1f} KB up" for name, row in rows.items()),
            *(f"{name:22s} not run: {reason}" for name, reason in table.refused.items()),
            *said,
        ],
        unfinished=table.unfinished,
    )


def ends(table: Table, rows: Mapping[str, Mapping[str, Any]], said: Sequence[str]) -> Html:
    """Curves by round, and what came after the last one."""
    plots = plots_of(
        "curves",
        "Means over seeds with 95 % intervals; rounds of sums, in which nothing is learnt, are counted too.",
        {name: mean_curve(values) for name, values in table.values.items()},
        x_label="round",
        y_label="held-out nats per token",
    )
    columns = {
        "times its own rate": [f"{table.factors[name]:g}" for name in rows],
        "nats per token": [worded(row["loss"]) for row in rows.values()],
        "less the random start's": [worded(row["difference"]) for row in rows.values()],
        "KB up": [f"{row['up'] / 1e3:.1f}" for row in rows.values()],
        "KB down": [f"{row['down'] / 1e3:.1f}" for row in rows.values()],
        "rounds rejected": [str(row["num_rejected"]) for row in rows.values()],
    }
    return join([plots, Html(bullets(said)), grid("At the end", "algorithm, start", list(rows), columns)])


def mean_curve(values: Sequence[Value]) -> list[Point]:
    """Loss on the test texts by round, over seeds."""
    losses = [[point["loss"] for point in value["curve"]] for value in values]
    return [Mean.of(ones).point(number) for number, ones in enumerate(zip(*losses, strict=True))]


def by_rate(table: Table) -> Html:
    """What each learning rate came to."""
    plots = plots_of(
        "rates",
        "The server's texts, seed 0.",
        {
            name: [(rate, nats, None, None) for rate, nats in found.items() if nats is not None]
            for name, found in table.searched.items()
        },
        x_label="times its own learning rate, log scale",
        y_label="nats per token",
        is_log_x=True,
    )
    columns = {
        f"{rate:g}": [
            "" if rate not in found else "diverged" if (nats := found[rate]) is None else f"{nats:.3f}"
            for found in table.searched.values()
        ]
        for rate in table.study.args.rate_factors
    }
    names = list(table.searched)
    return join([plots, grid("Nats per token of the server's texts, seed 0", "algorithm, start", names, columns)])


if __name__ == "__main__":
    run_study(NAME, parser(), build)
