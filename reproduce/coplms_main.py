"""Co-tuning compared: Co-PLMs as reconstructed, ours, and the other methods, at equal compute and by their bytes.

Questions of made-up domains tell apart what a device learnt from its own texts, what crossed from other devices'
texts, which it never had, and what is a skill that all share. Every method but the bounds takes as many steps as make
its devices and its cloud compute as much as ours do in a round, counted in tokens times parameters, and has its own
best learning rate; bytes are those of whole messages, and the proxy's download is told beside them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptation_study import edge_notes
from cells import OutOfTimeError, Value
from coplms_contest import (
    ABLATIONS,
    ASKING,
    BESIDE,
    BESIDE_BY_DOMAIN,
    BOTH,
    BOUNDS,
    BY_DOMAIN,
    CODED,
    EQUAL,
    METHODS,
    OURS,
    PROTOCOL,
    REHEARSING,
    REHEARSING_BY_DOMAIN,
    STANDALONE,
    UNPUBLISHED,
    VARIANTS,
    ZERO_SHOT,
    CoPlmsStudy,
    make_parser,
    options,
    total_bytes,
)
from coplms_memory import measured_peak
from coplms_models import CLOUD, FAMILIES, PROXY
from coplms_texts import CROSSED, MAX_SEEDS, MIXED, OWN, SETS, SKILLS
from lora_init import plots_of
from mean import Mean
from page import Page, about_run
from result_folder import Point, grid, plot_groups
from study_options import plain_endings, results_of

from cotune.errors import CotuneError, InputError
from cotune.evaluation.markup import Html, bullets, join
from cotune.evaluation.report import Section
from cotune.federation.comparison.co_tuned import CoTuned

NAME = "coplms_main"
MARGINS = {"rouge_l": 5.38, "em": 4.88}
METRICS = {"em": "EM", "rouge_l": "Rouge-L", "bits": "bits per byte"}
EXPECTED = {
    "Co-PLMs, arXiv 2511.11678, abstract": "on average 5.38 % in Rouge-L and 4.88 % in EM above the best of others",
    "issue 8": "more than that above the best baseline at equal compute and bytes, for the cloud's model and every "
    "device; at most 1.5 MB per device and round at a 0.5B-like proxy",
}
_GOALS = (
    f"The goal: {MARGINS['em']} % more exact match and {MARGINS['rouge_l']} % more Rouge-L than the best other method, "
    "and fewer bits per byte, with an interval of the difference over seeds that leaves out 0.",
    "A star marks what nobody published, made for this study of parts of ours; it stands where it is better than all "
    "that was published.",
)
DEVICES = "devices"
BARS = 5
WORDS = {OWN: "own domain", CROSSED: "crossed", SKILLS: "skills", MIXED: "sums"}


def parser() -> argparse.ArgumentParser:
    """Of this command."""
    made = make_parser(
        NAME,
        __doc__ or "",
        examples=(
            "--budget-minutes 30",
            "--size toy --devices 3 --seeds 1 --side-seeds 1 --rounds 1 --local-steps 2 --cloud-steps 1",
            "--models my-models --devices 3",
            "--data-root data --datasets trec babi arc_easy --school dailydialog cola --max-tokens 128",
        ),
    )
    made.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="(default: all)")
    made.add_argument("--ablations", nargs="*", choices=ABLATIONS, default=list(ABLATIONS), help="(default: all)")
    made.add_argument(
        "--measure-memory", action="store_true", help="of a device, in processes of their own; on Linux, or on CUDA"
    )
    return made


# What cells say.


def score(value: Value, who: str, name: str, metric: str) -> float | None:
    """Of one run.

    Args:
        who: `devices`, the mean over them; `cloud`, `proxy`, or a device.
        name: the set of questions.
        metric: em, rouge_l or bits.
    """
    chosen = [own for one, own in value["parties"].items() if (one == who or (who == DEVICES and _is_device(one)))]
    told = [own[name][metric] for own in chosen if name in own]
    return sum(told) / len(told) if told else None


def _is_device(name: str) -> bool:
    return name not in (CLOUD, PROXY)


def over_sets(value: Value, who: str, metric: str) -> float:
    """The mean over all sets of questions that were asked."""
    told = [one for one in (score(value, who, name, metric) for name in SETS) if one is not None]
    return sum(told) / len(told)


def mean_of(values: Sequence[Value], read: Callable[[Value], float | None]) -> Mean | None:
    """Over seeds; None where there is nothing."""
    told = [one for one in map(read, values) if one is not None]
    return Mean.of(told) if told else None


def worded(mean: Mean | None, digits: int = 2, times: float = 1.0) -> str:
    """A mean with half of its interval."""
    if mean is None:
        return "-"
    low, high = (None if one is None else one * times for one in (mean.low, mean.high))
    return Mean(mean=mean.mean * times, low=low, high=high, num=mean.num).worded(digits)


def em_over_sets(values: Sequence[Value], who: str) -> str:
    """In per cent, in words."""
    return worded(mean_of(values, lambda one: over_sets(one, who, "em")), 1, 100)


def bits_within(value: Value, num_bytes: float, who: str) -> float | None:
    """Bits per byte after the last round that costs at most so much; None where no round does."""
    paid = [one for number, one in enumerate(value["curve"]) if number and total_bytes(one) <= num_bytes]
    return None if not paid else bits_at(paid[-1], who)


def bits_at(point: Mapping[str, Any], who: str) -> float:
    """Of a point of a curve: the mean over devices, or one party's."""
    told = [bits for one, bits in point["bits"].items() if one == who or (who == DEVICES and _is_device(one))]
    return sum(told) / len(told)


def relative(ours: float, theirs: float) -> float | None:
    """In per cent of theirs; None where that is 0.

    Example:
        >>> round(relative(0.42, 0.40), 6), relative(0.1, 0.0)
        (5.0, None)
    """
    return 100 * (ours / theirs - 1) if theirs > 0 else None


@dataclass(frozen=True, kw_only=True)
class Margin:
    """Ours over one other method.

    Attributes:
        where: in words.
        metric: em, rouge_l or bits.
        own, other: the two methods.
        ours, theirs: means over seeds, 0 to 1, or bits per byte.
        gain: ours less theirs, seed by seed.
        is_best_published: among all that were published; else the best of all, which was made for this study.
    """

    where: str
    metric: str
    own: str
    other: str
    ours: Mean
    theirs: Mean
    gain: Mean
    is_best_published: bool

    @property
    def share(self) -> float | None:
        """In per cent of theirs."""
        return relative(self.ours.mean, self.theirs.mean)

    @property
    def is_reached(self) -> bool:
        """Whether ours is better by more than the goal's margin, or by anything in bits, told apart."""
        if self.metric == "bits":
            return (self.gain.high or 0) < 0
        return self.share is not None and self.share > MARGINS[self.metric] and (self.gain.low or 0) > 0

    @property
    def row(self) -> str:
        """What it is of, in words."""
        return f"{self.where}, {METRICS[self.metric]}: {self.own}"

    def value(self, mean: Mean) -> str:
        """In per cent, or bits per byte."""
        return worded(mean, 3) if self.metric == "bits" else f"{worded(mean, 1, 100)} %"

    @property
    def sentence(self) -> str:
        """All of it."""
        whom = "the best other method" if self.is_best_published else "the best of what was made for this study"
        goal = "" if self.metric == "bits" else f"the margin of {MARGINS[self.metric]} % "
        return (
            f"{self.row} {self.value(self.ours)}, {whom} ({self.other}) {self.value(self.theirs)}; "
            f"{'' if self.share is None else f'{self.share:+.1f} % relative, '}{told_apart(self.gain)}; "
            f"{goal}{'is reached' if self.is_reached else 'is not reached'}."
        )


def margins(rows: Mapping[str, Sequence[Value]]) -> list[Margin]:
    """Ours against the best published method and, where that is better, the best of what was made for this study: on
    devices, on each, and in the cloud.

    Args:
        rows: by method the runs of all seeds, with one number of devices; of equal compute or less, and of equal
            bytes or less where they shall be.
    """
    # Alone with fewer steps is a rival too, as more of them may be too many.
    rivals = [name for name in rows if name not in (*VARIANTS, *BOUNDS)]
    found: list[Margin] = []
    for own in (name for name in VARIANTS if name in rows and rivals):
        devices = sorted(filter(_is_device, rows[own][0]["parties"]))
        asked = [(DEVICES, "On devices", metric) for metric in METRICS]
        if len(devices) > 1:
            asked += [(one, f"On {one} ({family_of(one)})", "em") for one in devices]
        # The cloud's model is the same, whoever answers on devices.
        learns = next(name for name in rows if name in VARIANTS and rehearses(name) == rehearses(own))
        asked += [(CLOUD, "In the cloud", metric) for metric in METRICS if own == learns]
        for who, where, metric in asked:
            found += _margins_over(rows, rivals, own, who, where, metric)
    return found


def rehearses(variant: str) -> bool:
    """Whether this form of ours does, see `coplms_contest.REHEARSING`."""
    return variant in (REHEARSING, REHEARSING_BY_DOMAIN)


def family_of(device: str) -> str:
    """Of its own model, by the number in its name.

    Example:
        >>> family_of("device-1")
        'gpt2'
    """
    return list(FAMILIES)[int(device.rpartition("-")[2]) % len(FAMILIES)]


def _margins_over(
    rows: Mapping[str, Sequence[Value]], rivals: Sequence[str], own: str, who: str, where: str, metric: str
) -> list[Margin]:
    """Over the best published rival, and over the best one where that is another."""

    def read(one: Value) -> float:
        return bits_at(one["curve"][-1], who) if metric == "bits" else over_sets(one, who, metric)

    means = means_of(rows, (own, *rivals), read)
    better = (lambda name: -means[name].mean) if metric == "bits" else (lambda name: means[name].mean)
    best = max((name for name in rivals if published(name)), key=better, default=None)
    every = max(rivals, key=better)
    return [
        Margin(
            where=where,
            metric=metric,
            own=own,
            other=other,
            ours=means[own],
            theirs=means[other],
            gain=less_of(rows, own, other, read),
            is_best_published=other == best,
        )
        for other in dict.fromkeys([best, every])
        if other is not None
    ]


def published(name: str) -> bool:
    """Whether somebody published the method, perhaps run with fewer rounds here."""
    return not any(name == one or name.startswith(f"{one}, ") for one in UNPUBLISHED)


def means_of(
    rows: Mapping[str, Sequence[Value]], names: Sequence[str], read: Callable[[Value], float]
) -> dict[str, Mean]:
    """Of some methods, over seeds."""
    return {name: Mean.of([read(value) for value in rows[name]]) for name in names}


def less_of(rows: Mapping[str, Sequence[Value]], own: str, other: str, read: Callable[[Value], float]) -> Mean:
    """Of a method less another one, over seeds."""
    return Mean.of([read(a) - read(b) for a, b in zip(rows[own], rows[other], strict=True)])


def told_apart(difference: Mean) -> str:
    """Whether its interval leaves out 0."""
    is_told = difference.low is not None and difference.high is not None and difference.low * difference.high > 0
    seeds = f"{difference.num} seed{'s' if difference.num > 1 else ''}"
    return f"{'told apart' if is_told else 'not told apart'} with {seeds}"


# The page.


class Results:
    """What is finished, by number of devices and method."""

    def __init__(self, study: CoPlmsStudy) -> None:
        self.study = study
        self.runs: dict[int, dict[str, list[Value]]] = {}
        self.shorter: dict[str, list[Value]] = {}
        self.ablations: dict[str, list[Value]] = {}
        self.factors: dict[str, tuple[float, float]] = {}
        self.rates: dict[str, float] = {}
        self.searched: dict[str, dict[float, float | None]] = {}
        self.peaks: dict[str, float] = {}
        self.refused: dict[str, str] = {}
        self.unfinished: list[str] = []

    def fill(self) -> None:
        """Measure what is missing."""
        args = self.study.args
        first = args.devices[0]
        for num in args.devices:
            for name in args.methods:
                seeds = args.seeds if num == first else args.side_seeds
                what = f"{name}, {num} devices"
                if found := self._seeds(what, seeds, lambda s, a=name, b=num: self.study.run(a, b, s)):
                    self.runs.setdefault(num, {})[name] = found
                    if num == first:
                        self._tell(name)
            if num == first:
                self._fill_paid(first)
                for name in args.ablations:
                    what = f"ablation {name}"
                    if found := self._seeds(what, args.side_seeds, lambda s, a=name: self.study.ablate(a, first, s)):
                        self.ablations[name] = found

    def _fill_paid(self, num: int) -> None:
        """The methods that send more than ours again, with the rounds that its bytes pay for."""
        for name in self.runs.get(num, {}) if OURS in self.runs.get(num, {}) else ():
            if name in VARIANTS:
                continue
            paid = self.study.paid_rounds(name, num)
            if paid is None:
                continue
            what = f"{name}, {paid} round{'s' if paid > 1 else ''}"
            if runs := self._seeds(what, self.study.args.seeds, lambda s, a=name, b=paid: self.study.run(a, num, s, b)):
                self.shorter[what] = runs
                self.factors[what] = self.study.factors(name, num, paid)
                self.searched[what] = self.study.search(name, paid)
                self.rates[what] = self.study.rate_factor(name, paid)

    def at_equal_bytes(self) -> dict[str, list[Value]]:
        """With the first number of devices, what costs no more bytes than ours; the rest with fewer rounds."""
        rows = self.runs.get(self.study.args.devices[0], {})
        if OURS not in rows:
            return {}
        most = max(total_bytes(one) for one in rows[OURS])
        return {name: v for name, v in rows.items() if name in VARIANTS or total_bytes(v[0]) <= most} | self.shorter

    def _tell(self, name: str) -> None:
        """At which steps and learning rate a method ran with the first number of devices, and its memory."""
        self.factors[name] = self.study.factors(name, self.study.args.devices[0])
        self.rates[name] = self.study.rate_factor(name)
        if name == ZERO_SHOT:
            return
        self.searched[name] = self.study.search(name)
        if self.study.args.measure_memory:
            try:
                key = {"what": "memory", "method": name}
                measured = self.study.cell(key, lambda: measured_peak(self.study.args, self.study.folder, name))
                self.peaks[name] = measured["peak_bytes"] / 1e6
            except OutOfTimeError:
                self.unfinished.append(f"memory of {name}")
            except CotuneError as error:
                self.refused[f"memory of {name}"] = str(error)

    def _seeds(self, what: str, num: int, run: Callable[[int], Value]) -> list[Value]:
        found = []
        try:
            for seed in range(num):
                value = run(seed)
                if value["diverged"]:
                    raise InputError("a loss was nan or inf; lower the learning rates")
                found.append(value)
        except OutOfTimeError:
            self.unfinished.append(what)
        except CotuneError as error:
            self.refused[what] = str(error)
        return found if len(found) == num else []


def margin_grids(what: str, found: Sequence[Margin]) -> list[Html]:
    """Ours beside the best other method, line by line; a table for each way in which ours answers."""
    return [
        grid(
            f"{what}: {own}",
            "",
            [f"{one.where}, {METRICS[one.metric]}" for one in rows],
            {
                "ours": [one.value(one.ours) for one in rows],
                "the best other": [one.other + "*" * (not one.is_best_published) for one in rows],
                "has": [one.value(one.theirs) for one in rows],
                "more by": ["-" if one.share is None else f"{one.share:+.1f} %" for one in rows],
                "difference": [one.value(one.gain) for one in rows],
                "goal": ["reached" if one.is_reached else "no" for one in rows],
            },
        )
        for own in dict.fromkeys(one.own for one in found)
        for rows in [[one for one in found if one.own == own]]
    ]


def quality_grid(caption: str, head: str, rows: Mapping[str, Sequence[Value]], who: str) -> Html:
    """EM by set, Rouge-L over all, and bits per byte after the last round."""

    def em(name: str) -> list[str]:
        return [worded(mean_of(v, lambda one: score(one, who, name, "em")), 1, 100) for v in rows.values()]

    return grid(
        caption,
        head,
        list(rows),
        {
            **{f"{WORDS[name]}, EM %": em(name) for name in SETS if who == DEVICES or name != OWN},
            "all, EM %": [em_over_sets(v, who) for v in rows.values()],
            "all, Rouge-L %": [
                worded(mean_of(v, lambda one: over_sets(one, who, "rouge_l")), 1, 100) for v in rows.values()
            ],
            "bits per byte": [worded(mean_of(v, lambda one: bits_at(one["curve"][-1], who)), 3) for v in rows.values()],
        },
    )


def cost_grid(rows: Mapping[str, Sequence[Value]], head: str, peaks: Mapping[str, float] | None = None) -> Html:
    """What a device, and the cloud, spent on the whole run.

    Args:
        peaks: MB that a device's round took at most, by method, where it was measured.
    """
    measured = [f"{peaks[name]:.1f}" if name in peaks else "-" for name in rows] if peaks else []

    def column(name: str, digits: int, times: float = 1.0) -> list[str]:
        return [worded(mean_of(v, lambda one: one[name]), digits, times) for v in rows.values()]

    return grid(
        "What it cost: one device, and the cloud, over all rounds; memory held for weights, gradients and optimiser "
        "state" + ", and the peak of a round" * bool(measured),
        head,
        list(rows),
        {
            "up, kB": column("up", 1, 1e-3),
            "down, kB": column("down", 1, 1e-3),
            "proxy once, kB": column("download", 0, 1e-3),
            "device, GFLOP": column("gflop", 2),
            "cloud, GFLOP": column("cloud_gflop", 2),
            "held, MB": column("held_mb", 2),
            **({"peak, MB": measured} if measured else {}),
            "device, s": column("device_s", 1),
            "cloud, s": column("cloud_s", 1),
        },
    )


def devices_section(num: int, rows: Mapping[str, Sequence[Value]], peaks: Mapping[str, float]) -> Section:
    """All methods with one number of devices; `peaks` as for `cost_grid`."""
    content = [
        quality_grid("On devices, means over devices and seeds", "method", rows, DEVICES),
        *bars_of(num, rows),
        quality_grid("The cloud's model, which has texts of no domain", "method", rows, CLOUD),
    ]
    with_proxy = {name: v for name, v in rows.items() if PROXY in v[0]["parties"]}
    if with_proxy:
        content.append(quality_grid("The proxy with what travels", "method", with_proxy, PROXY))
    content += [cost_grid(rows, "method", peaks), bytes_part(num, rows)]
    heading = f"{num} device{'s' if num > 1 else ''}"
    return Section(name=f"devices-{num}", short=heading, heading=heading, content=join(content))


def bars_of(num: int, rows: Mapping[str, Sequence[Value]]) -> list[Html]:
    """Exact match by set of questions, so many methods in a plot that their names can be read."""
    sets = [name for name in SETS if num > 1 or name != CROSSED]
    parts = [list(rows)[begin : begin + BARS] for begin in range(0, len(rows), BARS)]

    def bar(name: str, asked: str) -> Point | None:
        mean = mean_of(rows[name], lambda one: _percent(score(one, DEVICES, asked, "em")))
        return None if mean is None else mean.point()

    return [
        plot_groups(
            f"em_{num}_{number}",
            "Exact match on devices by set of questions.",
            part,
            {WORDS[asked]: [bar(name, asked) for name in part] for asked in sets},
            y_label="EM, %",
        )
        for number, part in enumerate(parts)
    ]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def bytes_part(num: int, rows: Mapping[str, Sequence[Value]]) -> Html:
    """Bits per byte against what was sent, and within what ours sends."""
    curves = {
        name: [
            (
                Mean.of([total_bytes(v["curve"][number]) for v in values]).mean / 1e3,
                *Mean.of([bits_at(v["curve"][number], DEVICES) for v in values]).point()[1:],
            )
            for number in range(1, len(values[0]["curve"]))
        ]
        # Ours first, which then is in every plot.
        for name, values in sorted(rows.items(), key=lambda row: row[0] != OURS)
        if total_bytes(values[0])
    }
    parts = plots_of(
        f"bytes_{num}",
        "Bits per byte of held-out answers on devices, own, crossed and skills, round by round.",
        curves,
        x_label="kB of one device so far, the proxy's download too",
        y_label="bits per byte",
    )
    if OURS not in rows:
        return parts
    budget = Mean.of([total_bytes(one) for one in rows[OURS]]).mean

    def column(who: str) -> list[str]:
        return [worded(mean_of(v, lambda one: bits_within(one, budget, who)), 3) for v in rows.values()]

    told = grid(
        f"Within the bytes of ours, {budget / 1e3:,.0f} kB for a device: the last round that they pay for, - for none",
        "method",
        list(rows),
        {"devices, bits per byte": column(DEVICES), "cloud, bits per byte": column(CLOUD)},
    )
    return join([parts, told])


def equal_bytes_section(num: int, rows: Mapping[str, Sequence[Value]]) -> Section:
    """All methods with no more bytes than ours, those that send more with fewer rounds and more steps in each."""
    content = [
        quality_grid("On devices, means over devices and seeds", "method", rows, DEVICES),
        quality_grid("The cloud's model, which has texts of no domain", "method", rows, CLOUD),
        cost_grid(rows, "method"),
    ]
    heading = f"{num} devices, and no more bytes than ours"
    return Section(name="equal-bytes", short="Equal bytes", heading=heading, content=join(content))


def ablation_section(results: Results, num: int) -> Section:
    """Ours with one thing changed."""
    ours = results.runs.get(num, {}).get(OURS, [])[: results.study.args.side_seeds]
    rows = {**({OURS: ours} if ours else {}), **results.ablations}
    content = [
        quality_grid("On devices", "ours with", rows, DEVICES),
        quality_grid("The cloud's model", "ours with", rows, CLOUD),
        quality_grid("The proxy with what travels", "ours with", rows, PROXY),
        cost_grid(rows, "ours with"),
    ]
    return Section(name="ablations", short="Ablations", heading=f"Ablations, {num} devices", content=join(content))


def rates_section(results: Results) -> Section:
    """At which learning rate each method ran, and what the search said."""
    factors = sorted({one for found in results.searched.values() for one in found})

    def said(name: str, factor: float) -> str:
        found = results.searched.get(name, {})
        return "-" if factor not in found else "not finite" if (bits := found[factor]) is None else f"{bits:.3f}"

    content = grid(
        "Share of wrong answers to questions of the search, devices and the cloud alike, by multiples of all learning "
        "rates, - where it was not run; the multiple that is used, and those of the options' steps",
        "method",
        list(results.rates),
        {
            **{f"{factor:g}": [said(name, factor) for name in results.rates] for factor in factors},
            "used": [f"{one:g}" if name in results.searched else "-" for name, one in results.rates.items()],
            "steps of devices": [f"{results.factors[name][0]:.2f}" for name in results.rates],
            "steps of the cloud": [f"{results.factors[name][1]:.2f}" for name in results.rates],
        },
    )
    return Section(name="rates", short="Rates", heading="Learning rates and steps", content=content)


def build(study: CoPlmsStudy) -> Page:
    """Measure what is missing and show what there is."""
    args, results = study.args, Results(study)
    if max(args.seeds, args.side_seeds) > MAX_SEEDS or len(set(args.devices)) < len(args.devices):
        raise InputError(
            f"--seeds is {args.seeds}, --side-seeds {args.side_seeds} and --devices {args.devices}, expected at most "
            f"{MAX_SEEDS} seeds, as made models know none of their facts, and each number of devices once"
        )
    results.fill()
    if not results.runs:
        if results.unfinished:
            raise OutOfTimeError("the budget is spent before any method is finished; run again to go on")
        raise InputError(f"no method could be run: {next(iter(results.refused.values()), 'none was asked for')}")
    first = next(iter(results.runs))
    equal_bytes = results.at_equal_bytes()
    goals = {f"{num} device{'s' if num > 1 else ''}": margins(rows) for num, rows in results.runs.items()}
    if results.shorter:
        goals[f"{first} devices, and no more bytes than ours"] = margins(equal_bytes)
    # Where bytes are equal, too, if that was run.
    headline = [*goals][-1 if results.shorter else 0]
    said = {what: [one.sentence for one in own] for what, own in goals.items()}
    sections = [
        Section(
            name="goals",
            short="Goals",
            heading="Ours against the best other method at equal compute or less",
            content=join([bullets(_GOALS), *(part for what, own in goals.items() for part in margin_grids(what, own))]),
        ),
        *(devices_section(num, rows, results.peaks if num == first else {}) for num, rows in results.runs.items()),
    ]
    if results.shorter:
        sections.append(equal_bytes_section(first, equal_bytes))
    if results.ablations:
        sections.append(ablation_section(results, args.devices[0]))
    sections.append(rates_section(results))
    if results.refused:
        reasons = grid("What the product said", "what", list(results.refused), {"reason": [*results.refused.values()]})
        sections.append(Section(name="refused", short="Refused", heading="Not run", content=reasons))
    return Page(
        title="Co-tuning at equal compute, and by bytes",
        lead=" ".join(
            [
                f"With {headline}:",
                *(
                    one.sentence
                    for one in goals[headline]
                    if one.metric == "em" and one.where in ("On devices", "In the cloud") and one.is_best_published
                ),
            ]
        ),
        expected=EXPECTED,
        measured={
            "runs": {num: {name: _plain(v) for name, v in rows.items()} for num, rows in results.runs.items()},
            "ablations": {name: _plain(v) for name, v in results.ablations.items()},
            "summary": {num: {name: summarise(v) for name, v in rows.items()} for num, rows in results.runs.items()},
            "at_equal_bytes": {name: summarise(v) for name, v in equal_bytes.items()},
            "factors": results.factors,
            "rates": results.rates,
            "search": results.searched,
            "peaks_mb": results.peaks,
            "refused": results.refused,
            "said": said,
        },
        sections=sections,
        deviations=deviations(results),
        lines=[
            *(
                f"{num} devices, {name:26s} EM {em_over_sets(v, DEVICES)} %, cloud {em_over_sets(v, CLOUD)} %, "
                f"{total_bytes(v[0]) / 1e3:,.0f} kB, {v[0]['gflop']:.2f} GFLOP"
                for num, rows in results.runs.items()
                for name, v in rows.items()
            ),
            *(f"{what}: {reason}" for what, reason in results.refused.items()),
            *(f"{what}. {one.sentence}" for what, own in goals.items() for one in own if one.metric == "em"),
        ],
        unfinished=results.unfinished,
    )


def summarise(values: Sequence[Value]) -> dict[str, Any]:
    """Of one method: exact matches in per cent, and what a device sent and computed."""
    found: dict[str, Any] = {
        name: mean_of(values, lambda one, n=name: _percent(score(one, DEVICES, n, "em"))) for name in SETS
    }
    return {
        **found,
        DEVICES: mean_of(values, lambda one: _percent(over_sets(one, DEVICES, "em"))),
        CLOUD: mean_of(values, lambda one: _percent(over_sets(one, CLOUD, "em"))),
        "kb": Mean.of([total_bytes(one) / 1e3 for one in values]).mean,
        "gflop": Mean.of([one["gflop"] for one in values]).mean,
    }


def _plain(values: Sequence[Value]) -> list[Value]:
    """Without the curves, which stay in the cells."""
    return [{name: one for name, one in value.items() if name != "curve"} for value in values]


def deviations(results: Results) -> list[str]:
    """Where this is another study than the paper's, and what its numbers mean."""
    args = results.study.args
    # A comma in a name is none between names.
    rates = {name.replace(",", ""): results.rates[name] for name in results.searched}
    searched = {name.replace(",", ""): found for name, found in results.searched.items()}
    return [
        f"Small models and {_asked(args)}: numbers compare the methods with each other, none with the paper's.",
        "Operations are tokens times parameters: 2 for a forward pass, 2 more for the way back by activations and 2 by "
        "the weights that learn; embeddings, products inside of attention, scans and optimisers are left out.",
        f"Steps are multiples of the options' at which a method computes as much as ours, see the table: '{EQUAL}' is "
        f"'{STANDALONE}' with that many, and the centralised bound takes the options' as often as there are devices. "
        f"Ours takes {CoTuned().small_times:g} times the options' for small models and {CoTuned().proxy_times:g} times "
        "for each adapter of the proxy.",
        "A method whose devices do not train the cloud's model, or that has no cloud, leaves it as it was given.",
        "With FedAvg-LoRA, FlexLoRA and FedCoLLM what answers on a device is the proxy, which is larger than most "
        "small models here; with all others it is the device's own model. "
        + f"'{BOTH}' is ours with one answer of both: of what each writes, that of the larger product of their "
        "probabilities; bits per byte are of the mean of these there. "
        f"With '{BY_DOMAIN}' the small model counts as much as the chance that a question is of its domain, the proxy "
        f"for the rest. '{REHEARSING}' has a proxy that learns its own answers to open questions on the server, beside "
        "public texts. Two models read each question twice. "
        "Where a proxy answers, it is with the adapter after the last round, whose way down is counted for nobody.",
        f"Published by nobody, and made here to tell what parts of ours give to others: '{CODED}', FedAvg-LoRA with "
        f"our codec; '{BESIDE}', that and small models that learn alone, both answering as with '{BOTH}', and "
        f"'{BESIDE_BY_DOMAIN}', as with '{BY_DOMAIN}'; '{ASKING}', "
        "whose cloud learns open questions as its proxy answers them.",
        "All learning rates of a method, of small models, the proxy's adapters and the cloud's, are one multiple of "
        f"the options', the best of a search with {args.devices[0]} devices on facts and texts that no "
        "test has, by exact match, see the table. Other numbers of devices use it too, and ablations that of ours.",
        *edge_notes(rates, searched),
        f"Adapters of ours travel in {options(args).bits} bits a number, those of others in float32, as "
        "they were published; FedMKT's logits are float16 with int32 ids.",
        *(
            []
            if args.datasets
            else ["Answers are one word or number, so Rouge-L and EM differ where a model writes more."]
        ),
        "Held at once are weights, gradients and optimiser state; activations are not counted."
        + " The peak of a round is all that a process took beyond what it had before, with the models that it loads: "
        "the largest device's, of two steps with its longest texts, in the middle one of three processes."
        * bool(results.peaks),
        *(
            [
                f"With {args.devices[0]} devices, what sends more than ours ran again with as many whole rounds as its "
                "bytes pay for, at least one, as many more steps in each, and a search of its own."
            ]
            if results.shorter
            else []
        ),
        "All learning rates "
        + (
            f"fall along half a cosine, to {args.least_rate:g} of what they are in the first round."
            if args.least_rate < 1
            else "stay as they are in all rounds."
        ),
        "Crossed is what is asked of the other devices' domains; with one device that is nothing.",
        "Everybody may have the open questions, to which the server has no answers; ours asks its proxy, and so does "
        f"'{ASKING}'. They ask in other words what tests ask of all domains.",
        "Ours has no private adapter here, which the product has by default: 'DST' among the ablations is with it.",
        *makings(results),
        f"Cells of protocol {PROTOCOL}; intervals are Student's over seeds, each with facts and texts of its own: "
        f"{args.seeds} of {args.devices[0]} devices, {args.side_seeds} of ablations and other numbers of devices.",
    ]


def makings(results: Results) -> list[str]:
    """Whether all runs are of the same models, in words; one recipe gives others on another kind of processor."""
    rows = [(f"{num} devices, {name}", v, own) for num, own in results.runs.items() for name, v in own.items()]
    first = results.runs.get(results.study.args.devices[0], {})
    rows += [(f"ours with {name}", values, first) for name, values in results.ablations.items()]
    if len({value["models"] for _, values, _ in rows for value in values}) < 2:
        return []
    apart = [
        what
        for what, values, others in rows
        if any(a["models"] != b["models"] for a, b in zip(values, others.get(OURS, []), strict=False))
    ]
    return [
        "Not all seeds have the same models: made again by the same recipe on another kind of processor, they differ "
        "in rounding and then in what they learn."
        + (f" Of other models than ours at the same seed: {'; '.join(apart)}." if apart else "")
        + " What is compared seed by seed had the same ones." * (not apart)
    ]


def _asked(args: argparse.Namespace) -> str:
    return f"{len(args.datasets)} data sets" if args.datasets else "made-up questions"


def main() -> None:
    """Measure what is missing, write the result folder, say what came."""
    args = parser().parse_args()
    with plain_endings():
        study = CoPlmsStudy(NAME, args)
        page = build(study)
    args.model = str(args.models or args.size)
    page.publish(
        results_of(args, NAME),
        about=about_run(
            vars(args),
            device=args.device,
            threads=args.threads,
            models=study.recipe,
            backbone_parameters=study.num_parameters,
        ),
        lead=f"Models {Path(args.model).name}.",
    )


if __name__ == "__main__":
    main()
