"""`cotune federate prepare`: what the model decides is kept with the run, and what cannot be run is refused first."""

from __future__ import annotations

import json
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="flwr is not installed; pip install 'cotune[flower]'")

from tiny_models import save_tiny, tiny_backbone

from cotune.cli.mixed_needs import with_needs
from cotune.federation.flower.server_folder import ServerFolder
from cotune.federation.identities import make_identities
from cotune.federation.in_process import InProcess
from cotune.federation.settings import FederationSettings
from cotune.models.backbone import Backbone

PREFIX = """
algorithm = "fedpeptao"
model = "{model}"
[data]
limit = 20
num_devices = 2
num_judge = 4
max_length = 48
[adapter]
kind = "prefix"
virtual_tokens = 2
"""
MIXED = """
algorithm = "mixed"
model = "{model}"
[data]
num_judge = 0
max_length = 48
[adapter]
rank = 2
[options.mixed]
memory_bytes = {{ kitchen = {memory}, '*' = 900_000_000_000 }}
[options.mixed.seed_mode]
batch_size = 1
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "tiny")


@pytest.fixture
def given(tmp_path: Path) -> tuple[Path | str, ...]:
    """What every run is given beside its config."""
    made = make_identities(tmp_path / "ids", ["kitchen", "office"])
    return "--registry", made.registry_file, "--secret", made.secret_file


def test_layers_are_looked_up_and_the_run_begins_and_ends_without_anything_by_hand(
    tmp_path: Path, model: Path, given: tuple[Path | str, ...], run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder, app = tmp_path / "c.toml", tmp_path / "run-1", tmp_path / "app"
    config.write_text(PREFIX.format(model=model))
    load, dtypes = Backbone.from_pretrained, []
    monkeypatch.setattr(
        Backbone, "from_pretrained", lambda *names, **how: dtypes.append(how["dtype"]) or load(*names, **how)
    )
    outcome = run("federate", "prepare", config, folder, *given, "--app", app, "--dtype", "bfloat16", "--json")
    assert outcome.status == 0, outcome.err
    told = json.loads(outcome.out)
    num_layers = tiny_backbone("llama").spec.num_layers
    assert told["options"] == {"num_layers": num_layers} and told["devices"] == ["kitchen", "office"]
    assert tomllib.loads((folder / "federation.toml").read_text())["options"]["fedpeptao"]["num_layers"] == num_layers
    assert tomllib.loads((app / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"] == {
        "folder": str(folder)
    }
    read = ServerFolder.read(folder)
    assert (read.run_id, read.dtype, read.base_digest) == (told["run_id"], "bfloat16", told["base_digest"])
    with read.coordinator(InProcess([])) as (coordinator, start):
        # One prompt for each layer, and the judge read the model.
        assert sum(name.startswith("prompt/") for name in start.state) == num_layers and start.best_loss is not None
        first = coordinator.task(start.state, 1, "kitchen", None)[0]
        assert first.reply == {"scores": (num_layers,)}
    with ServerFolder.read(folder).coordinator(InProcess([])) as (_, again):
        assert again.state.keys() == start.state.keys(), "it goes on from its checkpoint"
    outcome = run("federate", "result", folder, "--out", tmp_path / "out", "--json")
    assert outcome.status == 0 and (tmp_path / "out" / "adapter_config.json").is_file(), outcome.err
    # To prepare, to judge twice, and for the result.
    assert dtypes == ["bfloat16"] * 4


def test_what_both_classes_of_mixed_need_is_kept_with_the_run(
    tmp_path: Path, model: Path, given: tuple[Path | str, ...], run: Any
) -> None:
    config, folder = tmp_path / "c.toml", tmp_path / "run-1"
    config.write_text(MIXED.format(model=model, memory=1))
    backbone = Backbone.from_pretrained(str(model))
    needs: Any = with_needs(FederationSettings.read(config), backbone, "float32").options["mixed"]
    config.write_text(MIXED.format(model=model, memory=needs["seed_bytes"]))
    outcome = run("federate", "prepare", config, folder, *given)
    assert outcome.status == 0, outcome.err
    lines = outcome.err.splitlines()
    assert lines[0].startswith(f"{folder}: run {ServerFolder.read(folder).run_id}, mixed on {model} (")
    assert "20 rounds of kitchen, office" in lines[0]
    started = shlex.split(next(line for line in lines if "flwr run" in line).rpartition(": ")[2])
    assert started == ["flwr", "run", "APP", "CONNECTION", "--stream", "--run-config", f'folder="{folder}"']
    assert f"cotune federate result {folder} --out my-adapter" in lines[-1]
    with ServerFolder.read(folder).coordinator(InProcess([])) as (coordinator, start):
        works = [coordinator.task(start.state, 1, name, None)[0].work for name in ("kitchen", "office")]
    assert works == ["mixed_seed", "descend"]
    own: Any = ServerFolder.read(folder).settings.options["mixed"]
    assert (own["lora_bytes"], own["seed_bytes"]) == (needs["lora_bytes"], needs["seed_bytes"])


def test_what_could_not_be_run_is_refused_and_nothing_is_written(
    tmp_path: Path, model: Path, given: tuple[Path | str, ...], run: Any
) -> None:
    config, folder = tmp_path / "c.toml", tmp_path / "run-1"
    plain = f'model = "{model}"\n[data]\nnum_judge = 0\n'
    for text, words in (
        ("[data]\nnum_devicez = 3\n", "num_devicez is not known"),
        (plain + "[audit]\nnum_canaries = 4\n", "made-up devices take part in simulations only"),
        (plain + "[rounds]\nmin_devices = 3\n", "rounds.min_devices is 3, expected at most 2"),
        (plain + "[combine]\nrule = 'median'\n", "median needs at least 3 replies"),
        ('model = "nowhere"\n[data]\npath = "no-texts.jsonl"\n', "no-texts.jsonl"),
        ('model = "nowhere"\n[data]\nnum_judge = 0\n', "nowhere"),
        (plain + "[adapter]\ntargets = ['query']\n", "targets has query"),
        ('algorithm = "fedpeptao"\n' + plain, "expected 'prefix'"),
        (
            'algorithm = "mixed"\n' + plain + "max_length = 48\n[options.mixed]\nmemory_bytes = { '*' = 1 }\n",
            "kitchen has 1 bytes, expected at least",
        ),
    ):
        config.write_text(text)
        run("federate", "prepare", config, folder, *given).check_refusal(words)
    config.write_text(plain)
    run("federate", "prepare", config, folder, *given, "--app", tmp_path / "my_app").check_refusal("my_app")
    run("federate", "prepare", config, folder, *given, "--dtype", "int3").check_refusal("int3")
    run("federate", "prepare", config, folder, *given[:3], tmp_path / "none").check_refusal("run secret cannot be read")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.toml", "ids", "tiny"]
    folder.mkdir()
    (folder / "mine").touch()
    run("federate", "prepare", config, folder, *given).check_refusal("holds something already")
