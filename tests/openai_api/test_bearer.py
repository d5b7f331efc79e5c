"""Bearer tokens: which are let in, and files that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from cotune.errors import InputError
from cotune.openai_api.bearer import BearerTokens


def test_tokens_of_a_file_are_let_in(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    path.write_text("# mine\n\nfirst\n  second  \n")
    tokens = BearerTokens.read(path)
    assert tokens.admits(["Bearer first"]) and tokens.admits(["bearer second"])
    for headers in ([], [""], ["first"], ["Basic first"], ["Bearer "], ["Bearer third"], ["Bearer first"] * 2):
        assert not tokens.admits(headers)
    assert not tokens.admits(["Bearer # mine"]) and not tokens.admits(["Bearer \udcff"])


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "holds no token"), (b"#x\n", "holds no token"), (b"\xff", "UTF-8")]
)
def test_a_file_without_tokens_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "keys").write_bytes(content)
    with pytest.raises(InputError, match=words):
        BearerTokens.read(tmp_path / "keys")
    with pytest.raises(InputError, match="cannot be read: No such file"):
        BearerTokens.read(tmp_path / "missing")


def test_a_token_that_no_header_can_hold_is_refused_and_not_shown() -> None:
    for token in ("", "s3cret token", "s3cret\x00"):
        with pytest.raises(InputError) as caught:
            BearerTokens([token])
        assert "s3cret" not in str(caught.value)


def test_a_holder_has_one_name_however_the_token_is_written() -> None:
    tokens = BearerTokens(["ann", "bob"])
    names = {tokens.holder([header]) for header in ("Bearer ann", "bearer ann", "BEARER   ann ")}
    assert len(names) == 1 and None not in names and "ann" not in str(names)
    assert tokens.holder(["Bearer bob"]) not in names
    assert tokens.holder(["Bearer eve"]) is None and tokens.holder([]) is None


def test_one_string_is_no_list_of_tokens() -> None:
    with pytest.raises(InputError, match="expected a list of tokens"):
        BearerTokens("s3cret")
