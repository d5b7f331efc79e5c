"""Byzantine devices and eavesdroppers on a real model: the rules against the attacks, for pool draws, a shared schedule
and rolora.

Some devices lie: they alter their replies and sign what they say with their own keys, so that only the rule stands
between them and the model. Below it the second open question of arXiv 2408.10691: who reads FedKSeed's dictionary has
the tuned model, and who writes into it spoils it; in seed mode neither works.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from adaptation_study import best_rate, edge_notes, worded
from cells import OutOfTimeError, Value
from federated_study import FederatedStudy, make_parser, run_study, secret_of
from federated_texts import IID, SPLITS
from mean import Mean
from page import Page
from result_folder import Point, grid, plot_groups
from study_options import at_least_one

from cotune.errors import CotuneError, InputError
from cotune.evaluation.markup import Html, bullets, join
from cotune.evaluation.report import Section
from cotune.federation.algorithm import Combine
from cotune.federation.algorithms import ALGORITHMS
from cotune.federation.arrays import Arrays
from cotune.federation.coordinator import FederationError
from cotune.federation.messages import Reply, decode, encode
from cotune.federation.robust.rules import rule_named
from cotune.federation.robust.usual_rule import TRIMMED
from cotune.federation.run_secret import RunSecret, direction_seed
from cotune.federation.seed_attacks import (
    cosine_of_changes,
    guess_from_slopes,
    overhear,
    rebuild_from_dictionary,
    run_tapped,
    scaled,
)
from cotune.federation.signing import DeviceKey, sign

NAME = "federated_attacks"
NONE = "none"
WITHIN = 0.1
"""How much more than the honest loss is still well."""
EXPECTED = {
    "issue 6": "with 20 % Byzantine devices within 10 % of the honest loss where the mean diverges",
    "spec, linear regression": {
        "pool draws": "median 53.4, trimmed mean 7.2 and Bulyan 18.6 fail without any liar (start 61.6, mean 0.0097)",
        "shared schedule": "all robust rules at most 0.0142 under attack (honest mean 0.0096)",
    },
}
# Their names stand side by side under the bars.
RULES_IN_A_PLOT = 3
ALGORITHMS_HERE = ("fedkseed", "seed", "rolora")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A row of the table.

    Attributes:
        name, options: of `cotune.federation.robust.rules`.
        is_judged: rounds that make the server's texts worse are rejected as well.
    """

    name: str
    options: Mapping[str, Any]
    is_judged: bool = False

    def combine(self) -> Combine:
        """The rule itself."""
        return rule_named(self.name, self.options)


_TRIMMING = {"rule": {"name": "trimmed_mean", "share": TRIMMED}}
USUAL = "long out + clip + trim"
"""The product's own, of five devices or more."""
RULES: dict[str, Rule] = {
    "mean": Rule(name="mean", options={}),
    "median": Rule(name="median", options={}),
    "trimmed mean": Rule(name="trimmed_mean", options={"share": TRIMMED}),
    "multi-krum": Rule(name="multi_krum", options={"num_byzantine": 2}),
    "bulyan, f = 1": Rule(name="bulyan", options={"num_byzantine": 1}),
    "clip": Rule(name="clip_to_median_norm", options={"rule": "mean"}),
    "clip + trim": Rule(name="clip_to_median_norm", options=_TRIMMING),
    USUAL: Rule(name="leave_out_long", options={"rule": {"name": "clip_to_median_norm", **_TRIMMING}}),
    "clip + trim + judge": Rule(name="clip_to_median_norm", options=_TRIMMING, is_judged=True),
    "mean + judge": Rule(name="mean", options={}, is_judged=True),
}
# Changes the arrays of a reply, and how many examples it claims.
Lie = Callable[[Reply, np.random.Generator], Reply]


def times(factor: float) -> Lie:
    """The honest numbers times a factor."""
    return lambda reply, rng: _with(reply, {name: np.float32(factor) * a for name, a in reply.arrays.items()})


def normal(size: float) -> Lie:
    """Normal numbers of this size."""
    return lambda reply, rng: _with(
        reply, {name: (size * rng.standard_normal(a.shape)).astype(np.float32) for name, a in reply.arrays.items()}
    )


def not_a_number(reply: Reply, rng: np.random.Generator) -> Reply:
    """NaN everywhere."""
    return _with(reply, {name: np.full_like(a, np.nan) for name, a in reply.arrays.items()})


def claims(num_examples: int, lie: Lie) -> Lie:
    """A lie with a claim of so many examples, so that it weighs more."""
    return lambda reply, rng: replace(lie(reply, rng), num_examples=num_examples)


def _with(reply: Reply, arrays: Arrays) -> Reply:
    return replace(reply, arrays=arrays)


@dataclass(frozen=True, kw_only=True)
class Attack:
    """A column of the table.

    Attributes:
        lie: of each liar; None where all are honest.
        weights: of the coordinator: `equal`, or by the `examples` that devices claim.
    """

    lie: Lie | None
    weights: str = "equal"


ATTACKS: dict[str, Attack] = {
    NONE: Attack(lie=None),
    "-10 g": Attack(lie=times(-10.0)),
    # Not long enough to be left out for it.
    "-3 g": Attack(lie=times(-3.0)),
    "1e6 noise": Attack(lie=normal(1e6)),
    "NaN": Attack(lie=not_a_number),
    "1e9 examples": Attack(lie=claims(10**9, times(-10.0)), weights="examples"),
}


def tampering(lie: Lie, keys: Mapping[str, DeviceKey], seed: int) -> Callable[[str, bytes], bytes]:
    """What `InProcess` does to replies: those of the owners of `keys` become lies that they sign themselves."""
    rng = np.random.default_rng((seed, 5))

    def tamper(device: str, data: bytes) -> bytes:
        if device not in keys:
            return data
        return encode(sign(lie(decode(data, Reply), rng), keys[device]))

    return tamper


def parser() -> Any:
    """Of this command."""
    made = make_parser(NAME, __doc__ or "", examples=("--rules mean median --attacks none '-10 g'",))
    made.add_argument(
        "--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS_HERE), help="(default: %(default)s)"
    )
    made.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES), help="(default: all)")
    made.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS), help="(default: all)")
    made.add_argument("--liars", type=at_least_one, default=2, help="of the devices (default: %(default)s)")
    made.add_argument("--split", choices=SPLITS, default=IID, help="(default: %(default)s)")
    return made


def ratios(attacked: Sequence[float | None], honest: Sequence[float]) -> Mean | None:
    """Attacked over honest loss, seed by seed; None where a run was lost.

    Example:
        >>> ratios([2.0, 4.0], [1.0, 2.0]).mean, ratios([2.0, None], [1.0, 2.0])
        (2.0, None)
    """
    pairs = list(zip(attacked, honest, strict=True))
    return Mean.of([a / b for a, b in pairs if a is not None]) if all(a is not None for a, _ in pairs) else None


def kept(losses: Sequence[float | None], honest: Sequence[float], starts: Sequence[float]) -> Mean | None:
    """The share of what honest tuning gains that is gained here too; None where a run was lost, or nothing is gained.

    Example:
        >>> kept([3.0], [2.0], [4.0]).mean, kept([3.0], [4.0], [4.0])
        (0.5, None)
    """
    found = list(zip(losses, honest, starts, strict=True))
    if any(loss is None or start <= best for loss, best, start in found):
        return None
    return Mean.of([(start - loss) / (start - best) for loss, best, start in found if loss is not None])


def says_little(name: str, honest: Sequence[float], starts: Sequence[float]) -> list[str]:
    """A warning where honest tuning gains so little that a model that learns nothing is within 10 % as well."""
    if sum(starts) > (1 + WITHIN) * sum(honest):
        return []
    return [
        f"{name}: honest tuning gains less than 10 %, so that a rule which learns nothing is within 10 % too: look at "
        "the share of the gain that is kept."
    ]


def holds(ratio: Mean | None) -> bool:
    """Whether a rule keeps the loss within 10 % of the honest one, on average over seeds.

    Example:
        >>> holds(Mean.of([1.05, 1.11])), holds(Mean.of([1.2])), holds(None)
        (True, False, False)
    """
    return ratio is not None and ratio.mean <= 1 + WITHIN


class Runs:
    """The cells of this study."""

    def __init__(self, study: FederatedStudy) -> None:
        self.study = study

    def table(self, name: str, factor: float, rule: str, attack: str) -> list[Value]:
        """One for each seed."""
        args = self.study.args
        found = []
        for seed in self.study.seeds():
            key = {"what": "table", "algorithm": name, "factor": factor, "rule": rule, "attack": attack, "seed": seed}
            key |= {"liars": args.liars, "split": args.split}
            found.append(
                self.study.cell(key, lambda seed=seed: self._attacked(name, factor, RULES[rule], ATTACKS[attack], seed))
            )
        return found

    def _attacked(self, name: str, factor: float, rule: Rule, attack: Attack, seed: int) -> Value:
        study, args, secret = self.study, self.study.args, secret_of(seed)
        with study.stage(args.split, seed, algorithm=name) as stage:
            keys = {device: DeviceKey.generate() for device in stage.models}
            liars = liars_of(list(stage.models), args.liars, seed)
            tamper = None if attack.lie is None else tampering(attack.lie, {one: keys[one] for one in liars}, seed)
            algorithm = study.algorithm(name, factor, secret, seed=seed)
            coordinator = study.coordinator(
                stage,
                algorithm,
                secret,
                replace(study.settings(seed=seed).rounds, weights=attack.weights),
                rule.combine(),
                seed=seed,
                keys=keys,
                tamper=tamper,
                is_judged=rule.is_judged,
            )
            progress, remark = coordinator.begin(stage.start), ""
            start = stage.test(algorithm.adapter(progress.state))
            try:
                for reached in coordinator.run(progress):
                    progress = reached
            except FederationError as error:
                remark = str(error)
            # With huge numbers in the state, the adapter itself may overflow: that is a lost run.
            with np.errstate(over="ignore", invalid="ignore"):
                loss = stage.test(algorithm.adapter(progress.state))
            return {
                "start": start,
                "loss": loss if np.isfinite(loss) else None,
                "remark": remark,
                "num_rounds": progress.round_number,
                "num_void": sum(one.verdict == "void" for one in progress.records),
                "num_rejected": sum(one.verdict == "rejected" for one in progress.records),
                "num_excluded": sum(count >= 3 for count in progress.offences.values()),
                "num_refused": sum(len(one.refused) for one in progress.records),
            }

    def overheard(self, name: str, factor: float) -> list[Value]:
        """What an eavesdropper of FedKSeed or of seed mode has, one for each seed."""
        found = []
        for seed in self.study.seeds():
            key = {"what": "eavesdropper", "algorithm": name, "factor": factor, "seed": seed}
            key |= {"split": self.study.args.split, "liars": self.study.args.liars}
            found.append(self.study.cell(key, lambda seed=seed: self._overheard(name, factor, seed)))
        return found

    def _overheard(self, name: str, factor: float, seed: int) -> Value:
        study, args, secret = self.study, self.study.args, secret_of(seed)
        rounds, digest = args.rounds, study.backbone.spec.backbone_digest
        with study.stage(args.split, seed, algorithm=name) as stage:
            algorithm, mean = study.algorithm(name, factor, secret, seed=seed), rule_named("mean")
            progress, tap = run_tapped(
                algorithm, mean, stage.models, stage.start, secret, num_rounds=rounds, base_digest=digest
            )
            tuned, heard = algorithm.adapter(progress.state), overhear(tap)
            if name == "fedkseed":
                stolen = rebuild_from_dictionary(heard, mean)
            else:
                # It knows the method and all that was sent, and guesses the secret.
                guess = RunSecret(bytes([seed % 256] * 32))
                stolen = guess_from_slopes(heard, mean, lambda number, k: direction_seed(guess, number, k))
            median = rule_named("median")
            liars = liars_of(list(stage.models), args.liars, seed)
            poisoned = {}
            for what, who in (("honest", []), ("poisoned", liars)):
                reached, _ = run_tapped(
                    study.algorithm(name, factor, secret, seed=seed),
                    median,
                    stage.models,
                    stage.start,
                    secret,
                    num_rounds=rounds,
                    base_digest=digest,
                    liars=dict.fromkeys(who, scaled(-10.0)),
                )
                loss = stage.test(algorithm.adapter(reached.state))
                poisoned[f"median_{what}"] = loss if np.isfinite(loss) else None
            stolen_loss = stage.test(stolen)
            return {
                "start": stage.test(stage.start),
                "tuned": stage.test(tuned),
                "stolen": stolen_loss if np.isfinite(stolen_loss) else None,
                "cosine": cosine_of_changes(stolen, tuned, stage.start),
                "is_identical": all(stolen[one].tobytes() == tuned[one].tobytes() for one in tuned),
                **poisoned,
            }


def liars_of(devices: Sequence[str], num: int, seed: int) -> list[str]:
    """Who lies, drawn.

    Example:
        >>> len(liars_of(["a", "b", "c"], 2, 0))
        2
    """
    return [str(one) for one in np.random.default_rng((seed, 6)).choice(list(devices), num, replace=False)]


def cells_of(table: Mapping[str, Mapping[str, list[Value]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """By rule and attack: mean loss, its ratio to the honest mean of the same seeds, and whether it holds.

    Args:
        table: of one algorithm, by rule and attack, of all seeds; has the row of the mean without attack.
    """
    honest = [float(one["loss"]) for one in table["mean"][NONE]]
    starts = [float(one["start"]) for one in table["mean"][NONE]]
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for rule, columns in table.items():
        for attack, values in columns.items():
            losses = [None if one["diverged"] else one["loss"] for one in values]
            ratio = ratios(losses, honest)
            found.setdefault(rule, {})[attack] = {
                "loss": None if ratio is None else Mean.of([one for one in losses if one is not None]),
                "ratio": ratio,
                "holds": holds(ratio),
                "kept": kept(losses, honest, starts),
                "num_refused": sum(one.get("num_refused", 0) for one in values),
                "num_void": sum(one.get("num_void", 0) for one in values),
            }
    return found


def verdict(name: str, found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Which rules keep within 10 % under all attacks that were run, and where the mean does not, in words."""
    kept = [rule for rule, columns in found.items() if all(one["holds"] for one in columns.values())]
    fallen = [attack for attack, one in found["mean"].items() if not one["holds"]]
    return [
        f"{name}: the plain mean is more than 10 % worse than honest under {', '.join(fallen) or 'no attack'}; within "
        f"10 % under all attacks: {', '.join(kept) or 'no rule'}."
    ]


def eavesdropper_words(name: str, values: Sequence[Value]) -> str:
    """What reading along gave."""
    gained = [100 * _share(one) for one in values if one["stolen"] is not None and one["tuned"] < one["start"]]
    has = f"it has {worded(Mean.of(gained), 1)} % of what tuning gained" if gained else "tuning gained nothing to steal"
    same = sum(one["is_identical"] for one in values)
    return (
        f"{name}: the eavesdropper's adapter is the tuned one bit for bit in {same} of {len(values)} runs, the cosine "
        f"of the changes is {worded(Mean.of([one['cosine'] for one in values]))}, and {has}."
    )


def _share(one: Mapping[str, Any]) -> float:
    return float((one["start"] - one["stolen"]) / (one["start"] - one["tuned"]))


def build(study: FederatedStudy) -> Page:
    """Measure what is missing and show what there is."""
    args, runs = study.args, Runs(study)
    if not 0 < args.liars < args.devices:
        raise InputError(f"--liars is {args.liars}, expected 1 to {args.devices - 1}, fewer than the devices")
    # Everything is compared with the honest mean.
    rules = list(dict.fromkeys(["mean", *args.rules]))
    attacks = list(dict.fromkeys([NONE, *args.attacks]))
    tables: dict[str, dict[str, dict[str, list[Value]]]] = {}
    heard: dict[str, list[Value]] = {}
    factors: dict[str, float] = {}
    searched: dict[str, dict[float, float | None]] = {}
    refused: dict[str, str] = {}
    unfinished: list[str] = []
    for name in args.algorithms:
        try:
            searched[name] = study.search(name)
            factors[name] = best_rate(searched[name])
            for rule in rules:
                for attack in attacks:
                    try:
                        values = runs.table(name, factors[name], rule, attack)
                        tables.setdefault(name, {}).setdefault(rule, {})[attack] = values
                    except OutOfTimeError:
                        unfinished.append(f"{name}, {rule}, {attack}")
                    except InputError as error:
                        refused[f"{name}, {rule}, {attack}"] = str(error)
            if name in ("fedkseed", "seed"):
                heard[name] = runs.overheard(name, factors[name])
        except OutOfTimeError:
            unfinished.append(name)
        except CotuneError as error:
            refused[name] = str(error)
    ready = {name: one for name, one in tables.items() if _is_honest(one)}
    if not ready:
        if unfinished:
            raise OutOfTimeError("the budget is spent before any honest run is finished; run again to go on")
        raise InputError(f"no federation could be run: {next(iter(refused.values()))}")
    sections, measured, said = [], {}, []
    for name, table in ready.items():
        found = measured[name] = cells_of(table)
        said += verdict(name, found)
        honest = table["mean"][NONE]
        said += says_little(name, [one["loss"] for one in honest], [one["start"] for one in honest])
        sections.append(_section(name, found, attacks, table))
    if heard:
        words = [eavesdropper_words(name, values) for name, values in heard.items()]
        said += words
        sections.append(_eavesdropper_section(words, heard))
    if refused:
        reasons = grid("What the product said", "what", list(refused), {"reason": list(refused.values())})
        sections.append(Section(name="refused", short="Refused", heading="Not run", content=reasons))
    return Page(
        title="Byzantine devices and eavesdroppers",
        lead=" ".join(said),
        expected=EXPECTED,
        measured={
            "algorithms": measured,
            "eavesdropper": heard,
            "factors": factors,
            "search": searched,
            "refused": refused,
            "said": said,
        },
        sections=sections,
        deviations=[
            *edge_notes(factors, {name: list(found) for name, found in searched.items()}),
            f"{args.liars} of {args.devices} devices lie in every round, honest ones are the same as without them; "
            "liars do not know the honest replies, so stronger attacks than these exist.",
            "The honest loss of a ratio is that of the plain mean over all devices, the texts of later liars included.",
            "Replies that are not finite are refused before any rule sees them, and a device with three of them is "
            "asked no more: the column NaN tests these checks, not the rules.",
            f"The product's own rule is {USUAL}, with the judge. It leaves out what is longer than four median norms: "
            "-10 g and noise, and not -3 g.",
            "With 1e9 examples weights go by claims, which the coordinator limits to four times the median claim; the "
            "liars send -10 g. Rules other than the mean give every device one vote.",
            "Bulyan with two liars needs eleven replies; with ten devices it is set to one, as in the spec.",
        ],
        lines=[
            *(
                f"{name:10s} {rule:22s} " + "  ".join(f"{attack} {_cell(one)}" for attack, one in columns.items())
                for name, found in measured.items()
                for rule, columns in found.items()
            ),
            *(f"{name}: not run: {reason}" for name, reason in refused.items()),
            *said,
        ],
        unfinished=unfinished,
    )


def _is_honest(table: Mapping[str, Mapping[str, list[Value]]]) -> bool:
    """Whether the row that all others are compared with is there, and learnt at all."""
    values = table.get("mean", {}).get(NONE)
    return values is not None and all(not one["diverged"] and one["loss"] is not None for one in values)


def _cell(one: Mapping[str, Any]) -> str:
    if one["loss"] is None:
        return "lost"
    return f"{worded(one['loss'])} ({one['ratio'].mean:.2f}x)"


def _section(
    name: str,
    found: Mapping[str, Mapping[str, Mapping[str, Any]]],
    attacks: Sequence[str],
    table: Mapping[str, Mapping[str, list[Value]]],
) -> Section:
    columns = {attack: [_cell(row[attack]) if attack in row else "-" for row in found.values()] for attack in attacks}
    start = Mean.of([one["start"] for one in table["mean"][NONE]])
    # A loss that exploded would hide all others, so bars end at twice the start.
    most = 2 * start.mean
    names = list(found)
    parts = []
    for begin in range(0, len(names), RULES_IN_A_PLOT):
        shown = names[begin : begin + RULES_IN_A_PLOT]
        bars: dict[str, list[Point | None]] = {
            attack: [_bar(found[rule].get(attack), most) for rule in shown] for attack in attacks
        }
        parts.append(
            plot_groups(
                f"attacks_{name}_{begin}",
                f"Means over seeds with 95 % intervals. The start is {start.mean:.3f}; bars end at twice of it, and "
                "lost runs have that height.",
                shown,
                bars,
                y_label="held-out nats per token",
            )
        )
    caption = "Held-out nats per token, and in brackets over the honest mean"
    gains = {
        attack: [worded(row[attack]["kept"], 2) if attack in row else "-" for row in found.values()]
        for attack in attacks
    }
    shares = grid("Share of what honest tuning gains that is kept", "rule", names, gains)
    content = join([*parts, grid(caption, "rule", names, columns), shares])
    return Section(name=name, short=name, heading=f"Rules and attacks: {name}", content=content)


def _bar(one: Mapping[str, Any] | None, most: float) -> Point | None:
    if one is None:
        return None
    if one["loss"] is None or one["loss"].mean > most:
        return 0.0, most, None, None
    _, mean, low, high = one["loss"].point()
    return 0.0, mean, low, None if high is None else min(high, most)


def _eavesdropper_section(words: Sequence[str], heard: Mapping[str, list[Value]]) -> Section:
    def column(key: str) -> list[str]:
        return [
            worded(Mean.of([one[key] for one in values])) if all(one[key] is not None for one in values) else "lost"
            for values in heard.values()
        ]

    heads = {
        "start": "start",
        "tuned": "tuned",
        "stolen": "read along",
        "cosine": "cosine of changes",
        "median_honest": "median, honest",
        "median_poisoned": "median, -10 g",
    }
    table = grid(
        "Held-out nats per token: the eavesdropper's adapter, and the median with and without liars",
        "method",
        list(heard),
        {head: column(key) for key, head in heads.items()},
    )
    return Section(
        name="dictionary",
        short="Dictionary",
        heading="Reading and writing the dictionary",
        content=Html(bullets(words) + table),
    )


if __name__ == "__main__":
    run_study(NAME, parser(), build)
