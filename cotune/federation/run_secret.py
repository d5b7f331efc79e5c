"""The run secret, and the seeds of random directions that registered nodes derive from it.

Scalars along random directions tell nothing to someone who does not know the directions. So no seed is ever sent: the
nodes get the run secret once, when they are registered, and derive what they need. HKDF with SHA-256, RFC 5869:

    prk  = HKDF-Extract(salt = "cotune federation directions 1", secret)          once
    seed = first 63 bits of HKDF-Expand(prk, "direction seed" 00 round index, 8)  for each direction

`round` and `index` are 8 bytes each, big-endian, so that no two pairs give the same info. Each index is expanded on
its own, one HMAC, instead of one stream for a round: a device may then draw any subset, and as many as it likes (a
stream ends after 255 blocks, which are 1,020 seeds).
"""

from __future__ import annotations

import hmac
import struct
from typing import final

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.federation.secret_files import RandomSecret

SALT = b"cotune federation directions 1"
_SEED_INFO = b"direction seed\0"
_ID_INFO = b"secret id\0"
_HASH = "sha256"
_HASH_BYTES = 32
_PLACE = struct.Struct(">QQ")


@final
class RunSecret(RandomSecret):
    """32 random bytes that the nodes of one run share. Every run has its own. Never sent with a task.

    Example:
        >>> RunSecret.generate()
        RunSecret(hidden)
    """

    kind = "run secret"

    @property
    def public_id(self) -> str:
        """16 hex digits that name this secret and say nothing about it; for checkpoints."""
        return hkdf_expand(hkdf_extract(SALT, self.value), _ID_INFO, 8).hex()


def direction_seed(secret: RunSecret, round_number: int, index: int) -> int:
    """The seed of one direction, 0 to 2^63 - 1.

    Args:
        secret: of the run.
        round_number, index: 0 to 2^64 - 1.

    Raises:
        InputError: one of the two is no such number.

    Example:
        >>> direction_seed(RunSecret(bytes(32)), 0, 0) == direction_seed(RunSecret(bytes(32)), 0, 1)
        False
    """
    _check_count(round_number, "round_number")
    _check_count(index, "index")
    return _seed(hkdf_extract(SALT, secret.value), round_number, index)


def direction_seeds(secret: RunSecret, round_number: int, num_directions: int) -> NDArray[np.int64]:
    """The seeds of the directions 0, 1, ... of one round, int64 (num_directions,).

    Raises:
        InputError: an argument is negative or no integer.

    Example:
        >>> secret = RunSecret(bytes(32))
        >>> int(direction_seeds(secret, 3, 5)[4]) == direction_seed(secret, 3, 4)
        True
    """
    _check_count(round_number, "round_number")
    _check_count(num_directions, "num_directions")
    prk = hkdf_extract(SALT, secret.value)
    return np.fromiter((_seed(prk, round_number, index) for index in range(num_directions)), np.int64, num_directions)


def hkdf_extract(salt: bytes, key: bytes) -> bytes:
    """HKDF-Extract with SHA-256, RFC 5869, section 2.2: 32 bytes."""
    return hmac.digest(salt, key, _HASH)


def hkdf_expand(prk: bytes, info: bytes, num_bytes: int) -> bytes:
    """HKDF-Expand with SHA-256, RFC 5869, section 2.3.

        T(0) = "";  T(i) = HMAC(prk, T(i-1) | info | i);  the first `num_bytes` of T(1) | T(2) | ...

    Raises:
        InputError: `num_bytes` is more than 255 blocks of 32.
    """
    if not 0 <= num_bytes <= 255 * _HASH_BYTES:
        raise InputError(f"num_bytes is {num_bytes}, HKDF gives 0 to {255 * _HASH_BYTES}; use more than one info")
    blocks, block = b"", b""
    for number in range(1, -(-num_bytes // _HASH_BYTES) + 1):
        block = hmac.digest(prk, block + info + bytes([number]), _HASH)
        blocks += block
    return blocks[:num_bytes]


def _seed(prk: bytes, round_number: int, index: int) -> int:
    derived = hkdf_expand(prk, _SEED_INFO + _PLACE.pack(round_number, index), 8)
    return int.from_bytes(derived, "big") >> 1


def _check_count(value: int, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
        raise InputError(f"{name} is {value!r:.40}, expected an int from 0 to 2^64 - 1")
