"""Table 1 of SPA (arXiv 2403.07088) computed for measured parts and a stated link.

    inference = tokens * (cloud + device)      network = tokens * M * (tau + T_data)      total = inference + network

tau: the link's round trip. T_data: what one transfer's bytes take on it. M: transfers per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cotune.errors import InputError

# What the paper states for Llama-7B and 50 tokens; seconds. The link is not stated: about 4 ms per transfer.
STATED = {
    "LoRA": {"percent": 0.19, "inference_s": 3.26, "network_s": 6.37, "total_s": 9.63, "trips": 32.0},
    "Adapter": {"percent": 0.38, "inference_s": 3.32, "network_s": 12.56, "total_s": 15.88, "trips": 64.0},
    "LST": {"percent": 0.20, "inference_s": 3.29, "network_s": 0.31, "total_s": 3.60, "trips": 1.0},
    "SPA": {"percent": 0.21, "inference_s": 3.30, "network_s": 0.18, "total_s": 3.48, "trips": 0.62},
}
NUM_TOKENS = 50


@dataclass(frozen=True, kw_only=True)
class Link:
    """A network between cloud and device."""

    rtt_ms: float
    mbps: float

    def __post_init__(self) -> None:
        if self.rtt_ms < 0 or self.mbps <= 0:
            raise InputError(f"link is {self.rtt_ms} ms and {self.mbps} Mbit/s, expected from 0 on and above 0")

    def transfer_ms(self, num_bytes: float) -> float:
        """A round trip that carries so many bytes, both ways together."""
        return self.rtt_ms + num_bytes * 8 / (self.mbps * 1e3)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to work together, in measured parts.

    Attributes:
        name: as in the paper.
        num_parameters: trained for one person.
        cloud_ms: one step of the backbone.
        device_ms: one token on the device where it takes part.
        trips: M, transfers per token.
        trip_bytes: of one transfer, both ways.
        device_rate: share of tokens on which the device computes.
    """

    name: str
    num_parameters: int
    cloud_ms: float
    device_ms: float
    trips: float
    trip_bytes: float
    device_rate: float = 1.0

    def row(self, link: Link, backbone_parameters: int, num_tokens: int = NUM_TOKENS) -> dict[str, Any]:
        """Its row of the table, seconds for `num_tokens` tokens.

        Example:
            >>> method = Method(name="LST", num_parameters=2, cloud_ms=60, device_ms=4, trips=1, trip_bytes=1000)
            >>> row = method.row(Link(rtt_ms=8, mbps=1), backbone_parameters=100, num_tokens=50)
            >>> row["inference_s"], row["network_s"], row["total_s"]  # 50 * 64 ms and 50 * (8 + 8) ms
            (3.2, 0.8, 4.0)
        """
        inference_s = num_tokens * (self.cloud_ms + self.device_rate * self.device_ms) / 1e3
        network_s = num_tokens * self.trips * link.transfer_ms(self.trip_bytes) / 1e3
        return {
            **asdict(self),
            "rtt_ms": link.rtt_ms,
            "mbps": link.mbps,
            "percent": 100 * self.num_parameters / backbone_parameters,
            "inference_s": inference_s,
            "network_s": network_s,
            "total_s": inference_s + network_s,
            "is_computed": True,
        }


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """The rows of one link, with those of the paper beside them."""
    first = rows[0]
    print(
        f"\nTable 1 in this set-up, {NUM_TOKENS} tokens; COMPUTED from the parts above for a link of "
        f"{first['rtt_ms']:g} ms and {first['mbps']:g} Mbit/s"
    )
    print(
        f"{'':9s} {'param %':>8s} {'inference s':>12s} {'network s':>10s} {'total s':>8s} {'M':>6s}   paper: total s, M"
    )
    for row in rows:
        stated = STATED[row["name"]]
        print(
            f"{row['name']:9s} {row['percent']:8.3f} {row['inference_s']:12.2f} {row['network_s']:10.2f} "
            f"{row['total_s']:8.2f} {row['trips']:6.2f}   {stated['total_s']:24.2f}, {stated['trips']:g}"
        )
