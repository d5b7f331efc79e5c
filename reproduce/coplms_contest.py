"""Methods of co-tuning on questions of several domains: one run of one method as a cell, all that it knew and cost.

Each device has the texts of one domain. What a model answers is asked in four sets: of its own domain, of the other
devices' domains ("crossed"), of skills, and sums over two things, see `coplms_texts`. The cloud's model has no domain
of its own: everything crossed to it.
"""

from __future__ import annotations

import argparse
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from adaptation_study import best_rate, search_wider
from cells import Value
from coplms_models import CLOUD, FAMILIES, MAX_TOKENS, PROXY, SIZES, SMALLER_PROXY, make_models, school_texts
from coplms_texts import (
    CROSSED,
    MAX_SEEDS,
    OWN,
    SEARCH_WORLD,
    SKILLS,
    Questions,
    school_of,
    texts_of,
    texts_of_search,
    texts_of_test,
)
from study_options import StudyParser, add_run_options, at_least_one, open_cells, positive
from torch.nn.functional import cross_entropy

from cotune.data.templates import Example
from cotune.distillation.mutual_loss import MutualLossConfig
from cotune.distillation.paired_texts import PairedText
from cotune.errors import NonFiniteLossError
from cotune.evaluation.text_metrics import exact_match, rouge_l
from cotune.federation.agreed_answers import answer_together
from cotune.federation.algorithms import POOLED
from cotune.federation.causal_model import CausalModel
from cotune.federation.comparison.beside import Beside
from cotune.federation.comparison.centralised import Centralised
from cotune.federation.comparison.co_tuned import CoTuned
from cotune.federation.comparison.coplms_reconstruction import CoPlmsReconstruction
from cotune.federation.comparison.fedcollm import FedCoLlm
from cotune.federation.comparison.federated_lora import FederatedLora
from cotune.federation.comparison.fedmkt import FedMkt
from cotune.federation.comparison.party import Party
from cotune.federation.comparison.scene import Account, Contestant, Scene, Site
from cotune.federation.comparison.seqkd import SeqKd
from cotune.federation.comparison.standalone import Standalone
from cotune.federation.comparison.zero_shot import ZeroShot
from cotune.federation.coplms import CloudSettings, CoPlms
from cotune.federation.flexlora import FlexLora
from cotune.federation.greedy_texts import write_greedily
from cotune.federation.local_model import LocalSteps
from cotune.federation.mutual_descent import SideBatch
from cotune.federation.open_questions import Answering
from cotune.federation.own_domain import OwnDomain
from cotune.federation.robust.usual_rule import UsualRule

# The meaning of a cell: one more, and all are run again.
PROTOCOL = 5
MAX_NEW_TOKENS, TEXTS_AT_ONCE = 8, 32
RATE_FACTORS, MOST_RATES = (0.5, 1.0), 6
ZERO_SHOT, OURS, STANDALONE, EQUAL = "zero-shot", "ours", "standalone", "standalone, equal compute"
BOTH = "ours, both answer"
"""On a device the small model and the proxy give one answer together, see `cotune.federation.agreed_answers`."""
CODED, ASKING = "fedavg-lora, coded", "fedcollm, asking"
"""With the codec of ours, and with its open questions."""
BESIDE = "fedavg-lora, coded, beside standalone"
"""Neither knows of the other, and both answer together."""
USUAL = UsualRule(is_pooled="coplms" in POOLED)
"""The rule of a run that names none."""
BY_DOMAIN, BESIDE_BY_DOMAIN = "ours, both by domain", "fedavg-lora, coded, beside standalone, by domain"
"""The same two, of which the small model counts more where a question is like the device's own texts, see
`cotune.federation.own_domain`."""
REHEARSING, REHEARSING_BY_DOMAIN = "ours, rehearsing", "ours, rehearsing, both by domain"
"""Whose proxy, on the server, learns its own answers to open questions beside public texts."""
UNPUBLISHED = (CODED, ASKING, BESIDE, BESIDE_BY_DOMAIN)
"""Made here of what was published and of parts of ours, to tell what these parts give."""
VARIANTS = (OURS, BOTH, BY_DOMAIN, REHEARSING, REHEARSING_BY_DOMAIN)
"""One method, on devices with three ways to answer, on the server with two ways to learn."""
WEIGHED = (BY_DOMAIN, BESIDE_BY_DOMAIN, REHEARSING_BY_DOMAIN)
TOGETHER = (BOTH, BESIDE, *WEIGHED)
METHODS: dict[str, Callable[[argparse.Namespace], Contestant]] = {
    ZERO_SHOT: lambda args: ZeroShot(),
    STANDALONE: lambda args: Standalone(),
    EQUAL: lambda args: Standalone(),
    "fedavg-lora": lambda args: FederatedLora(),
    CODED: lambda args: FederatedLora(bits=options(args).bits),
    "flexlora": lambda args: FederatedLora(algorithm=FlexLora(ranks={"device-1": max(1, args.rank // 2)})),
    "seqkd": lambda args: SeqKd(max_new_tokens=MAX_NEW_TOKENS),
    "fedmkt, published": lambda args: FedMkt(is_fixed=False, top_k=args.top_k),
    "fedmkt, fixed": lambda args: FedMkt(top_k=args.top_k),
    "fedcollm": lambda args: FedCoLlm(),
    ASKING: lambda args: FedCoLlm(answering=options(args).answering),
    **dict.fromkeys((BESIDE, BESIDE_BY_DOMAIN), lambda args: Beside(shared=FederatedLora(bits=options(args).bits))),
    "co-plms, MinED": lambda args: CoPlmsReconstruction(private_rank=args.rank),
    **dict.fromkeys((OURS, BOTH, BY_DOMAIN), lambda args: CoTuned(options=options(args))),
    **dict.fromkeys(
        (REHEARSING, REHEARSING_BY_DOMAIN),
        lambda args: CoTuned(options=options(args, cloud=CloudSettings(rehearses=True))),
    ),
    "centralised": lambda args: Centralised(),
}
BOUNDS = (ZERO_SHOT, "centralised")
"""Whose compute is what it is."""
AT_BASE = (*BOUNDS, STANDALONE, *VARIANTS)
"""Who takes the steps of the options; all others take as many as make their devices and cloud work as much as ours."""


def make_parser(name: str, description: str, examples: Sequence[str]) -> argparse.ArgumentParser:
    """A parser with models, texts, amounts and learning rates.

    Args:
        name: of the study's file.
        description: of the study.
        examples: options, one line each.
    """
    made = StudyParser(
        prog=f"python reproduce/{name}.py",
        description=description,
        epilog="examples:\n"
        + "".join(f"  python reproduce/{name}.py {line}\n" for line in examples)
        + "\nWithout --models, cotune makes small ones, once. Finished cells are kept in --cells and never run again.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--data-root", type=Path, help="folder of data sets")
    made.add_argument(
        "--datasets", nargs="+", help="folders there, one for each device in turn, instead of made-up domains"
    )
    made.add_argument(
        "--school", nargs="+", help="with --datasets: folders there that models have read before; the rest is public"
    )
    made.add_argument(
        "--models", type=Path, help="a folder with cloud, proxy, proxy-smaller, llama, gpt2 and mamba2 in it"
    )
    made.add_argument("--made", type=Path, default=Path("runs/coplms-models"), help="where made models go")
    made.add_argument("--size", choices=SIZES, default="small", help="of made models (default: %(default)s)")
    made.add_argument(
        "--devices", type=at_least_one, nargs="+", default=[3, 1, 5], help="ablations use the first (default: 3 1 5)"
    )
    for option, default, what in (
        ("--seeds", MAX_SEEDS, "runs with the first number of devices, each with facts of its own"),
        ("--side-seeds", 3, "runs with other numbers of devices, and of ablations"),
        ("--num-things", 8, "of each domain; three facts are known of each"),
        ("--num-skills", 40, "training questions of skills on each device"),
        ("--num-test", 40, "test questions of skills"),
        ("--num-public", 240, "texts of the server"),
        ("--rounds", 10, ""),
        ("--local-steps", 20, "of each model on a device, in a round"),
        ("--cloud-steps", 30, "of the cloud's model, in a round"),
        ("--batch-size", 8, "texts in one step"),
        ("--rank", 8, "of all adapters"),
        ("--top-k", 32, "logits that FedMKT sends of each token"),
        ("--max-tokens", MAX_TOKENS, "of one text"),
        ("--num-train", 240, "texts of a device, with --datasets"),
        ("--num-open", 40, "open questions of each of --datasets"),
    ):
        made.add_argument(option, type=at_least_one, default=default, help=f"{what} (default: %(default)s)".strip())
    for option, rate, whose in (
        ("--rate", 1e-3, "small models"),
        ("--adapter-rate", 5e-3, "adapters of the proxy"),
        ("--cloud-rate", 2e-3, "the cloud's adapter"),
    ):
        made.add_argument(option, type=positive, default=rate, help=f"learning rate of {whose} (default: %(default)s)")
    made.add_argument(
        "--rate-factors",
        type=positive,
        nargs="+",
        default=list(RATE_FACTORS),
        help="searched for every method, times these learning rates, then by twos beyond them while the best one is "
        f"at an end, {MOST_RATES} at most (default: %(default)s)",
    )
    made.add_argument(
        "--least-rate",
        type=positive,
        default=1.0,
        help="share of all learning rates that is left in the last round, after half a cosine (default: %(default)s)",
    )
    add_run_options(made, name)
    return made


def options(args: argparse.Namespace, **changes: Any) -> CoPlms:
    """Ours, as the study runs it. Without DST: what the private adapter has learnt, the shared one need not, and then
    no fact crosses."""
    return replace(CoPlms(private_rank=0, answering=Answering(max_new_tokens=MAX_NEW_TOKENS)), **changes)


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """Ours with one thing changed.

    Attributes:
        method: makes it.
        rank: of all adapters, from that of the options.
        proxy: folder of the proxy among the models.
        share: of the devices that take part in a round.
    """

    method: Callable[[argparse.Namespace], Contestant]
    rank: Callable[[int], int] = field(default=lambda rank: rank)
    proxy: str = PROXY
    share: float = 1.0


def _loss(**weights: float) -> Callable[[argparse.Namespace], Contestant]:
    own = {"byte_weight": 0.0, "chunk_weight": 0.0, "token_weight": 0.0} | weights
    return lambda args: CoTuned(options=options(args, loss=MutualLossConfig(**own)))  # type: ignore[arg-type]


def _alone(args: argparse.Namespace) -> Contestant:
    silent = CloudSettings(mix=0.0, proxy_mix=0.0)
    return CoTuned(options=options(args, loss=MutualLossConfig(mix=0.0), proxy_mix=0.0, cloud=silent))


def _as_it_comes(args: argparse.Namespace) -> Contestant:
    """A user's run that sets nothing: with a private adapter, and the usual rule."""
    return CoTuned(options=options(args, private_rank=CoPlms().private_rank), rule=USUAL)


ABLATIONS: dict[str, Ablation] = {
    "DST": Ablation(method=lambda args: CoTuned(options=options(args, private_rank=args.rank))),
    "no SAML": Ablation(method=_alone),
    "no public texts on devices": Ablation(method=lambda args: CoTuned(options=options(args, public_share=0.0))),
    "no open questions": Ablation(method=lambda args: CoTuned(options=options(args), asks=False)),
    "no gate": Ablation(method=lambda args: CoTuned(options=options(args, gated=False))),
    "gate on the server": Ablation(method=lambda args: CoTuned(options=options(args, cloud=CloudSettings(gated=True)))),
    "L_byte alone": Ablation(method=_loss(byte_weight=1.0)),
    "L_chunk alone": Ablation(method=_loss(chunk_weight=1.0)),
    "L_tok alone": Ablation(method=_loss(token_weight=1.0)),
    "naive merge": Ablation(method=lambda args: CoTuned(options=options(args), merges_factors=True)),
    "usual rule": Ablation(method=lambda args: CoTuned(options=options(args), rule=USUAL)),
    "as it comes": Ablation(method=_as_it_comes),
    "smaller proxy": Ablation(method=METHODS[OURS], proxy=SMALLER_PROXY),
    "quarter of the rank": Ablation(method=METHODS[OURS], rank=lambda rank: max(1, rank // 4)),
    "twice the rank": Ablation(method=METHODS[OURS], rank=lambda rank: 2 * rank),
    "half of the devices": Ablation(method=METHODS[OURS], share=0.5),
}


class CoPlmsStudy:
    """The models, the texts and the cells.

    Args:
        name: of the study, for its cells.
        args: from `coplms_main.parser`.
    """

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        torch.set_num_threads(args.threads)
        self.name, self.args = name, args
        self.cells = open_cells(args)
        self.folder = args.models
        if self.folder is None:
            self.folder = make_models(args.made, SIZES[args.size], self._school(), max_tokens=args.max_tokens)
        self.models = {
            one: CausalModel(str(Path(self.folder) / one), args.dtype, args.device)
            for one in (CLOUD, PROXY, SMALLER_PROXY, *FAMILIES)
        }
        with self.models[CLOUD].loaded() as cloud:
            self.num_parameters = sum(one.numel() for one in cloud.parameters())
        self.digest = "-".join(model.digest[:6] for model in self.models.values())
        # What is made of one recipe differs in rounding from one kind of processor to another; cells are of the recipe.
        self.recipe = self.digest if args.models else self.folder.name

    def _school(self) -> list[Example]:
        """What models read before they meet any device."""
        args = self.args
        if args.datasets:
            return school_of(args)
        worlds = [texts_of(args, max(args.devices), seed) for seed in (*range(MAX_SEEDS), SEARCH_WORLD)]
        return school_texts(SIZES[args.size], known=[one for world in worlds for one in world.kept_out()])

    def scene(
        self,
        questions: Questions,
        folder: Path,
        *,
        seed: int,
        factors: tuple[float, float] = (1.0, 1.0),
        rate_factor: float = 1.0,
        num_rounds: int | None = None,
        proxy: str = PROXY,
        rank: int | None = None,
    ) -> Scene:
        """Devices take turns in architecture.

        Args:
            factors: of the steps on devices and in the cloud.
            rate_factor: of all learning rates.
        """
        args, rank = self.args, rank or self.args.rank

        def steps(num: int, factor: float, rate: float) -> LocalSteps:
            own = max(1, round(num * factor))
            return LocalSteps(num_steps=own, batch_size=args.batch_size, learning_rate=rate * rate_factor)

        sites = {
            f"device-{place}": Site(
                small=self.models[FAMILIES[place % len(FAMILIES)]],
                examples=domain.train,
                steps=steps(args.local_steps, factors[0], args.rate),
            )
            for place, domain in enumerate(questions.domains)
        }
        return Scene(
            cloud=self.models[CLOUD],
            proxy=self.models[proxy],
            sites=sites,
            public=questions.public,
            questions=questions.open,
            cloud_steps=steps(args.cloud_steps, factors[1], args.cloud_rate),
            num_rounds=num_rounds or args.rounds,
            folder=folder,
            adapter_rate=args.adapter_rate * rate_factor,
            rank=rank,
            alpha=2.0 * rank,
            max_tokens=args.max_tokens,
            seed=seed,
            least_rate=args.least_rate,
        )

    def cell(self, key: Mapping[str, Any], run: Callable[[], Value]) -> Value:
        """A cell of this study: `key` and all settings decide. A loss that is nan or inf is a finding, too."""
        args = self.args
        sizes = ("num_things", "num_skills", "num_test", "num_public", "rounds", "local_steps", "cloud_steps")
        rates = ("rate", "adapter_rate", "cloud_rate", "batch_size", "rank", "top_k", "dtype")
        whole = {**key, **{one: getattr(args, one) for one in (*sizes, *rates)}, "models": self.recipe}
        if args.least_rate < 1:
            whole["least_rate"] = args.least_rate
        if args.datasets:
            own = {one: getattr(args, one) for one in ("max_tokens", "num_train", "num_open")}
            whole |= {**own, "datasets": " ".join(args.datasets), "school": " ".join(args.school)}

        def measured() -> Value:
            try:
                return {"diverged": False, "models": self.digest, **run()}
            except NonFiniteLossError:
                return {"diverged": True, "models": self.digest}

        group = f"{self.name}-{'+'.join(args.datasets)}" if args.datasets else self.name
        return self.cells.get(group, {**whole, "domains": max(args.devices), "protocol": PROTOCOL}, measured)

    def flops(self, name: str, num_devices: int, factor: float) -> dict[str, float]:
        """Operations of one round: the mean of a device, and the cloud's."""

        def run() -> Value:
            with TemporaryDirectory() as folder:
                scene = self.scene(
                    texts_of_test(self.args, num_devices, 0),
                    Path(folder),
                    seed=0,
                    factors=(factor, factor),
                    num_rounds=1,
                )
                account = Account()
                for _ in METHODS[name](self.args).rounds(scene, account):
                    pass
            return {"device": _mean(account.flops, scene.sites), "cloud": account.flops[CLOUD]}

        return self.cell({"what": "flops", "method": name, "devices": num_devices, "factor": factor}, run)

    def factors(self, name: str, num_devices: int, num_rounds: int | None = None) -> tuple[float, float]:
        """Of the steps, so that all rounds cost what those of ours do; from two counts, as the rest costs the same.

        Args:
            num_rounds: of the method, where it has fewer than ours.
        """
        if name in AT_BASE:
            return 1.0, 1.0
        times = 1.0 if num_rounds is None else self.args.rounds / num_rounds
        ours = self.flops(OURS, num_devices, 1.0)
        own = EQUAL if name == EQUAL else name
        once, twice = (self.flops(own, num_devices, factor) for factor in (1.0, 2.0))
        return solved(times * ours["device"], once["device"], twice["device"]), solved(
            times * ours["cloud"], once["cloud"], twice["cloud"]
        )

    def paid_rounds(self, name: str, num_devices: int) -> int | None:
        """How many rounds the bytes of ours pay for, at least one; None where they pay for all."""
        most = total_bytes(self.run(OURS, num_devices, 0))
        curve = self.run(name, num_devices, 0)["curve"]
        paid = sum(total_bytes(one) <= most for one in curve[1:])
        return None if paid == len(curve) - 1 else max(1, paid)

    def search(self, name: str, num_rounds: int | None = None) -> dict[float, float | None]:
        """The share of wrong answers by multiples of all learning rates, with the first number of devices, until the
        best one is between others; None where a loss was not finite.

        Facts and texts are of a world that no test has, and what is a question of any test is not asked. Bits per byte
        would choose the smallest rate for everybody: whoever learns facts becomes surer of what he does not know, too.

        Args:
            num_rounds: of the method, where it has fewer than ours.
        """
        num = self.args.devices[0]
        own = {"factors": self.factors(name, num, num_rounds), "num_rounds": num_rounds}

        def wrong(rate_factor: float) -> float | None:
            value = self.cell(
                {"what": "search", "method": name, "devices": num, "rate_factor": rate_factor, **_fewer(num_rounds)},
                lambda: self._searched(name, num, rate_factor=rate_factor, **own),
            )
            return None if value["diverged"] else float(value["wrong"])

        return search_wider(self.args.rate_factors, wrong, most=max(MOST_RATES, len(self.args.rate_factors)))

    def rate_factor(self, name: str, num_rounds: int | None = None) -> float:
        """The best one of the search; what does not learn has none to search."""
        return 1.0 if name == ZERO_SHOT else best_rate(self.search(name, num_rounds))

    def run(self, name: str, num_devices: int, seed: int, num_rounds: int | None = None) -> Value:
        """A method at equal compute and its own learning rate.

        Args:
            num_rounds: fewer than those of ours, each with as many more steps.
        """
        rate_factor = self.rate_factor(name, num_rounds)
        key = {"what": "run", "method": name, "devices": num_devices, "seed": seed, "rate_factor": rate_factor}
        own = {"factors": self.factors(name, num_devices, num_rounds), "rate_factor": rate_factor}
        return self.cell(
            {**key, **_fewer(num_rounds)},
            lambda: self._run(
                METHODS[name](self.args), num_devices, seed, answering=name, num_rounds=num_rounds, **own
            ),
        )

    def ablate(self, name: str, num_devices: int, seed: int) -> Value:
        """Ours with one thing changed, at the steps of the options and the learning rate of ours."""
        own, rate_factor = ABLATIONS[name], self.rate_factor(OURS)
        method, rank = own.method(self.args), own.rank(self.args.rank)
        if own.share < 1:
            assert isinstance(method, CoTuned), "an ablation is of ours"
            method = replace(method, num_per_round=math.ceil(own.share * num_devices))
        key = {"what": "ablation", "ablation": name, "devices": num_devices, "seed": seed, "rate_factor": rate_factor}
        changes = {"rank": rank, "proxy": own.proxy, "rate_factor": rate_factor}
        return self.cell(key, lambda: self._run(method, num_devices, seed, **changes))

    def _searched(self, name: str, num_devices: int, **changes: Any) -> Value:
        """The share of wrong answers at the end, over all sets alike: the mean of the devices' and the cloud's."""
        questions = texts_of_search(self.args, num_devices)
        with TemporaryDirectory() as folder:
            scene = self.scene(questions, Path(folder), seed=0, **changes)
            (parties,) = deque(METHODS[name](self.args).rounds(scene, Account()), maxlen=1)
            own, most = respondents(parties, questions, name), self.args.max_tokens
            devices = [
                right_of(own[f"device-{place}"], questions.of_device(place), max_tokens=most)
                for place in range(num_devices)
            ]
            cloud = right_of(own[CLOUD], questions.of_all(), max_tokens=most)
        return {"wrong": 1 - (sum(devices) / num_devices + cloud) / 2}

    def _run(self, method: Contestant, num_devices: int, seed: int, *, answering: str = OURS, **changes: Any) -> Value:
        """Args: answering: the method by whose name devices answer."""
        questions, account, curve = texts_of_test(self.args, num_devices, seed), Account(), []
        asked = {f"device-{place}": questions.of_device(place) for place in range(num_devices)}
        everything, most = questions.of_all(), self.args.max_tokens
        with TemporaryDirectory() as folder:
            scene = self.scene(questions, Path(folder), seed=seed, **changes)
            found: Mapping[str, Respondent] = {}
            for parties in method.rounds(scene, account):
                found = respondents(parties, questions, answering)
                bits = {one: bits_of(own, asked.get(one, everything), max_tokens=most) for one, own in found.items()}
                curve.append({"bits": bits, **_bytes(account, scene.sites)})
            return {
                "parties": {one: judge(own, asked.get(one, everything), max_tokens=most) for one, own in found.items()},
                "curve": curve,
                **_bytes(account, scene.sites),
                "gflop": _mean(account.flops, scene.sites) / 1e9,
                "cloud_gflop": account.flops[CLOUD] / 1e9,
                "held_mb": account.held_bytes / 1e6,
                "device_s": _mean(account.seconds, scene.sites),
                "cloud_s": account.seconds[CLOUD],
            }


def solved(wanted: float, once: float, twice: float) -> float:
    """The factor of the steps at which a + b f operations are as many as wanted, at least 0.

    Example:
        >>> solved(70.0, 30.0, 50.0), solved(70.0, 0.0, 0.0)
        (3.0, 1.0)
    """
    each = twice - once
    # Where steps cost nothing, or more steps no more because there are whole ones, nothing can be solved.
    return max(0.0, 1.0 + (wanted - once) / each) if each > 0 else 1.0


@dataclass(frozen=True)
class Respondent:
    """Who answers in one place.

    Attributes:
        parties: one, or several that answer together.
        domain: of the device whose own model is the first of two, which counts by it; None: all count alike.
    """

    parties: tuple[Party, ...]
    domain: OwnDomain | None = None

    def weights(self, examples: Sequence[Example]) -> list[tuple[float, ...]]:
        """Of each party for each question; their sum is 1."""
        if self.domain is None:
            return [(1 / len(self.parties),) * len(self.parties)] * len(examples)
        return [(one, 1 - one) for one in self.domain.chances([example.prompt for example in examples])]


def respondents(parties: Mapping[str, Party], questions: Questions, name: str) -> dict[str, Respondent]:
    """Each party alone; or on every device its own model and what is shared, which is alone as `proxy`.

    Args:
        questions: of which a device has its own texts, the public ones and all open questions.
        name: of the method, which says how devices answer.
    """
    found = {one: Respondent((party,)) for one, party in parties.items()}
    if name in TOGETHER:
        for one in found.keys() - {CLOUD, PROXY}:
            domain = own_domain(questions, int(one.rpartition("-")[2])) if name in WEIGHED else None
            found[one] = Respondent((parties[one], parties[PROXY]), domain)
    return found


def own_domain(questions: Questions, place: int) -> OwnDomain:
    """Of a device, told from what the server gives to all of them."""
    shared = [*(one.prompt for one in questions.public), *questions.open]
    return OwnDomain.of([one.prompt for one in questions.domains[place].train], shared)


def answer_nats(who: Respondent, examples: Sequence[Example], *, max_tokens: int) -> list[float]:
    """-log p of each answer and its end; of several parties together, of their probabilities' mean, as they count."""
    nats = np.array([_party_nats(party, party.read(examples, max_tokens=max_tokens)) for party in who.parties])
    shares = np.array(who.weights(examples)).reshape(len(examples), len(who.parties)).T
    with np.errstate(divide="ignore"):
        return [float(-one) for one in np.logaddexp.reduce(np.log(shares) - nats, axis=0)]


@torch.no_grad()
def _party_nats(party: Party, texts: Sequence[PairedText]) -> list[float]:
    order = sorted(range(len(texts)), key=lambda number: len(texts[number].sides[0].input_ids))
    found = [0.0] * len(texts)
    with party.loaded() as model:
        for begin in range(0, len(order), TEXTS_AT_ONCE):
            numbers = order[begin : begin + TEXTS_AT_ONCE]
            batch = SideBatch.of([texts[number] for number in numbers], 0, model.device)
            logits = batch.logits(model)[batch.target_places].float()
            nats = cross_entropy(logits, batch.targets, reduction="none").double()
            # Targets stand in the order of their texts.
            counts = [int(texts[number].sides[0].is_target.sum()) for number in numbers]
            for number, own in zip(numbers, torch.split(nats, counts), strict=True):
                found[number] = float(own.sum())
    return found


def num_answer_bytes(who: Respondent, examples: Sequence[Example], *, max_tokens: int) -> int:
    """As far as they fit into what the first party reads; the end of a text has none."""
    texts = who.parties[0].read(examples, max_tokens=max_tokens)
    return sum(len(text.text.encode()) - text.from_byte for text in texts)


def bits_of(who: Respondent, asked: Mapping[str, Sequence[Example]], *, max_tokens: int) -> float:
    """Bits per byte of the answers of all sets but the sums."""
    examples = [one for name in (OWN, CROSSED, SKILLS) for one in asked[name]]
    nats = sum(answer_nats(who, examples, max_tokens=max_tokens))
    return nats / math.log(2) / num_answer_bytes(who, examples, max_tokens=max_tokens)


def right_of(who: Respondent, asked: Mapping[str, Sequence[Example]], *, max_tokens: int) -> float:
    """Exact match, 0 to 1: the mean over the sets that have questions."""
    found = judge(who, asked, max_tokens=max_tokens)
    return sum(own["em"] for own in found.values()) / len(found)


def judge(who: Respondent, asked: Mapping[str, Sequence[Example]], *, max_tokens: int) -> dict[str, dict[str, float]]:
    """EM, Rouge-L, both 0 to 1, and bits per byte of each set that has questions."""
    questions = [(name, one) for name, examples in asked.items() for one in examples]
    written = answers_of(who, [one for _, one in questions], max_tokens=max_tokens)
    nats = answer_nats(who, [one for _, one in questions], max_tokens=max_tokens)
    found = {}
    for name, examples in asked.items():
        places = [place for place, (own, _) in enumerate(questions) if own == name]
        pairs = [(written[place], questions[place][1].target.strip()) for place in places]
        if pairs:
            num_bytes = num_answer_bytes(who, examples, max_tokens=max_tokens)
            found[name] = {
                "em": float(np.mean([exact_match(answer, truth) for answer, truth in pairs])),
                "rouge_l": float(np.mean([rouge_l(answer, truth) for answer, truth in pairs])),
                "bits": sum(nats[place] for place in places) / math.log(2) / num_bytes,
            }
    return found


def answers_of(who: Respondent, questions: Sequence[Example], *, max_tokens: int) -> list[str]:
    """What is written to each, one answer from all parties together."""
    if len(who.parties) > 1:
        writers = {str(place): party for place, party in enumerate(who.parties)}
        prompts = [one.prompt for one in questions]
        weights = [{str(place): one for place, one in enumerate(own)} for own in who.weights(questions)]
        agreed = answer_together(
            writers, prompts, max_new_tokens=MAX_NEW_TOKENS, max_tokens=max_tokens, weights=weights
        )
        return [one.text for one in agreed]
    (party,) = who.parties
    # As far as they fit into what the model reads.
    texts = party.read(questions, max_tokens=max_tokens)
    prompts = [one.text.encode()[: one.from_byte].decode() for one in texts]
    with party.loaded() as model:
        written = write_greedily(model, party.model.reader, prompts, max_new_tokens=MAX_NEW_TOKENS)
    return [one.text for one in written]


def total_bytes(point: Mapping[str, Any]) -> float:
    """Of one device so far, the download too."""
    return float(point["up"] + point["down"] + point["download"])


def _fewer(num_rounds: int | None) -> dict[str, int]:
    # Cells of all rounds say nothing of them here, as the options do.
    return {} if num_rounds is None else {"paid_rounds": num_rounds}


def _mean(by_name: Mapping[str, float], names: Mapping[str, Any]) -> float:
    """Over devices."""
    return sum(by_name.get(name, 0.0) for name in names) / len(names)


def _bytes(account: Account, sites: Mapping[str, Site]) -> dict[str, float]:
    return {
        "up": _mean(account.up, sites),
        "down": _mean(account.down, sites),
        "download": _mean(account.downloads, sites),
    }
