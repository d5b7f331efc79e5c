"""The plugin folder: whole or not at all, bounded, and bound to its backbone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from cotune import plugin as plugin_module
from cotune.errors import InputError, MismatchError
from cotune.plugin import GateParameters, Plugin

FILES = {"plugin.json", "plugin.safetensors", "tokenizer.json", "output_basis.safetensors"}


def some_plugin(**changes: Any) -> Plugin:
    fields: dict[str, Any] = {
        "kind": "tap_ladder",
        "config": {"num_taps": 3, "side_width": 2},
        "tensors": {
            "head_weight": np.arange(6, dtype=np.float32).reshape(2, 3),
            "head_bias": np.array([0.5, -1.0], np.float32),
        },
        "gate": GateParameters(weight=np.array([1.0, 2.0, 3.0], np.float32), bias=0.25, threshold=-1.5),
        "backbone_digest": "b" * 64,
        "projections_digest": "p" * 64,
        "tokenizer_digest": "t" * 64,
        "family": "parallel",
        "training": {"steps": 12, "loss": 1.5, "data": "Jörg's notes"},
        "tokenizer_json": b'{"version": "1.0"}',
        "output_basis": b"\0\1\2",
    }
    return Plugin(**{**fields, **changes})


LAYERED = GateParameters(
    weight=np.array([1.0, -2.0], np.float32),
    bias=0.5,
    threshold=0.25,
    layer=np.array([[1, 2, 3], [4, 5, 6]], np.float32),
    layer_bias=np.array([0.5, -0.5], np.float32),
)


def assert_equal(left: Plugin, right: Plugin) -> None:
    left_fields, right_fields = dict(vars(left)), dict(vars(right))
    for fields in (left_fields, right_fields):
        fields["tensors"] = {name: (t.dtype, t.shape, t.tobytes()) for name, t in fields["tensors"].items()}
        gate = fields["gate"]
        kept = gate and {name: tensor.tobytes() for name, tensor in gate.tensors().items()}
        fields["gate"] = gate and (kept, gate.bias, gate.threshold)
    assert left_fields == right_fields


@pytest.mark.parametrize(
    "changes", [{}, {"gate": None}, {"gate": LAYERED}, {"family": "serial", "training": {}}, {"tensors": {}}]
)
def test_a_saved_plugin_loads_as_it_was(changes: dict[str, Any], tmp_path: Path) -> None:
    plugin = some_plugin(**changes)
    plugin.save(tmp_path / "deep" / "plugin")
    assert {path.name for path in (tmp_path / "deep" / "plugin").iterdir()} == FILES
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["plugin"]
    assert_equal(Plugin.load(tmp_path / "deep" / "plugin"), plugin)


def test_strided_tensors_are_stored_by_value(tmp_path: Path) -> None:
    wide = np.arange(12, dtype=np.float32).reshape(3, 4)
    some_plugin(tensors={"t": wide.T[::2]}).save(tmp_path / "p")
    np.testing.assert_array_equal(Plugin.load(tmp_path / "p").tensors["t"], wide.T[::2])


def test_a_plugin_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    some_plugin().save(tmp_path / "p")
    assert (tmp_path / "p").stat().st_mode & 0o077 == 0


def test_saving_replaces_the_plugin_and_keeps_the_rest(tmp_path: Path) -> None:
    some_plugin().save(tmp_path / "p")
    (tmp_path / "p" / "report.html").write_text("mine")
    (tmp_path / "p" / "logs").mkdir()
    other = some_plugin(family="serial")
    other.save(tmp_path / "p")
    assert_equal(Plugin.load(tmp_path / "p"), other)
    assert {path.name for path in (tmp_path / "p").iterdir()} == FILES | {"report.html", "logs"}
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_saving_into_an_empty_folder_or_through_a_link_works(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    some_plugin().save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_equal(Plugin.load(tmp_path / "real"), some_plugin())


def test_other_folders_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years")
    (tmp_path / "file").write_text("x")
    for name in ("thesis", "file"):
        with pytest.raises(InputError, match="is no plugin folder"):
            some_plugin().save(tmp_path / name)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years"


@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupted_save_leaves_what_was_there(
    existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if existing:
        some_plugin().save(tmp_path / "p")
    calls = []

    def interrupt(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        some_plugin(family="serial").save(tmp_path / "p")
    assert [path.name for path in tmp_path.iterdir()] == (["p"] if existing else [])
    if existing:
        assert_equal(Plugin.load(tmp_path / "p"), some_plugin())


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some_plugin().save(tmp_path / "p")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"cannot be written to .*No space left"):
        some_plugin(family="serial").save(tmp_path / "p")
    assert_equal(Plugin.load(tmp_path / "p"), some_plugin())
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_a_failed_rename_gives_the_old_plugin_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some_plugin().save(tmp_path / "p")
    rename = Path.rename

    def fail_once(source: Path, target: Path) -> Path:
        if source.name.startswith(".p.") and not source.name.endswith(".old"):
            raise OSError(5, "Input/output error")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(InputError, match="Input/output error"):
        some_plugin(family="serial").save(tmp_path / "p")
    assert_equal(Plugin.load(tmp_path / "p"), some_plugin())
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_a_plugin_fits_its_own_backbone_alone() -> None:
    plugin = some_plugin()
    plugin.check_backbone("b" * 64, "p" * 64, "t" * 64)
    for i, what in enumerate(("backbone", "projections", "tokenizer")):
        digests = ["b" * 64, "p" * 64, "t" * 64]
        own = digests[i][:12]
        digests[i] = "0123456789abcdef" * 4
        with pytest.raises(MismatchError, match=f"on the {what} {own}, .* 0123456789ab; .*cotune device tune"):
            plugin.check_backbone(*digests)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "sideways"}, "expected one of parallel, serial"),
        ({"tensors": {"a": np.zeros(2)}}, "a is float64, expected float32"),
        ({"tensors": {"a": np.array([np.nan], np.float32)}}, "nan or inf"),
        ({"tensors": {"gate.weight": np.zeros(2, np.float32)}}, "give it as gate"),
    ],
)
def test_impossible_plugins_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        some_plugin(**changes)


@pytest.mark.parametrize("changes", [{"weight": np.zeros(3)}, {"bias": float("nan")}, {"threshold": float("inf")}])
def test_impossible_gates_are_refused(changes: dict[str, Any]) -> None:
    fields = {"weight": np.zeros(3, np.float32), "bias": 0.0, "threshold": 0.0}
    with pytest.raises(InputError, match="gate"):
        GateParameters(**{**fields, **changes})


@pytest.mark.parametrize("config", [{"a": np.float32(1)}, {"a": float("nan")}, {"a": object()}])
def test_a_config_that_is_no_json_is_refused_before_writing(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no JSON"):
        some_plugin(config=config).save(tmp_path / "p")
    assert not list(tmp_path.iterdir())


def test_too_large_a_plugin_is_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at most 1048576 are allowed"):
        some_plugin(training={"log": "x" * 2**20}).save(tmp_path / "p")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    some_plugin().save(tmp_path / "p")
    return tmp_path / "p"


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    meta = json.loads((folder / "plugin.json").read_text())
    change(meta)
    (folder / "plugin.json").write_text(json.dumps(meta))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing is no folder, expected a plugin; make one with `cotune device tune"):
        Plugin.load(tmp_path / "missing")


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"{name} is missing"):
        Plugin.load(folder)
    (folder / name).mkdir()
    with pytest.raises(InputError, match=f"{name} is missing"):
        Plugin.load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff", '{"format_version": ', "[" * 100_000])
def test_wrong_json_is_refused(folder: Path, text: str) -> None:
    (folder / "plugin.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"plugin\.json"):
        Plugin.load(folder)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_is_refused(folder: Path, version: object) -> None:
    edit(folder, lambda meta: meta.update(format_version=version))
    with pytest.raises(InputError, match="this cotune reads 1"):
        Plugin.load(folder)


@pytest.mark.parametrize("key", ["kind", "config", "digests", "family", "training"])
@pytest.mark.parametrize("value", [7, True, [1], None])
def test_wrong_entries_are_named(folder: Path, key: str, value: object) -> None:
    edit(folder, lambda meta: meta.update({key: value}))
    with pytest.raises(InputError, match=f"has {key} = "):
        Plugin.load(folder)


@pytest.mark.parametrize("gate", [True, {}, {"bias": "a", "threshold": 0}, {"bias": 0, "threshold": True}])
def test_wrong_gates_are_refused(folder: Path, gate: object) -> None:
    edit(folder, lambda meta: meta.update(gate=gate))
    with pytest.raises(InputError, match=r"plugin\.json has"):
        Plugin.load(folder)


def test_json_and_tensors_must_agree_about_the_gate(folder: Path) -> None:
    edit(folder, lambda meta: meta.update(gate=None))
    with pytest.raises(InputError, match=r"gate\.weight"):
        Plugin.load(folder)
    some_plugin(gate=None).save(folder)
    edit(folder, lambda meta: meta.update(gate={"bias": 0.0, "threshold": 0.0}))
    with pytest.raises(InputError, match=r"no gate\.weight"):
        Plugin.load(folder)


def test_wrong_tensors_are_refused(folder: Path) -> None:
    path = folder / "plugin.safetensors"
    whole = path.read_bytes()
    for data in (b"", whole[:7], whole[:40], whole[:-1], whole + b"\0", b"\xff" * 64, b"\x80\x04K\x01."):
        path.write_bytes(data)
        with pytest.raises(InputError, match="is no safetensors file"):
            Plugin.load(folder)
    for array in (np.zeros(3, np.float64), np.zeros(3, np.int8), np.zeros(3, np.float16)):
        save_file({"head_bias": array}, path)
        with pytest.raises(InputError, match="not float32"):
            Plugin.load(folder)
    save_file({"gate.weight": np.zeros((2, 2), np.float32)}, path)
    with pytest.raises(InputError, match="gate weight"):
        Plugin.load(folder)
    save_file({"gate.weight": np.zeros(2, np.float32), "t": np.array([np.inf], np.float32)}, path)
    with pytest.raises(InputError, match="nan or inf"):
        Plugin.load(folder)


@pytest.mark.parametrize("name", sorted(FILES))
def test_sizes_are_checked_before_reading(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with (folder / name).open("r+b") as file:
        file.truncate(2**40)  # sparse: a terabyte that takes no room
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail() if path.name == name else read(path))
    with pytest.raises(InputError, match=f"{name} has {2**40} bytes"):
        Plugin.load(folder)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["plugin.json", "plugin.safetensors"]), data=st.data())
def test_damaged_files_give_a_plugin_or_an_input_error(folder: Path, name: str, data: st.DataObject) -> None:
    whole = (folder / name).read_bytes()
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    (folder / name).write_bytes(bytes(damaged))
    try:
        Plugin.load(folder)
    except InputError as error:
        assert str(error)
    finally:
        (folder / name).write_bytes(whole)


def test_the_number_of_parameters_leaves_out_the_gate() -> None:
    assert some_plugin().num_parameters == 8


def test_it_needs_no_torch() -> None:
    code = "import sys, cotune.plugin; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_limits_are_those_of_the_format() -> None:
    assert plugin_module.MAX_JSON_BYTES == 2**20
    assert plugin_module.MAX_TENSOR_BYTES == 512 * 2**20
