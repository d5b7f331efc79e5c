"""What a device learns for itself, on its own disk: one file for each round, there whole or not at all.

    FOLDER/RUN/round-000003.safetensors    after the work of round 3

A round that is done again, because the coordinator or the device was killed in it, begins from the file of the last
round before it, so that it gives the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from cotune.errors import InputError
from cotune.tuning.stored_tensors import StoredTensors

ROUNDS = "rounds"
"""The store's folder among what a co-tuned device keeps."""
_NAME = re.compile(r"round-(\d{6,10})\.safetensors")


class DeviceStore:
    """The files of one device.

    Args:
        folder: made when the first round is done.
        keep: rounds of a run that stay; a coordinator that was killed is at most one behind.

    Example:
        >>> store = DeviceStore(Path("kitchen"))  # doctest: +SKIP
        >>> store.save("run-1", 3, {"private/a": tensor})  # doctest: +SKIP
        >>> store.before("run-1", 4)["private/a"]  # doctest: +SKIP
    """

    def __init__(self, folder: Path, *, keep: int = 3) -> None:
        self.folder, self._keep = folder, keep

    def before(self, run_id: str, round_number: int) -> dict[str, Tensor] | None:
        """What was there before a round; None before the first one.

        Raises:
            InputError: a file is damaged, or only later rounds are there.
        """
        found = self._rounds(run_id)
        earlier = [number for number in found if number < round_number]
        if found and not earlier and min(found) > round_number:
            raise InputError(
                f"{self.folder} has rounds from {min(found)} on of run {run_id}, expected one before {round_number}; "
                "go on where the run was, or begin with an empty folder"
            )
        return dict(StoredTensors(found[max(earlier)])) if earlier else None

    def last(self, run_id: str) -> dict[str, Tensor] | None:
        """After the last round; None before the first one.

        Raises:
            InputError: the file is damaged.
        """
        found = self._rounds(run_id)
        return dict(StoredTensors(found[max(found)])) if found else None

    def last_round(self, run_id: str) -> int | None:
        """Its number; None before the first one."""
        return max(self._rounds(run_id), default=None)

    def runs(self) -> list[str]:
        """Of which something is there, by name."""
        if not self.folder.is_dir():
            return []
        return sorted(path.name for path in self.folder.iterdir() if path.is_dir() and self._rounds(path.name))

    def save(self, run_id: str, round_number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write what is there after a round, and remove rounds that nobody needs any more.

        Raises:
            InputError: the disk refuses.
        """
        StoredTensors.write(self.folder / run_id / f"round-{round_number:06d}.safetensors", tensors)
        found = self._rounds(run_id)
        for number in sorted(number for number in found if number <= round_number)[: -self._keep]:
            found[number].unlink(missing_ok=True)

    def _rounds(self, run_id: str) -> dict[int, Path]:
        folder = self.folder / run_id
        if not folder.is_dir():
            return {}
        return {int(match[1]): path for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))}
