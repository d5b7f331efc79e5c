"""FLoRA: the factors of all devices stacked, which is the mean of their updates exactly.

FLoRA (Wang et al., arXiv 2409.05976):
    sum_c p_c s_c B_c A_c = s [p_1 s_1 / s B_1, ..., p_n s_n / s B_n] [A_1; ...; A_n]
Symbols: p_c the device's share of the weights; s_c its scale, s that of the result. The rank is the sum of the ranks,
which may differ from device to device, as may the scales.

Bytes in float32 for each layer: 4 r_c (in + out) up, 4 sum_c r_c (in + out) down. Memory of the server: all adapters.
The result is meant to be merged into the weights, or to be cut to a rank by `svd_factors`: it grows with the number of
devices, and where sum_c r_c exceeds out in / (in + out) the dense update is smaller.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cotune.federation.lora_factors import Layers, LoraFactors, as_float32, matching_layers, normalised_weights
from cotune.federation.number_ranges import check_positive


def stack_factors(
    adapters: Sequence[Layers], weights: NDArray[np.float64] | Sequence[float], *, scale: float = 1.0
) -> dict[str, LoraFactors]:
    """Stack both factors of each layer. A device of weight 0 takes no room.

    Args:
        adapters: one for each device, of the same layers; ranks and scales may differ.
        weights: one for each device, at least 0, in any unit.
        scale: s of the result; the shares are folded into B accordingly.

    Raises:
        InputError: adapters or weights do not match, the scale is no positive number, or B leaves float32.

    Example:
        >>> up = LoraFactors(np.array([[1.0, 0.0]], np.float32), np.array([[2.0], [0.0]], np.float32), 2.0)
        >>> down = LoraFactors(np.array([[0.0, 1.0]], np.float32), np.array([[0.0], [2.0]], np.float32), 4.0)
        >>> merged = stack_factors([{"q": up}, {"q": down}], [1, 1])["q"]
        >>> merged.rank, merged.product().tolist()
        (2, [[2.0, 0.0], [0.0, 4.0]])
    """
    layers = matching_layers(adapters)
    shares = normalised_weights(weights, len(adapters))
    check_positive(scale=scale)
    stacked = {}
    for layer in layers:
        a, b = stacked_pair([adapter[layer] for adapter in adapters], shares)
        stacked[layer] = LoraFactors(as_float32(a), as_float32(b / scale), scale)
    return stacked


def stacked_pair(
    factors: Sequence[LoraFactors], shares: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[A_1; ...; A_n] and [p_1 s_1 B_1, ..., p_n s_n B_n] in float64, without the devices of share 0."""
    present = [(one, share) for one, share in zip(factors, shares, strict=True) if share > 0]
    a = np.concatenate([one.a.astype(np.float64) for one, _ in present], axis=0)  # (sum_c r_c, in)
    b = np.concatenate([share * one.scale * one.b.astype(np.float64) for one, share in present], axis=1)
    return a, b  # b: (out, sum_c r_c)
