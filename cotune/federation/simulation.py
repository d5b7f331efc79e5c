"""A federation in one process, from its settings: devices with shards of the texts, a judge, and the coordinator."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cotune.data import DEMO_PERSONA, Example, format_answer, format_request, persona_split, read_examples
from cotune.data.batches import EncodedExample
from cotune.data.client_shards import ClientShards, shard_dirichlet, shard_iid, shard_sizes
from cotune.errors import InputError
from cotune.federation.algorithm import Algorithm
from cotune.federation.arrays import Arrays
from cotune.federation.backbone_model import BackboneModel, ResidentBackbone
from cotune.federation.canary_devices import CanaryDevices, audited_shapes
from cotune.federation.coordinator import Coordinator, Progress
from cotune.federation.device_agent import DeviceAgent
from cotune.federation.fresh_adapter import fresh_adapter, trained_adapter
from cotune.federation.in_process import InProcess, SimulatedDevice
from cotune.federation.orthonormal_rows import orthonormal_rows
from cotune.federation.run_parts import algorithm_of, combine_of, run_id, with_num_layers
from cotune.federation.run_privacy import check_privacy
from cotune.federation.run_secret import RunSecret, direction_seed
from cotune.federation.settings import DataSettings, FederationSettings
from cotune.federation.signing import DeviceKey, Registry
from cotune.ledger import EgressLedger
from cotune.models.backbone import Backbone
from cotune.tuning.attached import Tunable
from cotune.tuning.personal import encode_examples

PERSONA = "persona"
NUM_PERSONA = 400
"""Texts that cotune makes where no limit is given."""
MAX_LABELS = 200


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Who has which texts.

    Attributes:
        devices: by name the texts of each.
        judge: texts that no device has.
        table: counts, in Markdown.
    """

    devices: dict[str, list[Example]]
    judge: list[Example]
    table: str

    @property
    def digest(self) -> str:
        """SHA-256 of who has which texts, in hexadecimal: a run goes on with the same alone."""
        everyone = [*sorted(self.devices.items()), ("", self.judge)]
        told = [[name, [[one.prompt, one.target] for one in texts]] for name, texts in everyone]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """A federation that is ready to run.

    Attributes:
        settings: as given.
        coordinator: runs it.
        adapter: where it begins.
        shards: of the texts.
        canaries: of the audit; None without one.
        judge: loss of an adapter on the judge's texts, nats per token; None without such texts.
        adapter_of: makes an adapter that can be saved and attached.
        keep: writes what a run gives beside its adapter, and says numbers for its summary.
    """

    settings: FederationSettings
    coordinator: Coordinator
    adapter: Arrays
    shards: Shards
    judge: Callable[[Arrays], float] | None
    adapter_of: Callable[[Arrays], Tunable]
    canaries: CanaryDevices | None = None
    keep: Callable[[Progress], Mapping[str, Any]] = lambda progress: {}


def read_shards(settings: FederationSettings) -> Shards:
    """The texts, split over devices and judge; the same for the same settings.

    Raises:
        InputError: there are too few texts, or they cannot be split in this way.
    """
    data, seed = settings.data, settings.seed
    if data.split == "domains":
        parts = _domains(data, seed)
        judge, devices = _take_judge(parts, data.num_judge)
        names = [f"{name}" for name in devices]
        return Shards(devices=devices, judge=judge, table=_counts({n: len(devices[n]) for n in names}))
    texts = _texts(data, seed)
    order = np.random.default_rng((seed, 1)).permutation(len(texts))
    if len(texts) < data.num_judge + data.num_devices * data.min_examples:
        raise InputError(
            f"there are {len(texts)} texts, expected at least {data.num_judge} for the judge and {data.min_examples} "
            f"for each of {data.num_devices} devices; give more texts, fewer devices or a smaller num_judge"
        )
    judge = [texts[index] for index in order[: data.num_judge]]
    own = [texts[index] for index in order[data.num_judge :]]
    shards, labels = _split(own, data, seed)
    width = len(str(shards.num_clients - 1))
    devices = {f"device-{index:0{width}d}": part for index, part in enumerate(shards.take(own))}
    return Shards(devices=devices, judge=judge, table=shards.table(labels))


@contextmanager
def simulate(
    settings: FederationSettings,
    backbone: Backbone,
    *,
    secret: RunSecret,
    shards: Shards | None = None,
    ledger: EgressLedger | None = None,
    save: Callable[[Progress], None] = lambda progress: None,
) -> Iterator[Simulation]:
    """A federation of `settings`; the backbone is as before afterwards.

    Args:
        settings: what to run.
        backbone: shared by all devices, which take turns.
        secret: of the run; directions come from it, so a resumed run needs the same.
        shards: what `read_shards` gives for the settings, where it was called before.
        ledger: told of everything that leaves a device.
        save: told of the progress after each round.

    Raises:
        InputError: the texts, the adapter or the algorithm do not fit.
    """
    check_privacy(settings)
    shards = shards or read_shards(settings)
    algorithm = algorithm_of(with_num_layers(settings, backbone.spec.num_layers), secret)
    fresh = fresh_adapter(settings.adapter, backbone, seed=settings.seed)

    def encode(texts: Sequence[Example]) -> list[EncodedExample]:
        return encode_examples(backbone.tokenizer_json, texts, backbone.description, settings.data.max_length)

    with ResidentBackbone(backbone, fresh) as resident:
        adapter = start_of(resident.arrays, settings)
        models = {name: resident.with_texts(encode(texts)) for name, texts in shards.devices.items()}
        check_tasks(algorithm, adapter, list(models))
        canaries = canaries_of(settings, algorithm, adapter, secret)
        names = [*models, *(canaries.names if canaries else [])]
        keys = {name: DeviceKey.generate() for name in names}
        digest = backbone.spec.backbone_digest
        agents = [
            DeviceAgent(
                name,
                model,
                base_digest=digest,
                secret=secret,
                key=keys[name],
                seed=settings.seed,
                ledger=ledger,
            )
            for name, model in models.items()
        ]
        if canaries:
            agents += [
                DeviceAgent(
                    name,
                    # It sends what it always sends; the model is never asked.
                    next(iter(models.values())),
                    base_digest=digest,
                    secret=secret,
                    key=keys[name],
                    ledger=ledger,
                    works=canaries.works(name),
                )
                for name in canaries.names
            ]
        combine = combine_of(settings, num_devices=len(agents))
        judge = mean_loss(resident.with_texts(encode(shards.judge))) if shards.judge else None
        coordinator = Coordinator(
            algorithm,
            canaries.watched(combine) if canaries else combine,
            InProcess([SimulatedDevice(agent=agent) for agent in agents]),
            settings.rounds,
            registry=Registry({name: key.public_key for name, key in keys.items()}),
            run_id=run_id(settings, secret),
            base_digest=digest,
            judge=judge,
            save=save,
        )

        yield Simulation(
            settings=settings,
            coordinator=coordinator,
            adapter=adapter,
            shards=shards,
            judge=judge,
            adapter_of=lambda arrays: trained_adapter(fresh, arrays),
            canaries=canaries,
        )


def check_tasks(algorithm: Algorithm, adapter: Arrays, devices: Sequence[str]) -> None:
    """Refuse a federation in which no device can do anything, before a run of it begins.

    Raises:
        InputError: the algorithm has a task for none of them, as where all have too little memory.
    """
    state, refusal = algorithm.start(adapter), None
    for device in devices:
        try:
            algorithm.plan(state, 1, device, None)
            return
        except InputError as error:
            refusal = refusal or error
    if refusal is not None:
        raise refusal


def canaries_of(
    settings: FederationSettings, algorithm: Algorithm, adapter: Arrays, secret: RunSecret
) -> CanaryDevices | None:
    """The canary devices that the settings ask for.

    Raises:
        InputError: the algorithm cannot be audited, or there would be too many numbers.
    """
    if not settings.audit.num_canaries:
        return None
    # Rounds are counted from 1, so no direction has these seeds.
    seeds = (direction_seed(secret, 0, 0), direction_seed(secret, 0, 1))
    return CanaryDevices(
        settings.audit.num_canaries,
        audited_shapes(algorithm, adapter),
        norm=settings.privacy.clip_norm if settings.privacy.is_on else settings.audit.norm,
        seeds=seeds,
        num_rounds=settings.rounds.num_rounds,
    )


def mean_loss(model: BackboneModel) -> Callable[[Arrays], float]:
    """Nats per token of a model's texts, as a judge."""

    def judge(adapter: Arrays) -> float:
        total, num_tokens = model.evaluate(adapter)
        return total / num_tokens

    return judge


def start_of(arrays: Arrays, settings: FederationSettings) -> dict[str, NDArray[np.float32]]:
    """The adapter before round 1: of LoRA, B is zero, A random or of orthonormal rows."""
    found = dict(arrays)
    if settings.adapter.kind == "lora" and settings.adapter.start != "random":
        for index, name in enumerate(sorted(name for name in found if "lora_A" in name)):
            rank, dim = found[name].shape
            found[name] = orthonormal_rows(rank, dim, settings.seed + index)
    return found


def _texts(data: DataSettings, seed: int) -> list[Example]:
    if data.path == PERSONA:
        exchanges, _ = persona_split(DEMO_PERSONA, seed, data.limit or NUM_PERSONA, 0)
        return [Example(format_request(one.request), format_answer(one.answer)) for one in exchanges]
    return read_examples(data.path, data.template, data.limit, seed)


def _split(texts: Sequence[Example], data: DataSettings, seed: int) -> tuple[ClientShards, list[str] | None]:
    """Shards, and the labels that they were split by."""
    sizes = {"num_clients": data.num_devices, "seed": seed, "min_examples": data.min_examples}
    if data.split == "dirichlet":
        labels = [one.target.strip() for one in texts]
        if len(set(labels)) > MAX_LABELS:
            raise InputError(
                f"split is 'dirichlet' and the texts have {len(set(labels))} different targets, expected at most "
                f"{MAX_LABELS} labels; give a classification data set, or split by domains, sizes or iid"
            )
        return shard_dirichlet(labels, alpha=data.alpha, **sizes), labels
    if data.split == "sizes":
        return shard_sizes(len(texts), **sizes), None
    return shard_iid(len(texts), **sizes), None


def _domains(data: DataSettings, seed: int) -> dict[str, list[Example]]:
    """One device for each data file or folder in the folder."""
    folder = Path(data.path)
    found = (
        sorted(one for one in folder.iterdir() if one.suffix in (".jsonl", ".csv", ".parquet") or one.is_dir())
        if folder.is_dir()
        else []
    )
    if len(found) < 2:
        raise InputError(
            f"split is 'domains' and {data.path} has {len(found)} data files, expected one for each device, at least 2"
        )
    limit = None if data.limit is None else max(1, data.limit // len(found))
    return {one.stem: read_examples(str(one), data.template, limit, seed) for one in found}


def _take_judge(parts: dict[str, list[Example]], num_judge: int) -> tuple[list[Example], dict[str, list[Example]]]:
    """As many texts of every domain for the judge."""
    each = num_judge // len(parts)
    name = min(parts, key=lambda one: len(parts[one]))
    least = len(parts[name])
    if least <= each:
        raise InputError(
            f"num_judge is {num_judge}, of which {each} are from each domain, and {name} has {least} texts; take "
            f"{(least - 1) * len(parts)} or fewer, or add texts"
        )
    judge = [text for texts in parts.values() for text in texts[:each]]
    return judge, {name: texts[each:] for name, texts in parts.items()}


def _counts(sizes: dict[str, int]) -> str:
    rows = [f"| {name} | {size} |" for name, size in sizes.items()]
    return "\n".join(["| client | examples |", "|---|---|", *rows])
