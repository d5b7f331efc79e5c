"""Named tensors that wait on disk, where they cost no memory, and are read one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cotune.durable import replacing
from cotune.errors import InputError


@dataclass(frozen=True)
class StoredTensors(Mapping[str, Tensor]):
    """The tensors of one safetensors file; each access reads one.

    Attributes:
        path: of the file.

    Example:
        >>> stored = StoredTensors.write(Path("best.safetensors"), {"w": torch.ones(2)})  # doctest: +SKIP
        >>> stored["w"].tolist()  # doctest: +SKIP
        [1.0, 1.0]
    """

    path: Path

    @classmethod
    def write(cls, path: Path, tensors: Mapping[str, Tensor]) -> StoredTensors:
        """Write a file that nobody else may read; its folder is made if it is not there.

        Raises:
            InputError: the disk refuses.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as unfinished:
                save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, unfinished)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"parameters cannot be kept in {path.parent}: {getattr(error, 'strerror', None) or error}; "
                "free some room there, or give another run_dir"
            ) from error
        return cls(path)

    def __getitem__(self, name: str) -> Tensor:
        try:
            with safe_open(self.path, framework="pt") as file:
                if name not in file.keys():  # noqa: SIM118
                    raise KeyError(name)
                tensor: Tensor = file.get_tensor(name)
                return tensor
        except (OSError, SafetensorError) as error:
            raise InputError(f"{self.path} is missing or damaged ({error}); start without resuming") from error

    def __iter__(self) -> Iterator[str]:
        try:
            with safe_open(self.path, framework="pt") as file:
                names = list(file.keys())
        except (OSError, SafetensorError) as error:
            raise InputError(f"{self.path} is missing or damaged ({error}); start without resuming") from error
        return iter(names)

    def __len__(self) -> int:
        return len(list(iter(self)))
