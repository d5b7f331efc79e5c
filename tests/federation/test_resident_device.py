"""A device from its settings: a real backbone behind a real socket."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from co_tuning import model_folder

from cotune.errors import InputError
from cotune.federation.algorithm import Plan
from cotune.federation.arrays import check_arrays
from cotune.federation.causal_model import CausalModel
from cotune.federation.co_tuning_parts import with_cloud
from cotune.federation.coplms import CloudSettings, CoPlms
from cotune.federation.fedit import FedIT
from cotune.federation.introduction import ask
from cotune.federation.local_model import LocalSteps
from cotune.federation.messages import Reply, Task, decode, encode
from cotune.federation.resident_client import ResidentClient
from cotune.federation.resident_device import DeviceSettings, main, resident_agent
from cotune.federation.resident_trainer import ResidentTrainer
from cotune.federation.resident_wire import RequestKind
from cotune.federation.run_secret import RunSecret
from cotune.federation.settings import AdapterSettings, DataSettings, FederationSettings
from cotune.federation.signing import DeviceKey, Registry, verify
from cotune.models.adapters import LoraAdapter, LoraShape
from cotune.models.backbone import Backbone

SHAPE = {"rank": 2, "targets": ["q_proj"]}


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ct-") as name:
        yield Path(name)


def write(folder: Path, extra: str = "") -> Path:
    DeviceKey.generate().save(folder / "kitchen.key")
    RunSecret.generate().save(folder / "run.secret")
    rows = [{"prompt": f"Say {number}:", "completion": f"It is {number}."} for number in range(6)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "device.toml").write_text(
        f'name = "kitchen"\nfolder = "{folder / "t"}"\nkey = "{folder / "kitchen.key"}"\n'
        f'secret = "{folder / "run.secret"}"\nledger = "{folder / "ledger.jsonl"}"\n{extra}\n'
        f'[data]\npath = "{folder / "texts.jsonl"}"\n[adapter]\nrank = 2\ntargets = ["q_proj"]\n'
    )
    return folder / "device.toml"


def task_for(device: str) -> tuple[Task, Plan]:
    """A round of two steps on a fresh adapter of the same shape."""
    backbone = Backbone.from_pretrained("starter", dtype="float32", device="cpu")
    fresh = LoraAdapter.fresh(backbone.model, LoraShape(rank=2, targets=("q_proj",)))
    start = {name: tensor.detach().numpy() for name, tensor in fresh.params.items()}
    plan = FedIT(steps=LocalSteps(num_steps=2, batch_size=2)).plan(start, 1, device, None)
    task = Task(
        run_id="r",
        round_number=1,
        device=device,
        work=plan.work,
        arrays=plan.arrays,
        settings={**plan.settings, "coordinator.since": -1},
        base_digest=backbone.spec.backbone_digest,
    )
    return task, plan


def test_a_device_learns_and_signs_and_its_ledger_knows(folder: Path) -> None:
    settings = DeviceSettings.read(write(folder))
    assert settings.adapter == AdapterSettings(rank=2, targets=("q_proj",)) and settings.model == "starter"
    task, plan = task_for("kitchen")
    with resident_agent(settings) as agent, ResidentTrainer(agent, settings.folder) as trainer:
        thread = threading.Thread(target=trainer.serve)
        thread.start()
        client = ResidentClient(settings.folder)
        question = ask("r", bytes(32))
        introduction = client.handle(question, 60, kind=RequestKind.INTRODUCTION).data
        sent = client.handle(encode(task), 60).data
        # Before the trainer ends: it may be killed.
        entries = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
        trainer.stop()
        thread.join(30)
    reply = decode(sent, Reply)
    registry = Registry().add("kitchen", DeviceKey.load(settings.key).public_key)
    verify(reply, registry, run_id="r", round_number=1, base_digest=task.base_digest)
    assert reply.num_examples == 6 and {n: a.shape for n, a in reply.arrays.items()} == dict(plan.reply)
    assert any(np.any(array) for array in reply.arrays.values())
    assert [(one["kind"], one["bytes"]) for one in entries] == [
        ("introduction", len(introduction)),
        (plan.work, len(sent)),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("name = ", "nam = "), "nam is not known"),
        (("[data]", "[dota]"), "dota is not known"),
        (('path = "', 'path = 3 # "'), "data.path is 3"),
        (("kitchen.key", "other.key"), "other.key"),
        (("texts.jsonl", "nothing.jsonl"), "nothing.jsonl"),
    ],
)
def test_settings_that_cannot_be_used_are_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], change: tuple[str, str], message: str
) -> None:
    path = write(folder)
    path.write_text(path.read_text().replace(*change))
    assert main([str(path)]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


def test_the_program_wants_one_argument(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2 and "one argument" in capsys.readouterr().err
    with pytest.raises(InputError, match="cannot be read"):
        DeviceSettings.read("/nowhere/device.toml")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A proxy, and a recurrent model with another tokenizer."""
    root = tmp_path_factory.mktemp("pair")
    return (
        model_folder(root / "proxy", "llama", "byte_level", seed=1),
        model_folder(root / "small", "mamba2", "unigram", seed=2),
    )


def co_tuning(folder: Path, pair: tuple[Path, Path], *, proxy: str = "", digest: str = "") -> Path:
    """Settings of a device with a small model of its own."""
    path = write(folder, f'model = "{proxy}"')
    extra = f'[co_tuning]\nsmall_model = "{pair[1]}"\nfolder = "{folder / "state"}"\nproxy_digest = "{digest}"\n'
    path.write_text(path.read_text().replace("[data]", extra + "[data]"))
    return path


@pytest.mark.parametrize("channel", ["proxy", "likelihoods"])
def test_a_device_with_a_model_of_its_own_co_tunes_over_its_socket(
    folder: Path, pair: tuple[Path, Path], channel: str
) -> None:
    proxy = CausalModel(str(pair[0]))
    has_proxy = channel == "proxy"
    settings = DeviceSettings.read(
        co_tuning(folder, pair, proxy=str(pair[0]) if has_proxy else "", digest="" if has_proxy else proxy.digest)
    )
    with proxy.loaded() as model:
        fresh = LoraAdapter.fresh(model, LoraShape(rank=2, targets=("q_proj",)))
        start = {name: tensor.detach().numpy().copy() for name, tensor in fresh.params.items()}
    steps = LocalSteps(num_steps=1, batch_size=2)
    cloud = CloudSettings(model=str(pair[0]), public=str(folder / "texts.jsonl"), limit=3)
    algorithm = with_cloud(
        CoPlms(steps=steps, channels={"kitchen": channel}, cloud=cloud),
        FederationSettings(model=str(pair[0]), data=DataSettings(max_length=64)),
        proxy,
    )
    state = algorithm.start(start)
    plan = algorithm.plan(state, 1, "kitchen", None)
    task = Task(
        run_id="r",
        round_number=1,
        device="kitchen",
        work=plan.work,
        arrays=plan.arrays,
        settings={**plan.settings, "since": -1},
        base_digest=proxy.digest,
    )
    with resident_agent(settings) as agent, ResidentTrainer(agent, settings.folder) as trainer:
        thread = threading.Thread(target=trainer.serve)
        thread.start()
        answer = ResidentClient(settings.folder).handle(encode(task), 120)
        trainer.stop()
        thread.join(30)
    reply = decode(answer.data, Reply)
    check_arrays(reply.arrays, plan.reply, codes=plan.codes)
    found = plan.decode(reply.arrays)
    assert all(np.isfinite(one).all() for one in found.values()) and reply.num_examples == 6
    assert (folder / "state" / "rounds" / "r" / "round-000001.safetensors").is_file()
    assert (folder / "ledger.jsonl").read_text().count(plan.work) == 1


def test_a_device_has_the_proxy_or_its_digest(
    folder: Path, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for proxy, digest in (("", ""), (str(pair[0]), "ab")):
        assert main([str(co_tuning(folder, pair, proxy=proxy, digest=digest))]) == 2
        assert "expected one of them: the proxy" in capsys.readouterr().err
        for name in ("kitchen.key", "run.secret"):
            (folder / name).unlink()
