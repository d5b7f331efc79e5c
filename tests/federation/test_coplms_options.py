"""Every setting of co-tuning, down to those in tables, changes what one round of a real simulation ends with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from co_tuning import KINDS, domain_texts, model_folder, write_texts

from cotune.distillation.mutual_loss import MutualLossConfig
from cotune.federation.arrays import digest
from cotune.federation.co_tuning_simulation import simulation_of
from cotune.federation.coordinator import RoundRules
from cotune.federation.coplms import CoPlms
from cotune.federation.device_store import DeviceStore
from cotune.federation.local_model import LocalSteps
from cotune.federation.run_parts import run_id
from cotune.federation.run_secret import RunSecret
from cotune.federation.settings import AdapterSettings, DataSettings, FederationSettings
from cotune.models.backbone import Backbone

SECRET = RunSecret(bytes(range(1, 33)))
STEPS = {"num_steps": 1, "batch_size": 4, "learning_rate": 5e-3}
MORE = STEPS | {"num_steps": 2}
MODELS = {
    "proxy": ("llama", "byte_level"),
    "cloud": ("llama", "byte_level"),
    **{one: (one, KINDS[one]) for one in KINDS},
}

# What is set instead of the base below. Folders and files are given by their names there.
CHANGES: Mapping[str, object] = {
    "steps": STEPS,
    "small_steps": MORE,
    "dst_steps": MORE,
    "private_rank": 2,
    "loss.mix": 0.25,
    "loss.byte_weight": 2.0,
    "loss.chunk_weight": 2.0,
    "loss.token_weight": 0.25,
    "loss.temperature": 1.0,
    "loss.tau": 1.0,
    "loss.top_k": 2,
    "loss.drops_merged": True,
    "loss.gate.margin": 1.0,
    "loss.gate.tau_g": 1.0,
    "gated": False,
    "proxy_mix": 0.25,
    "public_share": 0.0,
    "answering.max_new_tokens": 2,
    "answering.sure_above": 1.0,
    "answering.share": 0.0,
    "answering.per_round": 1,
    "ranks": {"desk": 1},
    "fold_above": 1.0,
    "fold_rank": 2,
    "bits": 8,
    "channels": {},
    "devices": {"desk": "gpt2", "*": "mamba2"},
    "cloud.model": "proxy",
    "cloud.public": "others.jsonl",
    "cloud.questions": "others.jsonl",
    "cloud.template": "request",
    "cloud.limit": 1,
    "cloud.steps": MORE,
    "cloud.rank": 1,
    "cloud.alpha": 4.0,
    "cloud.mix": 0.25,
    "cloud.proxy_mix": 0.25,
    "cloud.temperature": 1.0,
    "cloud.top_k": 2,
    "cloud.gated": True,
    "cloud.told_weight": 0.0,
    "cloud.rehearses": True,
}
WORDS = ["others", "away", "hello", "world", "theory", "far", "ran", "mat"]
NO_SETTINGS = {"cloud_half", "rates"}


def names_of(kind: type, prefix: str = "") -> Iterator[str]:
    """All settings of a dataclass, those in tables by a dotted name; steps are one setting."""
    for one in fields(kind):
        default = _default(one)
        if is_dataclass(default) and not isinstance(default, LocalSteps):
            yield from names_of(type(default), f"{prefix}{one.name}.")
        elif prefix + one.name not in NO_SETTINGS:
            yield prefix + one.name


def _default(one: Field[Any]) -> object:
    return one.default if one.default_factory is MISSING else one.default_factory()


def test_every_setting_is_tried_here() -> None:
    assert list(names_of(CoPlms)) == list(CHANGES)
    assert "gate.tau_g" in list(names_of(MutualLossConfig))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("options")
    # From a seed on whose proxy, untrained, answers questions in characters and not in parts of them.
    for seed, (name, (family, kind)) in enumerate(MODELS.items(), start=7):
        model_folder(found / name, family, kind, seed=seed)
    (found / "texts").mkdir()
    for name, domain in (("desk", "law"), ("kitchen", "med"), ("watch", "law")):
        write_texts(found / "texts" / f"{name}.jsonl", domain_texts(domain, 3))
    write_texts(found / "others.jsonl", domain_texts("law", 2))
    for name, words in (("public", ["theory", "far", "ran"]), ("questions", WORDS)):
        rows = [
            {"prompt": f"the {one} cat?", "completion": " the cat sat.", "request": one, "answer": "hats"}
            for one in words
        ]
        (found / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return found


@pytest.fixture(scope="module")
def proxy(root: Path) -> Backbone:
    return Backbone.from_pretrained(str(root / "proxy"))


def outcome(options: Mapping[str, object], root: Path, proxy: Backbone, folder: Path) -> dict[str, str]:
    """Of one round: what the server has, and each device."""
    settings = FederationSettings(
        algorithm="coplms",
        model=str(root / "proxy"),
        data=DataSettings(path=str(root / "texts"), split="domains", num_judge=2, max_length=48),
        adapter=AdapterSettings(rank=2),
        steps=LocalSteps(**STEPS),  # type: ignore[arg-type]
        rounds=RoundRules(num_rounds=1, tolerance=100.0),
        options={"coplms": dict(options)},
    )
    with simulation_of(settings, proxy, secret=SECRET, folder=folder) as simulation:
        *_, end = simulation.coordinator.run(simulation.coordinator.begin(simulation.adapter))
    assert [one.verdict for one in end.records] == ["accepted"] and not end.records[0].refused
    found = {"server": digest(end.state)}
    for device in ("desk", "kitchen", "watch"):
        kept = DeviceStore(folder / "devices" / device / "rounds").last(run_id(settings, SECRET))
        assert kept is not None
        found[device] = digest({name: one.numpy() for name, one in kept.items()})
    return found


def options_of(root: Path) -> dict[str, Any]:
    return {
        # Two, as A does not learn in the first step from a B of zeros, and a merge leaves nothing out then.
        "steps": MORE,
        "small_steps": STEPS,
        "dst_steps": STEPS,
        "private_rank": 1,
        "loss": {"token_weight": 0.5},
        "fold_above": 0.0,
        "channels": {"watch": "likelihoods"},
        "devices": {"desk": str(root / "llama"), "kitchen": str(root / "gpt2"), "*": str(root / "mamba2")},
        "answering": {"sure_above": 0.0, "max_new_tokens": 1},
        "cloud": {
            "model": str(root / "cloud"),
            "public": str(root / "public.jsonl"),
            "questions": str(root / "questions.jsonl"),
            "rank": 2,
            "steps": STEPS,
        },
    }


@pytest.fixture(scope="module")
def base(root: Path, proxy: Backbone, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    first, again = (outcome(options_of(root), root, proxy, tmp_path_factory.mktemp("base")) for _ in range(2))
    assert first == again, "else any change would seem to count"
    return first


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_changes_what_a_round_ends_with(
    root: Path, proxy: Backbone, base: dict[str, str], tmp_path: Path, name: str
) -> None:
    options = deepcopy(options_of(root))
    *tables, last = name.split(".")
    table = options
    for one in tables:
        table = table.setdefault(one, {})
    table[last] = in_folder(CHANGES[name], root)
    assert outcome(options, root, proxy, tmp_path) != base


def in_folder(value: object, root: Path) -> object:
    """Names of models and files as paths."""
    if isinstance(value, dict):
        return {name: in_folder(one, root) for name, one in value.items()}
    return str(root / value) if isinstance(value, str) and (root / value).exists() else value
