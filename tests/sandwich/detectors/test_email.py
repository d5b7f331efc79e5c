"""E-mail addresses in the forms that people and programs write."""

from __future__ import annotations

import pytest

from cotune.sandwich.detectors.email import EmailDetector


def found(text: str) -> list[tuple[str, str]]:
    return [(text[each.start : each.end], each.identity) for each in EmailDetector().find(text)]


@pytest.mark.parametrize(
    ("text", "address", "identity"),
    [
        ("mail ann.lee+tag@Mail.Example.org.", "ann.lee+tag@Mail.Example.org", "ann.lee+tag@mail.example.org"),
        ("<mailto:o'neil@example.co.uk>", "o'neil@example.co.uk", "o'neil@example.co.uk"),
        ("ann [at] example [dot] org, thanks", "ann [at] example [dot] org", "ann@example.org"),
        ("ann(at)example.org", "ann(at)example.org", "ann@example.org"),
        ("ann [dot] lee {at} example (dot) org", "ann [dot] lee {at} example (dot) org", "ann.lee@example.org"),
        ("ann at example dot org", "ann at example dot org", "ann@example.org"),
        ("?to=ann%40example.org&x", "ann%40example.org", "ann@example.org"),
        ("ann&#64;example.org", "ann&#64;example.org", "ann@example.org"),
        ('"ann lee"@example.org', '"ann lee"@example.org', '"ann lee"@example.org'),
        ("root@[192.0.2.7]", "root@[192.0.2.7]", "root@[192.0.2.7]"),
        ("root@localhost", "root@localhost", "root@localhost"),
        ("jürgen@müller.example", "jürgen@müller.example", "jürgen@müller.example"),
        ("a@b.xn--p1ai", "a@b.xn--p1ai", "a@b.xn--p1ai"),
    ],
)
def test_finds_the_whole_address(text: str, address: str, identity: str) -> None:
    assert found(text) == [(address, identity)]


@pytest.mark.parametrize(
    "text",
    ["@ann", "meet at noon", "numpy@2.0.1", "a @ b", "x@y", "we looked at the dot", "@example.org", "ann@", ""],
)
def test_leaves_other_at_signs_alone(text: str) -> None:
    assert found(text) == []


def test_two_addresses_side_by_side_are_two() -> None:
    assert [address for address, _ in found("a@x.org,b@y.org;c@z.org")] == ["a@x.org", "b@y.org", "c@z.org"]
