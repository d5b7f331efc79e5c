"""Files with secrets: mode 0600, never overwritten, refused where others can read them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest

from cotune.errors import InputError
from cotune.federation.run_secret import RunSecret
from cotune.federation.sealing import SealingKey
from cotune.federation.secret_files import RandomSecret, read_secret, write_secret

KINDS = pytest.mark.parametrize("kind", [RunSecret, SealingKey])


def test_a_secret_is_written_once_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_secret(path, b"first", "the key")
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_secret(path, "the key", max_bytes=5) == b"first"
    with pytest.raises(InputError, match="the key is never overwritten"):
        write_secret(path, b"second", "the key")
    assert path.read_bytes() == b"first"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
def test_a_secret_that_others_can_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    write_secret(path, b"first", "the key")
    path.chmod(mode)
    with pytest.raises(InputError, match=f"mode {mode:04o}, so others can read the key, expected 0600"):
        read_secret(path, "the key", max_bytes=5)


def test_missing_and_large_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_secret(tmp_path / "none", "the key", max_bytes=5)
    with pytest.raises(InputError, match="cannot be read"):
        read_secret(tmp_path, "the key", max_bytes=5)
    with pytest.raises(InputError, match="cannot be written"):
        write_secret(tmp_path / "none" / "key", b"", "the key")
    write_secret(tmp_path / "large", b"123456", "the key")
    with pytest.raises(InputError, match="more than 5 bytes"):
        read_secret(tmp_path / "large", "the key", max_bytes=5)


@KINDS
def test_a_random_secret_is_written_once_with_mode_0600_and_loaded(kind: type[RandomSecret], tmp_path: Path) -> None:
    path = tmp_path / "secret"
    made = kind.generate()
    assert made != kind.generate()
    made.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(InputError, match=f"the {made.kind} is never overwritten"):
        kind.generate().save(path)
    assert kind.load(path) == made and type(kind.load(path)) is kind
    path.chmod(0o640)
    with pytest.raises(InputError, match=f"others can read the {made.kind}"):
        kind.load(path)


@KINDS
@pytest.mark.parametrize("num_bytes", [0, 31, 33])
def test_random_secrets_of_another_length_are_refused(kind: type[RandomSecret], num_bytes: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"32 bytes; make one with {kind.__name__}.generate"):
        kind(bytes(num_bytes))
    path = tmp_path / "short"
    path.touch(mode=0o600)
    path.write_bytes(bytes(num_bytes))
    with pytest.raises(InputError, match="copy the file again" if num_bytes < 32 else "more than 32 bytes"):
        kind.load(path)


@KINDS
def test_a_random_secret_is_never_shown(kind: type[RandomSecret]) -> None:
    secret = kind(bytes(range(32)))
    assert repr(secret) == str(secret) == f"{secret}" == f"{kind.__name__}(hidden)"
    for copied in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="not to be copied"):
            copied(secret)


def test_the_same_bytes_are_not_the_same_secret() -> None:
    assert RunSecret(bytes(32)) == RunSecret(bytes(32)) != SealingKey(bytes(32))
