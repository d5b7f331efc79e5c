"""What the studies of federations share: options, cells, an algorithm at a multiple of its own learning rate, and one
federation from its first round to its last, with what it cost.

The federation is the product's: `Coordinator`, `DeviceAgent` and `InProcess`, signed messages and all.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import Value
from federated_texts import IID, StudyTexts, device_names, read_texts, split_texts
from page import Page, about_run
from study_options import (
    PERSONA,
    add_run_options,
    at_least_one,
    open_cells,
    plain_endings,
    positive,
    results_of,
    study_parser,
)

from cotune.cli.backbone_judging import judge_backbone
from cotune.data.batches import EncodedExample
from cotune.data.templates import Example
from cotune.errors import InputError, NonFiniteLossError
from cotune.federation.algorithm import Algorithm, Combine
from cotune.federation.algorithms import ALGORITHMS, KINDS, POOLED
from cotune.federation.annealed import CosineRates
from cotune.federation.arrays import Arrays
from cotune.federation.backbone_model import ResidentBackbone
from cotune.federation.coordinator import Coordinator, FederationError, Progress, RoundRules
from cotune.federation.device_agent import DeviceAgent
from cotune.federation.ferret import Ferret
from cotune.federation.fresh_adapter import fresh_adapter
from cotune.federation.in_process import InProcess, SimulatedDevice
from cotune.federation.local_model import LocalModel, LocalSteps
from cotune.federation.mixed import SEED, Mixed, SeedSteps
from cotune.federation.run_parts import algorithm_of, rule_of, with_num_layers
from cotune.federation.run_secret import RunSecret
from cotune.federation.settings import (
    CONSTANT,
    SCHEDULES,
    AdapterSettings,
    DataSettings,
    FederationSettings,
    ScheduleSettings,
)
from cotune.federation.signing import DeviceKey, Registry
from cotune.federation.simulation import mean_loss, start_of
from cotune.federation.start_first import StartFirst
from cotune.federation.transport import Arrival, Transport
from cotune.models.adapters import LoraShape
from cotune.models.backbone import Backbone
from cotune.models.residual_lora import ResidualLora
from cotune.tuning.attached import Tunable
from cotune.tuning.lora_init import initial_lora
from cotune.tuning.personal import encode_examples

# The meaning of a cell: one more, and all are run again.
PROTOCOL = 1
RATE_FACTORS = (0.3, 1.0, 3.0, 10.0, 30.0)
PISSA = "pissa"
MIXED = "mixed"
SEED_RATE_SHARE = 0.1
"""Of `mixed`: the multiple of the seed devices' learning rate, of that of the lora devices. Alone, seed mode's best
multiple is a tenth of FFA-LoRA's, so that no single one suits both."""
STRAGGLERS, LOST = "stragglers", "lost replies"
FAULT_SHARE = 0.2
WORK_S = 1.0
MAX_REJECTED = 3
"""Rounds in a row that the judge rejects; the learning rate is too large then, and a search goes on to the next."""
DEVIATIONS = (
    "Model, data, devices and rounds are those of the settings below: numbers compare the methods with each other.",
    "Devices take turns in one process and their clock is simulated; bytes are those of real signed messages, without "
    "what a transport adds.",
    "The learning rate of each method is a multiple of the product's own, the one with the least loss on the server's "
    "texts after the last round of a search with seed 0 on the IID split, which goes up from the smallest and ends at "
    "the first that is worse than the one before; all splits and seeds use it.",
)


def make_parser(name: str, description: str, *, examples: Sequence[str] = ()) -> argparse.ArgumentParser:
    """A parser with the options that these studies have.

    Args:
        name: of the study's file.
        description: of the study.
        examples: more options, one line each.
    """
    lines = ["", "--budget-minutes 30", *examples]
    parser = study_parser(
        name,
        description,
        "examples:\n"
        + "".join(f"  python reproduce/{name}.py {line}".rstrip() + "\n" for line in lines)
        + "\nA data set is a folder of --data-root in any format that `cotune tune` reads. Finished cells are kept in "
        "--cells and never run again.",
    )
    parser.add_argument(
        "--datasets",
        nargs="+",
        default=[PERSONA],
        help=f"folders there, each a domain, or {PERSONA}, which cotune makes (default: %(default)s)",
    )
    parser.add_argument(
        "--num-train", type=at_least_one, default=400, help="texts of all devices (default: %(default)s)"
    )
    parser.add_argument(
        "--num-server", type=at_least_one, default=48, help="texts of the server (default: %(default)s)"
    )
    parser.add_argument("--num-test", type=at_least_one, default=96, help="held-out texts (default: %(default)s)")
    parser.add_argument("--seeds", type=at_least_one, default=3, help="runs of every cell (default: %(default)s)")
    parser.add_argument("--devices", type=at_least_one, default=10, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=at_least_one, default=20, help="(default: %(default)s)")
    parser.add_argument("--local-steps", type=at_least_one, default=10, help="with gradients (default: %(default)s)")
    parser.add_argument(
        "--directions", type=at_least_one, default=512, help="of forward-only methods (default: %(default)s)"
    )
    parser.add_argument(
        "--pool", type=at_least_one, default=1024, help="seeds of FedKSeed's pool (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=at_least_one, default=8, help="texts in one step (default: %(default)s)")
    parser.add_argument(
        "--max-length", type=at_least_one, default=256, help="tokens of one text (default: %(default)s)"
    )
    parser.add_argument("--rank", type=at_least_one, default=8, help="of LoRA (default: %(default)s)")
    parser.add_argument(
        "--schedule",
        choices=SCHEDULES,
        default=CONSTANT,
        help="of learning rates over rounds, for the algorithms that know one (default: %(default)s)",
    )
    parser.add_argument(
        "--rate-factors",
        type=positive,
        nargs="+",
        default=list(RATE_FACTORS),
        help="searched for every method, times the product's own learning rate (default: %(default)s)",
    )
    add_run_options(parser, name)
    return parser


def options_at(kind: type, factor: float, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Options of an algorithm: its own learning rates times `factor`, and how much it works.

    Args:
        kind: its class, or that of a table of it.
        factor: of every field `learning_rate`.
        sizes: `local_steps`, `directions`, `pool`, `batch_size`.

    Example:
        >>> from cotune.federation.rolora import RoLora
        >>> sizes = {"local_steps": 4, "directions": 16, "pool": 32, "batch_size": 2}
        >>> options_at(RoLora, 3.0, sizes)
        {'steps': {'num_steps': 4, 'batch_size': 2, 'learning_rate': 0.003}}
    """
    amounts = {
        "num_steps": sizes["local_steps"] if kind is LocalSteps else sizes["directions"],
        "num_directions": sizes["directions"],
        "num_seeds": sizes["pool"],
        "batch_size": sizes["batch_size"],
    }
    if kind is Ferret:
        # Not of forward passes: how many numbers a step of back-propagation is sent as.
        del amounts["num_directions"]
    found: dict[str, Any] = {}
    for one in fields(kind):
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        if is_dataclass(default) and not isinstance(default, type):
            found[one.name] = options_at(type(default), factor, sizes)
        elif one.name in amounts:
            found[one.name] = amounts[one.name]
        elif one.name == "learning_rate" and isinstance(default, float):
            found[one.name] = default * factor
    return found


def mixed_options(factor: float, sizes: Mapping[str, int], num_devices: int) -> dict[str, Any]:
    """Of `mixed`: the second half of the devices has room for inference only.

    Example:
        >>> sizes = {"local_steps": 4, "directions": 16, "pool": 32, "batch_size": 2}
        >>> made = mixed_options(3.0, sizes, 4)
        >>> made["classes"], round(made["seed_mode"]["learning_rate"], 6), made["steps"]["learning_rate"]
        ({'device-2': 'seed', 'device-3': 'seed'}, 0.0003, 0.003)
    """
    made = options_at(Mixed, factor, sizes)
    made["seed_mode"] = options_at(SeedSteps, factor * SEED_RATE_SHARE, sizes)
    return made | {"classes": dict.fromkeys(device_names(num_devices)[num_devices // 2 :], SEED)}


class Watched:
    """A device's model that counts what an algorithm does with it. All else is the model's.

    Args:
        model: of the device.
        passes: `forward` and `backward`, of batches, added to.
    """

    def __init__(self, model: LocalModel, passes: Counter[str]) -> None:
        self._model, self._passes = model, passes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def descend(self, params: Arrays, trained: Sequence[str], steps: LocalSteps, *, seed: int) -> Any:
        self._passes.update(forward=steps.num_steps, backward=steps.num_steps)
        return self._model.descend(params, trained, steps, seed=seed)

    def gradient(self, params: Arrays, names: Sequence[str], *, num_batches: int, batch_size: int, seed: int) -> Any:
        self._passes.update(forward=num_batches, backward=num_batches)
        return self._model.gradient(params, names, num_batches=num_batches, batch_size=batch_size, seed=seed)

    @contextmanager
    def walk(self, params: Arrays, tuned: Sequence[str], *, batch_size: int, seed: int) -> Iterator[_WatchedWalk]:
        with self._model.walk(params, tuned, batch_size=batch_size, seed=seed) as walk:
            yield _WatchedWalk(walk, self._passes)


class _WatchedWalk:
    def __init__(self, walk: Any, passes: Counter[str]) -> None:
        self._walk, self._passes = walk, passes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._walk, name)

    def slope(self, seed: int, zo_eps: float) -> float:
        self._passes.update(forward=2)
        return float(self._walk.slope(seed, zo_eps))


class Lossy:
    """A transport that loses replies.

    Args:
        transport: the whole one.
        share: of replies that are lost.
        seed: of the draw.

    Attributes:
        num_lost: so many so far.
    """

    def __init__(self, transport: Transport, share: float, seed: int) -> None:
        self._transport, self._share = transport, share
        self._rng = np.random.default_rng((seed, 3))
        self.num_lost = 0

    def devices(self) -> Sequence[str]:
        return self._transport.devices()

    def send(self, tasks: Mapping[str, bytes]) -> None:
        self._transport.send(tasks)

    def receive(self, timeout_s: float) -> list[Arrival]:
        kept = []
        for arrival in self._transport.receive(timeout_s):
            if self._rng.random() < self._share:
                self.num_lost += 1
            else:
                kept.append(arrival)
        return kept

    def now_s(self) -> float:
        return self._transport.now_s()


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where A begins.

    Attributes:
        method: of the product's `STARTS`; or `PISSA`, which the product refuses, as its B is not zero: here each device
            takes it from the base itself and tunes the residual, so that the base on disk is the one that all share.
        scale: of the product's `SCALES`.
    """

    method: str = "orthonormal"
    scale: str = "lora"

    def settings(self, rank: int, kind: str = "lora") -> AdapterSettings:
        """The product's; PiSSA begins where its arrays are, as `random` does."""
        method = "random" if self.method == PISSA else self.method
        return AdapterSettings(kind=kind, rank=rank, alpha=2.0 * rank, start=method, scale=self.scale)

    def adapter(self, backbone: Backbone, own: AdapterSettings, *, seed: int) -> Tunable:
        """What the devices hold before anybody tells them where A begins."""
        if self.method != PISSA:
            return fresh_adapter(own, backbone, seed=seed)
        shape = LoraShape(rank=own.rank, alpha=own.alpha, use_rslora=own.scale == "rslora")
        made = initial_lora(backbone, shape, PISSA, (), seed=seed)
        assert isinstance(made, ResidualLora)
        return made


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One federation.

    Attributes:
        algorithm: of `ALGORITHMS`.
        factor: of its own learning rates.
        split: of the texts.
        seed: of texts, batches, directions and start.
        fault: none, `STRAGGLERS` or `LOST`.
        start: where A begins; the rounds that it takes for itself are taken beside the others.
    """

    algorithm: str
    factor: float
    split: str = IID
    seed: int = 0
    fault: str | None = None
    start: Start = Start()


@dataclass(kw_only=True)
class Stage:
    """What a federation runs on: an adapter on the backbone, and the devices' models.

    Attributes:
        start: the adapter before round 1.
        models: of the devices by name.
        server, test: nats per token of an adapter on these texts.
        passes: counted over all devices.
    """

    start: dict[str, Any]
    models: dict[str, LocalModel]
    server: Callable[[Arrays], float]
    test: Callable[[Arrays], float]
    resident: ResidentBackbone
    passes: Counter[str] = field(default_factory=Counter)


class FederatedStudy:
    """The model, the texts and the cells of one study.

    Args:
        name: of the study, for its cells.
        args: from `make_parser`.
    """

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        torch.set_num_threads(args.threads)
        self.name, self.args = name, args
        self.model_name = Path(args.model).name
        self.cells = open_cells(args)
        self.texts: StudyTexts = read_texts(
            args.datasets,
            args.data_root,
            num_train=args.num_train,
            num_server=args.num_server,
            num_test=args.num_test,
        )
        self.backbone = Backbone.from_pretrained(args.model, dtype=args.dtype, device=args.device)

    def encode(self, texts: Sequence[Example]) -> list[EncodedExample]:
        """Token ids within the context."""
        longest = min(self.args.max_length, self.backbone.spec.max_context)
        return encode_examples(self.backbone.tokenizer_json, texts, self.backbone.description, longest)

    def seeds(self) -> range:
        """Of the runs."""
        return range(self.args.seeds)

    def cell(self, key: Mapping[str, Any], run: Callable[[], Value]) -> Value:
        """A cell of this study: `key` and all settings decide. A loss that is nan or inf is a finding, too."""
        args = self.args
        shared = ("dtype", "max_length", "batch_size", "num_train", "num_server", "num_test", "devices", "rounds")
        sizes = ("local_steps", "directions", "pool", "rank")
        whole = {
            **key,
            "protocol": PROTOCOL,
            **{name: getattr(args, name) for name in (*shared, *sizes)},
            **({} if args.schedule == CONSTANT else {"schedule": args.schedule}),
            # In the first cells of these the usual rule trimmed away what they learn.
            **({"usual": "untrimmed"} if key.get("algorithm") in POOLED and "rule" not in key else {}),
            "backbone": self.backbone.spec.backbone_digest[:16],
        }

        def measured() -> Value:
            try:
                return {"diverged": False, **run()}
            except NonFiniteLossError:
                return {"diverged": True}

        return self.cells.get(f"{self.name}-{self.model_name}-{'+'.join(args.datasets)}", whole, measured)

    def algorithm(
        self, name: str, factor: float, secret: RunSecret, *, seed: int = 0, start: Start | None = None
    ) -> Algorithm:
        """The server's half, with its start and its schedule around it.

        Raises:
            InputError: it cannot be run here; says why.
        """
        if name not in ALGORITHMS:
            raise InputError(f"algorithm is {name!r}, expected one of {', '.join(ALGORITHMS)}")
        sizes = {one: getattr(self.args, one) for one in SIZES}
        kind: Any = ALGORITHMS[name]
        own = mixed_options(factor, sizes, self.args.devices) if name == MIXED else options_at(kind, factor, sizes)
        settings = replace(self.settings(seed=seed, algorithm=name, start=start), options={name: own})
        return algorithm_of(with_num_layers(settings, self.backbone.spec.num_layers), secret)

    def rate_share(self, round_number: int) -> float:
        """Of the learning rate in a round, counted from 1, by the schedule."""
        own = ScheduleSettings(kind=self.args.schedule)
        return (
            1.0
            if own.kind == CONSTANT
            else CosineRates(num_rounds=self.args.rounds, least=own.least).share(round_number)
        )

    def settings(self, *, seed: int, algorithm: str | None = None, start: Start | None = None) -> FederationSettings:
        """The product's, as far as rules and starts need them; the usual rule depends on the algorithm."""
        args = self.args
        return FederationSettings(
            algorithm=algorithm or FederationSettings.algorithm,
            seed=seed,
            data=DataSettings(num_devices=args.devices),
            adapter=(start or Start()).settings(args.rank, KINDS.get(algorithm or "", "lora")),
            rounds=RoundRules(num_rounds=args.rounds, seed=seed),
            schedule=ScheduleSettings(kind=args.schedule),
        )

    @contextmanager
    def stage(
        self, split: str, seed: int, start: Start | None = None, *, algorithm: str | None = None
    ) -> Iterator[Stage]:
        """An adapter on the backbone, of the kind that the algorithm needs, and the devices' models.

        Raises:
            InputError: the texts cannot be split in this way.
        """
        parts = split_texts(self.texts, split, num_devices=self.args.devices, seed=seed)
        start, passes = start or Start(), Counter[str]()
        settings = self.settings(seed=seed, algorithm=algorithm, start=start)
        with ResidentBackbone(self.backbone, start.adapter(self.backbone, settings.adapter, seed=seed)) as resident:
            yield Stage(
                start=start_of(resident.arrays, settings),
                models={
                    name: Watched(resident.with_texts(self.encode(own)), passes)  # type: ignore[misc]
                    for name, own in parts.items()
                },
                server=mean_loss(resident.with_texts(self.encode(self.texts.server))),
                test=mean_loss(resident.with_texts(self.encode(self.texts.test))),
                resident=resident,
                passes=passes,
            )

    def coordinator(
        self,
        stage: Stage,
        algorithm: Algorithm,
        secret: RunSecret,
        rules: RoundRules,
        combine: Combine,
        *,
        seed: int,
        keys: Mapping[str, DeviceKey] | None = None,
        fault: str | None = None,
        tamper: Callable[[str, bytes], bytes] | None = None,
        is_judged: bool = True,
        save: Callable[[Progress], None] = lambda progress: None,
    ) -> Coordinator:
        """The product's coordinator with simulated devices.

        Args:
            stage: what it runs on.
            algorithm, secret, rules, combine: the server's.
            seed: of the order of texts, and of faults.
            keys: of the devices; new ones where they are not given.
            fault: none, `STRAGGLERS` (a fifth of the devices answer after the deadline) or `LOST`.
            tamper: what becomes of replies on their way.
            is_judged: rounds that make the server's texts worse are rejected.
            save: told of the progress after each round.
        """
        keys = keys or {name: DeviceKey.generate() for name in stage.models}
        digest = self.backbone.spec.backbone_digest
        slow = set(stragglers(sorted(stage.models), seed)) if fault == STRAGGLERS else set()
        devices = [
            SimulatedDevice(
                agent=DeviceAgent(name, model, base_digest=digest, secret=secret, key=keys[name], seed=seed),
                work_s=1.5 * rules.deadline_s if name in slow else WORK_S,
            )
            for name, model in stage.models.items()
        ]
        transport: Transport = InProcess(devices, tamper=tamper)
        if fault == LOST:
            transport = Lossy(transport, FAULT_SHARE, seed)
        return Coordinator(
            algorithm,
            combine,
            transport,
            rules,
            registry=Registry({name: key.public_key for name, key in keys.items()}),
            run_id=f"{self.name}-{seed}",
            base_digest=digest,
            judge=stage.server if is_judged else None,
            save=save,
        )

    def federate(self, scene: Scene, *, on_test: bool = True, rouge_texts: int = 0) -> Value:
        """Run a federation, with the product's usual rule and its judge.

        Args:
            scene: which one.
            on_test: judge the test texts after each round; else nothing of them is seen, as in a search, and the run
                ends early where round after round is rejected.
            rouge_texts: so many test texts are written at the end.

        Returns:
            `curve`: after each round, cumulative: `loss` on the test texts, `server` on the server's, `up` and `down`
            in bytes of one device, `device_s` and `server_s`; `passes` of batches per device and round.
        """
        secret = secret_of(scene.seed)
        with self.stage(scene.split, scene.seed, scene.start, algorithm=scene.algorithm) as stage:
            settings = self.settings(seed=scene.seed, algorithm=scene.algorithm, start=scene.start)
            algorithm = self.algorithm(scene.algorithm, scene.factor, secret, seed=scene.seed, start=scene.start)
            first = algorithm.method.num_rounds if isinstance(algorithm, StartFirst) else 0
            rules = replace(settings.rounds, num_rounds=settings.rounds.num_rounds + first)
            coordinator = self.coordinator(
                stage,
                algorithm,
                secret,
                rules,
                rule_of(settings, num_devices=settings.data.num_devices),
                seed=scene.seed,
                fault=scene.fault,
            )
            progress = coordinator.begin(stage.start)
            judge = stage.test if on_test else (lambda adapter: None)
            curve = [_point(progress.start_loss, judge(coordinator.adapter(progress)), 0, 0, 0.0, 0.0)]
            remark, started_s = "", time.perf_counter()
            try:
                for reached in coordinator.run(progress):
                    progress = reached
                    wall_s = time.perf_counter() - started_s
                    curve.append(self._after(curve[-1], progress, wall_s, judge, coordinator))
                    started_s = time.perf_counter()
                    latest = [one.verdict for one in progress.records[-MAX_REJECTED:]]
                    if not on_test and latest == ["rejected"] * MAX_REJECTED:
                        break
            except FederationError as error:
                remark = str(error)
            value: Value = {
                "curve": curve,
                "remark": remark,
                "num_rejected": sum(one.verdict == "rejected" for one in progress.records),
                "num_void": sum(one.verdict == "void" for one in progress.records),
                "refused": next((reason for one in progress.records for reason in one.refused.values()), ""),
                "num_counted": sum(len(one.counted) for one in progress.records),
                "passes": {
                    kind: count / (len(stage.models) * max(1, progress.round_number))
                    for kind, count in stage.passes.items()
                },
            }
            if rouge_texts:
                stage.resident.write(coordinator.adapter(progress))
                value["rouge_l"] = self._rouge(rouge_texts)
            return value

    def search(self, name: str) -> dict[float, float | None]:
        """Nats per token on the server's texts after the last round by factor, seed 0; None where it diverged.

        Raises:
            InputError: the algorithm cannot be run on these devices.
        """
        key = {"what": "search", "algorithm": name}
        return self.search_rates(
            lambda factor: self.cell(
                {**key, "factor": factor},
                lambda: self.federate(Scene(algorithm=name, factor=factor), on_test=False),
            )
        )

    def search_rates(self, run: Callable[[float], Value]) -> dict[float, float | None]:
        """As `search`, of what `run` gives for a factor.

        Raises:
            InputError: no run was finished.
        """
        refused = ""

        def nats(factor: float) -> float | None:
            nonlocal refused
            value = run(factor)
            refused = value.get("refused") or value.get("remark") or refused
            return None if value["diverged"] or value["remark"] else float(value["curve"][-1]["server"])

        found = upwards(self.args.rate_factors, nats)
        if all(one is None for one in found.values()):
            raise InputError(f"no run was finished at any learning rate: {refused or 'the loss was not finite'}")
        return found

    def describe(self, **more: Any) -> dict[str, Any]:
        """Settings, versions and machine, so that the numbers can be judged and repeated."""
        return about_run(
            {**vars(self.args), "model": self.model_name},
            device=self.args.device,
            threads=self.args.threads,
            backbone_parameters=sum(p.numel() for p in self.backbone.model.parameters()),
            **more,
        )

    def _after(
        self,
        before: Mapping[str, Any],
        progress: Progress,
        wall_s: float,
        judge: Callable[[Arrays], float | None],
        coordinator: Coordinator,
    ) -> Value:
        """The next point of a curve."""
        last, num = progress.records[-1], self.args.devices
        device_s = last.device_seconds or 0.0
        is_changed = last.verdict == "accepted"
        return _point(
            last.heldout_loss if is_changed else before["server"],
            judge(coordinator.adapter(progress)) if is_changed else before["loss"],
            before["up"] + sum(last.bytes_up.values()) / num,
            before["down"] + sum(last.bytes_down.values()) / num,
            before["device_s"] + device_s,
            before["server_s"] + max(0.0, wall_s - device_s * len(last.counted)),
        )

    def _rouge(self, num: int) -> float:
        judged = judge_backbone(
            self.backbone, self.texts.test[:num], max_new_tokens=32, seed=0, advance=lambda done, total, note: None
        )
        return 100 * (judged.rouge_l or 0.0)


SIZES = ("local_steps", "directions", "pool", "batch_size")


def _point(
    server: float | None, loss: float | None, up: float, down: float, device_s: float, server_s: float
) -> dict[str, float | None]:
    for value in (server, loss):
        if value is not None and not math.isfinite(value):
            raise NonFiniteLossError(0, value)
    return {"server": server, "loss": loss, "up": up, "down": down, "device_s": device_s, "server_s": server_s}


def upwards(factors: Sequence[float], nats: Callable[[float], float | None]) -> dict[float, float | None]:
    """What `nats` says of learning rates, from the smallest up to the first that is worse than the one before it.

    Past the best rate more is only worse, and with forward passes alone each run is dear.

    Args:
        factors: of learning rates, in any order.
        nats: of one; None where it diverged.

    Example:
        >>> upwards([1, 10, 0.1, 100], {0.1: 3.0, 1: 2.0, 10: 2.5, 100: 9.0}.get)
        {0.1: 3.0, 1: 2.0, 10: 2.5}
        >>> upwards([1, 10], lambda factor: None)
        {1: None}
    """
    found: dict[float, float | None] = {}
    least = math.inf
    for factor in sorted(factors):
        found[factor] = value = nats(factor)
        if value is None or value > least:
            break
        least = value
    return found


def secret_of(seed: int) -> RunSecret:
    """Of a study's run, so that it can be repeated; a real run draws its own."""
    return RunSecret(hashlib.sha256(f"cotune federated study {seed}".encode()).digest())


def stragglers(devices: Sequence[str], seed: int) -> list[str]:
    """A fifth of the devices, at least one, drawn.

    Example:
        >>> len(stragglers(["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"], 0))
        2
    """
    num = max(1, round(FAULT_SHARE * len(devices)))
    return [str(one) for one in np.random.default_rng((seed, 4)).choice(list(devices), num, replace=False)]


def run_study(name: str, parser: argparse.ArgumentParser, build: Callable[[FederatedStudy], Page]) -> None:
    """A study's command: measure what is missing, write the result folder, say what came."""
    args = parser.parse_args()
    with plain_endings():
        study = FederatedStudy(name, args)
        page = build(study)
    page.publish(
        results_of(args, name),
        about=study.describe(),
        lead=f"Model {study.model_name}, data {' '.join(args.datasets)}.",
        deviations=DEVIATIONS,
    )
