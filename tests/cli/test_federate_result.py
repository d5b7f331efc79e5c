"""`cotune federate result`: a run over Flower as a peft adapter, with its rounds and its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr", reason="flwr is not installed; pip install 'cotune[flower]'")

from federated import SECRET
from tiny_models import save_tiny

from cotune.federation.flower.server_folder import CHECKPOINTS, ServerFolder
from cotune.federation.progress_checkpoint import save_progress
from cotune.federation.signing import DeviceKey, Registry
from cotune.federation.simulation import simulate
from cotune.models.backbone import Backbone
from cotune.models.peft_adapter import PeftAdapter

SETTINGS = """
algorithm = "ffa_lora"
model = "{model}"
[data]
limit = 20
num_devices = 2
num_judge = 4
max_length = 48
[adapter]
rank = 2
[steps]
num_steps = 1
batch_size = 2
[rounds]
num_rounds = 2
"""


def test_a_run_over_flower_ends_as_an_adapter_and_a_report(tmp_path: Path, run: Any) -> None:
    model, settings, out = save_tiny(tmp_path / "tiny"), tmp_path / "settings.toml", tmp_path / "out"
    settings.write_text(SETTINGS.format(model=model))
    registry = Registry({name: DeviceKey.generate().public_key for name in ("kitchen", "office", "garage")})
    folder = ServerFolder.prepare_from_model(tmp_path / "run", settings, registry=registry, secret=SECRET)
    run("federate", "result", folder.path, "--out", out).check_refusal("has no checkpoint")
    backbone = Backbone.from_pretrained(str(model), dtype="float32", device="cpu")
    # The rounds that Flower would bring, in this process.
    with simulate(folder.settings, backbone, secret=SECRET) as simulation:
        *_, end = simulation.coordinator.run(simulation.coordinator.begin(folder.start))
    save_progress(folder.path / CHECKPOINTS, end, run_id=folder.run_id, base_digest=folder.base_digest)

    outcome = run("federate", "result", folder.path, "--out", out, "--json")
    assert outcome.status == 0, outcome.err
    told = json.loads(outcome.out)
    assert (told["num_rounds"], told["num_devices"], told["start_nats_per_token"]) == (2, 3, end.start_loss)
    assert told["bytes_up"] == sum(sum(one.bytes_up.values()) for one in end.records)
    lines = (folder.path / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["counted"] for line in lines] == [["device-0", "device-1"]] * 2
    assert "Federated tuning with ffa_lora" in (folder.path / "report.html").read_text(encoding="utf-8")
    saved = PeftAdapter.load(out, backbone.model).params
    learnt = simulation.coordinator.adapter(end)
    assert saved.keys() == learnt.keys() and any(array.any() for name, array in learnt.items() if "lora_B" in name)
    assert all(np.array_equal(saved[name].numpy(), array) for name, array in learnt.items())

    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("x", encoding="utf-8")
    run("federate", "result", folder.path, "--out", full).check_refusal("holds something else")
    run("federate", "result", tmp_path, "--out", tmp_path / "new").check_refusal("is no folder of a run")
