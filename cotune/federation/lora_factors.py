"""The factors of LoRA adapters as arrays, layer by layer.

    update of a layer = s B A

Symbols: A (rank, in) and B (out, rank) of Hu et al., arXiv 2106.09685; s = alpha / rank, or alpha / sqrt(rank) with
rsLoRA. The ranks of the layers of one adapter may differ, and so may the scales.

A device sends 4 rank (in + out) bytes for each layer, in float32; either factor alone is 4 rank in or 4 rank out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.federation.number_ranges import check_positive

Arrays = Mapping[str, NDArray[np.float32]]

_SIDES = ("lora_A", "lora_B")


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """One adapted layer.

    Attributes:
        a: float32 (rank, in).
        b: float32 (out, rank).
        scale: s, what B A is multiplied by.

    Raises:
        InputError: the shapes do not meet, a number is not finite, or the scale is no positive number.
    """

    a: NDArray[np.float32]
    b: NDArray[np.float32]
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[0] != self.b.shape[1] or 0 in self.a.shape:
            raise InputError(
                f"the factors have shapes {self.a.shape} and {self.b.shape}, expected (rank, in) and (out, rank) "
                "with one rank of at least 1; send both factors of the same adapter"
            )
        check_positive(scale=self.scale)
        if not (np.isfinite(self.a).all() and np.isfinite(self.b).all()):
            raise InputError("a factor holds nan or inf, expected finite numbers; leave this device out of the round")

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def num_bytes(self) -> int:
        """What both factors take in float32."""
        return 4 * (self.a.size + self.b.size)

    def product(self) -> NDArray[np.float32]:
        """s B A, float32 (out, in), for merging and for tests; the merges themselves never build it.

        Example:
            >>> one = np.ones((1, 2), np.float32)
            >>> LoraFactors(one, 3 * one.T, 0.5).product().tolist()
            [[1.5, 1.5], [1.5, 1.5]]
        """
        wide = self.scale * (self.b.astype(np.float64) @ self.a.astype(np.float64))
        return np.asarray(wide, np.float32)


Layers = Mapping[str, LoraFactors]
"""Factors by layer, named as in the model's adapter without `.lora_A....weight`."""


@dataclass(frozen=True, kw_only=True)
class FactorNames:
    """The names of the two factors of a layer, such as peft gives them."""

    a: str
    b: str


def layer_names(names: Sequence[str]) -> dict[str, FactorNames]:
    """The factors' names by layer, in order of appearance.

    peft calls them `<layer>.lora_A.<adapter>.weight` in a model and `<layer>.lora_A.weight` in a file.

    Raises:
        InputError: a name is of no factor, as a magnitude of DoRA or a trained bias, or a layer lacks one.

    Example:
        >>> layer_names(["h.0.q.lora_A.default.weight", "h.0.q.lora_B.default.weight"])
        {'h.0.q': FactorNames(a='h.0.q.lora_A.default.weight', b='h.0.q.lora_B.default.weight')}
    """
    found: dict[str, dict[str, str]] = {}
    for name in names:
        parts = name.split(".")
        at = [index for index, part in enumerate(parts) if part in _SIDES]
        # The word alone is not enough: a bias would be `<layer>.lora_B.<adapter>.bias`.
        if len(at) != 1 or at[0] == 0 or parts[-1] != "weight" or len(parts) - at[0] not in (2, 3):
            raise InputError(
                f"the adapter holds '{name}', expected only names of LoRA factors, such as "
                "'<layer>.lora_A.default.weight'; federate LoRA without DoRA, embeddings or biases"
            )
        sides = found.setdefault(".".join(parts[: at[0]]), {})
        if parts[at[0]] in sides:
            raise InputError(
                f"the adapter holds {parts[at[0]]} of '{'.'.join(parts[: at[0]])}' twice, expected one adapter; "
                "send them apart"
            )
        sides[parts[at[0]]] = name
    for layer, sides in found.items():
        for side in _SIDES:
            if side not in sides:
                raise InputError(f"layer '{layer}' has no {side}, expected both factors; send the whole adapter")
    return {layer: FactorNames(a=sides["lora_A"], b=sides["lora_B"]) for layer, sides in found.items()}


def split_layers(arrays: Arrays, scale: float | Mapping[str, float]) -> dict[str, LoraFactors]:
    """Pairs of factors by layer.

    Args:
        arrays: the adapter, as `LoraAdapter.params` in NumPy.
        scale: s, `LoraShape.scale`; for each layer where they differ.

    Raises:
        InputError: there is no layer; names, shapes or numbers are wrong; a layer has no scale.

    Example:
        >>> one = np.ones((1, 2), np.float32)
        >>> layers = split_layers({"q.lora_A.weight": one, "q.lora_B.weight": one.T}, 2.0)
        >>> layers["q"].rank, layers["q"].scale
        (1, 2.0)
    """
    names = layer_names(list(arrays))
    if not names:
        raise InputError("the adapter is empty, expected the factors of at least one layer")
    layers = {}
    for layer, pair in names.items():
        try:
            own = scale[layer] if isinstance(scale, Mapping) else scale
            layers[layer] = LoraFactors(as_float32(arrays[pair.a]), as_float32(arrays[pair.b]), float(own))
        except KeyError as error:
            raise InputError(f"scale has no entry for layer '{layer}', expected one for each layer") from error
        except InputError as error:
            raise InputError(f"layer '{layer}': {error}") from error
    return layers


def join_layers(layers: Layers, names: Mapping[str, FactorNames]) -> dict[str, NDArray[np.float32]]:
    """The way back: named arrays. The scales are left out, as in an adapter.

    Raises:
        InputError: a layer has no names.

    Example:
        >>> one = np.ones((1, 2), np.float32)
        >>> arrays = {"q.lora_A.weight": one, "q.lora_B.weight": one.T}
        >>> list(join_layers(split_layers(arrays, 1.0), layer_names(list(arrays))))
        ['q.lora_A.weight', 'q.lora_B.weight']
    """
    arrays: dict[str, NDArray[np.float32]] = {}
    for layer, factors in layers.items():
        if layer not in names:
            raise InputError(f"names has no entry for layer '{layer}', expected the names of this model's adapter")
        arrays[names[layer].a] = factors.a
        arrays[names[layer].b] = factors.b
    return arrays


def as_float32(array: NDArray[np.floating]) -> NDArray[np.float32]:
    """The array in float32; nan and inf are found by whoever checks it."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, np.float32)


def matching_layers(adapters: Sequence[Layers]) -> list[str]:
    """The layers that all adapters have, in the order of the first one.

    Raises:
        InputError: there is no adapter, or two differ in layers or in a layer's size. Ranks may differ.
    """
    if not adapters:
        raise InputError("there are no adapters, expected at least one; wait for more devices")
    first = adapters[0]
    for index, adapter in enumerate(adapters):
        if adapter.keys() != first.keys():
            odd = sorted(adapter.keys() ^ first.keys())
            raise InputError(
                f"adapter {index} differs from adapter 0 in layer '{odd[0]}', expected the same layers; "
                "tune the same targets on all devices"
            )
        for layer, factors in adapter.items():
            sizes = (factors.b.shape[0], factors.a.shape[1])
            expected = (first[layer].b.shape[0], first[layer].a.shape[1])
            if sizes != expected:
                raise InputError(
                    f"adapter {index} has (out, in) {sizes} in layer '{layer}', expected {expected} as in adapter 0; "
                    "tune the same model on all devices"
                )
    return list(first)


def normalised_weights(weights: NDArray[np.float64] | Sequence[float], num_devices: int) -> NDArray[np.float64]:
    """The weights as shares p that sum to 1.

    Raises:
        InputError: their number is wrong or 0, one is negative or not finite, or all are zero.

    Example:
        >>> normalised_weights([1, 3], 2).tolist()
        [0.25, 0.75]
    """
    if num_devices < 1:
        raise InputError("there are no devices, expected at least one; wait for more")
    wide = np.asarray(weights, np.float64)
    if wide.shape != (num_devices,):
        raise InputError(f"weights have shape {wide.shape}, expected ({num_devices},), one for each device")
    if not np.isfinite(wide).all() or (wide < 0).any():
        raise InputError(f"weights are {wide.tolist()}, expected finite numbers of at least 0")
    largest = wide.max()
    if not largest > 0:
        raise InputError("all weights are 0, expected at least one above 0; wait for more devices")
    # Divided by the largest first, so that no sum overflows.
    shares = wide / largest
    return np.asarray(shares / shares.sum(), np.float64)
