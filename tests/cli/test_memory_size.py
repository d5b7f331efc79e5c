from __future__ import annotations

import pytest

from cotune.cli.memory_size import parse_bytes
from cotune.errors import InputError


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GB", 4 * 10**9), ("512MiB", 2**29), (" 1.5 gb ", 1_500_000_000), ("700B", 700), (".5KB", 500), ("2kib", 2048)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text, "memory") == size


@pytest.mark.parametrize("text", ["", "4", "GB", "-4GB", "4XB", "0GB", "4GB more", "1e3GB", "nanGB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InputError, match=r"--memory is .*expected a positive number with a unit"):
        parse_bytes(text, "--memory")
