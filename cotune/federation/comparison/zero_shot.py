"""Zero-shot: everybody's model as it was given. What every method has to beat."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cotune.federation.comparison.party import Party
from cotune.federation.comparison.scene import Account, Scene


@dataclass(frozen=True, kw_only=True)
class ZeroShot:
    """Nobody learns, and nothing is sent."""

    def rounds(self, scene: Scene, account: Account) -> Iterator[Mapping[str, Party]]:
        """As `Contestant`."""
        parties = scene.start()
        for _ in range(scene.num_rounds + 1):
            yield parties
