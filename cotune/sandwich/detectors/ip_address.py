"""Internet addresses, version 4 and 6, as Python's `ipaddress` reads them."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

from cotune.sandwich.finding import Finding

_FOUR = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)")
_SIX = re.compile(r"(?<![\w:.])[0-9A-Fa-f:]{2,39}(?:(?:\.\d{1,3}){3})?(?![\w])")


class IpAddressDetector:
    """Finds addresses; kind IP, identity the shortest form. Ports, zones and prefix lengths stay outside.

    Addresses that mean this machine or none (127.0.0.1, ::1, 0.0.0.0) tell nothing and stay.

    Example:
        >>> [f.identity for f in IpAddressDetector().find("from 192.168.001.007 and 2001:DB8:0:0::1, at 12:30:45")]
        ['192.168.1.7', '2001:db8::1']
    """

    def find(self, text: str) -> Iterator[Finding]:
        """See `Detector`."""
        for four in _FOUR.finditer(text):
            parts = [int(part) for part in four[0].split(".")]
            if max(parts) < 256:
                address = ipaddress.IPv4Address(".".join(map(str, parts)))
                if not (address.is_loopback or address.is_unspecified):
                    yield Finding(four.start(), four.end(), "IP", str(address))
        for six in _SIX.finditer(text):
            if six[0].count(":") < 2:
                continue
            written = six[0] if six[0].endswith("::") else six[0].rstrip(":")
            try:
                sixth = ipaddress.IPv6Address(written)
            except ValueError:
                continue
            if not (sixth.is_loopback or sixth.is_unspecified):
                yield Finding(six.start(), six.start() + len(written), "IP", str(sixth))
