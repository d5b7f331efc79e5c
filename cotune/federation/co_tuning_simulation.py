"""A co-tuned federation in one process: devices with models of their own, and folders of their own, beside one server.

Every device loads and unloads its models as a real one does; the server's judge keeps a proxy besides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from cotune.durable import remove_folder
from cotune.errors import CotuneError, InputError
from cotune.federation.backbone_model import to_arrays
from cotune.federation.causal_model import CausalModel
from cotune.federation.co_tuning_device import CoTuningDevice
from cotune.federation.co_tuning_parts import (
    judge_of_terms,
    proxy_of,
    save_cloud_adapter,
    scale_of,
    stacked_adapter,
    with_cloud,
)
from cotune.federation.coordinator import Coordinator, Progress
from cotune.federation.coplms import PROXY_CHANNEL, CoPlms
from cotune.federation.device_agent import DeviceAgent
from cotune.federation.fresh_adapter import fresh_adapter
from cotune.federation.in_process import InProcess, SimulatedDevice
from cotune.federation.run_parts import COPLMS, algorithm_of, combine_of, run_id
from cotune.federation.run_privacy import check_privacy
from cotune.federation.run_secret import RunSecret
from cotune.federation.settings import FederationSettings
from cotune.federation.signing import DeviceKey, Registry
from cotune.federation.simulation import Shards, Simulation, read_shards, simulate, start_of
from cotune.ledger import EgressLedger
from cotune.models.backbone import Backbone
from cotune.tuning.personal import encode_examples

DEVICES, CLOUD_ADAPTER = "devices", "cloud-adapter"


def simulation_of(
    settings: FederationSettings,
    backbone: Backbone,
    *,
    secret: RunSecret,
    folder: Path,
    shards: Shards | None = None,
    ledger: EgressLedger | None = None,
    save: Callable[[Progress], None] = lambda progress: None,
) -> AbstractContextManager[Simulation]:
    """The simulation that the algorithm needs: of pairs of models for `coplms`, of one backbone for all others.

    Args:
        settings, backbone, secret, shards, ledger, save: as for `simulate`.
        folder: where devices keep what they learn for themselves.
    """
    if settings.algorithm == COPLMS:
        return simulate_co_tuning(
            settings, backbone, secret=secret, folder=folder, shards=shards, ledger=ledger, save=save
        )
    return simulate(settings, backbone, secret=secret, shards=shards, ledger=ledger, save=save)


@contextmanager
def simulate_co_tuning(
    settings: FederationSettings,
    backbone: Backbone,
    *,
    secret: RunSecret,
    folder: Path,
    shards: Shards | None = None,
    ledger: EgressLedger | None = None,
    save: Callable[[Progress], None] = lambda progress: None,
) -> Iterator[Simulation]:
    """As `simulation_of`, of `coplms`.

    Raises:
        InputError: the texts, the adapter, a model or an option do not fit.
        MismatchError: the cloud's model has another tokenizer than the proxy.
    """
    check_privacy(settings)
    if settings.audit.num_canaries:
        raise InputError(
            f"audit.num_canaries is {settings.audit.num_canaries}, expected 0 for {COPLMS}, whose replies are coded; "
            "leave [audit] out"
        )
    shards, proxy = shards or read_shards(settings), proxy_of(settings, backbone)
    algorithm = with_cloud(algorithm_of(settings, secret), settings, proxy)
    assert isinstance(algorithm, CoPlms), "the settings name it"
    scale, name = scale_of(settings.adapter), run_id(settings, secret)
    start = start_of(to_arrays(dict(fresh_adapter(settings.adapter, backbone, seed=settings.seed).params)), settings)
    devices = {
        device: CoTuningDevice(
            texts,
            small=CausalModel(small_model_of(algorithm, device), proxy.dtype, proxy.torch_device),
            proxy=proxy if algorithm.channel_of(device) == PROXY_CHANNEL else None,
            folder=folder / DEVICES / device,
            scale=scale,
            max_tokens=settings.data.max_length,
        )
        for device, texts in shards.devices.items()
    }
    for device, own in devices.items():
        try:
            own.check()
        except CotuneError as error:
            raise InputError(f"{device} cannot take part: {error}") from error
    keys = {device: DeviceKey.generate() for device in devices}
    agents = [
        DeviceAgent(
            device,
            own,
            base_digest=backbone.spec.backbone_digest,
            secret=secret,
            key=keys[device],
            seed=settings.seed,
            ledger=ledger,
            works=own.works,
        )
        for device, own in devices.items()
    ]
    judge = None
    if shards.judge:
        encoded = encode_examples(backbone.tokenizer_json, shards.judge, backbone.description, settings.data.max_length)
        judge = judge_of_terms(backbone, encoded, scale=scale)

    def keep(progress: Progress) -> dict[str, Any]:
        """Small models and the cloud's adapter, and what was downloaded once."""
        for device, own in devices.items():
            saved = folder / DEVICES / device / "model"
            if own.store.last(name) is not None:
                if saved.exists():
                    remove_folder(saved)
                own.save_small(name, saved)
        if algorithm.cloud.model:
            save_cloud_adapter(algorithm, progress.state, folder / CLOUD_ADAPTER)
        num = algorithm.num_with_proxy(devices)
        return {
            "proxy_download_bytes": proxy.size_bytes,
            "num_devices_with_proxy": num,
            "bytes_down_with_proxy": num * proxy.size_bytes
            + sum(sum(one.bytes_down.values()) for one in progress.records),
        }

    yield Simulation(
        settings=settings,
        coordinator=Coordinator(
            algorithm,
            combine_of(settings, num_devices=len(agents), num_merged=algorithm.num_with_proxy(devices)),
            InProcess([SimulatedDevice(agent=agent) for agent in agents]),
            settings.rounds,
            registry=Registry({device: key.public_key for device, key in keys.items()}),
            run_id=name,
            base_digest=backbone.spec.backbone_digest,
            judge=judge,
            save=save,
        ),
        adapter=start,
        shards=shards,
        judge=judge,
        adapter_of=lambda arrays: stacked_adapter(arrays, settings.adapter),
        keep=keep,
    )


def small_model_of(algorithm: CoPlms, device: str) -> str:
    """The folder or name of a simulated device's own model.

    Raises:
        InputError: the options name none for it.
    """
    for pattern, model in algorithm.devices.items():
        if fnmatchcase(device, pattern):
            return str(model)
    raise InputError(
        f"options.coplms.devices names no model for {device}, expected one for every device; add a line, such as "
        '"*" = "my-small-model"'
    )
