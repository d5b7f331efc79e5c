"""Counter-based Gumbel noise: the same number for the same (seed, position, token id), on every machine.

Gumbel-max sampling draws x = argmax_v (logits_v / T + g_v), an exact sample of softmax(logits / T). With g a
pure function of its key the draw depends on nothing else: not on the network, the schedule, how often a
position was redone, or which side computes it. Base and personal draws share their noise, so they agree as
often as the two distributions allow.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_MASK = 0xFFFFFFFFFFFFFFFF


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, 2014): 64 bits to 64 well-mixed bits."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def gumbel(seed: int, position: int, token_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Standard Gumbel noise for some tokens at one position.

    Args:
        seed: the session's seed, 0 <= seed < 2^64.
        position: index of the token in the sequence, prompt included.
        token_ids: int64 (n,).

    Returns:
        float64 (n,), finite.

    Example:
        >>> a = gumbel(7, 3, np.array([0, 1, 2]))
        >>> bool(a[2] == gumbel(7, 3, np.array([2]))[0])
        True
    """
    stream = _mix(np.array([(seed + int(_GOLDEN)) & _MASK], np.uint64))
    stream = _mix(stream ^ np.array([(position * 0xD1342543DE82EF95 + 1) & _MASK], np.uint64))
    bits = _mix(stream + token_ids.astype(np.uint64) * _GOLDEN)
    # 53 random bits, moved by a half into the open interval (0, 1), so that both logarithms are finite.
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return np.asarray(-np.log(-np.log(uniform)), np.float64)
