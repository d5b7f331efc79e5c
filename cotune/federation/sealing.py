"""Encryption at rest: bytes that only the holder of a key can read or change.

AES-256-GCM (NIST SP 800-38D) by `cryptography`, with a random nonce of 96 bits for each block and the label of the
block as associated data, so that a block cannot be put in another's place:

    "cotune sealed 1" 00   id of the key (8)   nonce (12)   ciphertext and tag (16 more than the data)
"""

from __future__ import annotations

import hashlib
import secrets
from typing import TYPE_CHECKING, final

from cotune.errors import InputError, MismatchError
from cotune.federation.secret_files import RandomSecret

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

MAX_DATA_BYTES = 2**31 - 64
"""What one call of AES-GCM takes."""
_MAGIC = b"cotune sealed 1\0"
_ID_BYTES = 8
_NONCE_BYTES = 12
_TAG_BYTES = 16
OVERHEAD_BYTES = len(_MAGIC) + _ID_BYTES + _NONCE_BYTES + _TAG_BYTES


@final
class SealingKey(RandomSecret):
    """32 random bytes, in a file that is kept apart from what they seal.

    Example:
        >>> key = SealingKey.generate()
        >>> unseal(seal(b"weights", key, "round 3"), key, "round 3")
        b'weights'
    """

    kind = "sealing key"

    @property
    def public_id(self) -> bytes:
        """8 bytes that name this key and say nothing about it."""
        return hashlib.sha256(b"cotune sealing key id\0" + self.value).digest()[:_ID_BYTES]


def is_sealed(data: bytes) -> bool:
    """Whether these bytes say that `seal` made them."""
    return data.startswith(_MAGIC)


def seal(data: bytes, key: SealingKey, label: str) -> bytes:
    """Encrypt.

    Args:
        data: at most `MAX_DATA_BYTES`.
        key: at most 2^32 blocks are sealed with one, so that nonces do not meet.
        label: where the block belongs; the same one opens it.

    Raises:
        InputError: `data` is too large, or `cryptography` is not installed.
    """
    if len(data) > MAX_DATA_BYTES:
        raise InputError(f"data has {len(data)} bytes, at most {MAX_DATA_BYTES} can be sealed in one block")
    nonce = secrets.token_bytes(_NONCE_BYTES)
    front = _MAGIC + key.public_id + nonce
    return front + _cipher(key).encrypt(nonce, data, _associated(label))


def unseal(block: bytes, key: SealingKey, label: str) -> bytes:
    """Inverse of `seal`.

    Raises:
        MismatchError: the block was sealed with another key.
        InputError: it was altered, cut, or belongs under another label.
    """
    start = len(_MAGIC) + _ID_BYTES
    if not is_sealed(block) or not OVERHEAD_BYTES <= len(block) <= MAX_DATA_BYTES + OVERHEAD_BYTES:
        raise InputError(f"{label} is no whole sealed block; take an older one")
    if block[len(_MAGIC) : start] != key.public_id:
        raise MismatchError(
            f"{label} was sealed with the key {block[len(_MAGIC) : start].hex()}, this is {key.public_id.hex()}; "
            "give the key that it was sealed with"
        )
    nonce = block[start : start + _NONCE_BYTES]
    cipher = _cipher(key)
    from cryptography.exceptions import InvalidTag

    try:
        return cipher.decrypt(nonce, memoryview(block)[start + _NONCE_BYTES :], _associated(label))
    except InvalidTag:
        raise InputError(f"{label} was altered, or belongs in another place; take an older one") from None


def _cipher(key: SealingKey) -> AESGCM:
    """AES-256-GCM; imported here, so that checkpoints that are not sealed need no `cryptography`."""
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError as error:
        raise InputError(
            "sealing needs cryptography, which is not installed; run: pip install 'cotune[federated]'"
        ) from error
    return AESGCM(key.value)


def _associated(label: str) -> bytes:
    return _MAGIC + label.encode()
