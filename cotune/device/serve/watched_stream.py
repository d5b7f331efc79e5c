"""A device's stream that also notes how likely each token was that the device decided."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cotune.device.serve.probability import Bounds, probability_bounds
from cotune.device.stream import DeviceStream
from cotune.generation.sampling import PartialLogits
from cotune.wire.frames import Frame, Step


class WatchedStream(DeviceStream):
    """As `DeviceStream`.

    In the token form the device holds base logits and its own delta where it decides. In the correction form it
    sees no base logits, and where it is not consulted neither: there nothing is noted.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._probabilities: dict[int, Bounds] = {}

    def probability(self, position: int) -> Bounds | None:
        """Of the token at `position`, counted from the prompt's first; it is told once."""
        return self._probabilities.pop(position, None)

    def _decide(self, step: Step, delta: NDArray[np.float32], base: PartialLogits, k: int) -> list[Frame]:
        num_known = len(self.decisions)
        replies = super()._decide(step, delta, base, k)
        if len(self.decisions) > num_known:
            bounds = probability_bounds(
                base,
                delta,
                self.decisions[num_known].token_id,
                self.request.sampling,
                adds_base=self.request.combination.adds_base,
            )
            if bounds is not None:
                self._probabilities[step.pos] = bounds
        return replies
