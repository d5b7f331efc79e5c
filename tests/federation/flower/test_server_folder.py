"""A run as the SuperLink's machine holds it: written once, read with suspicion, resumed."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="flwr is not installed; pip install 'cotune[flower]'")

from federated import BASE, SECRET, ToyFederation, same_arrays
from flwr.app import Context, RecordDict
from toy_federation import toy_adapter, toy_prefix

from cotune.errors import InputError, MismatchError
from cotune.federation.flower.server_app import as_line, serve
from cotune.federation.flower.server_folder import ServerFolder
from cotune.federation.simulation import simulate
from cotune.models.backbone import Backbone

SETTINGS = """
algorithm = "ffa_lora"
[data]
num_judge = 0
[steps]
num_steps = 4
batch_size = 4
learning_rate = 0.1
optimizer = "sgd"
[rounds]
num_rounds = 3
[combine]
rule = "mean"
options = {}
"""


@pytest.fixture
def federation() -> ToyFederation:
    return ToyFederation(num_devices=3)


def prepare(path: Path, federation: ToyFederation, text: str = SETTINGS) -> ServerFolder:
    settings = path.with_name("settings.toml")
    settings.write_text(text)
    return ServerFolder.prepare(
        path, settings, registry=federation.registry, secret=SECRET, start=toy_adapter(3, 3, 2), base_digest=BASE
    )


def test_what_was_prepared_is_read_again(tmp_path: Path, federation: ToyFederation) -> None:
    made = prepare(tmp_path / "run", federation)
    found = ServerFolder.read(tmp_path / "run")
    assert found.settings == made.settings and found.settings.algorithm == "ffa_lora"
    assert found.registry == federation.registry and found.secret == SECRET and found.base_digest == BASE
    assert same_arrays(found.start, toy_adapter(3, 3, 2))
    assert stat.S_IMODE((tmp_path / "run" / "run.secret").stat().st_mode) == 0o600
    with pytest.raises(InputError, match="holds something"):
        prepare(tmp_path / "run", federation)


def test_a_run_goes_on_after_its_last_checkpoint(tmp_path: Path, federation: ToyFederation) -> None:
    whole, cut = prepare(tmp_path / "whole", federation), prepare(tmp_path / "cut", federation)
    with whole.coordinator(federation.transport) as (coordinator, start):
        end = [*coordinator.run(start)][-1]
    again = ToyFederation(num_devices=3)
    cut = replace(cut, registry=again.registry)
    with cut.coordinator(again.transport) as (coordinator, start):
        assert start.round_number == 0
        next(coordinator.run(start))
    with cut.coordinator(again.transport) as (coordinator, start):
        assert start.round_number == 1
        resumed = [*coordinator.run(start)][-1]
    assert same_arrays(resumed.state, end.state) and resumed.round_number == 3
    assert json.loads(as_line(resumed))["round_number"] == 3


def test_more_rounds_are_the_same_run_and_other_settings_are_not(tmp_path: Path, federation: ToyFederation) -> None:
    ids = {}
    for name, old, new in (("a", "", ""), ("b", "num_rounds = 3", "num_rounds = 9"), ("c", "= 0.1", "= 0.2")):
        (tmp_path / name).mkdir()
        ids[name] = prepare(tmp_path / name / "run", federation, SETTINGS.replace(old, new)).run_id
    assert ids["a"] == ids["b"] != ids["c"]


@pytest.mark.parametrize("file", ["federation.toml", "registry.json", "run.secret", "start.safetensors", "server.json"])
@pytest.mark.parametrize("content", [None, b"{}", b"\xff" * 40])
def test_a_file_that_is_missing_or_wrong_is_named(
    tmp_path: Path, federation: ToyFederation, file: str, content: bytes | None
) -> None:
    prepare(tmp_path / "run", federation)
    (tmp_path / "run" / file).unlink()
    if content is not None:
        (tmp_path / "run" / file).write_bytes(content)
        (tmp_path / "run" / file).chmod(0o600)
    with pytest.raises(InputError, match="run"):
        ServerFolder.read(tmp_path / "run")


def test_a_folder_of_the_older_format_is_read_and_its_model_judges_in_float32(
    tmp_path: Path, federation: ToyFederation
) -> None:
    made = prepare(tmp_path / "run", federation)
    older = {"format": "cotune federation server 1", "base_digest": BASE}
    (tmp_path / "run" / "server.json").write_text(json.dumps(older))
    (tmp_path / "run" / "federation.toml").write_text(SETTINGS)
    found = ServerFolder.read(tmp_path / "run")
    assert found.settings == made.settings and found.dtype == "float32" and found.run_id == made.run_id
    newer = older | {"format": "cotune federation server 3"}
    (tmp_path / "run" / "server.json").write_text(json.dumps(newer))
    with pytest.raises(InputError, match="expected format 'cotune federation server 2'; use the cotune that wrote it"):
        ServerFolder.read(tmp_path / "run")


def test_a_folder_is_there_whole_or_not_at_all(
    tmp_path: Path, federation: ToyFederation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: object, path: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(InputError, match="cannot be written: No space left"):
        patched.setattr(type(SECRET), "save", full)
        prepare(tmp_path / "run", federation)
    assert [path.name for path in tmp_path.iterdir()] == ["settings.toml"]
    (tmp_path / "run").mkdir()
    assert prepare(tmp_path / "run", federation).run_id, "an empty folder is as good as none"
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700


def test_a_run_that_was_never_told_its_layers_says_what_to_do(tmp_path: Path, federation: ToyFederation) -> None:
    text = SETTINGS.replace("ffa_lora", "fedpeptao") + '[adapter]\nkind = "prefix"\n'
    (tmp_path / "settings.toml").write_text(text)
    folder = ServerFolder.prepare(
        tmp_path / "run",
        tmp_path / "settings.toml",
        registry=federation.registry,
        secret=SECRET,
        start=toy_prefix(),
        base_digest=BASE,
    )
    with (
        pytest.raises(InputError, match=r"num_layers is 0 .* or prepare the run anew, which looks it up"),
        folder.coordinator(federation.transport),
    ):
        pass


def test_settings_are_checked_before_anything_is_written(tmp_path: Path, federation: ToyFederation) -> None:
    with pytest.raises(InputError, match="num_devicez"):
        prepare(tmp_path / "run", federation, "[data]\nnum_devicez = 3\n")
    assert not (tmp_path / "run").exists()


JUDGED = """
model = "starter"
[data]
limit = 12
num_devices = 2
num_judge = 4
[adapter]
rank = 2
targets = ["q_proj"]
"""


def test_start_and_judge_are_those_of_a_simulation(tmp_path: Path, federation: ToyFederation) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text(JUDGED)
    run = ServerFolder.prepare_from_model(tmp_path / "run", settings, registry=federation.registry, secret=SECRET)
    backbone = Backbone.from_pretrained("starter", dtype="float32", device="cpu")
    with simulate(run.settings, backbone, secret=SECRET) as simulation:
        assert same_arrays(run.start, simulation.adapter)
        expected = simulation.coordinator.begin(simulation.adapter).best_loss
    with run.coordinator(federation.transport) as (_, start):
        assert start.best_loss == expected and expected is not None
    with (
        pytest.raises(MismatchError, match="the model that the run was prepared with"),
        replace(run, base_digest=BASE).coordinator(federation.transport),
    ):
        pass


def test_what_python_does_not_look_up_is_asked_for_before_anything_is_written(
    tmp_path: Path, federation: ToyFederation
) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text('algorithm = "mixed"' + JUDGED + "[options.mixed]\nmemory_bytes = { d0 = 3 }\n")
    with pytest.raises(InputError, match="lora_bytes or seed_bytes is not; add what both need"):
        ServerFolder.prepare_from_model(tmp_path / "run", settings, registry=federation.registry, secret=SECRET)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("folder", ["", 3, None])
def test_a_run_config_without_a_folder_is_refused(folder: object) -> None:
    context = Context(
        run_id=1,
        node_id=1,
        node_config={},
        state=RecordDict(),
        run_config={} if folder is None else {"folder": folder},  # type: ignore[dict-item]
        series_id=1,
    )
    with pytest.raises(InputError, match="--run-config"):
        serve(None, context)  # type: ignore[arg-type]


def test_privacy_that_was_asked_for_is_there_over_flower_too(tmp_path: Path, federation: ToyFederation) -> None:
    table = "[privacy]\nnoise_multiplier = 4.0\nclip_norm = 0.5\n"
    text = SETTINGS.replace('[combine]\nrule = "mean"\noptions = {}\n', table)
    ends = []
    for name in ("one", "other"):
        own = ToyFederation(num_devices=3)
        folder = replace(prepare(tmp_path / name, federation, text), registry=own.registry)
        with folder.coordinator(own.transport) as (coordinator, start):
            ends.append([*coordinator.run(start)][-1])
    # The devices answer alike; the noise does not.
    assert not same_arrays(ends[0].state, ends[1].state)
    robust = prepare(tmp_path / "robust", federation, text + '[combine]\nrule = "median"\n')
    with (
        pytest.raises(InputError, match=r"combine\.rule is 'median' and \[privacy\] is on"),
        robust.coordinator(federation.transport),
    ):
        pass


def test_made_up_devices_stay_in_simulations(tmp_path: Path, federation: ToyFederation) -> None:
    folder = prepare(tmp_path / "run", federation, SETTINGS + "[audit]\nnum_canaries = 4\n")
    with (
        pytest.raises(InputError, match="made-up devices take part in simulations only"),
        folder.coordinator(federation.transport),
    ):
        pass
