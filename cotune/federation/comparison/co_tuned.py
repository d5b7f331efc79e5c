"""Ours: `cotune.federation.coplms` as the product runs it, signed messages and all, on the scene of a comparison.

`merges_factors` is an ablation alone: A and B are averaged each apart, as in FedIT, by giving the merge one reply that
is the mean of all, which a merge of products keeps as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.federation.algorithm import Combine, Done, Job, Plan, Update, Work, mean_of
from cotune.federation.arrays import Arrays
from cotune.federation.catch_up import under
from cotune.federation.co_tuning_device import LIKELIHOODS, CoTuningDevice
from cotune.federation.comparison.party import Party
from cotune.federation.comparison.scene import CLOUD, PROXY, Account, Scene
from cotune.federation.coordinator import Coordinator, RoundRules
from cotune.federation.coplms import PROXY_CHANNEL, CloudHalf, CloudTuned, CoPlms
from cotune.federation.device_agent import DeviceAgent
from cotune.federation.in_process import InProcess, SimulatedDevice
from cotune.federation.local_model import LocalSteps
from cotune.federation.public_chunks import PublicText
from cotune.federation.robust.mean import Mean
from cotune.federation.robust.rule import RobustRule
from cotune.federation.run_secret import RunSecret
from cotune.federation.signing import DeviceKey, Registry
from cotune.federation.small_model import SMALL

_RUN = "comparison"


@dataclass(frozen=True, kw_only=True)
class CoTuned:
    """The product's method."""

    options: CoPlms = field(default_factory=CoPlms)
    """Its settings; steps, models and the cloud's half are the scene's, and mixes of the server those of `cloud`."""
    merges_factors: bool = False
    """Average A and B each apart."""
    rule: RobustRule = field(default_factory=Mean)
    """By which changes of devices become one."""
    asks: bool = True
    """Let the proxy answer the scene's open questions."""
    num_per_round: int | None = None
    """Devices that take part in a round; None: all."""
    small_times: float = 3.0
    """Steps of the small model, of the scene's: it is what answers, and its steps are the cheapest."""
    proxy_times: float = 1.5
    """Steps of each of the proxy's adapters, of the scene's: all that crosses goes through them."""

    def rounds(self, scene: Scene, account: Account) -> Iterator[Mapping[str, Party]]:
        """As `Contestant`."""
        parties, proxy = scene.start(), scene.fresh(scene.proxy)
        algorithm = self._algorithm(scene, account)
        devices = {name: self._device(scene, algorithm, name) for name in scene.sites}
        keys = {name: DeviceKey.generate() for name in devices}
        # Orders of texts come from seeds; the secret is only of directions, which this method has not.
        secret = RunSecret(bytes(range(32)))
        agents = [
            DeviceAgent(
                name,
                device,
                base_digest=scene.proxy.digest,
                secret=secret,
                key=keys[name],
                seed=scene.seed,
                works={work: _on_account(account, name, do) for work, do in device.works.items()},
            )
            for name, device in devices.items()
        ]
        for name in scene.sites:
            if algorithm.channel_of(name) == PROXY_CHANNEL:
                account.download(name, scene.proxy)
        coordinator = Coordinator(
            FactorMerge(algorithm) if self.merges_factors else algorithm,
            self.rule,
            _Counted([SimulatedDevice(agent=agent) for agent in agents], account),
            RoundRules(num_rounds=scene.num_rounds, num_devices_per_round=self.num_per_round, seed=scene.seed),
            registry=Registry({name: key.public_key for name, key in keys.items()}),
            run_id=_RUN,
            base_digest=scene.proxy.digest,
        )
        parties[PROXY] = proxy
        yield parties
        for progress in coordinator.run(coordinator.begin(proxy.adapter)):
            record = progress.records[-1]
            assert not record.refused and not record.lost, "simulated devices answer, and truly"
            account.hold(record.device_held_bytes or 0)
            parties = {
                name: replace(party, weights=_small_weights(devices[name]) or party.weights)
                for name, party in parties.items()
                if name in devices
            } | {
                CLOUD: replace(parties[CLOUD], adapter=algorithm.cloud_adapter(progress.state)),
                PROXY: replace(proxy, adapter=algorithm.adapter(progress.state)),
            }
            yield parties

    def _algorithm(self, scene: Scene, account: Account) -> CoPlms:
        if len({site.steps for site in scene.sites.values()}) > 1:
            raise InputError("sites differ in their steps, expected the same for all; the plan of a round has one")
        site = next(iter(scene.sites.values()))
        own, cloud = self.options, self.options.cloud
        steps = replace(_times(site.steps, self.proxy_times), learning_rate=scene.adapter_rate)
        half = scene.saml(
            mix=cloud.mix,
            proxy_mix=cloud.proxy_mix,
            temperature=cloud.temperature,
            top_k=cloud.top_k,
            gated=cloud.gated,
            told_weight=cloud.told_weight,
            rehearses=cloud.rehearses,
            answering=own.answering if self.asks else None,
            gate=own.device_steps.loss.gate,
        )
        return replace(
            own,
            steps=steps,
            small_steps=_times(site.steps, self.small_times),
            dst_steps=steps,
            cloud_half=_CountedHalf(half, account),
            rates=scene.rates,
        )

    @staticmethod
    def _device(scene: Scene, algorithm: CoPlms, name: str) -> CoTuningDevice:
        site = scene.sites[name]
        return CoTuningDevice(
            site.examples,
            small=site.small,
            proxy=scene.proxy if algorithm.channel_of(name) == PROXY_CHANNEL else None,
            folder=Path(scene.folder) / name,
            scale=scene.shape.scale,
            max_tokens=scene.max_tokens,
        )


@dataclass(frozen=True)
class FactorMerge:
    """The algorithm with A and B averaged each apart: one reply that is the mean of all.

    Attributes:
        inner: whose devices' halves and folds stay.
    """

    inner: CoPlms

    def start(self, adapter: Arrays) -> Arrays:
        return self.inner.start(adapter)

    def plan(self, state: Arrays, round_number: int, device: str, since: int | None) -> Plan:
        return self.inner.plan(state, round_number, device, since)

    def merge(self, state: Arrays, round_number: int, updates: Sequence[Update], combine: Combine) -> Arrays:
        told = [one for one in updates if LIKELIHOODS in one.arrays]
        changed = [one for one in updates if LIKELIHOODS not in one.arrays]
        if changed:
            mean = mean_of(changed, combine, sorted(changed[0].arrays))
            told.append(Update(device="mean", arrays=mean))
        return self.inner.merge(state, round_number, told, combine)

    def adapter(self, state: Arrays) -> dict[str, NDArray[np.float32]]:
        return self.inner.adapter(state)


class _Counted(InProcess):
    """The transport, with every byte on the account."""

    def __init__(self, devices: Sequence[SimulatedDevice], account: Account) -> None:
        super().__init__(devices, tamper=self._on_reply)
        self._account = account

    def send(self, tasks: Mapping[str, bytes]) -> None:
        for name, task in tasks.items():
            self._account.down[name] += len(task)
        super().send(tasks)

    def _on_reply(self, name: str, reply: bytes) -> bytes:
        self._account.up[name] += len(reply)
        return reply


@dataclass(frozen=True)
class _CountedHalf:
    """The cloud's half, on the account."""

    inner: CloudHalf
    account: Account

    @property
    def public(self) -> Sequence[PublicText]:
        return self.inner.public

    @property
    def questions(self) -> Sequence[str]:
        return self.inner.questions

    def start(self) -> dict[str, NDArray[np.float32]]:
        return self.inner.start()

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
        with self.account.at(CLOUD):
            return self.inner.tune(
                proxy=proxy, cloud=cloud, folds=folds, told=told, round_number=round_number, rate_share=rate_share
            )


def _times(steps: LocalSteps, factor: float) -> LocalSteps:
    return replace(steps, num_steps=max(1, round(factor * steps.num_steps)))


def _on_account(account: Account, name: str, do: Work) -> Work:
    def work(job: Job) -> Done:
        with account.at(name):
            return do(job)

    return work


def _small_weights(device: CoTuningDevice) -> dict[str, torch.Tensor]:
    return under(SMALL, device.store.last(_RUN) or {})
