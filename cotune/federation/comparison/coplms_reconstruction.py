"""Co-PLMs, arXiv 2511.11678, as its abstract and its authors' other papers let one think that it works.

Against `cotune.federation.coplms`, which is ours: tokens are aligned by minimum edit distance and time warping and not
by bytes, no gate chooses what is learnt, both models of a device are in memory and learn in the same step, factors are
averaged each apart, and numbers travel in float32. In a round, with w_i the private adapter and t_G the shared one:

    device    w_i:  CE of g(t_G, w_i)                                          t_G frozen
              h_i:  (1 - a) CE + a T^2 KL(A[p_g] || p_h)                       at once with
              t_G:  (1 - b) CE + b T^2 KL(A^-1[p_h] || p_g)                    w_i attached and frozen
    server    t_G = sum_i (n_i / n) t_i, of A and of B
              the cloud's f and g, on public texts:  (1 - a) CE + a T^2 KL of the other one, both ways

A[.] is `TokenMap.pooled`. The means over targets in KL are over those that have something beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cotune.distillation.mapped_targets import TokenMap, WarpedText
from cotune.distillation.paired_texts import PairedText, pair_texts
from cotune.errors import InputError
from cotune.federation.algorithm import Update
from cotune.federation.annealed import at_rate
from cotune.federation.arrays import difference
from cotune.federation.backbone_model import MAX_GRAD_NORM
from cotune.federation.comparison.party import Party
from cotune.federation.comparison.scene import CLOUD, PROXY, Account, Scene, Site, learn_at
from cotune.federation.fedit import FedIT
from cotune.federation.flora import fresh_adapter
from cotune.federation.mutual_descent import SideBatch, batches_of, held_bytes
from cotune.federation.number_ranges import check_at_least, check_positive
from cotune.federation.robust.mean import Mean

PROXY_SIDE, SMALL_SIDE = 0, 1


@dataclass(frozen=True, kw_only=True)
class CoPlmsReconstruction:
    """Mutual learning over tokens that are mapped by edit distance."""

    mix: float = 0.5
    """a and b, of the other model against the texts, on devices and server."""
    temperature: float = 2.0
    """T."""
    private_rank: int = 8
    """Of w_i."""

    def __post_init__(self) -> None:
        check_at_least(1, private_rank=self.private_rank)
        check_positive(temperature=self.temperature)
        if not 0 < self.mix <= 1:
            raise InputError(
                f"mix is {self.mix}, expected above 0 and at most 1; without it nobody learns from another"
            )

    def rounds(self, scene: Scene, account: Account) -> Iterator[Mapping[str, Party]]:
        """As `Contestant`."""
        algorithm, parties, proxy = FedIT(), scene.start(), scene.fresh(scene.proxy)
        saml = scene.plain_saml(mix=self.mix, temperature=self.temperature)
        devices = {name: _Device.of(scene, site) for name, site in scene.sites.items()}
        private = {
            name: fresh_adapter(proxy.adapter, self.private_rank, scene.seed_of(0, name)) for name in scene.sites
        }
        for name in scene.sites:
            account.download(name, scene.proxy)
        state, parties[PROXY] = algorithm.start(proxy.adapter), proxy
        yield parties
        for number in range(1, scene.num_rounds + 1):
            learnt, updates = dict(parties), []
            for name, device in devices.items():
                plan = algorithm.plan(state, number, name, None)
                had = dict(account.send_down(name, number, plan.arrays, digest=scene.proxy.digest))
                domain = replace(proxy, adapter=private[name], frozen=had)
                domain = learn_at(
                    scene, account, name, number, domain, device.texts, steps=scene.proxy_steps(name), part=1
                )
                private[name] = dict(domain.adapter)
                shared = replace(proxy, adapter=had, frozen=private[name])
                with account.at(name):
                    shared, learnt[name] = self.together(scene, account, name, number, shared, parties[name], device)
                change = account.send_up(name, number, difference(shared.adapter, had), digest=scene.proxy.digest)
                weight = float(len(scene.sites[name].examples))
                updates.append(Update(device=name, arrays=change, weight=weight))
            state = algorithm.merge(state, number, updates, Mean())
            with account.at(CLOUD):
                tuned = saml.tune(
                    proxy=state,
                    cloud=parties[CLOUD].adapter,
                    folds={},
                    told=[],
                    round_number=number,
                    rate_share=scene.rates.share(number),
                )
            state, learnt[CLOUD] = dict(tuned.proxy), replace(parties[CLOUD], adapter=tuned.cloud)
            learnt[PROXY] = replace(proxy, adapter=tuned.proxy)
            parties = learnt
            yield parties

    def together(
        self, scene: Scene, account: Account, name: str, number: int, proxy: Party, small: Party, device: _Device
    ) -> tuple[Party, Party]:
        """Steps of both, each from the other as it is."""
        share = scene.rates.share(number)
        steps = [at_rate(one, share) for one in (scene.proxy_steps(name), scene.sites[name].steps)]
        seed = scene.seed_of(number, name)
        with proxy.learning(steps[0]) as (g, g_state), small.learning(steps[1]) as (h, h_state):
            for numbers in batches_of(device.texts, steps[1], seed=seed):
                texts = [device.texts[one] for one in numbers]
                batches = [SideBatch.of(texts, side, g.device) for side in (PROXY_SIDE, SMALL_SIDE)]
                logits = [
                    batch.logits(model)[batch.target_places] for batch, model in zip(batches, (g, h), strict=True)
                ]
                losses = [
                    self.loss(
                        mapped,
                        [warped[one] for one in numbers],
                        logits[1 - side].detach(),
                        logits[side],
                        batches[side].targets,
                    )
                    for side, (mapped, warped) in enumerate(device.ways)
                ]
                for state, loss in zip((g_state, h_state), losses, strict=True):
                    state.descend(loss, max_grad_norm=MAX_GRAD_NORM)
            account.hold(held_bytes(g, g_state) + held_bytes(h, h_state))
            return proxy.after(g_state), small.after(h_state)

    def loss(self, mapped: TokenMap, texts: Sequence[WarpedText], told: Tensor, own: Tensor, targets: Tensor) -> Tensor:
        """(1 - a) CE + a T^2 KL(A[p] || q), means over targets.

        Args:
            mapped: from the teacher's tokens to the learner's.
            texts: of the batch.
            told, own: logits of teacher and learner, (targets, vocab) of each.
            targets: the learner's tokens.
        """
        plain = torch.nn.functional.cross_entropy(own.float(), targets)
        p, places = mapped.pooled(texts, told, temperature=self.temperature)
        if not len(places):
            return plain
        log_q = (own.float()[places.to(own.device)] / self.temperature).log_softmax(1)
        divergence: Tensor = (torch.special.xlogy(p, p) - p * log_q).sum(1).mean()
        return (1 - self.mix) * plain + self.mix * self.temperature**2 * divergence


@dataclass(frozen=True, eq=False)
class _Device:
    """A device's texts on both sides, and both ways between them: to the proxy's tokens, and to the small model's."""

    texts: list[PairedText]
    ways: tuple[tuple[TokenMap, list[WarpedText]], tuple[TokenMap, list[WarpedText]]]

    @classmethod
    def of(cls, scene: Scene, site: Site) -> _Device:
        proxy, small = scene.proxy, site.small
        most = proxy.fitting(small.fitting(scene.max_tokens))
        texts = pair_texts(site.examples, proxy.reader, small.reader, max_tokens=most)
        tables = (proxy.reader.table, small.reader.table)
        to_proxy, to_small = TokenMap(tables[1], tables[0]), TokenMap(tables[0], tables[1])
        return cls(
            texts,
            (
                (to_proxy, [to_proxy.warped(one, teacher=SMALL_SIDE) for one in texts]),
                (to_small, [to_small.warped(one, teacher=PROXY_SIDE) for one in texts]),
            ),
        )
