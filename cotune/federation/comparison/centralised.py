"""Centralised: every model learns the texts of all devices, as if they were in one place. The upper bound.

The cloud's model learns them beside the public texts. With D devices each model takes D times its steps, so that it
sees a text as often as alone: no equal compute, and no private text is private.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from cotune.federation.comparison.party import Party
from cotune.federation.comparison.scene import CLOUD, Account, Scene, learn_at


@dataclass(frozen=True, kw_only=True)
class Centralised:
    """All texts for everybody."""

    def rounds(self, scene: Scene, account: Account) -> Iterator[Mapping[str, Party]]:
        """As `Contestant`."""
        parties = scene.start()
        union = [one for site in scene.sites.values() for one in site.examples]
        examples = dict.fromkeys(scene.sites, union) | {CLOUD: [*union, *scene.public]}
        steps = {name: site.steps for name, site in scene.sites.items()} | {CLOUD: scene.cloud_steps}
        more = {name: replace(own, num_steps=own.num_steps * len(scene.sites)) for name, own in steps.items()}
        texts = {name: parties[name].read(own, max_tokens=scene.max_tokens) for name, own in examples.items()}
        yield parties
        for number in range(1, scene.num_rounds + 1):
            parties = {
                name: learn_at(scene, account, name, number, own, texts[name], steps=more[name])
                for name, own in parties.items()
            }
            yield parties
