"""A federation on a real (tiny) backbone: it learns, nothing private leaves, faults leave nothing behind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from leak_search import SentBytes
from tiny_models import tiny_backbone
from tokenizers import Tokenizer

from cotune.errors import InputError
from cotune.federation import in_process
from cotune.federation.algorithms import ALGORITHMS
from cotune.federation.coordinator import Progress, RoundRules
from cotune.federation.fedpeptao import PREFIX
from cotune.federation.local_model import LocalSteps
from cotune.federation.run_parts import algorithm_of, run_id
from cotune.federation.run_secret import RunSecret
from cotune.federation.settings import AdapterSettings, DataSettings, FederationSettings
from cotune.federation.simulation import PERSONA, read_shards, simulate
from cotune.ledger import EgressLedger
from cotune.models.backbone import Backbone
from cotune.models.peft_adapter import PeftAdapter

SECRET = RunSecret(bytes(range(1, 33)))
CANARY = "the quiet harbour 93817 keeps seven lanterns"


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone("llama")


def settings_of(path: Path | str, **changes: object) -> FederationSettings:
    base = FederationSettings(
        algorithm="rolora",
        data=DataSettings(path=str(path), num_devices=3, num_judge=4, max_length=48),
        adapter=AdapterSettings(rank=2),
        steps=LocalSteps(num_steps=3, batch_size=4, learning_rate=0.02),
        options={"seed": {"num_directions": 6, "learning_rate": 0.001, "batch_size": 4}},
        rounds=RoundRules(num_rounds=3),
    )
    return replace(base, **changes)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    rows = [{"prompt": f"Where is box {i}?", "completion": f" In room {i % 3}, where {CANARY}."} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def mixed(**options: object) -> dict[str, dict[str, object]]:
    return {"mixed": {"classes": {"device-1": "seed"}, "seed_mode": {"num_directions": 6, "batch_size": 4}, **options}}


# By name what differs from `settings_of`: all algorithms whose devices share one backbone, and the starts of A.
WAYS: Mapping[str, Mapping[str, object]] = {
    "fedit": {},
    "ffa_lora": {},
    "rolora": {},
    "seed": {},
    "fedkseed": {"options": {"fedkseed": {"num_seeds": 16, "num_steps": 6, "batch_size": 4}}},
    "fedkseed_pro": {"options": {"fedkseed_pro": {"pool": {"num_seeds": 16, "num_steps": 6, "batch_size": 4}}}},
    "fwdllm": {"options": {"fwdllm": {"num_perturbations": 2, "num_candidates": 2, "batch_size": 4}}},
    "ferret": {"options": {"ferret": {"num_directions": 80}}},
    # A class of one, and one of two: the usual rule suits itself to both.
    "mixed": {"options": mixed()},
    "flexlora": {"adapter": AdapterSettings(rank=4), "options": {"flexlora": {"ranks": {"device-1": 1}}}},
    "flora": {"adapter": AdapterSettings(rank=4), "options": {"flora": {"ranks": {"device-1": 1}}}},
    "fedselft": {"adapter": AdapterSettings(rank=4), "options": {"fedselft": {"budgets": {"device-1": 40_000}}}},
    "fedpeptao": {
        "adapter": AdapterSettings(kind="prefix", virtual_tokens=4),
        "steps": LocalSteps(num_steps=4, batch_size=4, learning_rate=0.05),
        "options": {"fedpeptao": {"beta": 0.0}},
    },
    "ffa_lora from eva": {"adapter": AdapterSettings(rank=2, start="eva", start_batches=1)},
    "ffa_lora from lora_ga": {"adapter": AdapterSettings(rank=2, start="lora_ga", start_batches=1)},
}
LEARNS_LITTLE = ("fedkseed", "fedkseed_pro", "fwdllm", "ferret")
"""In two rounds of so few directions; that they learn is tested on the toy."""


def test_every_algorithm_on_one_backbone_is_tried_here() -> None:
    assert {name.split()[0] for name in WAYS} == ALGORITHMS.keys() - {"coplms"}


@pytest.mark.parametrize("way", WAYS)
def test_no_text_no_token_and_no_seed_is_in_anything_that_was_sent(
    backbone: Backbone, texts: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[bytes] = []

    class Watched(in_process.InProcess):
        def send(self, tasks: Mapping[str, bytes]) -> None:
            sent.extend(tasks.values())
            super().send(tasks)

    def watch(device: str, reply: bytes) -> bytes:
        sent.append(reply)
        return reply

    monkeypatch.setattr("cotune.federation.simulation.InProcess", lambda devices: Watched(devices, tamper=watch))
    before = {name: p.detach().clone() for name, p in backbone.model.named_parameters()}
    ledger = EgressLedger(None)
    # Starts of A and choices of layers take a round for themselves.
    rules = RoundRules(num_rounds=3 if "from" in way else 2)
    settings = settings_of(texts, algorithm=way.split()[0], rounds=rules, **WAYS[way])
    with simulate(settings, backbone, secret=SECRET, ledger=ledger) as simulation:
        start = simulation.coordinator.begin(simulation.adapter)
        *_, end = simulation.coordinator.run(start)
    assert all(one.counted == ["device-0", "device-1", "device-2"] for one in end.records)
    assert all(one.verdict != "void" for one in end.records)
    if settings.algorithm not in LEARNS_LITTLE:
        assert end.best_loss is not None and start.best_loss is not None and end.best_loss < start.best_loss
    if "from" in way:
        # The round of sums: A is another one then, and B zero, so that nothing changed.
        kind = {"eva": "sketch", "lora_ga": "gradient"}[settings.adapter.start]
        assert kind in end.records[0].bytes_up and end.records[0].heldout_loss == start.best_loss
    found = SentBytes(sent)
    tokenizer = Tokenizer.from_str(backbone.tokenizer_json.decode())
    ids = tokenizer.encode(f" In room 1, where {CANARY}.", add_special_tokens=False).ids
    private = [CANARY.encode(), *(np.array(ids, kind).tobytes() for kind in ("<i8", "<i4", "<u2"))]
    assert len(found) > 3000 and not any(found.holds_part_of(one) for one in private)
    assert not any(found.holds_part_of(value) for value in (SECRET.value, SECRET.value.hex().encode()))
    # Every reply stands in the ledger, byte for byte.
    replies = sum(sum(one.bytes_up.values()) for one in end.records)
    assert sum(total["bytes"] for total in ledger.totals().values()) == replies
    assert all((before[name] == p).all() for name, p in backbone.model.named_parameters())


def test_prompts_of_a_real_model_are_federated_and_saved(backbone: Backbone, texts: Path, tmp_path: Path) -> None:
    settings = settings_of(texts, algorithm="fedpeptao", **WAYS["fedpeptao"], rounds=RoundRules(num_rounds=2))
    with simulate(settings, backbone, secret=SECRET) as simulation:
        *_, end = simulation.coordinator.run(simulation.coordinator.begin(simulation.adapter))
        found = simulation.coordinator.adapter(end)
        adapter = simulation.adapter_of(found)
    # Two of the tiny model's three layers: half, rounded up.
    assert end.state["chosen"].sum() == 2 and end.records[-1].counted == ["device-0", "device-1", "device-2"]
    adapter.save(tmp_path / "out", backbone.model)
    (again,) = PeftAdapter.load(tmp_path / "out", backbone.model).params.values()
    assert np.array_equal(again.numpy(), found[PREFIX]) and found[PREFIX].shape == (4, 3 * 2 * 12)


@pytest.mark.parametrize(
    ("algorithm", "kind", "words"),
    [("rolora", "prefix", "'prefix', expected 'lora', which rolora needs"), ("fedpeptao", "lora", "expected 'prefix'")],
)
def test_an_algorithm_that_needs_another_kind_of_adapter_is_refused(algorithm: str, kind: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        algorithm_of(FederationSettings(algorithm=algorithm, adapter=AdapterSettings(kind=kind)), SECRET)


def test_the_same_settings_and_secret_give_the_same_run(backbone: Backbone, texts: Path) -> None:
    unjudged = replace(settings_of(texts).data, num_judge=0)
    ends: list[Progress] = []
    for secret in (SECRET, SECRET, RunSecret(bytes(32))):
        settings = settings_of(texts, algorithm="seed", data=unjudged, rounds=RoundRules(num_rounds=2))
        with simulate(settings, backbone, secret=secret) as simulation:
            *_, end = simulation.coordinator.run(simulation.coordinator.begin(simulation.adapter))
        ends.append(end)
    one, same, other = (end.state for end in ends)
    assert one.keys() == same.keys() and all(np.array_equal(one[name], same[name]) for name in one)
    assert not np.array_equal(other["step/000001"], one["step/000001"])


def test_every_text_has_one_place(texts: Path, tmp_path: Path) -> None:
    shards = read_shards(settings_of(texts))
    everything = [text for part in [*shards.devices.values(), shards.judge] for text in part]
    assert len(everything) == 20 and len({one.prompt for one in everything}) == 20
    assert list(shards.devices) == ["device-0", "device-1", "device-2"] and len(shards.judge) == 4
    again = read_shards(settings_of(texts))
    assert again.devices == shards.devices and again.digest == shards.digest
    swapped = {**shards.devices, "device-0": shards.devices["device-1"], "device-1": shards.devices["device-0"]}
    assert replace(shards, devices=swapped).digest != shards.digest != replace(shards, judge=[]).digest
    assert read_shards(replace(settings_of(texts), seed=1)).judge != shards.judge
    by_label = replace(settings_of(texts).data, split="dirichlet", alpha=0.1)
    assert "In room" in read_shards(replace(settings_of(texts), data=by_label)).table
    sizes = read_shards(replace(settings_of(texts), data=replace(settings_of(texts).data, split="sizes")))
    assert sum(len(one) for one in sizes.devices.values()) == 16
    folder = tmp_path / "domains"
    folder.mkdir()
    for name in ("law", "med"):
        (folder / f"{name}.jsonl").write_text(texts.read_text(encoding="utf-8"), encoding="utf-8")
    domains = read_shards(replace(settings_of(folder), data=replace(settings_of(folder).data, split="domains")))
    assert list(domains.devices) == ["law", "med"] and [len(d) for d in domains.devices.values()] == [18, 18]


def test_texts_that_cotune_makes_need_no_file() -> None:
    shards = read_shards(settings_of(PERSONA, data=DataSettings(path=PERSONA, limit=30, num_devices=4, num_judge=6)))
    assert [len(one) for one in shards.devices.values()] == [6, 6, 6, 6]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_devices": 30}, "there are 20 texts"),
        ({"min_examples": 9}, "9 for each of 3 devices"),
        ({"split": "domains"}, "has 0 data files"),
    ],
)
def test_texts_that_cannot_be_split_are_refused(texts: Path, change: dict[str, object], words: str) -> None:
    settings = settings_of(texts)
    with pytest.raises(InputError, match=words):
        read_shards(replace(settings, data=replace(settings.data, **change)))


def test_more_rounds_are_the_same_run_and_other_settings_another(texts: Path) -> None:
    settings = settings_of(texts)
    more = replace(settings, rounds=replace(settings.rounds, num_rounds=9))
    assert run_id(settings, SECRET) == run_id(more, SECRET)
    assert (
        run_id(replace(settings, seed=1), SECRET) != run_id(settings, SECRET) != run_id(settings, RunSecret(bytes(32)))
    )


def test_a_judge_that_leaves_a_domain_without_texts_is_refused(tmp_path: Path) -> None:
    for name, num in (("law", 5), ("med", 3)):
        rows = [json.dumps({"prompt": f"{name} {i}?", "completion": " yes."}) for i in range(num)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    asked = settings_of(tmp_path, data=DataSettings(path=str(tmp_path), split="domains", num_judge=6))
    with pytest.raises(
        InputError, match="num_judge is 6, of which 3 are from each domain, and med has 3 texts; take 4 or"
    ):
        read_shards(asked)
    judge = replace(asked, data=replace(asked.data, num_judge=4))
    assert {name: len(one) for name, one in read_shards(judge).devices.items()} == {"law": 3, "med": 1}
