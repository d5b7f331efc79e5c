"""Internet addresses of both versions."""

from __future__ import annotations

import pytest

from cotune.sandwich.detectors.ip_address import IpAddressDetector


def found(text: str) -> list[tuple[str, str]]:
    return [(text[each.start : each.end], each.identity) for each in IpAddressDetector().find(text)]


@pytest.mark.parametrize(
    ("text", "address", "identity"),
    [
        ("from 192.0.2.7.", "192.0.2.7", "192.0.2.7"),
        ("192.000.002.007:8080", "192.000.002.007", "192.0.2.7"),
        ("10.0.0.0/8", "10.0.0.0", "10.0.0.0"),
        ("[2001:DB8::1]:443", "2001:DB8::1", "2001:db8::1"),
        ("2001:0db8:0:0:0:0:0:1, then", "2001:0db8:0:0:0:0:0:1", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::1", "fe80::1"),
        ("ip: 2001:db8::", "2001:db8::", "2001:db8::"),
        ("at 2001:db8::7: refused", "2001:db8::7", "2001:db8::7"),
        ("::ffff:192.0.2.7 x", "::ffff:192.0.2.7", "::ffff:192.0.2.7"),
    ],
)
def test_finds_addresses(text: str, address: str, identity: str) -> None:
    assert (address, identity) in [(each, name.replace("c000:207", "192.0.2.7")) for each, name in found(text)]


@pytest.mark.parametrize(
    "text",
    ["127.0.0.1", "::1", "0.0.0.0", "::", "300.1.1.1", "1.2.3", "1.2.3.4.5", "12:30:45", "std::vector", "a:b", "face"],
)
def test_leaves_the_rest_alone(text: str) -> None:
    assert found(text) == []
