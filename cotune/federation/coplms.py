"""Co-PLMs: a cloud's model and different small models improve each other through a proxy, whose shared adapter travels.

After Liu et al., arXiv 2511.11678, of whose method only the abstract could be read; the rounds are a reconstruction:

    device:    DST and SAML, see `cotune.federation.co_tuning_device`; sends how t_G = (B, A) has changed
    server:    W = B A + combine_c(B_c A_c - B A), which with the mean is the mean of the products, for any mix of ranks
               B' A' = the best adapter of rank R for W; `discarded_energy` is the share of ||W||^2 that it lacks
               where that is above `fold_above`, what is left out becomes a part of the proxy for good, on all devices
               SAML between the cloud's model and the proxy, see `cotune.federation.cloud_saml`
               everybody gets t_G, and what was folded

The small model learns public texts too, which the server hands out, and from the proxy what the cloud's model says of
them. ML-ECS of the same authors (arXiv 2602.14107) has public texts on devices; whether Co-PLMs has is not known.

Public questions without answers (`cloud.questions`) are answered by the proxy, on the server and on each device for
itself: what one device knows reaches the cloud's model and the others' small ones so.

A device without room for the proxy tells likelihoods of public texts instead (`channels`), which the server's SAML
learns from, see `cotune.federation.public_chunks`.

Wire, for each layer (m, n) and a device's rank r: r (m + n) bits / 8 bytes and 8 r of scales each way, rounded without
bias (`cotune.federation.row_codes`); 4 r (m + n) with `bits = 32`. After a round that folded k directions, as much down
for rank k, once. The proxy itself is downloaded once and not counted in rounds; the adapter's names and public texts
are, in the first. What a device got is rounded, and what it sends is the change of that; so the server's own adapter is
never rounded.
Memory on the device: the larger of proxy and small model, of which one is loaded at a time, with one adapter's
gradient and moments and what its layers keep for back-propagation; what either says of the texts waits on disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cotune.distillation.mutual_loss import MutualLossConfig
from cotune.errors import InputError
from cotune.federation.algorithm import SHOWN, Combine, Plan, Update
from cotune.federation.annealed import CosineRates, at_rate
from cotune.federation.array_layout import to_layout
from cotune.federation.arrays import Arrays, add, shapes_of
from cotune.federation.catch_up import prefixed, under
from cotune.federation.co_tuning_device import CO_TUNE, DITHER, DOWN, LIKELIHOODS, TELL, UP, CoTuningSteps
from cotune.federation.device_table import check_table, of_device
from cotune.federation.flexlora import ENERGY
from cotune.federation.folds import FOLD, fold_arrays, folds_in, round_of
from cotune.federation.local_model import LocalSteps
from cotune.federation.lora_factors import join_layers, layer_names, split_layers
from cotune.federation.mixed_ranks import check_adapter, filled_up, first_directions, rank_in
from cotune.federation.number_ranges import check_at_least
from cotune.federation.open_questions import Answering
from cotune.federation.open_questions import to_arrays as questions_to_arrays
from cotune.federation.product_merge import VANISHED, Svd, combined_products, left_out, product_change
from cotune.federation.public_chunks import PublicText, from_codes, to_arrays
from cotune.federation.row_codes import RowCodes, dither_seed
from cotune.federation.svd_factors import balanced_factors

CLOUD = "cloud/"
FOLDED = SHOWN + "folded_energy"
PROXY_CHANNEL, LIKELIHOOD_CHANNEL = "proxy", "likelihoods"
CHANNELS = {PROXY_CHANNEL: CO_TUNE, LIKELIHOOD_CHANNEL: TELL}


@dataclass(frozen=True, kw_only=True)
class CloudTuned:
    """What the server's SAML gave.

    Attributes:
        proxy, cloud: the adapters after it.
        shown: numbers for the round's record, such as losses.
    """

    proxy: dict[str, NDArray[np.float32]]
    cloud: dict[str, NDArray[np.float32]]
    shown: Mapping[str, float]


class CloudHalf(Protocol):
    """The cloud's model with its public texts: `cotune.federation.cloud_saml`."""

    @property
    def public(self) -> Sequence[PublicText]:
        """What devices without the proxy are given."""
        ...

    @property
    def questions(self) -> Sequence[str]:
        """What the proxy is asked, on devices too."""
        ...

    def start(self) -> dict[str, NDArray[np.float32]]:
        """The cloud's adapter before round 1."""
        ...

    def tune(
        self,
        *,
        proxy: Arrays,
        cloud: Arrays,
        folds: Mapping[int, Arrays],
        told: Sequence[NDArray[np.float32]],
        round_number: int,
        rate_share: float = 1.0,
    ) -> CloudTuned:
        """SAML between the cloud's model and the proxy.

        Args:
            proxy, cloud: the adapters.
            folds: what the proxy's weights hold besides, by round.
            told: what each device of the second channel said of all public texts.
            round_number: decides the order of texts.
            rate_share: of the learning rates, in this round.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class CloudSettings:
    """The cloud's model and how it learns."""

    model: str = ""
    """A folder or a Hub name, with the proxy's tokenizer; empty: no SAML on the server."""
    public: str = ""
    """Texts of the server, as for `cotune tune`; devices of the second channel see them."""
    questions: str = ""
    """Public questions that the proxy answers, a file as for `cotune tune` whose rows need no answers; empty: none."""
    template: str | None = None
    """How columns become prompts; found by itself if left out."""
    limit: int = 256
    """Public texts, and questions, at most."""
    steps: LocalSteps = field(default_factory=LocalSteps)
    """Of both models in each round."""
    rank: int = 8
    """Of the cloud's adapter."""
    alpha: float = 16.0
    """Its strength, over the rank."""
    mix: float = 0.5
    """a_0, what the cloud's model learns from the proxy, against the texts themselves."""
    proxy_mix: float = 0.5
    """b_0, what the proxy learns from the cloud's model."""
    temperature: float = 2.0
    """T."""
    top_k: int = 64
    """Tokens that are compared one by one; the rest is one event."""
    gated: bool = False
    """Learn from the other model only at tokens where it is better; else every token counts fully."""
    told_weight: float = 0.5
    """Of what devices of the second channel told, for both models."""
    rehearses: bool = False
    """Let the proxy learn what it answered to open questions, too, so that public texts of another kind than devices'
    do not make it forget what these taught."""

    def __post_init__(self) -> None:
        check_at_least(1, limit=self.limit, rank=self.rank, top_k=self.top_k)
        for name in ("mix", "proxy_mix"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected 0 to 1")
        check_at_least(0, told_weight=self.told_weight)
        if bool(self.model) != bool(self.public):
            raise InputError(
                f"cloud has model {self.model!r} and public {self.public!r}, expected both or none; SAML on the server "
                "needs a model and texts"
            )
        if self.questions and not self.model:
            raise InputError(f"cloud.questions is {self.questions!r}, but there is no cloud.model; name it, too")


@dataclass(frozen=True, kw_only=True)
class CoPlms:
    """The server half; `cotune.federation.co_tuning_device` is the device's.

    The state is the proxy's adapter; `cloud/NAME`, the cloud's; `fold/ROUND/..`, factors that became a part of the
    proxy in a round, see `cotune.federation.folds`; and numbers of the last round under `shown/`.
    """

    steps: LocalSteps = field(default_factory=LocalSteps)
    """Of the shared adapter in SAML."""
    small_steps: LocalSteps | None = None
    """Of the small model; those of `steps` if left out."""
    dst_steps: LocalSteps | None = None
    """Of the private adapter; those of `steps` if left out."""
    private_rank: int = 8
    """Of the private adapter; 0: none, and no DST."""
    loss: MutualLossConfig = field(default_factory=MutualLossConfig)
    """What both learn from each other; `mix` is that of the small model."""
    gated: bool = True
    """Learn from the other one only where it is better; else every chunk counts fully."""
    proxy_mix: float = 0.5
    """`mix` of the proxy."""
    public_share: float = 0.5
    """Of the texts in a step of the small model, the server's public ones, where it has any; 0: none."""
    answering: Answering = field(default_factory=Answering)
    """Of the server's open questions, `cloud.questions`."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Rank of the shared adapter by device name or pattern; all others have the adapter's."""
    fold_above: float = 0.1
    """Share of the energy that a merge may leave out before it is folded into the proxy; 1: never."""
    fold_rank: int = 1
    """Directions that one round may fold in each layer."""
    bits: int = 5
    """Of a number of the adapter on the wire: 2 to 8, or 32."""
    channels: Mapping[str, object] = field(default_factory=dict)
    """`proxy` or `likelihoods` by a pattern of names; the first that fits counts, and all others have the proxy."""
    devices: Mapping[str, object] = field(default_factory=dict)
    """In a simulation, each device's own model by a pattern of names; real devices name it themselves."""
    cloud: CloudSettings = field(default_factory=CloudSettings)
    """The cloud's model."""
    cloud_half: CloudHalf | None = None
    """No setting: the cloud's model at work, or None without one."""
    rates: CosineRates | None = None
    """No setting: how all learning rates fall, those of the server too, see `[schedule]`; None: not at all."""

    def __post_init__(self) -> None:
        check_table(self.ranks, "ranks", at_least=1)
        check_at_least(0, private_rank=self.private_rank, fold_rank=self.fold_rank)
        for name in ("proxy_mix", "public_share", "fold_above"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected 0 to 1")
        RowCodes(self.bits)
        for pattern, channel in self.channels.items():
            if channel not in CHANNELS:
                raise InputError(f"channels.{pattern} is {channel!r:.40}, expected one of {', '.join(CHANNELS)}")
        for pattern, model in self.devices.items():
            if not isinstance(model, str) or not model:
                raise InputError(f"devices.{pattern} is {model!r:.40}, expected a model's folder or name")
        if LIKELIHOOD_CHANNEL in self.channels.values() and not self.cloud.model:
            raise InputError(
                "channels has likelihoods, which only the server's SAML learns from; name the cloud's model and public "
                "texts under cloud"
            )
        if self.cloud.questions:
            self._check_answers_have_room()

    def _check_answers_have_room(self) -> None:
        """Shares of a step are whole texts: that none of these are answers shall be asked for, and not happen."""
        device = {"a device": self.device_steps.num_public} if self.public_share else {}
        for whose, num_public in (device | {"the cloud": self.cloud.steps.batch_size}).items():
            if self.answering.share and not self.answering.num_of(num_public):
                raise InputError(
                    f"answering.share is {self.answering.share}, of which nothing is left in a step of {whose}, whose "
                    f"public texts are {num_public}; take a larger batch_size, or answering.share = 0"
                )

    def channel_of(self, device: str) -> str:
        """`proxy` or `likelihoods`.

        Example:
            >>> cloud = CloudSettings(model="big", public="public.jsonl")
            >>> CoPlms(channels={"watch-*": "likelihoods"}, cloud=cloud).channel_of("watch-3")
            'likelihoods'
        """
        return str(next((one for pattern, one in self.channels.items() if fnmatchcase(device, pattern)), PROXY_CHANNEL))

    def num_with_proxy(self, devices: Iterable[str]) -> int:
        """Of these devices, who have the proxy and send what is merged."""
        return sum(self.channel_of(one) == PROXY_CHANNEL for one in devices)

    @property
    def codes(self) -> RowCodes:
        """How the adapter travels."""
        return RowCodes(self.bits)

    @property
    def device_steps(self) -> CoTuningSteps:
        """What every device does in a round."""
        return CoTuningSteps(
            dst=self.dst_steps or self.steps,
            proxy=self.steps,
            small=self.small_steps or self.steps,
            private_rank=self.private_rank,
            loss=self.loss if self.gated else replace(self.loss, gate=None),
            proxy_mix=self.proxy_mix,
            public_share=self.public_share,
            answering=self.answering,
            bits=self.bits,
        )

    def start(self, adapter: Arrays) -> Arrays:
        check_adapter(adapter, self.ranks)
        zero = np.zeros(1, np.float32)
        cloud = {} if self.cloud_half is None else self.cloud_half.start()
        return dict(adapter) | prefixed(CLOUD, cloud) | {ENERGY: zero, FOLDED: zero}

    def plan(self, state: Arrays, round_number: int, device: str, since: int | None) -> Plan:
        settings = at_rate(self.device_steps, self._rate_share(round_number)).as_settings()
        if self.channel_of(device) == LIKELIHOOD_CHANNEL:
            assert self.cloud_half is not None, "checked with the settings"
            public = self.cloud_half.public
            return Plan(
                work=TELL,
                arrays=to_arrays(public) if since is None else {},
                settings=settings,
                reply={LIKELIHOODS: (sum(one.num_slots for one in public),)},
                codes=frozenset([LIKELIHOODS]),
                decode=lambda arrays: {LIKELIHOODS: from_codes(arrays[LIKELIHOODS])},
            )
        own = first_directions(self.shared(state), of_device(self.ranks, device))
        # A device that did the work of a round has what was folded in the rounds before it.
        folds = {
            name: array
            for name, array in state.items()
            if name.startswith(FOLD) and (since is None or round_of(name) >= since)
        }
        codes, shapes = self.codes, shapes_of(own)
        coded = codes.encode(own, dither_seed(round_number, DOWN))
        return Plan(
            work=CO_TUNE,
            arrays={**coded, **folds, **(self._once(shapes) if since is None else {})},
            settings={**settings, DITHER: device},
            reply=codes.coded_shapes(shapes),
            codes=codes.code_names,
            decode=lambda arrays: codes.decode(arrays, shapes, dither_seed(round_number, f"{UP} {device}")),
        )

    def _rate_share(self, round_number: int) -> float:
        return 1.0 if self.rates is None else self.rates.share(round_number)

    def _once(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, NDArray[Any]]:
        """What a device with the proxy gets in its first round, and keeps."""
        if self.cloud_half is None or not self.public_share:
            return to_layout(shapes)
        public = self.cloud_half.public
        return {
            **to_layout(shapes),
            **(to_arrays(public) if public else {}),
            **questions_to_arrays(self.cloud_half.questions),
        }

    def merge(self, state: Arrays, round_number: int, updates: Sequence[Update], combine: Combine) -> Arrays:
        adapter, folds = self.shared(state), {n: array for n, array in state.items() if n.startswith(FOLD)}
        shapes, shown = shapes_of(adapter), {ENERGY: 0.0, FOLDED: 0.0}
        if changed := [one for one in updates if LIKELIHOODS not in one.arrays]:
            adapter, folded, shown = self._merged(adapter, round_number, changed, combine)
            folds |= fold_arrays(round_number, folded, shapes, self.codes)
        cloud = under(CLOUD, state)
        if self.cloud_half is not None:
            told = [one.arrays[LIKELIHOODS] for one in updates if LIKELIHOODS in one.arrays]
            tuned = self.cloud_half.tune(
                proxy=adapter,
                cloud=cloud,
                folds=folds_in(folds, shapes, self.codes),
                told=told,
                round_number=round_number,
                rate_share=self._rate_share(round_number),
            )
            adapter, cloud = tuned.proxy, tuned.cloud
            shown |= {SHOWN + name: number for name, number in tuned.shown.items()}
        numbers = {name: np.array([number], np.float32) for name, number in shown.items()}
        return {**adapter, **folds, **prefixed(CLOUD, cloud), **numbers}

    def adapter(self, state: Arrays) -> dict[str, NDArray[np.float32]]:
        """The shared adapter and all that was folded, as one of a larger rank on the proxy as it was downloaded."""
        stacked = self.shared(state)
        for folded in folds_in(state, shapes_of(stacked), self.codes).values():
            for names in layer_names(sorted(folded)).values():
                stacked[names.a] = np.concatenate([stacked[names.a], folded[names.a]])
                stacked[names.b] = np.concatenate([stacked[names.b], folded[names.b]], axis=1)
        ranks = [stacked[names.a].shape[0] for names in layer_names(sorted(stacked)).values()]
        # A layer in which less was folded is filled up with zeros.
        return filled_up(stacked, max(ranks))

    def shared(self, state: Arrays) -> dict[str, NDArray[np.float32]]:
        """The proxy's adapter, which travels."""
        return {name: array for name, array in state.items() if not name.startswith((FOLD, CLOUD, SHOWN))}

    def cloud_adapter(self, state: Arrays) -> dict[str, NDArray[np.float32]]:
        """The cloud's adapter, which does not; empty without a cloud's model."""
        return under(CLOUD, state)

    def _merged(
        self, adapter: Arrays, round_number: int, updates: Sequence[Update], combine: Combine
    ) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.float32]], dict[str, float]]:
        """The adapter after the round, what is folded, and what is shown."""
        before, names = split_layers(adapter, 1.0), layer_names(sorted(adapter))
        changes = []
        for one in updates:
            sent = first_directions(adapter, rank_in(one.arrays))
            had = self.codes.rounded(sent, dither_seed(round_number, DOWN))
            old, new = split_layers(had, 1.0), split_layers(add(had, one.arrays), 1.0)
            changes.append({layer: product_change(new[layer], old[layer]) for layer in before})
        products = combined_products(before, changes, np.array([one.weight for one in updates], np.float64), combine)
        ranks = {layer: own.rank for layer, own in before.items()}
        merged = {layer: balanced_factors(*products[layer], ranks[layer], 1.0, vanished=VANISHED) for layer in before}
        whole = sum(_energy(one) for one in products.values())
        lost = sum(_energy(products[layer], ranks[layer]) for layer in before)
        share = lost / whole if whole > 0 else 0.0
        folded, kept = {}, 0.0
        if share > self.fold_above and self.fold_rank:
            for layer, product in products.items():
                rest = left_out(product, ranks[layer], most=self.fold_rank)
                if rest is not None:
                    folded[layer] = rest
                    end = ranks[layer] + rest.rank
                    kept += _energy(product, ranks[layer]) - _energy(product, end)
        shown = {ENERGY: share, FOLDED: kept / whole if whole > 0 else 0.0}
        return join_layers(merged, names), join_layers(folded, names), shown


def _energy(product: Svd, rank: int = 0) -> float:
    """||.||^2 of what lies behind the first `rank` directions."""
    return float(np.square(product[1][rank:]).sum())
