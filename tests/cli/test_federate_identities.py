"""`cotune federate identities` and `device-key`: what is printed, and what never is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cotune.federation.run_secret import RunSecret
from cotune.federation.signing import DeviceKey, Registry


def test_a_device_makes_its_own_key_and_the_server_adds_it(tmp_path: Path, run: Any) -> None:
    folder, own = tmp_path / "ids", tmp_path / "garage.key"
    outcome = run("federate", "identities", folder, "--device", "kitchen", "--device", "office")
    assert outcome.status == 0 and outcome.out == ""
    for words in ("kitchen.key", "run.secret", "registered: kitchen, office", "cotune federate prepare CONFIG.toml"):
        assert words in outcome.err

    made = run("federate", "device-key", own)
    public_key = made.out.strip()
    assert bytes.fromhex(public_key) == DeviceKey.load(own).public_key
    assert f"--known NAME={public_key}" in made.err and own.stat().st_mode & 0o777 == 0o600
    shown = json.loads(run("federate", "device-key", own, "--show", "--json").out)
    assert shown == {"key": str(own), "public_key": public_key}

    added = json.loads(run("federate", "identities", folder, "--known", f"garage={public_key.upper()}", "--json").out)
    assert added["devices"].keys() == {"kitchen", "office", "garage"} and added["devices"]["garage"] == public_key
    assert added["keys"] == {} and added["is_new_secret"] is False
    assert Registry.load(added["registry"]).devices["garage"].hex() == public_key

    private = own.read_text().splitlines()[1]
    secret = RunSecret.load(added["secret"]).value.hex()
    for told in (outcome.err, made.err, made.out, json.dumps(added)):
        assert private not in told and secret not in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "no device is named"),
        (("--device", "a", "--device", "a"), "'a' is named twice"),
        (("--known", "garage"), "--known has no =, expected NAME=HEX; 6 characters came"),
        (("--known", "garage=12ab"), "--known garage has 4 characters behind =, expected the 64 hexadecimal digits"),
        (("--known", f"garage={'0x' * 32}"), "--known garage has 64 characters behind ="),
        (("--known", f"a={'12' * 32}", "--known", f"a={'34' * 32}"), "--known a is given twice"),
        (("--device", "a/b"), "device is 'a/b', expected 1 to 64 letters, digits"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_written(
    tmp_path: Path, run: Any, arguments: tuple[str, ...], words: str
) -> None:
    run("federate", "identities", tmp_path / "ids", *arguments).check_refusal(words)
    assert list(tmp_path.iterdir()) == []


def test_a_private_key_that_was_pasted_is_not_repeated(tmp_path: Path, run: Any) -> None:
    DeviceKey.generate().save(tmp_path / "a.key")
    pasted = (tmp_path / "a.key").read_text().splitlines()[1]
    for argument in (pasted, f"garage={pasted}"):
        outcome = run("federate", "identities", tmp_path / "ids", "--known", argument)
        assert outcome.status == 2 and pasted.rstrip("=") not in outcome.err


def test_keys_are_never_overwritten(tmp_path: Path, run: Any) -> None:
    run("federate", "device-key", tmp_path / "kitchen.key")
    before = (tmp_path / "kitchen.key").read_bytes()
    words = "the device's key is never overwritten"
    run("federate", "device-key", tmp_path / "kitchen.key").check_refusal(words)
    run("federate", "identities", tmp_path, "--device", "office", "--device", "kitchen")
    assert (tmp_path / "kitchen.key").read_bytes() == before and len(list(tmp_path.iterdir())) == 4
    run("federate", "device-key", tmp_path / "none.key", "--show").check_refusal("cannot be read from")
