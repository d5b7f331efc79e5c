"""Where an interrupted coordinator goes on: one folder for each finished round, there whole or not at all.

    checkpoint-000012/
        arrays.safetensors    the accepted state after round 12
        state.json            round, digests, history of rounds, exclusions, accountant

With a sealing key both files are encrypted, and their names end in `.sealed`. `cotune.tuning.checkpoint` is the same
idea for one machine: one file, in PyTorch. What they share, writing whole or not at all, is `cotune.durable`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from cotune.durable import remove_folder, remove_unfinished, write_folder
from cotune.errors import FrameError, InputError, MismatchError
from cotune.federation.arrays import AnyArrays, digest
from cotune.federation.number_ranges import check_at_least
from cotune.federation.packing import MAX_BLOCK_BYTES, canonical_json, pack, unpack
from cotune.federation.sealing import OVERHEAD_BYTES, SealingKey, seal, unseal

FORMAT = "cotune coordinator checkpoint 1"
MAX_STATE_BYTES = 2**28
MAX_ROUNDS = 10**9

_ARRAYS = "arrays.safetensors"
_STATE = "state.json"
_SEALED = ".sealed"
_DIGEST = "arrays_digest"
_MAX_BYTES = {_ARRAYS: MAX_BLOCK_BYTES, _STATE: MAX_STATE_BYTES}
_START = "checkpoint-"
_NAME = re.compile(_START + r"(\d{6,9})")


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """All that a coordinator knows after a round. What is not an array holds JSON values, none of them nan."""

    run_id: str
    """Names the run."""
    round_number: int
    """The last finished round."""
    base_digest: str
    """SHA-256 of the frozen model."""
    config_digest: str
    """Names the configuration and the data of the run."""
    arrays: AnyArrays
    """The last accepted state: float32, int64 or uint8."""
    history: Sequence[Mapping[str, Any]] = ()
    """One entry for each round."""
    exclusions: Mapping[str, str] = field(default_factory=dict)
    """Devices that may not take part any more, and why."""
    accountant: Mapping[str, Any] = field(default_factory=dict)
    """What was spent of the privacy budget."""
    secret_id: str = ""
    """`RunSecret.public_id`, where there is a secret; never the secret."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What else an algorithm or the coordinator keeps."""


@dataclass(frozen=True, kw_only=True)
class LastCheckpoint:
    """What `load_last` found."""

    checkpoint: Checkpoint
    """The newest whole one."""
    path: Path
    """Its folder."""
    skipped: tuple[str, ...]
    """One sentence for each newer one that is torn."""


class _TornError(Exception):
    """A checkpoint that is not whole; the reason."""


def save(folder: Path | str, checkpoint: Checkpoint, *, keep: int = 3, key: SealingKey | None = None) -> Path:
    """Write the checkpoint of a round, whole or not at all, then remove all but the last `keep`.

    What killed processes left half written is removed first. Only one coordinator may write to `folder`.

    Args:
        folder: holds the checkpoints of one run; made where it is missing.
        checkpoint: of a later round than those that are there.
        keep: how many stay, at least 1.
        key: encrypts the files.

    Returns:
        The folder of this checkpoint.

    Raises:
        InputError: `folder` holds this round or a later one, a value cannot be written, or the disk refuses.
    """
    check_at_least(1, keep=keep)
    number = checkpoint.round_number
    if type(number) is not int or not 0 <= number < MAX_ROUNDS:
        raise InputError(f"round_number is {number!r:.40}, expected an int from 0 to {MAX_ROUNDS - 1}")
    path = Path(folder) / f"{_START}{number:06d}"
    files = _files(checkpoint, path.name, key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished(path.parent, _START)
        _make_way(path.parent, number, key)
        write_folder(path, files)
        for old in _checkpoints(path.parent)[:-keep]:
            remove_folder(old)
    except OSError as error:
        raise InputError(f"the checkpoint {path} cannot be written: {error.strerror or error}") from error
    return path


def load_last(
    folder: Path | str, *, key: SealingKey | None = None, config_digest: str | None = None
) -> LastCheckpoint | None:
    """The newest whole checkpoint, or None where there has never been one.

    Every digest is verified. A torn checkpoint, which a failing disk may leave, is skipped and told about.

    Args:
        folder: as for `save`.
        key: what they were encrypted with. With a key, a checkpoint that is not encrypted is refused: somebody may
            have put it there.
        config_digest: refuse checkpoints of another configuration; None takes any.

    Raises:
        InputError: there are checkpoints, but none is whole, or a key is missing or should not be there.
        MismatchError: another key, or another configuration.
    """
    skipped: list[str] = []
    for path in reversed(_checkpoints(Path(folder))):
        try:
            checkpoint = _read(path, key)
        except _TornError as error:
            skipped.append(f"{path.name} is torn and skipped: {error}")
            continue
        if config_digest not in (None, checkpoint.config_digest):
            raise MismatchError(
                f"{path} belongs to a run with another configuration or other data; "
                "start without resuming in another folder, or resume with the configuration of that run"
            )
        return LastCheckpoint(checkpoint=checkpoint, path=path, skipped=tuple(skipped))
    if skipped:
        raise InputError(f"{folder} has no whole checkpoint ({'; '.join(skipped)}); start again in another folder")
    return None


def _checkpoints(folder: Path) -> list[Path]:
    """Folders of checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _make_way(folder: Path, number: int, key: SealingKey | None) -> None:
    """Remove torn checkpoints of this round and later ones; a whole one is somebody's run."""
    for path in _checkpoints(folder):
        if int(path.name.removeprefix(_START)) < number:
            continue
        try:
            _read(path, key)
        except _TornError:
            remove_folder(path)
            continue
        raise InputError(
            f"{folder} holds {path.name}, so round {number} is not its next one; "
            "resume that run, or choose another folder"
        )


def _files(checkpoint: Checkpoint, name: str, key: SealingKey | None) -> dict[str, bytes]:
    """The files of a checkpoint, by name."""
    content = {one.name: getattr(checkpoint, one.name) for one in fields(checkpoint) if one.name != "arrays"}
    content["history"] = [dict(entry) for entry in checkpoint.history]
    for mapping in ("exclusions", "accountant", "extra"):
        content[mapping] = dict(content[mapping])
    content[_DIGEST] = digest(checkpoint.arrays)
    try:
        text = canonical_json(content)
        arrays = pack(checkpoint.arrays, {_DIGEST: content[_DIGEST]}, "the checkpoint")
        # What json makes a text of, such as a key that is a number, would not come back as it was.
        if json.loads(text) != _as_lists(content):
            raise ValueError("a key is no text")
    except (FrameError, TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"the checkpoint of round {checkpoint.round_number} cannot be written: {error}; "
            "give it JSON values without nan, and arrays of float32, int64 or uint8"
        ) from None
    whole = {"format": FORMAT, "content": content, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    files = {_ARRAYS: arrays, _STATE: (json.dumps(whole, indent=1, sort_keys=True) + "\n").encode()}
    for file, data in files.items():
        if len(data) > _MAX_BYTES[file]:
            raise InputError(f"{file} would have {len(data)} bytes, at most {_MAX_BYTES[file]} are allowed")
    if key is None:
        return files
    return {file + _SEALED: seal(data, key, f"{name}/{file}") for file, data in files.items()}


def _read(path: Path, key: SealingKey | None) -> Checkpoint:
    """One checkpoint, verified."""
    content = _read_content(_read_file(path, _STATE, key))
    expected = {one.name for one in fields(Checkpoint)} - {"arrays"} | {_DIGEST}
    if content.keys() != expected or content["round_number"] != int(path.name.removeprefix(_START)):
        raise _TornError(f"{_STATE} is that of another checkpoint")
    try:
        arrays, note = unpack(_read_file(path, _ARRAYS, key), _ARRAYS)
    except FrameError as error:
        raise _TornError(str(error)) from None
    if digest(arrays) != content[_DIGEST] or note != {_DIGEST: content[_DIGEST]}:
        raise _TornError(f"{_ARRAYS} is not the one that {_STATE} is about")
    del content[_DIGEST]
    return Checkpoint(arrays=arrays, **content)


def _read_content(data: bytes) -> dict[str, Any]:
    """What `state.json` says, if it says all of it."""
    try:
        whole = json.loads(data)
        content, stated, version = whole["content"], whole["sha256"], whole["format"]
        if not isinstance(content, dict):
            raise TypeError("its content is no object")
        text = canonical_json(content)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _TornError(f"{_STATE} is damaged ({error!s:.120})") from None
    if stated != hashlib.sha256(text.encode()).hexdigest():
        raise _TornError(f"the digest of {_STATE} is not that of its content")
    if version != FORMAT:
        raise InputError(f"{_STATE} has format {version!r:.60}, expected {FORMAT!r}; use the cotune that wrote it")
    return content


def _read_file(path: Path, file: str, key: SealingKey | None) -> bytes:
    """One file of a checkpoint, decrypted; its size is looked at first."""
    name = file if key is None else file + _SEALED
    other = file + _SEALED if key is None else file
    if not (path / name).exists() and (path / other).is_file():
        if key is None:
            raise InputError(f"{path} is encrypted; give the key that it was sealed with")
        raise InputError(f"{path} is not encrypted, but a key was given; resume without a key if you trust this folder")
    limit = _MAX_BYTES[file] + OVERHEAD_BYTES
    try:
        with (path / name).open("rb") as opened:
            data = opened.read(limit + 1)
    except OSError as error:
        raise _TornError(f"{name} cannot be read: {error.strerror or error}") from None
    if len(data) > limit:
        raise _TornError(f"{name} has more than {limit} bytes")
    if key is None:
        return data
    try:
        return unseal(data, key, f"{path.name}/{file}")
    except MismatchError:
        raise
    except InputError as error:
        raise _TornError(str(error)) from None


def _as_lists(value: Any) -> Any:
    """The same value with lists for tuples, as JSON has them."""
    if isinstance(value, Mapping):
        return {key: _as_lists(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_as_lists(one) for one in value]
    return value
