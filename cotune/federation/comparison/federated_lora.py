"""FedAvg-LoRA and FlexLoRA: all devices have the proxy, and one adapter of it is averaged over them.

The server's half is the product's: `cotune.federation.fedit`, the mean of A and of B each apart (FedIT, arXiv
2305.05644), or `cotune.federation.flexlora`, the mean of the products (arXiv 2402.11505), with ranks by device. What
answers on a device is the proxy with the merged adapter; its own small model does not take part, nor does the cloud's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cotune.distillation.paired_texts import PairedText
from cotune.federation.algorithm import Algorithm, Update
from cotune.federation.arrays import Arrays, difference, shapes_of
from cotune.federation.co_tuning_device import DOWN, UP
from cotune.federation.comparison.party import Party
from cotune.federation.comparison.scene import CLOUD, Account, Scene, learn_at
from cotune.federation.fedit import FedIT
from cotune.federation.mixed_ranks import filled_up, first_directions, rank_in
from cotune.federation.robust.mean import Mean
from cotune.federation.row_codes import PLAIN, RowCodes, dither_seed


@dataclass(frozen=True, kw_only=True)
class FederatedLora:
    """One adapter for all devices."""

    algorithm: Algorithm = field(default_factory=FedIT)
    """The server's half, whose state the devices get as factors."""
    bits: int = PLAIN
    """Of a number on the wire, see `RowCodes`; by default float32, as published."""

    def rounds(self, scene: Scene, account: Account) -> Iterator[Mapping[str, Party]]:
        """As `Contestant`."""
        proxy, cloud = scene.fresh(scene.proxy), scene.start()[CLOUD]
        state, texts = self.algorithm.start(proxy.adapter), proxy_texts(scene, account, proxy)
        yield dict.fromkeys(scene.sites, proxy) | {CLOUD: cloud}
        for number in range(1, scene.num_rounds + 1):
            state = lora_round(scene, account, self.algorithm, state, number, proxy, texts, bits=self.bits)
            merged = replace(proxy, adapter=self.algorithm.adapter(state))
            yield dict.fromkeys(scene.sites, merged) | {CLOUD: cloud}


def proxy_texts(scene: Scene, account: Account, proxy: Party) -> dict[str, list[PairedText]]:
    """Every device downloads the proxy; its texts as the proxy reads them."""
    for name in scene.sites:
        account.download(name, proxy.model)
    return {name: proxy.read(site.examples, max_tokens=scene.max_tokens) for name, site in scene.sites.items()}


def lora_round(
    scene: Scene,
    account: Account,
    algorithm: Algorithm,
    state: Arrays,
    number: int,
    proxy: Party,
    texts: Mapping[str, Sequence[PairedText]],
    *,
    bits: int = PLAIN,
) -> Arrays:
    """One round: every device gets the adapter, learns, and sends what has changed; the state after the merge."""
    codes = RowCodes(bits)
    updates, digest = [], proxy.model.digest
    rank = rank_in(proxy.adapter)
    for name in scene.sites:
        plan = algorithm.plan(state, number, name, None).arrays
        # Names and shapes are of the model that all have; ours sends them once.
        shapes, down, up = shapes_of(plan), dither_seed(number, DOWN), dither_seed(number, f"{UP} {name}")
        came = account.send_down(name, number, codes.encode(plan, down), digest=digest)
        had = codes.decode(came, shapes, down)
        own = replace(proxy, adapter=filled_up(had, rank))
        after = learn_at(scene, account, name, number, own, texts[name], steps=scene.proxy_steps(name))
        change = difference(first_directions(after.adapter, rank_in(had)), had)
        came = account.send_up(name, number, codes.encode(change, up), digest=digest)
        updates.append(Update(device=name, arrays=codes.decode(came, shapes, up)))
    return algorithm.merge(state, number, updates, Mean())
