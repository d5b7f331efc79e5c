"""Standalone: every device's model learns its own texts, the cloud's the public ones, and nothing is sent.

At equal compute it is the same with more steps: what is left of a gain against that comes from others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cotune.federation.comparison.party import Party
from cotune.federation.comparison.scene import CLOUD, Account, Scene, learn_at


@dataclass(frozen=True, kw_only=True)
class Standalone:
    """Everybody alone."""

    def rounds(self, scene: Scene, account: Account) -> Iterator[Mapping[str, Party]]:
        """As `Contestant`."""
        parties = scene.start()
        examples = {name: site.examples for name, site in scene.sites.items()} | {CLOUD: scene.public}
        texts = {name: parties[name].read(own, max_tokens=scene.max_tokens) for name, own in examples.items()}
        yield parties
        for number in range(1, scene.num_rounds + 1):
            parties = {name: learn_at(scene, account, name, number, parties[name], texts[name]) for name in parties}
            yield parties
