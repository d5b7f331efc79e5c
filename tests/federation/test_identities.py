"""Keys, registry and secret of a run: made once, added to, and never half there."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import NoReturn

import pytest

from cotune.errors import InputError
from cotune.federation.identities import make_identities
from cotune.federation.run_secret import RunSecret
from cotune.federation.signing import DeviceKey, Registry


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def test_keys_fit_the_registry_and_secrets_are_their_owners(tmp_path: Path) -> None:
    folder, own = tmp_path / "new" / "ids", DeviceKey.generate()
    made = make_identities(folder, ["kitchen", "office"], {"garage": own.public_key})
    assert files(folder).keys() == {"kitchen.key", "office.key", "registry.json", "run.secret"}
    registry = Registry.load(made.registry_file)
    assert registry == made.registry and registry.devices["garage"] == own.public_key
    assert made.is_new_secret and RunSecret.load(made.secret_file)
    for name, path in made.keys.items():
        assert DeviceKey.load(path).public_key == registry.devices[name]
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(made.secret_file.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_devices_that_come_later_change_nothing_of_the_others(tmp_path: Path) -> None:
    make_identities(tmp_path, ["kitchen"])
    before = files(tmp_path)
    made = make_identities(tmp_path, ["office"], {"garage": DeviceKey.generate().public_key})
    assert not made.is_new_secret and made.keys.keys() == {"office"}
    after = files(tmp_path)
    assert {name: after[name] for name in ("kitchen.key", "run.secret")} == {
        name: before[name] for name in ("kitchen.key", "run.secret")
    }
    registry = Registry.load(made.registry_file).devices
    assert registry.keys() == {"kitchen", "office", "garage"}
    assert registry["kitchen"] == DeviceKey.load(tmp_path / "kitchen.key").public_key


@pytest.mark.parametrize(
    ("devices", "known", "words"),
    [
        ([], [], "no device is named"),
        (["attic", "attic"], [], "'attic' is named twice"),
        (["attic"], ["attic"], "'attic' is named twice"),
        (["kitchen"], [], "kitchen is registered already"),
        ([], ["kitchen"], "kitchen is registered already"),
        (["attic", "../attic"], [], r"device is '\.\./attic', expected 1 to 64 letters"),
        (["attic", ""], [], "device is '', expected"),
        (["attic", "cellar"], [], "cellar.key holds no Ed25519 key"),
    ],
)
def test_what_is_refused_leaves_everything_as_it_was(
    tmp_path: Path, devices: list[str], known: list[str], words: str
) -> None:
    make_identities(tmp_path, ["kitchen"])
    (tmp_path / "cellar.key").write_text("somebody's")
    (tmp_path / "cellar.key").chmod(0o600)
    before = files(tmp_path)
    with pytest.raises(InputError, match=words):
        make_identities(tmp_path, devices, {name: DeviceKey.generate().public_key for name in known})
    assert files(tmp_path) == before


def test_a_key_that_a_killed_process_left_is_registered_and_not_overwritten(tmp_path: Path) -> None:
    left = DeviceKey.generate()
    left.save(tmp_path / "attic.key")
    before = files(tmp_path)
    made = make_identities(tmp_path, ["attic", "cellar"])
    assert made.registry.devices["attic"] == left.public_key
    assert files(tmp_path)["attic.key"] == before["attic.key"]
    assert made.keys == {name: tmp_path / f"{name}.key" for name in ("attic", "cellar")}
    with pytest.raises(InputError, match="attic is registered already"):
        make_identities(tmp_path, ["attic"])


def test_public_keys_that_are_none_or_somebody_elses_are_refused(tmp_path: Path) -> None:
    taken = Registry.load(make_identities(tmp_path, ["kitchen"]).registry_file).devices["kitchen"]
    before = files(tmp_path)
    for key, words in ((b"short", "not of 32 bytes"), (bytes(32), "anybody can sign"), (taken, "the same public key")):
        with pytest.raises(InputError, match=words):
            make_identities(tmp_path, ["attic"], {"garage": key})
    assert files(tmp_path) == before


def test_a_registry_or_a_secret_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    made = make_identities(tmp_path, ["kitchen"])
    made.secret_file.chmod(0o644)
    with pytest.raises(InputError, match="others can read the run secret"):
        make_identities(tmp_path, ["attic"])
    made.secret_file.chmod(0o600)
    made.registry_file.write_text("{}")
    with pytest.raises(InputError, match=r"registry\.json cannot be used"):
        make_identities(tmp_path, ["attic"])
    assert not (tmp_path / "attic.key").exists()
    with pytest.raises(InputError, match="cannot be written"):
        make_identities(made.registry_file / "folder", ["attic"])


def test_a_disk_that_fills_up_at_the_end_leaves_nothing_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Registry, path: object) -> NoReturn:
        raise InputError("the registry cannot be written: no space left")

    monkeypatch.setattr(Registry, "save", full)
    with pytest.raises(InputError, match="no space left"):
        make_identities(tmp_path / "ids", ["kitchen"])
    assert files(tmp_path / "ids") == {}
