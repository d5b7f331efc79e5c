"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from cotune.durable import (
    is_free,
    new_folder,
    new_sized_folder,
    remove_folder,
    remove_unfinished,
    replacing,
    whole_lines,
    write_folder,
    write_new,
)
from cotune.errors import DataError, InputError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "no space left on device")


def test_a_file_is_replaced_and_has_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with replacing(path) as unfinished:
        unfinished.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
    with replacing(path, mode=0o644) as unfinished:
        unfinished.write_bytes(b"newer")
    assert path.stat().st_mode & 0o777 == 0o644
    earlier = os.umask(0o037)
    try:
        with replacing(path, mode=None) as unfinished:
            unfinished.write_bytes(b"newest")
    finally:
        os.umask(earlier)
    assert path.stat().st_mode & 0o777 == 0o640
    assert names(tmp_path) == ["file"]


def test_a_file_that_fails_half_way_is_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), replacing(path) as unfinished:
        unfinished.write_bytes(b"ne")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_new_file_is_never_a_replacement(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_new(path, b"first")
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_nlink == 1
    with pytest.raises(FileExistsError):
        write_new(path, b"second")
    assert path.read_bytes() == b"first"
    write_new(tmp_path / "key.pub", b"public", mode=0o644)
    assert (tmp_path / "key.pub").stat().st_mode & 0o777 == 0o644
    assert names(tmp_path) == ["key", "key.pub"]


def test_a_link_to_nowhere_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "key", b"secret")
    assert names(tmp_path) == ["key"]


def test_a_new_file_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="no space"):
        write_new(tmp_path / "key", b"secret")
    assert names(tmp_path) == []


def test_a_folder_is_written_whole(tmp_path: Path) -> None:
    write_folder(tmp_path / "f", {"a": b"1", "b": b"2"})
    assert names(tmp_path) == ["f"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "f").iterdir()} == {"a": b"1", "b": b"2"}
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "f", tmp_path / "f" / "a"))
    with pytest.raises(OSError, match="not empty"):
        write_folder(tmp_path / "f", {"a": b"3"})
    assert (tmp_path / "f" / "a").read_bytes() == b"1"
    assert names(tmp_path) == ["f"]


def test_a_folder_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="no space"):
        write_folder(tmp_path / "f", {"a": b"1"})
    assert names(tmp_path) == []


def test_only_where_nothing_would_be_lost_is_a_place_free(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "result.json").write_bytes(b"{}")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert {name: is_free(tmp_path / name) for name in ("new", "empty", "file", "held", "dangling")} == {
        **dict.fromkeys(("new", "empty"), True),
        **dict.fromkeys(("file", "held", "dangling"), False),
    }
    assert is_free(tmp_path / "held", earlier="result.json")
    assert not is_free(tmp_path / "held", earlier="other.json")


def test_a_new_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    with new_folder(tmp_path / "f") as unfinished:
        (unfinished / "a").write_bytes(b"1")
        (unfinished / "deeper").mkdir()
        (unfinished / "deeper" / "b").write_bytes(b"2")
        assert not (tmp_path / "f").exists()
    assert names(tmp_path) == ["f"]
    assert (tmp_path / "f" / "deeper" / "b").read_bytes() == b"2"
    assert (tmp_path / "f").stat().st_mode & 0o077 == 0


def test_a_new_folder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_folder(tmp_path / "f") as unfinished:
        (unfinished / "a").write_bytes(b"1")
        raise RuntimeError
    assert names(tmp_path) == []


def test_a_new_folder_takes_no_folder_s_place(tmp_path: Path) -> None:
    write_folder(tmp_path / "f", {"a": b"old"})
    with pytest.raises(OSError, match="not empty"), new_folder(tmp_path / "f") as unfinished:
        (unfinished / "a").write_bytes(b"new")
    assert names(tmp_path) == ["f"]
    assert (tmp_path / "f" / "a").read_bytes() == b"old"


def test_a_removed_folder_goes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "f-1", {"a": b"1"})
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # killed between the rename and the removal
    remove_folder(tmp_path / "f-1")
    assert not (tmp_path / "f-1").exists()
    assert len(names(tmp_path)) == 1
    monkeypatch.undo()
    remove_unfinished(tmp_path, "g-")
    assert len(names(tmp_path)) == 1, "another's"
    remove_unfinished(tmp_path, "f-")
    assert names(tmp_path) == []


def test_a_large_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "model"
    with (
        pytest.raises(InputError, match="model cannot be written: no space left on device; nothing is left of it"),
        new_sized_folder(out, num_bytes=1) as folder,
    ):
        (folder / "weights").write_bytes(b"half")
        no_space()
    assert not names(tmp_path / "deep")
    with new_sized_folder(out, num_bytes=1) as folder:
        (folder / "weights").write_bytes(b"all")
        assert not out.exists()
    assert names(out) == ["weights"] and names(tmp_path / "deep") == ["model"]
    with (
        pytest.raises(InputError, match="is there already, expected a new folder; remove it"),
        new_sized_folder(out, num_bytes=1),
    ):
        pytest.fail("it begins although something is there")


def test_a_folder_without_room_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    with (
        pytest.raises(InputError, match=r"takes 2\.0 MiB and 1\.0 MiB are free there, expected that and 16 MiB"),
        new_sized_folder(tmp_path / "model", num_bytes=2**21),
    ):
        pytest.fail("it begins although there is no room")
    assert not names(tmp_path)


def test_lines_of_a_file_that_is_not_there_are_none(tmp_path: Path) -> None:
    assert whole_lines(tmp_path / "log", max_bytes=0) == []


def test_a_last_line_without_its_end_is_cut_even_if_it_could_be_read(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b'{"a": "\xe2\x80\xa8\x0c"}\n\n{"a": 2}')  # ends of lines for Unicode, not for a file of lines
    assert whole_lines(path, max_bytes=100) == [b'{"a": "\xe2\x80\xa8\x0c"}', b""]
    with path.open("ab") as file:
        file.write(b'{"a": 3}\n')
    assert whole_lines(path, max_bytes=100)[2:] == [b'{"a": 3}']


def test_lines_that_cannot_be_had_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"12345")
    with pytest.raises(DataError, match=r"log: has more than 4 bytes, expected at most that; move it away"):
        whole_lines(path, max_bytes=4)
    assert path.read_bytes() == b"12345"
    with pytest.raises(DataError, match=r"cannot be read: Is a directory"):
        whole_lines(tmp_path, max_bytes=1 << 20)
