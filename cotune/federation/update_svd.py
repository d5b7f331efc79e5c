"""FedSVD around an algorithm: now and then the server writes the same update with a better A.

FedSVD (Lee et al., arXiv 2505.12805), whose formula is in `cotune.federation.start_from_update`:

    after every `refresh_rounds` accepted rounds:  B A = U S V^T,  A <- V^T,  B <- U S

No logit changes. Where only B is trained, A so learns from what is released anyway: no statistic of a device is asked
for, and under differential privacy it costs nothing.

Wire: that of the algorithm inside; after a rewriting, every device gets the whole adapter, 4 rank (in + out) bytes for
each layer. Memory: that of the algorithm inside, which begins again with its step counts and candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cotune.federation.algorithm import NEW, SINCE, Algorithm, Combine, Plan, Update
from cotune.federation.arrays import Arrays
from cotune.federation.catch_up import prefixed, under
from cotune.federation.lora_factors import join_layers, layer_names, split_layers
from cotune.federation.number_ranges import check_at_least
from cotune.federation.start_from_update import rewrite_factors

INNER = "inner/"
REWRITTEN, ACCEPTED = "rewritten", "num_accepted"


@dataclass(frozen=True, kw_only=True)
class UpdateSvd:
    """The server half; the device's is that of the algorithm inside."""

    inner: Algorithm
    """Trains."""
    refresh_rounds: int = 1
    """Accepted rounds from one rewriting to the next."""

    def __post_init__(self) -> None:
        check_at_least(1, refresh_rounds=self.refresh_rounds)

    def start(self, adapter: Arrays) -> Arrays:
        layer_names(sorted(adapter))
        return prefixed(INNER, self.inner.start(adapter)) | _counts(rewritten=0, accepted=0)

    def plan(self, state: Arrays, round_number: int, device: str, since: int | None) -> Plan:
        own = None if since is None or since <= int(state[REWRITTEN][0]) else since
        plan = self.inner.plan(under(INNER, state), round_number, device, own)
        settings = {**plan.settings, **({SINCE: NEW} if own is None else {})}
        return Plan(work=plan.work, arrays=plan.arrays, settings=settings, reply=plan.reply)

    def merge(self, state: Arrays, round_number: int, updates: Sequence[Update], combine: Combine) -> Arrays:
        merged = self.inner.merge(under(INNER, state), round_number, updates, combine)
        accepted = int(state[ACCEPTED][0]) + 1
        if accepted % self.refresh_rounds:
            return prefixed(INNER, merged) | _counts(rewritten=int(state[REWRITTEN][0]), accepted=accepted)
        adapter = self.inner.adapter(merged)
        # The scale is the same before and after, so it may be any.
        layers = rewrite_factors(split_layers(adapter, 1.0))
        begun = self.inner.start(join_layers(layers, layer_names(sorted(adapter))))
        return prefixed(INNER, begun) | _counts(rewritten=round_number, accepted=accepted)

    def adapter(self, state: Arrays) -> dict[str, NDArray[np.float32]]:
        return self.inner.adapter(under(INNER, state))


def _counts(*, rewritten: int, accepted: int) -> dict[str, NDArray[np.float32]]:
    """The round after which the factors were last rewritten, and how many were accepted so far."""
    return {REWRITTEN: np.full(1, rewritten, np.float32), ACCEPTED: np.full(1, accepted, np.float32)}
