"""FedCoLLM, arXiv 2411.11707, that works: one proxy on all devices, FedAvg of its adapter, and a cloud's model.

    devices    L = CE on their own texts, in the adapter; A and B averaged each apart
    server     on public texts, with f the cloud's model and g the proxy with the averaged adapter,
               L_f = (1 - a) CE_f + a T^2 KL(p_g || p_f),    L_g = (1 - a) CE_g + a T^2 KL(p_f || p_g)
    everybody  gets the adapter as it is after that

The released code cannot run: its divergence has no gradient, its teacher's logits are built from indices, and devices
never get the distilled model. So the losses are those of the paper's idea by `cotune.federation.cloud_saml`, and
secure aggregation, which changes no number, is left out. One architecture and tokenizer everywhere is its limit: what
answers on a device is the proxy. With `answering`, which the paper has not, the cloud's model learns the server's open
questions, too, as the proxy answers them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from cotune.errors import InputError
from cotune.federation.comparison.federated_lora import lora_round, proxy_texts
from cotune.federation.comparison.party import Party
from cotune.federation.comparison.scene import CLOUD, Account, Scene
from cotune.federation.fedit import FedIT
from cotune.federation.open_questions import Answering


@dataclass(frozen=True, kw_only=True)
class FedCoLlm:
    """FedAvg of adapters, and mutual distillation on the server."""

    mix: float = 0.5
    """a, of the other model against the texts, for both."""
    temperature: float = 1.0
    """T."""
    answering: Answering | None = None
    """Of the scene's open questions; None leaves them alone."""

    def __post_init__(self) -> None:
        if not 0 < self.mix <= 1:
            raise InputError(f"mix is {self.mix}, expected above 0 and at most 1; without it, it is FedAvg-LoRA")

    def rounds(self, scene: Scene, account: Account) -> Iterator[Mapping[str, Party]]:
        """As `Contestant`."""
        algorithm, proxy, cloud = FedIT(), scene.fresh(scene.proxy), scene.start()[CLOUD]
        saml = scene.plain_saml(mix=self.mix, temperature=self.temperature, answering=self.answering)
        state, texts = algorithm.start(proxy.adapter), proxy_texts(scene, account, proxy)
        yield dict.fromkeys(scene.sites, proxy) | {CLOUD: cloud}
        for number in range(1, scene.num_rounds + 1):
            state = lora_round(scene, account, algorithm, state, number, proxy, texts)
            with account.at(CLOUD):
                tuned = saml.tune(
                    proxy=state,
                    cloud=cloud.adapter,
                    folds={},
                    told=[],
                    round_number=number,
                    rate_share=scene.rates.share(number),
                )
            state, cloud = algorithm.start(tuned.proxy), replace(cloud, adapter=tuned.cloud)
            yield dict.fromkeys(scene.sites, replace(proxy, adapter=tuned.proxy)) | {CLOUD: cloud}
