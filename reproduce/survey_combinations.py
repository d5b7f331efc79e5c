"""Do savings of memory add up? What is tuned x how it is updated x the bits of the frozen weights, all combinations.

The edge fine-tuning survey (arXiv 2408.10691) lists parameter-efficient and memory-efficient methods and low-bit
weights beside each other. Here each combination that cotune tunes is measured: the peak above the weights in a child
process of its own, the loss on held-out texts after the same number of texts, and the seconds of a step. Combinations
that the product refuses are in the table with the reason.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from adaptation_study import AdaptationStudy, best_rate, edge_notes, make_parser, run_study, weight_bytes, worded
from cells import OutOfTimeError, Value
from mean import Mean
from page import Page
from result_folder import grid
from study_options import at_least_one, positive

from cotune.data.batches import EncodedExample
from cotune.errors import InputError
from cotune.evaluation.markup import Html, bullets, figure
from cotune.evaluation.measured_memory import peak_bytes, run_measured
from cotune.evaluation.report import Section
from cotune.evaluation.svg import INK, render_svg, series_colour
from cotune.models.backbone import Backbone
from cotune.tuning.adaptations import ADAPTATIONS, AdaptationOptions
from cotune.tuning.estimators import BackPropagation, Estimator, ForwardGradient, ZerothOrder
from cotune.tuning.loop import LoopConfig, LoopProgress
from cotune.tuning.tune import TuneConfig, tune

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "survey_combinations"
WHAT = ("full", "lora", "adapter", "soft_prompt", "bias")
BITS = (32, 8, 4)
MEMORY_STEPS = 3
CHILD_TIMEOUT_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class How:
    """A way to update.

    Attributes:
        estimator: of gradients.
        gradient_checkpointing: layers are computed again in the backward pass.
        rate: the estimator's own learning rate; None for that of what is tuned.
        same_course_as: a way with the same gradients, so with the same learning rate.
    """

    estimator: Estimator
    gradient_checkpointing: bool = False
    rate: float | None = None
    same_course_as: str | None = None


HOW: dict[str, How] = {
    "backprop": How(estimator=BackPropagation()),
    "checkpointing": How(estimator=BackPropagation(), gradient_checkpointing=True, same_course_as="backprop"),
    "zeroth_order": How(estimator=ZerothOrder(), rate=ZerothOrder.learning_rate),
    "forward_gradient": How(estimator=ForwardGradient(), rate=ForwardGradient.learning_rate),
}


@dataclass(frozen=True, kw_only=True, order=True)
class Combination:
    """One choice on each axis.

    Example:
        >>> str(Combination(what="lora", how="backprop", bits=4))
        'lora, backprop, 4 bit'
    """

    what: str
    how: str
    bits: int

    @property
    def base_bits(self) -> int | None:
        """As `Backbone.from_pretrained` takes it."""
        return None if self.bits == 32 else self.bits

    def __str__(self) -> str:
        return f"{self.what}, {self.how}, {self.bits} bit"


REFERENCE = Combination(what="full", how="backprop", bits=32)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two choices that differ from a start in one thing each, and the combination that has both.

    Attributes:
        start, first, second, both: combinations.
        alone: bytes that each saves alone.
        together: bytes that both save.
    """

    start: Combination
    first: Combination
    second: Combination
    both: Combination
    alone: tuple[float, float]
    together: float

    @property
    def share(self) -> float:
        """What both save together, of the sum of what they save alone: 1 if they add up."""
        return self.together / sum(self.alone)

    @property
    def gain(self) -> float:
        """Bytes that both save beyond the better one alone."""
        return self.together - max(self.alone)

    @property
    def kind(self) -> str:
        """What is combined, whatever is tuned."""
        return f"{self.both.how} with {'fewer numbers' if self.both.bits == 32 else f'{self.both.bits} bit'}"

    @property
    def name(self) -> str:
        """What is combined, and from where."""
        changed = [
            f"{getattr(one, axis)}{' bit' if axis == 'bits' else ''}"
            for one in (self.first, self.second)
            for axis in ("what", "how", "bits")
            if getattr(one, axis) != getattr(self.start, axis)
        ]
        return f"{' with '.join(changed)} (from {self.start})"


def pairs_of(whole: Mapping[Combination, float]) -> list[Pair]:
    """Every pair of choices that save memory alone and were measured together.

    Args:
        whole: bytes of each combination, weights and peak above them. Pairs of what and how start from full
            back-propagation; those of how and bits from back-propagation of the same what on whole weights, because
            low-bit weights are never tuned themselves.

    Example:
        >>> c = lambda what, how: Combination(what=what, how=how, bits=32)
        >>> at = {c("full", "backprop"): 10.0, c("lora", "backprop"): 6.0, c("full", "checkpointing"): 8.0}
        >>> [pair.share for pair in pairs_of({**at, c("lora", "checkpointing"): 4.0})]
        [1.0]
    """
    found = []
    for both in whole:
        starts = (
            [
                (
                    REFERENCE,
                    Combination(what=both.what, how="backprop", bits=32),
                    Combination(what="full", how=both.how, bits=32),
                )
            ]
            if both.bits == 32
            else [
                (
                    Combination(what=both.what, how="backprop", bits=32),
                    Combination(what=both.what, how=both.how, bits=32),
                    Combination(what=both.what, how="backprop", bits=both.bits),
                )
            ]
        )
        for start, first, second in starts:
            if len({start, first, second, both}) < 4 or not {start, first, second} <= whole.keys():
                continue
            alone = whole[start] - whole[first], whole[start] - whole[second]
            if min(alone) > 0:
                together = whole[start] - whole[both]
                found.append(Pair(start=start, first=first, second=second, both=both, alone=alone, together=together))
    return found


def paragraph(pairs: Sequence[Pair], percent: float) -> str:
    """Which pairs add up, in words, by kind; the table has each.

    Args:
        pairs: from `pairs_of`.
        percent: of the sum of what they save alone that both have to save together.
    """
    if not pairs:
        return "No pair of choices that save memory alone was measured together."
    kinds: dict[str, list[int]] = {}
    for pair in sorted(pairs, key=lambda pair: -pair.share):
        kinds.setdefault(pair.kind, []).append(round(100 * pair.share))
    num_adding = sum(100 * pair.share >= percent for pair in pairs)
    num_useless = sum(pair.gain <= 0 for pair in pairs)
    told = (
        f"{kind} {shares[0]} %" if shares[0] == shares[-1] else f"{kind} {shares[-1]} to {shares[0]} %"
        for kind, shares in kinds.items()
    )
    return (
        f"Of {len(pairs)} pairs that save memory alone, {num_adding} save together at least {percent:g} % of what "
        f"they save alone: {'; '.join(told)}. {num_useless or 'None'} of them gain nothing over the better one alone."
    )


def parser() -> argparse.ArgumentParser:
    """Of this command."""
    made = make_parser(NAME, __doc__ or "")
    made.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT), help="(default: all)")
    made.add_argument("--how", nargs="+", choices=HOW, default=list(HOW), help="(default: all)")
    made.add_argument("--bits", type=int, nargs="+", choices=BITS, default=list(BITS), help="(default: all)")
    made.add_argument("--epochs", type=at_least_one, default=2, help="the same for all (default: %(default)s)")
    made.add_argument(
        "--memory-length", type=at_least_one, default=256, help="tokens of a text there (default: %(default)s)"
    )
    made.add_argument(
        "--rate-factors",
        type=positive,
        nargs="+",
        default=[0.03, 0.3, 1.0, 3.0, 10.0],
        help="searched for what and how on whole weights, times the product's own rate (default: %(default)s)",
    )
    made.add_argument(
        "--adds-up", type=positive, default=90.0, help="per cent of the sum of savings alone (default: %(default)s)"
    )
    made.add_argument("--child", nargs=3, metavar=("WHAT", "HOW", "BITS"), help=argparse.SUPPRESS)
    return made


def tune_config(one: Combination, *, rate: float, epochs: int, num_batch_sequences: int, seed: int) -> TuneConfig:
    """What `tune` takes for this combination."""
    return TuneConfig(
        what=ADAPTATIONS[one.what].make(AdaptationOptions()),
        loop=LoopConfig(epochs=epochs, learning_rate=rate),
        num_batch_sequences=num_batch_sequences,
        gradient_checkpointing=HOW[one.how].gradient_checkpointing,
        seed=seed,
    )


def own_rate(what: str, how: str) -> float:
    """The product's own learning rate, around which is searched."""
    return HOW[how].rate or ADAPTATIONS[what].learning_rate


def measure_memory(one: Combination, args: argparse.Namespace) -> Value:
    """Bytes above the weights while a few steps are tuned, in this process; and those of the weights."""
    backbone = Backbone.from_pretrained(args.model, dtype=args.dtype, device=args.device, base_bits=one.base_bits)
    room = backbone.spec.max_context - ADAPTATIONS[one.what].num_virtual_tokens(AdaptationOptions())
    length = min(args.memory_length, room)

    def work(num_texts: int, num_tokens: int) -> None:
        ids = np.random.default_rng(0).integers(0, backbone.spec.vocab_size, (num_texts, num_tokens + 1))
        config = tune_config(one, rate=1e-5, epochs=1, num_batch_sequences=args.batch_size, seed=0)
        tune(backbone, [EncodedExample(row, 1) for row in ids], config, estimator=HOW[one.how].estimator)

    # What is loaded at the first use of anything must not count.
    work(1, 4)
    above = peak_bytes(lambda: work(MEMORY_STEPS * args.batch_size, length - 1), args.device)
    return {"above_bytes": above, "weight_bytes": weight_bytes(backbone.model), "length": length}


class Runs:
    """The cells of this study."""

    def __init__(self, study: AdaptationStudy) -> None:
        self.study = study

    def rates(self, what: str, how: str) -> list[float]:
        """That are searched."""
        return [own_rate(what, how) * factor for factor in self.study.args.rate_factors]

    def search(self, what: str, how: str) -> dict[float, float | None]:
        """Held-out nats per token by learning rate, on whole weights, seed 0; None where it diverged."""
        train, judges = self.study.selection()
        one = Combination(what=what, how=HOW[how].same_course_as or how, bits=32)
        found = {}
        for rate in self.rates(what, how):
            value = self._quality(one, rate, 0, "search", train, judges)
            found[rate] = None if value["diverged"] else value["nats"]
        return found

    def final(self, one: Combination, rate: float) -> list[Value]:
        """On all training texts, judged on the test texts; one for each seed."""
        study = self.study
        return [self._quality(one, rate, seed, "final", study.train, study.test) for seed in study.seeds()]

    def memory(self, one: Combination) -> Value:
        """From a child process."""
        args = self.study.args

        def run() -> Value:
            options = ["--model", args.model, "--dtype", args.dtype, "--device", args.device]
            options += ["--threads", str(args.threads), "--batch-size", str(args.batch_size)]
            options += ["--memory-length", str(args.memory_length), "--child", one.what, one.how, str(one.bits)]
            return run_measured([str(Path(__file__)), *options], timeout_s=CHILD_TIMEOUT_S)

        return self.study.cell({**_key(one), "measured": "memory", "memory_length": args.memory_length}, run)

    def _quality(
        self, one: Combination, rate: float, seed: int, measured: str, train: Sequence[Any], judges: Sequence[Any]
    ) -> Value:
        args = self.study.args
        # Outside of the cell: what cannot be had here may be had elsewhere.
        backbone = self.study.backbone(one.base_bits)

        def run() -> Value:
            room = ADAPTATIONS[one.what].num_virtual_tokens(AdaptationOptions())
            config = tune_config(one, rate=rate, epochs=args.epochs, num_batch_sequences=args.batch_size, seed=seed)
            ends_s: list[tuple[int, float]] = []

            def tell(progress: LoopProgress) -> None:
                ends_s.append((progress.epoch, progress.elapsed_s))

            result = tune(
                backbone,
                self.study.encode(train, room),
                config,
                estimator=HOW[one.how].estimator,
                heldout=self.study.encode(judges, room),
                progress=tell,
            )
            return {
                "base_nats": result.curve[0].heldout_loss,
                "nats": result.curve[-1].heldout_loss,
                "num_steps": result.curve[-1].num_steps,
                "num_trained": result.num_trained,
                "step_s": step_seconds(ends_s),
            }

        key = {**_key(one), "measured": measured, "learning_rate": rate, "seed": seed, "epochs": args.epochs}
        return self.study.cell(key, run)


def step_seconds(ends_s: Sequence[tuple[int, float]]) -> float | None:
    """The median time from one step's end to the next one's in the same epoch; between epochs texts are judged.

    Args:
        ends_s: epoch and seconds since the start at the end of each step.

    Example:
        >>> step_seconds([(1, 1.0), (1, 3.0), (2, 9.0), (2, 11.0)])
        2.0
    """
    taken = [b - a for (before, a), (epoch, b) in pairwise(ends_s) if before == epoch]
    return median(taken) if taken else None


def _key(one: Combination) -> dict[str, Any]:
    return {"what": one.what, "how": one.how, "bits": one.bits}


def summarise(memory: Value, runs: Sequence[Value]) -> dict[str, Any]:
    """A row of the table."""
    times = [run["step_s"] for run in runs if run["step_s"] is not None]
    return {
        "weight_mb": memory["weight_bytes"] / 1e6,
        "above_mb": memory["above_bytes"] / 1e6,
        "whole_mb": (memory["weight_bytes"] + memory["above_bytes"]) / 1e6,
        "nats": Mean.of([run["nats"] for run in runs]),
        "base_nats": Mean.of([run["base_nats"] for run in runs]),
        "step_s": median(times) if times else None,
        "num_trained": runs[0]["num_trained"],
    }


def plot_trade(rows: Mapping[Combination, Mapping[str, Any]]) -> Html:
    """Memory against quality: colours are how, the height tells what, the size of the mark the bits."""
    described = "Points of megabytes, weights and peak above them, against held-out nats per token. " + " ".join(
        f"{one}: {row['nats'].mean:.3f} at {row['whole_mb']:.0f} MB." for one, row in rows.items()
    )
    hows = [how for how in HOW if any(one.how == how for one in rows)]
    sizes = {32: 60, 8: 34, 4: 16}

    def draw(axes: Axes) -> None:
        for index, how in enumerate(hows):
            chosen = {one: row for one, row in rows.items() if one.how == how}
            axes.scatter(
                [row["whole_mb"] for row in chosen.values()],
                [row["nats"].mean for row in chosen.values()],
                s=[sizes[one.bits] for one in chosen],
                color=series_colour(index),
                label=how,
            )
            # Bits and checkpoints move a mark sideways: what is tuned is said once, where the marks lie farthest apart.
            named = {one: row for one, row in chosen.items() if how == hows[0] and one.bits == 32}
            for one, row in named.items():
                axes.annotate(
                    one.what,
                    (row["whole_mb"], row["nats"].mean),
                    xytext=(5, 6),
                    textcoords="offset points",
                    fontsize=8,
                    color=INK,
                )
        axes.set_xlabel("MB at the peak, weights included")
        axes.set_ylabel("held-out nats per token")
        axes.figure.legend(loc="outside lower left", ncols=2)

    caption = (
        f"Means over seeds; larger marks are weights of more bits, words say what {hows[0]} tunes. "
        "Left and low is best."
    )
    return figure(render_svg("trade", described, 4.2, draw), caption)


def build(study: AdaptationStudy) -> Page:
    """Measure what is missing and show what there is."""
    args, runs = study.args, Runs(study)
    rows: dict[Combination, dict[str, Any]] = {}
    rates: dict[str, float] = {}
    searched: dict[str, dict[float, float | None]] = {}
    refused: dict[Combination, str] = {}
    unfinished = []
    for bits, what, how in product(args.bits, args.what, args.how):
        one = Combination(what=what, how=how, bits=bits)
        try:
            # Cheap, and refused where the product does not have it, before any search.
            study.backbone(one.base_bits)
            refuse_early(study, one)
            found = runs.search(what, how)
            rate = best_rate(found)
            searched[f"{what}, {how}"], rates[f"{what}, {how}"] = found, rate
            values = runs.final(one, rate)
            if any(value["diverged"] for value in values):
                raise InputError(f"a run diverged at the best learning rate of seed 0, {rate:g}")
            rows[one] = summarise(runs.memory(one), values)
        except InputError as error:
            refused[one] = str(error)
        except OutOfTimeError:
            unfinished.append(str(one))
    if not rows and unfinished:
        raise OutOfTimeError("the budget is spent before any combination is finished; run again to go on")
    pairs = pairs_of({one: row["whole_mb"] for one, row in rows.items()})
    said = paragraph(pairs, args.adds_up)
    names = [str(one) for one in rows]
    columns = {
        "weights, MB": [f"{row['weight_mb']:.1f}" for row in rows.values()],
        "peak above, MB": [f"{row['above_mb']:.1f}" for row in rows.values()],
        "nats per token": [worded(row["nats"]) for row in rows.values()],
        "before": [worded(row["base_nats"]) for row in rows.values()],
        "s a step": ["-" if row["step_s"] is None else f"{row['step_s']:.3f}" for row in rows.values()],
        "trained numbers": [f"{row['num_trained']:,}" for row in rows.values()],
    }
    of_pairs = {
        "first alone, MB": [f"{pair.alone[0]:.1f}" for pair in pairs],
        "second alone, MB": [f"{pair.alone[1]:.1f}" for pair in pairs],
        "together, MB": [f"{pair.together:.1f}" for pair in pairs],
        "of the sum, %": [f"{100 * pair.share:.0f}" for pair in pairs],
        "over the better one, MB": [f"{pair.gain:.1f}" for pair in pairs],
    }
    sections = []
    if rows:
        content = Html(plot_trade(rows) + grid("Each combination", "what, how, bits", names, columns))
        sections.append(Section(name="all", short="All", heading="Memory, quality, time", content=content))
    if pairs:
        content = Html(bullets([said]) + grid("Memory saved", "pair", [pair.name for pair in pairs], of_pairs))
        sections.append(Section(name="pairs", short="Pairs", heading="What adds up", content=content))
    if refused:
        by_reason: dict[str, list[str]] = {}
        for one, reason in refused.items():
            by_reason.setdefault(reason, []).append(str(one))
        named = ["; ".join(those) for those in by_reason.values()]
        content = grid("What the product said", "what, how, bits", named, {"reason": list(by_reason)})
        sections.append(Section(name="refused", short="Refused", heading="Not run", content=content))
    return Page(
        title="What is tuned x how x bits: what adds up",
        lead=said,
        expected={"arXiv 2408.10691": "combinations of the methods are named as a direction, without numbers"},
        measured={
            "combinations": {str(one): row for one, row in rows.items()},
            "pairs": [
                {"name": p.name, "alone_mb": p.alone, "together_mb": p.together, "share": p.share} for p in pairs
            ],
            "said": said,
            "rates": rates,
            "search": searched,
            "refused": {str(one): reason for one, reason in refused.items()},
        },
        sections=sections,
        deviations=[
            *edge_notes(rates, {name: list(found) for name, found in searched.items()}),
            f"Every combination sees each text {args.epochs} times: few for methods without gradients, which are made "
            "for many more steps. Low-bit combinations take the learning rate of whole weights.",
            "What is tuned and bits make no pair of their own, as low-bit weights are never tuned themselves: what "
            "bits save alone is seen with the same parameters tuned, against how these are updated.",
            f"Memory is that of {MEMORY_STEPS} steps of {args.batch_size} random texts of {args.memory_length} tokens "
            "(fewer where the context ends), in a child process after the same on one short text.",
        ],
        lines=[
            *(
                f"{one!s:36s} {row['weight_mb']:.1f} + {row['above_mb']:.1f} MB, {worded(row['nats'])} nats"
                for one, row in rows.items()
            ),
            *(f"{one!s:36s} not run: {reason}" for one, reason in refused.items()),
            said,
        ],
        unfinished=unfinished,
    )


def refuse_early(study: AdaptationStudy, one: Combination) -> None:
    """Make what would be tuned, which is where the product refuses.

    Raises:
        InputError: what is tuned does not go with these weights.
    """
    what = ADAPTATIONS[one.what].make(AdaptationOptions())
    what.fresh(study.backbone(one.base_bits), study.encode(study.train[:1]), seed=0)


def main() -> None:
    """Entry point."""
    options = parser()
    args = options.parse_args()
    if args.child is None:
        run_study(NAME, options, build)
        return
    import torch

    torch.set_num_threads(args.threads)
    what, how, bits = args.child
    print(json.dumps(measure_memory(Combination(what=what, how=how, bits=int(bits)), args)))


if __name__ == "__main__":
    main()
