"""A scene for methods of co-tuning: three devices with three architectures and tokenizers, and a cloud."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from co_tuning import KINDS, domain_texts, model_folder

from cotune.federation.causal_model import CausalModel
from cotune.federation.comparison.party import Party
from cotune.federation.comparison.scene import CLOUD, Account, Contestant, Scene, Site
from cotune.federation.local_model import LocalSteps

STEPS = LocalSteps(num_steps=2, batch_size=3, learning_rate=5e-3)
DOMAINS = {"llama": "law", "gpt2": "med", "mamba2": "law"}


def make_models(root: Path) -> Path:
    """The folders that `scene_on` wants."""
    for family, kind in KINDS.items():
        model_folder(root / family, family, kind, seed=3)
    model_folder(root / "proxy", "llama", "byte_level", seed=1)
    model_folder(root / CLOUD, "llama", "byte_level", seed=5)
    return root


def scene_on(models: Path, folder: Path, families: tuple[str, ...] = ("llama", "gpt2"), **changes: Any) -> Scene:
    sites = {
        family: Site(small=CausalModel(str(models / family)), examples=domain_texts(DOMAINS[family]), steps=STEPS)
        for family in families
    }
    settings = {"num_rounds": 1, "rank": 2, "alpha": 4.0, "adapter_rate": 5e-3, "max_tokens": 64} | changes
    return Scene(
        cloud=CausalModel(str(models / CLOUD)),
        proxy=CausalModel(str(models / "proxy")),
        sites=sites,
        public=domain_texts("public", 4),
        cloud_steps=STEPS,
        folder=folder,
        **settings,
    )


@dataclass(frozen=True, eq=False)
class Ran:
    """What a method gave: everybody before round 1 and after each round, and the account."""

    parties: list[dict[str, Party]]
    account: Account


def run(method: Contestant, scene: Scene) -> Ran:
    account = Account()
    return Ran([dict(one) for one in method.rounds(scene, account)], account)


def has_learnt(before: Party, after: Party) -> bool:
    """Whether it says something else than before."""
    mine, theirs = dict(before.adapter), dict(after.adapter)
    if after.weights and not before.weights:
        with before.loaded() as model:
            old = {name: one.clone() for name, one in model.named_parameters()}
        return any(not old[name].equal(one) for name, one in after.weights.items())
    return bool(any((mine[name] != theirs[name]).any() for name in mine)) or any(
        not before.weights[name].equal(one) for name, one in after.weights.items()
    )
