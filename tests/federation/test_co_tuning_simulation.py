"""Three architectures with three tokenizers and one without the proxy: they learn, resume, and leak nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from co_tuning import CANARY, KINDS, domain_texts, model_folder, write_texts
from leak_search import SentBytes, directions_alike
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.federation import co_tuning_simulation
from cotune.federation.arrays import digest, shapes_of
from cotune.federation.causal_model import CausalModel
from cotune.federation.co_tuning_device import PRIVATE, UP
from cotune.federation.co_tuning_simulation import simulation_of
from cotune.federation.coordinator import Progress, RoundRules
from cotune.federation.device_store import DeviceStore
from cotune.federation.in_process import InProcess
from cotune.federation.local_model import LocalSteps
from cotune.federation.messages import Reply, decode, encode
from cotune.federation.mixed_ranks import first_directions
from cotune.federation.row_codes import RowCodes, dither_seed
from cotune.federation.run_parts import run_id
from cotune.federation.run_secret import RunSecret
from cotune.federation.settings import AdapterSettings, AuditSettings, DataSettings, FederationSettings
from cotune.ledger import EgressLedger
from cotune.models.backbone import Backbone
from cotune.models.peft_adapter import PeftAdapter

SECRET = RunSecret(bytes(range(1, 33)))
STEPS = {"num_steps": 2, "batch_size": 3, "learning_rate": 5e-3}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> FederationSettings:
    root = tmp_path_factory.mktemp("coplms")
    models = {family: model_folder(root / family, family, kind, seed=3) for family, kind in KINDS.items()}
    proxy = model_folder(root / "proxy", "llama", "byte_level", seed=1)
    cloud = model_folder(root / "cloud", "llama", "byte_level", seed=5)
    (root / "texts").mkdir()
    for name, domain in (("desk", "law"), ("kitchen", "med"), ("phone", "law"), ("watch", "med")):
        write_texts(root / "texts" / f"{name}.jsonl", domain_texts(domain))
    public = write_texts(root / "public.jsonl", domain_texts("public", 4))
    questions = root / "questions.jsonl"
    questions.write_text('{"prompt": "the far dog?"}\n{"prompt": "two hats?"}\n', encoding="utf-8")
    return FederationSettings(
        algorithm="coplms",
        model=str(proxy),
        data=DataSettings(path=str(root / "texts"), split="domains", num_judge=4, max_length=64),
        adapter=AdapterSettings(rank=2),
        steps=LocalSteps(**STEPS),  # type: ignore[arg-type]
        rounds=RoundRules(num_rounds=2, tolerance=10.0),
        options={
            "coplms": {
                "private_rank": 1,
                "fold_above": 0.0,
                "fold_rank": 1,
                "ranks": {"phone": 1},
                "channels": {"watch": "likelihoods"},
                "devices": {
                    "desk": str(models["llama"]),
                    "kitchen": str(models["gpt2"]),
                    "*": str(models["mamba2"]),
                },
                "answering": {"sure_above": 0.0, "max_new_tokens": 4},
                "cloud": {
                    "model": str(cloud),
                    "public": str(public),
                    "questions": str(questions),
                    "rank": 2,
                    "steps": STEPS,
                },
            }
        },
    )


@pytest.fixture(scope="module")
def proxy(settings: FederationSettings) -> Backbone:
    return Backbone.from_pretrained(settings.model)


def small_states(folder: Path, settings: FederationSettings) -> dict[str, str]:
    found = {}
    for device in ("desk", "kitchen", "phone", "watch"):
        kept = DeviceStore(folder / "devices" / device / "rounds").last(run_id(settings, SECRET))
        assert kept is not None
        found[device] = digest({name: one.numpy() for name, one in kept.items()})
    return found


def test_four_different_devices_and_a_cloud_learn_together_and_a_killed_run_goes_on_alike(
    settings: FederationSettings, proxy: Backbone, tmp_path: Path
) -> None:
    ledger = EgressLedger(None)
    before = {name: p.detach().clone() for name, p in proxy.model.named_parameters()}
    with simulation_of(settings, proxy, secret=SECRET, folder=tmp_path / "whole", ledger=ledger) as simulation:
        start = simulation.coordinator.begin(simulation.adapter)
        *_, end = simulation.coordinator.run(start)
        kept = simulation.keep(end)
        adapter = simulation.adapter_of(simulation.coordinator.adapter(end))
    assert [one.verdict for one in end.records] == ["accepted", "accepted"]
    assert all(one.counted == ["desk", "kitchen", "phone", "watch"] for one in end.records)
    assert end.best_loss is not None and start.best_loss is not None and end.best_loss < start.best_loss
    first, second = end.records
    assert first.bytes_up["likelihoods"] < 300 and first.bytes_down["public"] > second.bytes_down.get("public", 0) == 0
    assert {"codes", "scales", "likelihoods", "framing"} == first.bytes_up.keys() and second.bytes_down["fold"] > 0
    assert first.device_held_bytes is not None and first.device_held_bytes > 10_000
    assert {"discarded_energy", "folded_energy", "cloud_loss", "proxy_loss", "answered"} == end.records[-1].shown.keys()
    # Every reply stands in the ledger, byte for byte.
    up = sum(sum(one.bytes_up.values()) for one in end.records)
    assert sum(total["bytes"] for total in ledger.totals().values()) == up
    assert kept["num_devices_with_proxy"] == 3 and kept["proxy_download_bytes"] > 50_000
    down = sum(sum(one.bytes_down.values()) for one in end.records)
    assert kept["bytes_down_with_proxy"] == 3 * kept["proxy_download_bytes"] + down
    # What is saved can be loaded: adapters of rank 2 and two folds, and small models.
    adapter.save(tmp_path / "out", proxy.model)
    params = PeftAdapter.load(tmp_path / "out", proxy.model).params
    assert {one.shape[0] for name, one in params.items() if "lora_A" in name} == {4}
    PeftAdapter.load(tmp_path / "whole" / "cloud-adapter", Backbone.from_pretrained(cloud_of(settings)).model)
    for device in ("desk", "kitchen", "phone", "watch"):
        with CausalModel(str(tmp_path / "whole" / "devices" / device / "model")).loaded() as model:
            assert all(torch.isfinite(one).all() for one in model.parameters())
    assert all(torch.equal(before[name], p) for name, p in proxy.model.named_parameters())

    # Killed after the devices' work of round 2 and before its checkpoint.
    class Killed(BaseException):
        pass

    def dying(progress: Progress) -> None:
        if progress.round_number == 2:
            raise Killed

    states = small_states(tmp_path / "whole", settings)
    with simulation_of(settings, proxy, secret=SECRET, folder=tmp_path / "cut", save=dying) as simulation:
        begun = simulation.coordinator.begin(simulation.adapter)
        rounds = simulation.coordinator.run(begun)
        after_first = next(rounds)
        with pytest.raises(Killed):
            next(rounds)
    with simulation_of(settings, proxy, secret=SECRET, folder=tmp_path / "cut") as simulation:
        *_, again = simulation.coordinator.run(after_first)
    assert digest(again.state) == digest(end.state)
    assert small_states(tmp_path / "cut", settings) == states
    assert not np.array_equal(*(one.state["shown/cloud_loss"] for one in (after_first, end)))


@pytest.mark.parametrize("bits", [5, 32])
def test_nothing_that_is_sent_holds_a_private_adapter_of_any_round_or_a_text(
    settings: FederationSettings, proxy: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    own = settings.options["coplms"]
    assert isinstance(own, Mapping)
    settings = replace(settings, options={"coplms": {**own, "bits": bits}})
    tasks_sent: list[bytes] = []
    replies: list[tuple[str, bytes]] = []
    privates: list[tuple[str, dict[str, NDArray[np.float32]]]] = []

    class Watched(InProcess):
        def send(self, tasks: Mapping[str, bytes]) -> None:
            tasks_sent.extend(tasks.values())
            super().send(tasks)

    def watch(device: str, reply: bytes) -> bytes:
        replies.append((device, reply))
        kept = DeviceStore(tmp_path / "devices" / device / "rounds").last(run_id(settings, SECRET))
        assert kept is not None
        if device != "watch":
            # Now, as the next round moves it on.
            private = {name: one.numpy() for name, one in kept.items() if name.startswith(PRIVATE)}
            privates.append((device, {name.removeprefix(PRIVATE): one for name, one in private.items()}))
        return reply

    monkeypatch.setattr(co_tuning_simulation, "InProcess", lambda devices: Watched(devices, tamper=watch))
    with simulation_of(settings, proxy, secret=SECRET, folder=tmp_path) as simulation:
        *_, end = simulation.coordinator.run(simulation.coordinator.begin(simulation.adapter))
        adapter = simulation.adapter
    assert [one.verdict for one in end.records] == ["accepted", "accepted"]
    assert len(privates) == 2 * 3 and all(private.keys() == adapter.keys() for _, private in privates)
    found = SentBytes([*tasks_sent, *(reply for _, reply in replies)])
    assert len(found) > 10_000 and not found.holds_part_of(CANARY.encode())
    assert [name for _, private in privates for name in found.leaks(private)] == []
    codes = RowCodes(bits)
    for device, data in replies:
        if device == "watch":
            continue
        reply, rank = decode(data, Reply), 1 if device == "phone" else 2
        shapes, seed = shapes_of(first_directions(adapter, rank)), dither_seed(reply.round_number, f"{UP} {device}")
        update = codes.decode(reply.arrays, shapes, seed)
        assert [name for _, private in privates for name in directions_alike(update, private)] == []
        # The search finds a private adapter that takes this way.
        if rank == 1:
            private = privates[0][1]
            planted = codes.decode(codes.encode(private, seed), shapes, seed)
            assert directions_alike(planted, private) == list(private)
            coded = encode(replace(reply, arrays=codes.encode(private, seed)))
            assert bool(SentBytes([coded]).leaks(private)) == (bits == 32)


def cloud_of(settings: FederationSettings) -> str:
    own = settings.options["coplms"]
    assert isinstance(own, Mapping)
    return str(own["cloud"]["model"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"audit": AuditSettings(num_canaries=3)}, "audit.num_canaries is 3, expected 0"),
        ({"options": {"coplms": {"devices": {"desk": "x"}}}}, "names no model for kitchen"),
        ({"adapter": AdapterSettings(rank=2, start="eva")}, "adapter.start is 'eva'"),
        ({"options": {"coplms": {"cloud_half": 3}}}, "cloud_half is not known"),
    ],
)
def test_what_does_not_go_together_is_refused(
    settings: FederationSettings, proxy: Backbone, tmp_path: Path, change: dict[str, object], words: str
) -> None:
    with (
        pytest.raises(InputError, match=words),
        simulation_of(replace(settings, **change), proxy, secret=SECRET, folder=tmp_path),  # type: ignore[arg-type]
    ):
        pass
