"""What methods of co-tuning are compared on: one scene, one interface, one account of what each method cost.

    for parties in method.rounds(scene, account):    before round 1, and after each round
        parties[name].loaded()                       the model that answers on device `name`, or in the cloud

Everybody has the same models, texts, adapters at the start and order of texts. What a method sends goes through the
account, as the real messages of `cotune.federation.messages`, so that its bytes are those of a wire; what it computes
runs inside of `Account.at`, which counts operations and seconds.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cotune.data.templates import Example
from cotune.distillation.chunk_gate import ChunkGate
from cotune.distillation.paired_texts import PairedText
from cotune.errors import InputError
from cotune.federation.annealed import CosineRates, at_rate
from cotune.federation.arrays import AnyArrays
from cotune.federation.backbone_model import to_arrays
from cotune.federation.causal_model import CausalModel
from cotune.federation.cloud_saml import CloudSaml
from cotune.federation.comparison.party import BatchLoss, Party, teach
from cotune.federation.comparison.work_meter import WorkMeter
from cotune.federation.coplms import CloudSettings
from cotune.federation.local_model import LocalSteps
from cotune.federation.messages import SIGNATURE_BYTES, Reply, Task, decode, encode
from cotune.federation.open_questions import Answering
from cotune.models.adapters import LoraAdapter, LoraShape

CLOUD, PROXY = "cloud", "proxy"
_RUN = "comparison"


@dataclass(frozen=True, kw_only=True)
class Site:
    """A device.

    Attributes:
        small: its own model.
        examples: its texts.
        steps: of its model in a round.
    """

    small: CausalModel
    examples: Sequence[Example]
    steps: LocalSteps


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Who learns what, and how much.

    Attributes:
        cloud, proxy: models with one tokenizer; the proxy is on every device that needs it.
        sites: devices by name.
        public: texts of the server.
        questions: of the server, which nobody has answered; most methods can do nothing with them.
        cloud_steps: of the cloud's model in a round.
        adapter_rate: learning rate of the proxy's adapters, whose other steps are those of their device.
        rank, alpha: of all adapters.
        num_rounds: of every method.
        least_rate: share of all learning rates that is left in the last rounds; 1: they stay.
        max_tokens: of one text.
        folder: for what devices of methods that need a disk keep; cleared by whoever made it.
        seed: of the order of texts, and of adapters.
    """

    cloud: CausalModel
    proxy: CausalModel
    sites: Mapping[str, Site]
    public: Sequence[Example]
    cloud_steps: LocalSteps
    num_rounds: int
    folder: Path
    questions: Sequence[str] = ()
    adapter_rate: float = 1e-3
    rank: int = 8
    alpha: float = 16.0
    max_tokens: int = 128
    seed: int = 0
    least_rate: float = 1.0

    def __post_init__(self) -> None:
        if not self.sites or {CLOUD, PROXY} & self.sites.keys():
            raise InputError(f"sites are {sorted(self.sites)}, expected at least one, none named {CLOUD} or {PROXY}")

    @property
    def rates(self) -> CosineRates:
        """How all learning rates fall."""
        return CosineRates(num_rounds=self.num_rounds, least=self.least_rate)

    @property
    def shape(self) -> LoraShape:
        """Of all adapters."""
        return LoraShape(rank=self.rank, alpha=self.alpha)

    def fresh(self, model: CausalModel) -> Party:
        """A model with a fresh adapter, which changes nothing yet."""
        with model.loaded() as own:
            adapter = to_arrays(LoraAdapter.fresh(own, self.shape, seed=self.seed).params)
        return Party(model, adapter=adapter, scale=self.shape.scale)

    def start(self) -> dict[str, Party]:
        """Everybody's own model as it was given; the cloud's has an adapter to learn with."""
        return {name: Party(site.small) for name, site in self.sites.items()} | {CLOUD: self.fresh(self.cloud)}

    def proxy_steps(self, name: str) -> LocalSteps:
        """Of an adapter of the proxy on this device."""
        return replace(self.sites[name].steps, learning_rate=self.adapter_rate)

    def seed_of(self, number: int, name: str, part: int = 0) -> int:
        """Of the order of texts in a round, below 2^32; another one for each part of it."""
        place = [*self.sites, CLOUD].index(name)
        return int(np.random.SeedSequence((self.seed, number, place, part)).generate_state(1)[0])

    def saml(self, *, gate: ChunkGate | None = None, answering: Answering | None = None, **settings: Any) -> CloudSaml:
        """The server's mutual learning of cloud and proxy.

        Args:
            gate: of what devices without the proxy told.
            answering: of the open questions; None leaves them alone.
            settings: of `CloudSettings`, beside steps and ranks.
        """
        own = CloudSettings(steps=self.cloud_steps, rank=self.rank, alpha=self.alpha, **settings)
        return CloudSaml(
            own,
            cloud=self.cloud,
            proxy=self.proxy,
            examples=self.public,
            proxy_scale=self.shape.scale,
            max_tokens=self.max_tokens,
            gate=gate,
            questions=self.questions if answering is not None else (),
            answering=answering,
            seed=self.seed,
        )

    def plain_saml(self, *, mix: float, temperature: float, answering: Answering | None = None) -> CloudSaml:
        """As `saml`, with KL over the whole vocabulary at one share on both sides, and nothing that devices told."""
        whole: dict[str, Any] = {"top_k": len(self.proxy.reader.table), "temperature": temperature}
        return self.saml(answering=answering, mix=mix, proxy_mix=mix, told_weight=0.0, **whole)


class Contestant(Protocol):
    """A method."""

    def rounds(self, scene: Scene, account: Account) -> Iterator[Mapping[str, Party]]:
        """Run it.

        Args:
            scene: who learns what.
            account: told of all that is sent and computed.

        Yields:
            Before round 1 and after each round, by device and for `CLOUD`, the model that answers there; and for
            `PROXY` what travels, where that answers nowhere.

        Raises:
            InputError: the method cannot be run on this scene; says why.
            NonFiniteLossError: a loss is nan or inf.
        """
        ...


@dataclass
class Account:
    """What a method costs.

    Attributes:
        up, down: bytes by device, of whole messages.
        downloads: bytes of models that a device downloads once, by device.
        flops, seconds: by device and for `CLOUD`.
        held_bytes: the most that one device held at once in weights, gradients and optimiser state.
    """

    up: Counter[str] = field(default_factory=Counter)
    down: Counter[str] = field(default_factory=Counter)
    downloads: Counter[str] = field(default_factory=Counter)
    flops: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    held_bytes: int = 0

    def send_down(self, device: str, number: int, arrays: AnyArrays, *, digest: str) -> Mapping[str, NDArray[Any]]:
        """A task for a device, and what it reads; `digest` names the model that the arrays belong to."""
        task = Task(
            run_id=_RUN,
            round_number=number,
            device=device,
            work="learn",
            arrays=arrays,
            settings={},
            base_digest=digest,
        )
        message = encode(task)
        self.down[device] += len(message)
        return decode(message, Task).arrays

    def send_up(self, device: str, number: int, arrays: AnyArrays, *, digest: str) -> Mapping[str, NDArray[Any]]:
        """A device's reply, and what the server reads. Its signature is zeros, as long as a real one."""
        reply = Reply(
            run_id=_RUN,
            round_number=number,
            device=device,
            arrays=arrays,
            num_examples=0,
            metrics={},
            base_digest=digest,
            signature=bytes(SIGNATURE_BYTES),
        )
        message = encode(reply)
        self.up[device] += len(message)
        return decode(message, Reply).arrays

    def download(self, device: str, model: CausalModel) -> None:
        """A device downloads a model, once."""
        self.downloads[device] = model.size_bytes

    def hold(self, num_bytes: int) -> None:
        """A device held so much at once."""
        self.held_bytes = max(self.held_bytes, num_bytes)

    @contextmanager
    def at(self, name: str) -> Iterator[None]:
        """Work of a device, or of the cloud."""
        meter, begun_s = WorkMeter(), time.perf_counter()
        try:
            with meter.counting():
                yield
        finally:
            self.flops[name] += meter.flops
            self.seconds[name] += time.perf_counter() - begun_s


def learn_at(
    scene: Scene,
    account: Account,
    name: str,
    number: int,
    party: Party,
    texts: Sequence[PairedText],
    *,
    steps: LocalSteps | None = None,
    part: int = 0,
    side: int = 0,
    loss: BatchLoss | None = None,
) -> Party:
    """A round's steps of a party on a device or in the cloud, on the account.

    Args:
        name, number: where, and in which round.
        party, texts, side, loss: as for `teach`.
        steps: those of the scene for this name if left out; their learning rate falls as all do.
        part: of the round, where there are several.
    """
    whole = steps or (scene.cloud_steps if name == CLOUD else scene.sites[name].steps)
    own = at_rate(whole, scene.rates.share(number))
    seed = scene.seed_of(number, name, part)
    with account.at(name):
        if name == CLOUD:
            return teach(party, texts, own, seed=seed, side=side, loss=loss)
        return teach(party, texts, own, seed=seed, side=side, loss=loss, hold=account.hold)
