"""Bearer tokens: from a file, compared in constant time, never shown."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from cotune.errors import InputError


class BearerTokens:
    """The tokens that are let in.

    Args:
        tokens: at least one, of visible ASCII characters.

    Example:
        >>> BearerTokens(["s3cret"]).admits(["Bearer s3cret"])
        True
    """

    def __init__(self, tokens: Sequence[str]) -> None:
        if isinstance(tokens, str):
            raise InputError("tokens is one string, expected a list of tokens")
        if not tokens or not all(token and all("!" <= letter <= "~" for letter in token) for token in tokens):
            raise InputError("a token is missing or holds other than visible ASCII characters; choose another one")
        # Digests are of one length, so that a comparison tells nothing about a token's length either.
        self._digests = [sha256(token.encode()).digest() for token in tokens]

    @classmethod
    def read(cls, path: Path) -> BearerTokens:
        """The tokens in a file, one a line; empty lines and lines that start with # are skipped.

        Raises:
            InputError: the file cannot be read, or holds none.
        """
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except UnicodeDecodeError:
            raise InputError(f"token file {path} is no UTF-8 text, expected one token a line") from None
        except OSError as error:
            raise InputError(f"token file {path} cannot be read: {error.strerror}; expected one token a line") from None
        tokens = [line for line in lines if line and not line.startswith("#")]
        if not tokens:
            raise InputError(f"token file {path} holds no token, expected one a line")
        return cls(tokens)

    def admits(self, authorization: Sequence[str]) -> bool:
        """Whether these `Authorization` headers, of which there must be one, hold a token that is let in."""
        return self.holder(authorization) is not None

    def holder(self, authorization: Sequence[str]) -> str | None:
        """A name for whoever holds the token in these headers, however they are written; None lets nobody in.

        Example:
            >>> tokens = BearerTokens(["s3cret"])
            >>> tokens.holder(["Bearer s3cret"]) == tokens.holder(["bearer   s3cret"]) is not None
            True
        """
        scheme, _, token = authorization[0].partition(" ") if len(authorization) == 1 else ("", "", "")
        digest = sha256(token.strip().encode(errors="surrogateescape")).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return digest.hex()[:16] if scheme.lower() == "bearer" and any(matches) else None
