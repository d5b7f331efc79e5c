"""A method whose devices share the proxy, and beside it every device's own model, which learns alone.

Nobody has published the two together; they are the rival of ours where both models of a device answer, see
`cotune.federation.agreed_answers`: what ours is better by then comes from models that taught each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from cotune.federation.comparison.federated_lora import FederatedLora
from cotune.federation.comparison.party import Party
from cotune.federation.comparison.scene import PROXY, Account, Contestant, Scene
from cotune.federation.comparison.standalone import Standalone


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Both at once, neither knowing of the other."""

    shared: Contestant = field(default_factory=FederatedLora)
    """What answers with one proxy for all devices."""

    def rounds(self, scene: Scene, account: Account) -> Iterator[Mapping[str, Party]]:
        """As `Contestant`: devices' own models, and what they share as `proxy`."""
        some = next(iter(scene.sites))
        both = zip(self.shared.rounds(scene, account), Standalone().rounds(scene, account), strict=True)
        for shared, alone in both:
            yield {**alone, PROXY: shared[some]}
