"""A server's folder of a co-tuned federation: the cloud's half is at work, and the judge takes what was folded."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="flwr is not installed; pip install 'cotune[flower]'")

from co_tuning import domain_texts, model_folder, write_texts

from cotune.errors import InputError
from cotune.federation.causal_model import CausalModel
from cotune.federation.co_tuning_device import CoTuningDevice
from cotune.federation.device_agent import DeviceAgent
from cotune.federation.flower.server_folder import ServerFolder
from cotune.federation.in_process import InProcess, SimulatedDevice
from cotune.federation.run_secret import RunSecret
from cotune.federation.signing import DeviceKey, Registry

SECRET = RunSecret(bytes(range(32)))


def test_a_round_with_a_cloud_and_a_judge(tmp_path: Path) -> None:
    proxy, cloud = (model_folder(tmp_path / name, "llama", "byte_level", seed=1) for name in ("proxy", "cloud"))
    small = model_folder(tmp_path / "small", "gpt2", "byte_level")
    texts = write_texts(tmp_path / "texts.jsonl", domain_texts("law"))
    public = write_texts(tmp_path / "public.jsonl", domain_texts("public", 3))
    settings = tmp_path / "federation.toml"
    settings.write_text(
        f"""
algorithm = "coplms"
model = "{proxy}"
[data]
path = "{texts}"
num_devices = 1
num_judge = 3
max_length = 64
[adapter]
rank = 1
[steps]
num_steps = 2
batch_size = 3
[rounds]
num_rounds = 1
tolerance = 9.0
[options.coplms]
fold_above = 0.0
[options.coplms.cloud]
model = "{cloud}"
public = "{public}"
""",
        encoding="utf-8",
    )
    keys = {name: DeviceKey.generate() for name in ("a", "b", "c")}
    registry = Registry({name: key.public_key for name, key in keys.items()})
    folder = ServerFolder.prepare_from_model(tmp_path / "run", settings, registry=registry, secret=SECRET)
    agents = []
    for seed, (name, key) in enumerate(keys.items()):
        device = CoTuningDevice(
            domain_texts("med"),
            small=CausalModel(str(small)),
            proxy=CausalModel(str(proxy)),
            folder=tmp_path / name,
            scale=16.0,
            max_tokens=64,
        )
        agents.append(
            DeviceAgent(
                name,
                device,
                base_digest=folder.base_digest,
                secret=SECRET,
                key=key,
                seed=seed,
                works=device.works,
            )
        )
    transport = InProcess([SimulatedDevice(agent=agent) for agent in agents])
    with folder.coordinator(transport) as (coordinator, start):
        (end,) = coordinator.run(start)
    (record,) = end.records
    assert record.verdict == "accepted" and record.counted == ["a", "b", "c"]
    assert record.shown["folded_energy"] > 0 and record.heldout_loss is not None
    assert {"cloud_loss", "proxy_loss"} <= record.shown.keys()
    assert any(name.startswith("cloud/") for name in end.state)

    # Another run of the same folder has the same cloud and the same texts, or none.
    write_texts(public, domain_texts("public", 4))
    with (
        pytest.raises(InputError, match=r"the public texts of the run in .* prepare another run"),
        folder.coordinator(transport),
    ):
        pass
    write_texts(public, domain_texts("public", 3))
    with folder.coordinator(transport) as (coordinator, _):
        assert coordinator is not None


def test_a_rule_for_more_adapters_than_are_sent_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    proxy = model_folder(tmp_path / "proxy", "llama", "byte_level", seed=1)
    public = write_texts(tmp_path / "public.jsonl", domain_texts("public", 3))
    settings = tmp_path / "federation.toml"
    settings.write_text(
        f"""
algorithm = "coplms"
model = "{proxy}"
[data]
num_judge = 0
[combine]
rule = "median"
[options.coplms]
channels = {{ "small-*" = "likelihoods" }}
[options.coplms.cloud]
model = "{proxy}"
public = "{public}"
""",
        encoding="utf-8",
    )
    names = ("a", "b", "small-c", "small-d")
    registry = Registry({name: DeviceKey.generate().public_key for name in names})
    with pytest.raises(
        InputError, match=r"median needs at least 3 replies and 4 devices .* of which 2 send what coplms"
    ):
        ServerFolder.prepare_from_model(tmp_path / "run", settings, registry=registry, secret=SECRET)
    assert not (tmp_path / "run").exists()
