"""What became a part of the frozen weights for good, round by round: factors in the codes in which they travel.

    fold/ROUND/ranks     int64, directions of each layer, layers sorted
    fold/ROUND/...       what `cotune.federation.row_codes` makes of the factors of all layers that have any

The server keeps the codes and not what they were made of, so that it has to the last bit what every device has.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.federation.arrays import AnyArrays, Arrays, Shapes
from cotune.federation.catch_up import prefixed, under
from cotune.federation.lora_factors import layer_names
from cotune.federation.row_codes import RowCodes, dither_seed

FOLD = "fold/"
_RANKS = "ranks"


def fold_arrays(round_number: int, factors: Arrays, shapes: Shapes, codes: RowCodes) -> dict[str, NDArray[Any]]:
    """What a state keeps of one round, and devices are sent.

    Args:
        round_number: in which it was left out of the adapter.
        factors: of some of the adapter's layers, of any rank; nothing where there are none.
        shapes: of the adapter.
        codes: how they travel.
    """
    if not factors:
        return {}
    ranks = [len(factors[names.a]) if names.a in factors else 0 for names in layer_names(sorted(shapes)).values()]
    coded = codes.encode(factors, dither_seed(round_number, "fold"))
    return prefixed(f"{FOLD}{round_number:06d}/", {_RANKS: np.array(ranks, np.int64), **coded})


def folds_in(arrays: AnyArrays, shapes: Shapes, codes: RowCodes) -> dict[int, dict[str, NDArray[np.float32]]]:
    """By round, in their order, the factors that were folded.

    Args:
        arrays: some of which are those of `fold_arrays`.
        shapes, codes: as there; ranks of the shapes do not matter.

    Raises:
        InputError: they are not of such an adapter.
    """
    layers = layer_names(sorted(shapes))
    found = {}
    for number in sorted({round_of(name) for name in arrays if name.startswith(FOLD)}):
        own = under(f"{FOLD}{number:06d}/", arrays)
        ranks = own.pop(_RANKS, np.zeros(0, np.int64))
        if len(ranks) != len(layers) or ranks.min(initial=0) < 0:
            raise InputError(f"what round {number} folded is of {len(ranks)} layers, expected {len(layers)}")
        wanted: dict[str, tuple[int, ...]] = {}
        for rank, names in zip(ranks.tolist(), layers.values(), strict=True):
            if rank:
                wanted |= {names.a: (rank, shapes[names.a][1]), names.b: (shapes[names.b][0], rank)}
        found[number] = codes.decode(own, wanted, dither_seed(number, "fold"))
    return found


def round_of(name: str) -> int:
    """The round in the name of a folded array.

    Example:
        >>> round_of("fold/000012/ranks")
        12
    """
    return int(name.removeprefix(FOLD).partition("/")[0])
