"""What each way of tuning memorises, and what privacy costs: canaries planted 1, 4 and 16 times (arXiv 1802.08232).

LoRA by back-propagation, with differential privacy and by MeZO, a side network, a soft prompt and the whole model are
tuned on the same texts with the same canaries and audited as `cotune audit` does: exposure of the canaries before and
after, what is reproduced from a prefix, and beside it the loss on texts that nobody was tuned on.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from adaptation_study import AdaptationStudy, best_rate, edge_notes, make_parser, run_study, worded
from cells import OutOfTimeError, Value
from mean import Mean
from page import Page
from result_folder import grid, plot_lines
from study_options import at_least_one, positive

from cotune.cli.audit_scoring import BASE, backbone_scores
from cotune.data.templates import Example
from cotune.device.likelihood import base_nats, score_tokens
from cotune.device.side_network import open_side_network
from cotune.errors import InputError
from cotune.evaluation.canaries import SecretSpace, plant
from cotune.evaluation.markup import Html, bullets
from cotune.evaluation.memorisation import AuditConfig, Score, TextScore, audit
from cotune.evaluation.report import Section
from cotune.generation.output_basis import OutputBasis
from cotune.generation.reference import Personal
from cotune.models.backbone import Backbone
from cotune.plugin import Plugin
from cotune.tuning.adaptations import ADAPTATIONS, AdaptationOptions
from cotune.tuning.estimators import BackPropagation, Estimator, PrivateDescent, ZerothOrder
from cotune.tuning.feature_cache import FeatureCache
from cotune.tuning.loop import LoopConfig
from cotune.tuning.personal import PersonalConfig, PublicParts, encode_examples, tune_plugin
from cotune.tuning.side import SideConfig
from cotune.tuning.tune import TuneConfig, tune

NAME = "memorisation"
SIDE, AUDITED = "side", "tuned"
SIDE_RATE = 1e-2
BEFORE = "before"
# Texts in one pass of the backbone; all of their logits are in memory.
FEATURE_TEXTS = 8
EXPECTED = {
    "arXiv 1802.08232": "exposure grows with the number of times that a canary is in the training texts; "
    "with DP-SGD it stays where it was, at every epsilon that was tried",
    "exposure of what was never seen, bits": 1 / math.log(2),
}


@dataclass(frozen=True, kw_only=True)
class Way:
    """A row: what is tuned, and how.

    Attributes:
        method: a key of `ADAPTATIONS`, or `side`.
        how: makes the estimator for a seed.
        rate: the product's own learning rate, around which is searched; None for the method's.
        is_forward_only: whether its epochs are those of methods without gradients.
        epsilon: of differential privacy.
    """

    method: str
    how: Callable[[int], Estimator] = lambda seed: BackPropagation()
    rate: float | None = None
    is_forward_only: bool = False
    epsilon: float | None = None

    @property
    def base_rate(self) -> float:
        """Around which is searched."""
        return self.rate or (SIDE_RATE if self.method == SIDE else ADAPTATIONS[self.method].learning_rate)


def private(epsilon: float) -> Way:
    """LoRA with differential privacy. Texts and canaries are public here, so runs may be repeated by their seed."""
    return Way(
        method="lora",
        how=lambda seed: PrivateDescent(epsilon=epsilon, secret_seed=seed),
        rate=PrivateDescent.learning_rate,
        epsilon=epsilon,
    )


WAYS: dict[str, Way] = {
    "lora": Way(method="lora"),
    "lora, epsilon 8": private(8.0),
    "lora, epsilon 1": private(1.0),
    "lora, mezo": Way(
        method="lora", how=lambda seed: ZerothOrder(), rate=ZerothOrder.learning_rate, is_forward_only=True
    ),
    "side": Way(method=SIDE),
    "soft prompt": Way(method="soft_prompt"),
    "full": Way(method="full"),
}


def parser() -> argparse.ArgumentParser:
    """Of this command."""
    made = make_parser(NAME, __doc__ or "")
    made.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="(default: all)")
    made.add_argument("--times", type=at_least_one, nargs="+", default=[1, 4, 16], help="copies (default: %(default)s)")
    made.add_argument("--each", type=at_least_one, default=2, help="canaries for each of these (default: %(default)s)")
    made.add_argument("--candidates", type=at_least_one, default=511, help="other secrets (default: %(default)s)")
    made.add_argument(
        "--prefix-tokens", type=at_least_one, default=4, help="that the model is given (default: %(default)s)"
    )
    made.add_argument("--next-tokens", type=at_least_one, default=8, help="that it has to say (default: %(default)s)")
    made.add_argument(
        "--epochs", type=at_least_one, default=10, help="of methods with gradients (default: %(default)s)"
    )
    made.add_argument("--forward-epochs", type=at_least_one, default=40, help="of MeZO (default: %(default)s)")
    made.add_argument(
        "--rate-factors",
        type=positive,
        nargs="+",
        default=[0.3, 1.0, 3.0, 10.0],
        help="searched for every way, times the product's own learning rate (default: %(default)s)",
    )
    return made


def side_scores(backbone: Backbone, plugin: Plugin) -> Score:
    """Scores under a plugin that is consulted everywhere, beside a backbone in this process, and without it."""
    personal = Personal(
        corrector=open_side_network(plugin), output_basis=OutputBasis.from_bytes(plugin.output_basis), gate=None
    )
    vocab = backbone.spec.vocab_size

    def score(examples: Sequence[Example]) -> dict[str, list[TextScore]]:
        found: dict[str, list[TextScore]] = {AUDITED: [], BASE: []}
        encoded = encode_examples(backbone.tokenizer_json, examples, backbone.description)
        for begin in range(0, len(encoded), FEATURE_TEXTS):
            part = [(one.input_ids, one.first_target) for one in encoded[begin : begin + FEATURE_TEXTS]]
            for (_, first), features in zip(part, backbone.features_batch(part, vocab), strict=True):
                found[AUDITED].append(TextScore(*score_tokens(features, personal, "integration", start=first)))
                written = np.asarray(features.top_logits).argmax(axis=1)
                found[BASE].append(TextScore(base_nats(features), written == features.target_ids))
        return found

    return score


def completed(scores: Sequence[TextScore]) -> float:
    """The share of secrets whose second half is what the model writes behind the first.

    Example:
        >>> halves = [[False, False, True, True], [True, True, True, False]]
        >>> completed([TextScore(np.zeros(4), np.array(each)) for each in halves])
        0.5
    """
    return sum(bool(one.is_likeliest[len(one.nats) // 2 :].all()) for one in scores) / len(scores)


class Runs:
    """The cells of this study."""

    def __init__(self, study: AdaptationStudy) -> None:
        self.study = study
        args = study.args
        self.config = AuditConfig(
            num_prefix_tokens=args.prefix_tokens, num_next_tokens=args.next_tokens, num_candidates=args.candidates
        )

    def rates(self, name: str) -> list[float]:
        """That are searched."""
        return [WAYS[name].base_rate * factor for factor in self.study.args.rate_factors]

    def search(self, name: str) -> dict[float, float | None]:
        """Held-out nats per token by learning rate, without canaries, seed 0; None where it diverged."""
        train, judges = self.study.selection()
        found = {}
        for rate in self.rates(name):
            key = self._key(name, rate, 0, "search")
            value = self.study.cell(key, lambda rate=rate: self._judge(self._tuned(name, train, rate, 0), judges))
            found[rate] = None if value["diverged"] else value["nats"]
        return found

    def final(self, name: str, rate: float) -> list[Value]:
        """Tuned on texts with canaries and audited; one for each seed."""
        args, found = self.study.args, []
        for seed in self.study.seeds():
            key = self._key(name, rate, seed, "audit")
            key |= {"times": str(args.times), "each": args.each, **asdict(self.config)}
            found.append(self.study.cell(key, lambda seed=seed: self._audit(name, rate, seed)))
        return found

    def _key(self, name: str, rate: float, seed: int, what: str) -> dict[str, Any]:
        return {"what": what, "way": name, "learning_rate": rate, "seed": seed, "epochs": self._epochs(name)}

    def _epochs(self, name: str) -> int:
        return int(self.study.args.forward_epochs if WAYS[name].is_forward_only else self.study.args.epochs)

    def _audit(self, name: str, rate: float, seed: int) -> Value:
        args, study = self.study.args, self.study
        texts, manifest = plant(study.train, args.times, space=SecretSpace(), seed=seed, num_each=args.each)
        score = self._tuned(name, texts, rate, seed)
        found = audit(score, texts, self.config, heldout=study.test, manifest=manifest)
        secrets = {
            times: score([one.example() for one in manifest.canaries if one.times == times])
            for times in sorted({one.times for one in manifest.canaries})
        }
        value: Value = {"num_texts": len(texts), "num_canary_texts": len(texts) - len(study.train)}
        for when, model in zip(("after", BEFORE), found.models, strict=True):
            assert model.membership is not None and model.heldout_extraction is not None
            value[when] = {
                "heldout_nats": model.membership.heldout_nats,
                "train_nats": model.membership.train_nats,
                "auc": model.membership.auc,
                "extracted": model.extraction.share,
                "extracted_heldout": model.heldout_extraction.share,
                "bits": {str(times): [e.bits for e in model.exposures if e.times == times] for times in secrets},
                "completed": {str(times): completed(of[model.name]) for times, of in secrets.items()},
            }
        return value

    def _judge(self, score: Score, texts: Sequence[Example]) -> Value:
        return {"nats": float(np.concatenate([one.nats for one in score(texts)[AUDITED]]).mean())}

    def _tuned(self, name: str, texts: Sequence[Example], rate: float, seed: int) -> Score:
        """Tune, the last epoch counts; gives the scores of the tuned model and of the base."""
        args, way, study = self.study.args, WAYS[name], self.study
        backbone, loop = study.backbone(), LoopConfig(epochs=self._epochs(name), learning_rate=rate)
        if way.method == SIDE:
            return side_scores(backbone, self._plugin(texts, loop, seed))
        options, method = AdaptationOptions(), ADAPTATIONS[way.method]
        config = TuneConfig(what=method.make(options), loop=loop, num_batch_sequences=args.batch_size, seed=seed)
        encoded = study.encode(texts, method.num_virtual_tokens(options))
        result = tune(backbone, encoded, config, estimator=way.how(seed))
        return backbone_scores(backbone, result.adapter, None, AUDITED, lambda done, total, note: None)

    def _plugin(self, texts: Sequence[Example], loop: LoopConfig, seed: int) -> Plugin:
        backbone = self.study.backbone()
        config = PersonalConfig(
            side=SideConfig(loop=loop, seed=seed),
            gate=None,
            heldout_share=0.0,
            max_length=self.study.args.max_length,
            seed=seed,
        )
        with TemporaryDirectory() as folder:
            cache = FeatureCache(
                Path(folder),
                backbone_digest=backbone.spec.backbone_digest,
                projections_digest=backbone.projections.digest,
            )
            public = PublicParts(tokenizer_json=backbone.tokenizer_json, output_basis=backbone.output_basis)
            return tune_plugin(backbone, public, texts, config, cache=cache).plugin


def summarise(runs: Sequence[Value], when: str = "after") -> dict[str, Any]:
    """Means over seeds of one way; a seed's exposure is the mean over its canaries of that number of copies."""
    parts = [run[when] for run in runs]
    keys = ("heldout_nats", "train_nats", "auc", "extracted", "extracted_heldout")
    # A cell that was kept has them in the order of letters.
    all_times = sorted(parts[0]["bits"], key=int)
    return {
        **{key: Mean.of([part[key] for part in parts]) for key in keys},
        "bits": {times: Mean.of([float(np.mean(part["bits"][times])) for part in parts]) for times in all_times},
        "completed": {times: Mean.of([part["completed"][times] for part in parts]) for times in all_times},
    }


def cost_of_privacy(finished: Mapping[str, Sequence[Value]]) -> list[str]:
    """For each epsilon what LoRA loses on held-out texts and hides of the canaries, in words; seeds in pairs."""
    plain, said = finished.get("lora"), []
    for name, way in WAYS.items():
        if plain is None or way.epsilon is None or name not in finished:
            continue
        pairs = list(zip(finished[name], plain, strict=True))
        nats = Mean.of([mine["after"]["heldout_nats"] - theirs["after"]["heldout_nats"] for mine, theirs in pairs])
        most = max(pairs[0][0]["after"]["bits"], key=int)
        bits = Mean.of([float(np.mean(b["after"]["bits"][most]) - np.mean(a["after"]["bits"][most])) for a, b in pairs])
        said.append(
            f"Epsilon {way.epsilon:g} costs LoRA {worded(nats)} nats per held-out token and hides {worded(bits, 2)} "
            f"bits of a canary that is there {most} times."
        )
    return said


def build(study: AdaptationStudy) -> Page:
    """Measure what is missing and show what there is."""
    args, runs = study.args, Runs(study)
    rates: dict[str, float] = {}
    searched: dict[str, dict[float, float | None]] = {}
    finished: dict[str, list[Value]] = {}
    refused: dict[str, str] = {}
    unfinished = []
    for name in args.ways:
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
    if not finished:
        if unfinished:
            raise OutOfTimeError("the budget is spent before any way is finished; run again to go on")
        raise InputError(f"no way of tuning could be run: {next(iter(refused.values()))}")
    rows = {BEFORE: summarise(next(iter(finished.values())), BEFORE)}
    rows |= {name: summarise(values) for name, values in finished.items()}
    said, names = cost_of_privacy(finished), list(rows)
    all_times = list(rows[BEFORE]["bits"])
    exposures = {f"{times}x": [worded(rows[n]["bits"][times], 2) for n in names] for times in all_times}
    secrets = {f"{times}x": [worded(rows[n]["completed"][times], 2) for n in names] for times in all_times}
    others = {
        "learning rate": ["-", *(f"{rates[name]:g}" for name in finished)],
        "held-out nats": [worded(rows[n]["heldout_nats"]) for n in names],
        "training nats": [worded(rows[n]["train_nats"]) for n in names],
        "members told apart": [worded(rows[n]["auc"], 2) for n in names],
        "reproduced": [worded(rows[n]["extracted"], 3) for n in names],
        "held-out texts reproduced": [worded(rows[n]["extracted_heldout"], 3) for n in names],
    }
    # What was before tuning is in the table only: colours tell seven lines apart.
    lines = {n: [rows[n]["bits"][t].point(int(t)) for t in all_times if t != "0"] for n in finished}
    most_bits = math.log2(1 + args.candidates)
    caption = (
        f"Means over seeds with 95 % intervals; {most_bits:.2f} bits is the most that {args.candidates} candidates can "
        f"show, {1 / math.log(2):.2f} what a model shows that never saw the canary."
    )
    content = Html(
        plot_lines(
            "exposure",
            caption,
            lines,
            x_label="copies of a canary, log scale",
            y_label="exposure, bits",
            is_log_x=True,
        )
        + bullets(said)
        + grid("Exposure in bits", "tuned", names, exposures)
        + grid("Share of canaries whose second half follows from the first", "tuned", names, secrets)
    )
    sections = [
        Section(name="exposure", short="Exposure", heading="Canaries", content=content),
        Section(
            name="texts",
            short="Texts",
            heading="The real texts",
            content=grid(
                f"Reproduced: {args.next_tokens} tokens behind {args.prefix_tokens}, as shares", "tuned", names, others
            ),
        ),
    ]
    if refused:
        reasons = grid("What the product said", "tuned", list(refused), {"reason": list(refused.values())})
        sections.append(Section(name="refused", short="Refused", heading="Not run", content=reasons))
    return Page(
        title="What tuning memorises, and what privacy costs",
        lead=" ".join(said),
        expected=EXPECTED,
        measured={"ways": rows, "rates": rates, "search": searched, "refused": refused, "said": said},
        sections=sections,
        deviations=[
            *edge_notes(rates, {name: list(found) for name, found in searched.items()}),
            f"Methods with gradients see the texts {args.epochs} times, forward-only ones {args.forward_epochs} times; "
            "differential privacy draws each text so often on average.",
            "Epsilon is for one copy of a text: of a canary that is there k times it promises k times as little. "
            "The search for a learning rate is not in it; here texts and canaries are public.",
            "Noise and sampling of private runs come from the run's seed, so that they can be repeated.",
        ],
        lines=[
            *(
                f"{name:16s} held out {worded(row['heldout_nats'])}, bits "
                + ", ".join(f"{times}x {worded(one, 2)}" for times, one in row["bits"].items())
                for name, row in rows.items()
            ),
            *(f"{name:16s} not run: {reason}" for name, reason in refused.items()),
            *said,
        ],
        unfinished=unfinished,
    )


if __name__ == "__main__":
    run_study(NAME, parser(), build)
