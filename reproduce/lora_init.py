"""LoRA starts compared: every one that `cotune tune --init` knows, with rsLoRA and DoRA, each at its own learning rate.

Published comparisons often keep one learning rate for all starts, or take each start's from its paper. "Learning Rate
Matters: Vanilla LoRA May Suffice" (arXiv 2602.04998) finds variants within 1 to 2 % of each other once it is tuned.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from adaptation_study import AdaptationStudy, best_rate, edge_notes, make_parser, run_study, worded
from cells import OutOfTimeError, Value
from mean import Mean
from page import Page
from result_folder import Point, grid, plot_lines
from study_options import at_least_one, positive

from cotune.data.batches import EncodedExample
from cotune.errors import InputError
from cotune.evaluation.markup import NO_HTML, Html, bullets, join
from cotune.evaluation.report import Section
from cotune.models.adapters import LoraShape
from cotune.models.backbone import Backbone
from cotune.tuning.attached import Tunable
from cotune.tuning.loop import LoopConfig
from cotune.tuning.lora import Lora
from cotune.tuning.lora_init import INITS
from cotune.tuning.tune import Adaptation, TuneConfig, tune

NAME = "lora_init"
REFERENCE = "default"
LINES_IN_A_PLOT = 7
LOW_BITS = 4
EXPECTED = {
    "arXiv 2602.04998": "variants within 1 to 2 % of each other once the learning rate is tuned",
    "spread_percent": [1.0, 2.0],
    "PiSSA, arXiv 2404.02948": "GSM8K, Mistral-7B: 72.86 against LoRA's 67.7",
    "LoRA-GA, arXiv 2407.05000": "GSM8K, Llama-2-7B: 11.52 points above LoRA; converges 2 to 4 times as fast",
}


@dataclass(frozen=True, kw_only=True)
class Start:
    """A row of the table.

    Attributes:
        init: a name in `INITS`.
        use_rslora, use_dora: of the shape.
        bits: of the frozen weights; None for whole ones.
    """

    init: str = REFERENCE
    use_rslora: bool = False
    use_dora: bool = False
    bits: int | None = None

    def what(self, rank: int, alpha: float) -> Lora:
        """What is tuned."""
        shape = LoraShape(rank=rank, alpha=alpha, use_rslora=self.use_rslora, use_dora=self.use_dora)
        return Lora(shape=shape, init=self.init)


# loftq makes up for a low-bit model's rounding, so it is compared on one, beside two that go with one as well.
STARTS: dict[str, Start] = {
    **{name: Start(init=name) for name in INITS if name != "loftq"},
    "rslora": Start(use_rslora=True),
    "dora": Start(use_dora=True),
    **{f"{name}, {LOW_BITS} bit": Start(init=name, bits=LOW_BITS) for name in (REFERENCE, "eva", "loftq")},
}


@dataclass(frozen=True)
class TimedStart:
    """An adaptation that keeps the seconds that its start takes."""

    what: Adaptation
    seconds: list[float] = field(default_factory=list, repr=False, compare=False)

    def fresh(self, backbone: Backbone, examples: Sequence[EncodedExample], *, seed: int) -> Tunable:
        """As that of `what`."""
        begun_s = time.perf_counter()
        made = self.what.fresh(backbone, examples, seed=seed)
        self.seconds.append(time.perf_counter() - begun_s)
        return made


def parser() -> argparse.ArgumentParser:
    """Of this command."""
    made = make_parser(NAME, __doc__ or "")
    made.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS), help="(default: all)")
    made.add_argument(
        "--learning-rates",
        type=positive,
        nargs="+",
        default=[1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2],
        help="searched for every start (default: %(default)s)",
    )
    made.add_argument("--epochs", type=at_least_one, default=4, help="(default: %(default)s)")
    made.add_argument("--rank", type=at_least_one, default=8, help="(default: %(default)s)")
    made.add_argument("--alpha", type=positive, default=16.0, help="(default: %(default)s)")
    return made


class Runs:
    """The cells of this study."""

    def __init__(self, study: AdaptationStudy) -> None:
        self.study = study

    def search(self, name: str) -> dict[float, float | None]:
        """Held-out nats per token by learning rate, with seed 0; None where it diverged."""
        train, judges = self.study.selection()
        found = {}
        for rate in self.study.args.learning_rates:
            value = self._cell(name, rate, 0, "search", train, judges)
            found[rate] = None if value["diverged"] else value["curve"][-1]
        return found

    def final(self, name: str, rate: float) -> list[Value]:
        """On all training texts, judged on the test texts; one for each seed."""
        study = self.study
        return [self._cell(name, rate, seed, "final", study.train, study.test) for seed in study.seeds()]

    def _cell(self, name: str, rate: float, seed: int, what: str, train: Sequence[Any], judges: Sequence[Any]) -> Value:
        args, start = self.study.args, STARTS[name]
        # Outside of the cell: what cannot be had here may be had elsewhere.
        backbone = self.study.backbone(start.bits)

        def run() -> Value:
            timed = TimedStart(start.what(args.rank, args.alpha))
            config = TuneConfig(
                what=timed,
                loop=LoopConfig(epochs=args.epochs, learning_rate=rate),
                num_batch_sequences=args.batch_size,
                seed=seed,
            )
            result = tune(backbone, self.study.encode(train), config, heldout=self.study.encode(judges))
            return {
                "curve": [record.heldout_loss for record in result.curve],
                "num_trained": result.num_trained,
                "start_s": timed.seconds[0],
                "train_s": result.curve[-1].elapsed_s,
            }

        key = {"what": what, "start": name, "learning_rate": rate, "seed": seed, "epochs": args.epochs}
        return self.study.cell({**key, "rank": args.rank, "alpha": args.alpha}, run)


def summarise(runs: Sequence[Value], reference: Sequence[Value] | None) -> dict[str, Any]:
    """Means over seeds of one start.

    Args:
        runs: one for each seed, none of which diverged.
        reference: those of the start to compare with, of the same seeds; None where they are missing.

    Returns:
        Among others `difference`, the mean over seeds of ours less theirs, which share the order of texts.
    """
    curves = [run["curve"] for run in runs]
    return {
        "curve": [Mean.of(values) for values in zip(*curves, strict=True)],
        "nats": Mean.of([curve[-1] for curve in curves]),
        "difference": None
        if reference is None
        else Mean.of([a["curve"][-1] - b["curve"][-1] for a, b in zip(runs, reference, strict=True)]),
        "start_s": median(run["start_s"] for run in runs),
        "train_s": median(run["train_s"] for run in runs),
        "num_trained": runs[0]["num_trained"],
    }


def verdicts(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the numbers say, in words: spread of the tuned starts, and who differs from the default.

    Args:
        rows: of starts on whole weights, from `summarise`.
    """
    ends = {name: row["nats"].mean for name, row in rows.items()}
    best, worst = min(ends, key=lambda name: ends[name]), max(ends, key=lambda name: ends[name])
    spread = 100 * (ends[worst] / ends[best] - 1)
    said = [
        f"Each at its best learning rate, the starts end within {spread:.1f} % of each other, from {best} with "
        f"{ends[best]:.3f} to {worst} with {ends[worst]:.3f} nats per token."
    ]
    others = {name: row["difference"] for name, row in rows.items() if name != REFERENCE and row["difference"]}
    better = [name for name, one in others.items() if one.high is not None and one.high < 0]
    worse = [name for name, one in others.items() if one.low is not None and one.low > 0]
    if others and all(one.low is None for one in others.values()):
        return [*said, "One seed alone says nothing about differences from the default."]
    if others:
        said.append(
            f"Better than the default, with a 95 % interval without 0: {', '.join(better) or 'none'}; "
            f"worse: {', '.join(worse) or 'none'}; the other {len(others) - len(better) - len(worse)} cannot be told "
            "apart from it."
        )
    return said


def build(study: AdaptationStudy) -> Page:
    """Measure what is missing and show what there is."""
    args, runs = study.args, Runs(study)
    searched: dict[str, dict[float, float | None]] = {}
    rates: dict[str, float] = {}
    finished: dict[str, list[Value]] = {}
    refused: dict[str, str] = {}
    unfinished = []
    for name in args.starts:
        try:
            found = runs.search(name)
            rate = best_rate(found)
            values = runs.final(name, rate)
            searched[name], rates[name] = found, rate
            if any(value["diverged"] for value in values):
                raise InputError(f"a run diverged at the best learning rate of seed 0, {rate:g}")
            finished[name] = values
        except InputError as error:
            refused[name] = str(error)
        except OutOfTimeError:
            unfinished.append(name)
    if not finished and unfinished:
        raise OutOfTimeError("the budget is spent before any start is finished; run again to go on")
    rows = {}
    for name, values in finished.items():
        low = STARTS[name].bits is not None
        rows[name] = summarise(values, finished.get(f"{REFERENCE}, {LOW_BITS} bit" if low else REFERENCE))
    whole = {name: row for name, row in rows.items() if STARTS[name].bits is None}
    said = verdicts(whole) if whole else []
    names = list(rows)
    columns = {
        "learning rate": [f"{rates[name]:g}" for name in names],
        "nats per token": [worded(rows[name]["nats"]) for name in names],
        "less the default's": [worded(rows[name]["difference"]) for name in names],
        "start, s": [f"{rows[name]['start_s']:.2f}" for name in names],
        "training, s": [f"{rows[name]['train_s']:.1f}" for name in names],
        "trained numbers": [f"{rows[name]['num_trained']:,}" for name in names],
    }
    by_rate = {
        f"{rate:g}": ["diverged" if (nats := searched[name][rate]) is None else f"{nats:.3f}" for name in searched]
        for rate in args.learning_rates
    }
    curves = {name: [mean.point(epoch) for epoch, mean in enumerate(rows[name]["curve"])] for name in names}
    courses = {
        name: [(rate, nats, None, None) for rate, nats in found.items() if nats is not None]
        for name, found in searched.items()
    }
    plots = plots_of(
        "curves",
        "Means over seeds with 95 % intervals; epoch 0 is before any step.",
        curves,
        x_label="epoch",
        y_label="held-out nats per token",
    )
    rate_plots = plots_of(
        "rates",
        "Held-out training texts, seed 0.",
        courses,
        x_label="learning rate, log scale",
        y_label="held-out nats per token",
        is_log_x=True,
    )
    content = plots + bullets(said) + grid("At the end", "start", names, columns) if names else ""
    sections = [Section(name="starts", short="Starts", heading="Each at its best learning rate", content=Html(content))]
    if searched:
        sections.append(
            Section(
                name="rates",
                short="Rates",
                heading="The same learning rate for all",
                content=Html(
                    rate_plots + grid("Nats per held-out training token, seed 0", "start", list(searched), by_rate)
                ),
            )
        )
    if refused:
        reasons = grid("What the product said", "start", list(refused), {"reason": list(refused.values())})
        sections.append(Section(name="refused", short="Refused", heading="Not run", content=reasons))
    return Page(
        title="LoRA starts, each at its own learning rate",
        lead=" ".join(said),
        expected=EXPECTED,
        measured={"starts": rows, "rates": rates, "search": searched, "refused": refused, "said": said},
        sections=sections,
        deviations=[
            *edge_notes(rates, dict.fromkeys(rates, args.learning_rates)),
            "The time of a start has no warm-up of its own; it is the median over seeds.",
        ],
        lines=[
            *(f"{name:20s} lr {rates[name]:<8g} {worded(rows[name]['nats'])} nats" for name in names),
            *(f"{name:20s} not run: {reason}" for name, reason in refused.items()),
            *said,
        ],
        unfinished=unfinished,
    )


def plots_of(name: str, caption: str, lines: Mapping[str, Sequence[Point]], **options: Any) -> Html:
    """As many plots as needed, because colours tell only so many lines apart; the first line is in each of them."""
    if not lines:
        return NO_HTML
    first, *others = lines.items()
    step = LINES_IN_A_PLOT - 1
    parts = [others[begin : begin + step] for begin in range(0, max(1, len(others)), step)]
    return join(
        plot_lines(f"{name}_{number}", caption, dict([first, *part]), **options) for number, part in enumerate(parts)
    )


if __name__ == "__main__":
    run_study(NAME, parser(), build)
