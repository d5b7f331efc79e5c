"""Sizes as people write them."""

from __future__ import annotations

import math
import re

from cotune.errors import InputError

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str, name: str) -> int:
    """A number of bytes, such as 4GB (10^9), 512MiB (2^20) or 1.5 GB.

    Args:
        text: a number and a unit.
        name: of the argument, for the error.

    Raises:
        InputError: it is no such size.

    Example:
        >>> parse_bytes("4GB", "memory"), parse_bytes("0.5 GiB", "memory")
        (4000000000, 536870912)
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]+)\s*", text)
    size = float(found[1]) * _UNITS.get(found[2].upper(), 0) if found else 0.0
    if not (math.isfinite(size) and size >= 1):
        raise InputError(f"{name} is {text!r}, expected a positive number with a unit, such as 4GB or 512MiB")
    return int(size)
