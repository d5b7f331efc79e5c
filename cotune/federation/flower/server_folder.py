"""What a run needs on the machine of the SuperLink: one folder, whose path is all that `flwr run` passes on.

    federation.toml     all settings, as `cotune federate` takes them; options that the model decides are filled in
    registry.json       public keys of the devices
    run.secret          mode 0600; directions come from it, the devices have the same
    start.safetensors   the adapter before round 1
    server.json         format, digest of the backbone, the type of its numbers here, and digests of what else the
                        server has: the cloud's model of co-tuning and its texts
    checkpoints/        written by the run; where there are some, the run goes on after the last one

`[data]` of the settings is about the texts of the server alone: of them, the `num_judge` that a simulation of the same
settings would hold out judge each round. With 0 of them no backbone is loaded here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cotune.durable import is_free, new_folder, write_new
from cotune.errors import CotuneError, InputError, MismatchError
from cotune.federation.algorithm import Algorithm, Combine
from cotune.federation.arrays import Arrays, check_arrays, shapes_of
from cotune.federation.coordinator import Coordinator, Judge, Progress
from cotune.federation.coplms import CoPlms
from cotune.federation.identities import REGISTRY_FILE, SECRET_FILE
from cotune.federation.packing import MAX_BLOCK_BYTES, pack, unpack
from cotune.federation.progress_checkpoint import load_progress, save_progress
from cotune.federation.run_parts import (
    algorithm_of,
    check_inputs,
    combine_of,
    run_id,
    with_num_layers,
    with_whole_paths,
)
from cotune.federation.run_secret import RunSecret
from cotune.federation.settings import FederationSettings, as_toml
from cotune.federation.signing import Registry
from cotune.federation.transport import Transport

if TYPE_CHECKING:
    from cotune.models.backbone import Backbone

FORMAT = "cotune federation server 2"
FORMER_FORMAT = "cotune federation server 1"
"""Of folders that say no type: it was float32 in all of them."""
SETTINGS, START, SERVER, CHECKPOINTS = "federation.toml", "start.safetensors", "server.json", "checkpoints"
DTYPE = "float32"
MAX_SERVER_BYTES = 65536
# Settings, and the model that they name, give settings.
Complete = Callable[[FederationSettings, "Backbone"], FederationSettings]


@dataclass(frozen=True, kw_only=True)
class ServerFolder:
    """A run that is ready to be served.

    Attributes:
        path: of the folder.
        settings: of the run.
        registry: of the devices.
        secret: of the run.
        start: the adapter before round 1.
        base_digest: of the backbone.
        dtype: of the backbone's numbers, where it judges.
        inputs: SHA-256, hex, of what else the server has, see `cotune.federation.co_tuning_parts.inputs_of_cloud`.
    """

    path: Path
    settings: FederationSettings
    registry: Registry
    secret: RunSecret
    start: Arrays
    base_digest: str
    dtype: str = DTYPE
    inputs: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def prepare(
        cls,
        path: Path | str,
        settings: Path | str | FederationSettings,
        *,
        registry: Registry,
        secret: RunSecret,
        start: Arrays,
        base_digest: str,
        dtype: str = DTYPE,
        inputs: Mapping[str, str] | None = None,
    ) -> ServerFolder:
        """Write the folder, whole or not at all.

        Args:
            path: does not exist yet, or is empty.
            settings: as they are, or a TOML file of them.
            registry, secret, start, base_digest, dtype, inputs: see above.

        Raises:
            InputError: the folder holds something, the settings are wrong, or the disk refuses.
        """
        path, found = Path(path), _settings(settings)
        told = {"format": FORMAT, "base_digest": base_digest, "dtype": dtype, "inputs": dict(inputs or {})}
        server = json.dumps(told, indent=2) + "\n"
        check_new(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with new_folder(path) as unfinished:
                write_new(unfinished / SETTINGS, as_toml(found).encode())
                write_new(unfinished / START, pack(start, {}, START))
                write_new(unfinished / SERVER, server.encode())
                registry.save(unfinished / REGISTRY_FILE)
                secret.save(unfinished / SECRET_FILE)
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror or error}") from None
        return cls.read(path)

    @classmethod
    def read(cls, path: Path | str) -> ServerFolder:
        """What `prepare` wrote.

        Raises:
            InputError: a file is missing or wrong.
        """
        path = Path(path)
        try:
            with (path / SERVER).open("rb") as file:
                server = json.loads(file.read(MAX_SERVER_BYTES))
            with (path / START).open("rb") as file:
                start, _ = unpack(file.read(MAX_BLOCK_BYTES), START)
            if server["format"] not in (FORMAT, FORMER_FORMAT) or not isinstance(server["base_digest"], str):
                raise ValueError(f"expected format {FORMAT!r}; use the cotune that wrote it")
            dtype = DTYPE if server["format"] == FORMER_FORMAT else server["dtype"]
            if not isinstance(dtype, str):
                raise ValueError("its dtype is no text; prepare it anew")
            # Folders of earlier versions say nothing of them.
            inputs = server.get("inputs", {})
            if not isinstance(inputs, dict):
                raise ValueError("its inputs are no table; prepare it anew")
        except OSError as error:
            raise InputError(f"{path} is no folder of a run ({error.strerror or error}); prepare one first") from None
        except (ValueError, TypeError, KeyError, RecursionError, CotuneError) as error:
            raise InputError(f"{path} is no folder of a run: {error!s:.200}") from None
        check_arrays(start, shapes_of(start))
        return cls(
            path=path,
            settings=FederationSettings.read(path / SETTINGS),
            registry=Registry.load(path / REGISTRY_FILE),
            secret=RunSecret.load(path / SECRET_FILE),
            start=start,
            base_digest=server["base_digest"],
            dtype=dtype,
            inputs={str(name): str(one) for name, one in inputs.items()},
        )

    @classmethod
    def prepare_from_model(
        cls,
        path: Path | str,
        settings: Path | str | FederationSettings,
        *,
        registry: Registry,
        secret: RunSecret,
        dtype: str = DTYPE,
        complete: Complete = lambda settings, backbone: settings,
    ) -> ServerFolder:
        """Write the folder of a run that begins with a fresh adapter on the backbone that the settings name.

        What the run could not begin with is refused, most of it before the model is loaded.

        Args:
            path, settings, registry, secret, dtype: as for `prepare`.
            complete: fills in what else the model decides; its number of layers is filled in here.

        Raises:
            InputError: as for `prepare`, or the model, the adapter, the devices or the judge's texts do not fit.
        """
        # Only now: these load PyTorch and a backbone.
        from cotune.federation.backbone_model import ResidentBackbone
        from cotune.federation.co_tuning_parts import inputs_of_cloud
        from cotune.federation.fresh_adapter import fresh_adapter
        from cotune.federation.simulation import check_tasks, read_shards, start_of

        # The SuperLink is started somewhere else.
        found = with_whole_paths(_settings(settings))
        check_new(Path(path))
        check_servable(found, secret, registry)
        own = algorithm_of(found, secret)
        inputs = inputs_of_cloud(own, found) if isinstance(own, CoPlms) else {}
        if found.data.num_judge:
            read_shards(found)
        backbone = _load_backbone(found, dtype)
        found = complete(with_num_layers(found, backbone.spec.num_layers), backbone)
        with ResidentBackbone(backbone, fresh_adapter(found.adapter, backbone, seed=found.seed)) as resident:
            start = start_of(resident.arrays, found)
        algorithm = algorithm_of(found, secret)
        # A cloud's half, which makes tasks for small devices, is a model at work.
        check_tasks(algorithm, start, [] if isinstance(algorithm, CoPlms) else sorted(registry.devices))
        return cls.prepare(
            path,
            found,
            registry=registry,
            secret=secret,
            start=start,
            base_digest=backbone.spec.backbone_digest,
            dtype=dtype,
            inputs=inputs,
        )

    @property
    def run_id(self) -> str:
        """Names the run: the same settings with the same secret."""
        return run_id(self.settings, self.secret)

    def progress(self) -> Progress:
        """Where the run stands, after its last finished round.

        Raises:
            InputError: it has not begun, or no checkpoint is whole.
            MismatchError: the checkpoints are of another run.
        """
        return load_progress(self.path / CHECKPOINTS, run_id=self.run_id, base_digest=self.base_digest)

    def save_adapter(self, progress: Progress, out: Path) -> None:
        """Write the adapter after the last accepted round as a peft folder.

        Raises:
            InputError, MismatchError: the model of the settings cannot be used, or `out` not be written to.
        """
        # Only now: these load PyTorch and a backbone.
        from cotune.federation.co_tuning_parts import stacked_adapter
        from cotune.federation.fresh_adapter import fresh_adapter, trained_adapter

        algorithm, backbone = algorithm_of(self.settings, self.secret), self._backbone()
        arrays, own = algorithm.adapter(progress.state), self.settings.adapter
        if isinstance(algorithm, CoPlms):
            stacked_adapter(arrays, own).save(out, backbone.model)
        else:
            trained_adapter(fresh_adapter(own, backbone, seed=self.settings.seed), arrays).save(out, backbone.model)

    @contextmanager
    def coordinator(self, transport: Transport) -> Iterator[tuple[Coordinator, Progress]]:
        """The coordinator, and where it goes on: after the last checkpoint, or at the start.

        Raises:
            InputError: the settings, the texts or the checkpoints cannot be used.
            MismatchError: the checkpoints, or the backbone of the judge, are of another run.
        """
        checkpoints = self.path / CHECKPOINTS
        check_servable(self.settings, self.secret, self.registry)

        def save(at: Progress) -> None:
            save_progress(checkpoints, at, run_id=self.run_id, base_digest=self.base_digest)

        with self._judge() as judge:
            coordinator = Coordinator(
                self._algorithm(),
                _combine_of(self.settings, self.secret, self.registry),
                transport,
                self.settings.rounds,
                registry=self.registry,
                run_id=self.run_id,
                base_digest=self.base_digest,
                judge=judge,
                save=save,
            )
            if checkpoints.is_dir() and any(checkpoints.glob("checkpoint-*")):
                yield coordinator, self.progress()
                return
            begun = coordinator.begin(self.start)
            save(begun)
            yield coordinator, begun

    def _algorithm(self) -> Algorithm:
        """The server half; one with models of the server's own gets them."""
        algorithm = algorithm_of(self.settings, self.secret)
        if not isinstance(algorithm, CoPlms):
            return algorithm
        # Only now: it loads PyTorch.
        from cotune.federation.causal_model import CausalModel
        from cotune.federation.co_tuning_parts import inputs_of_cloud, with_cloud

        now = inputs_of_cloud(algorithm, self.settings)
        check_inputs(self.inputs, now, of=str(self.path), instead="prepare another run")
        return with_cloud(algorithm, self.settings, CausalModel(self.settings.model, self.dtype))

    @contextmanager
    def _judge(self) -> Iterator[Judge | None]:
        if self.settings.data.num_judge == 0:
            yield None
            return
        # Only now: these load PyTorch and a backbone.
        from cotune.federation.backbone_model import ResidentBackbone
        from cotune.federation.co_tuning_parts import judge_of_terms, scale_of
        from cotune.federation.fresh_adapter import fresh_adapter
        from cotune.federation.simulation import mean_loss, read_shards
        from cotune.tuning.personal import encode_examples

        settings = self.settings
        # As in a simulation of the same settings, so that both have the same curve.
        texts = read_shards(settings).judge
        backbone = self._backbone()
        encoded = encode_examples(backbone.tokenizer_json, texts, backbone.description, settings.data.max_length)
        if isinstance(algorithm_of(settings, self.secret), CoPlms):
            # Its adapters grow with what is folded.
            yield judge_of_terms(backbone, encoded, scale=scale_of(settings.adapter))
            return
        with ResidentBackbone(backbone, fresh_adapter(settings.adapter, backbone, seed=settings.seed)) as resident:
            yield mean_loss(resident.with_texts(encoded))

    def _backbone(self) -> Backbone:
        backbone = _load_backbone(self.settings, self.dtype)
        if backbone.spec.backbone_digest != self.base_digest:
            raise MismatchError(
                f"{self.settings.model} is the backbone {backbone.spec.backbone_digest[:16]}, expected "
                f"{self.base_digest[:16]}; give the model that the run was prepared with"
            )
        return backbone


def check_new(path: Path) -> None:
    """Refuse to write a run where something is.

    Raises:
        InputError: `path` is no empty folder.
    """
    if path.is_symlink() or not is_free(path):
        raise InputError(f"{path} holds something already; give a new folder for a new run")


def check_servable(settings: FederationSettings, secret: RunSecret, registry: Registry) -> None:
    """Refuse what no server could run, as far as it is seen without a model.

    Raises:
        InputError: the settings ask for made-up devices, do not fit together, or do not fit so many devices.
    """
    if settings.audit.num_canaries:
        raise InputError(
            f"audit.num_canaries is {settings.audit.num_canaries}, expected 0: made-up devices take part in "
            "simulations only; run `cotune federate` with these settings, or leave [audit] out"
        )
    _combine_of(settings, secret, registry)


def _combine_of(settings: FederationSettings, secret: RunSecret, registry: Registry) -> Combine:
    own, devices = algorithm_of(settings, secret), registry.devices
    num_merged = own.num_with_proxy(devices) if isinstance(own, CoPlms) else None
    return combine_of(settings, num_devices=len(devices), num_merged=num_merged)


def _settings(settings: Path | str | FederationSettings) -> FederationSettings:
    return settings if isinstance(settings, FederationSettings) else FederationSettings.read(settings)


def _load_backbone(settings: FederationSettings, dtype: str) -> Backbone:
    from cotune.models.backbone import Backbone

    return Backbone.from_pretrained(settings.model, dtype=dtype, device="cpu")
