"""Which layers each device tunes, under its budget: importance and agreement.

"FedSelFT" is named in a survey (arXiv 2408.10691) and found nowhere else. The nearest published algorithm is selective
layer fine-tuning (Sun et al., arXiv 2408.15600): devices send the squared norm of each layer's gradient, and the server
solves

    max over m_i in {0, 1}^L of   sum_i <v_i, m_i> - (lambda / 2) sum_i sum_j ||m_i - m_j||_1,   cost(m_i) <= R_i

Symbols: v_il = ||g_i,l||^2; m_i the mask of device i; R_i its budget in bytes; cost(m_i) the sum of the bytes of its
layers; lambda is `agreement`, in the units of v. Where devices differ in the size of v, `shares_of_devices` helps.

How the problem is solved is ours. With the other masks fixed, device i has a knapsack of values
v_il - lambda (N - 1 - 2 k_l), with N devices and k_l others that tune layer l. It is solved exactly, by the sets of
layers that no other set beats in both value and cost. Devices take turns, and layers too: one is given to all who have
room, or taken from all, or takes the place of another one. This goes on until nothing gains, from several starts, and
the best end is taken. Then layers of too few devices are repaired. Without agreement the result is the best there is.
With it, it is not always the best of all; the test counts how often.

Bytes in float32: 4 L up, L / 8 down. Memory of the device: `costs`, as `tuning.blocks` measures them, in place of those
of all layers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError

Masks = NDArray[np.bool_]

MAX_SETS = 200_000
"""Sets of layers that a knapsack keeps at once. Layers of few sizes need no more than a few hundred."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerChoice:
    """Who tunes what.

    Attributes:
        masks: bool (num_devices, num_layers).
        objective: what was maximised, in the units of the values.
    """

    masks: Masks
    objective: float

    @property
    def cover(self) -> NDArray[np.int64]:
        """Devices of each layer, (num_layers,)."""
        return np.asarray(self.masks.sum(axis=0), np.int64)

    def layers_of(self, device: int) -> tuple[int, ...]:
        """The layers of one device, rising; none where its budget holds none."""
        return tuple(int(layer) for layer in np.flatnonzero(self.masks[device]))


def shares_of_devices(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Each device's values in proportion, so that no device has more say because its gradients are larger.

    Args:
        values: (num_devices, num_layers), at least 0.

    Raises:
        InputError: the shape or a value is wrong.

    Example:
        >>> shares_of_devices(np.array([[1.0, 3.0], [0.0, 0.0]])).tolist()
        [[0.25, 0.75], [0.5, 0.5]]
    """
    wide = _checked_values(values)
    total = wide.sum(axis=1, keepdims=True)
    return np.where(total > 0, wide / np.where(total > 0, total, 1.0), 1.0 / wide.shape[1])


def objective(values: NDArray[np.floating], masks: Masks, agreement: float) -> float:
    """What is maximised.

    Example:
        >>> objective(np.array([[3.0, 1.0], [1.0, 3.0]]), np.array([[True, False], [True, True]]), 0.5)
        6.5
    """
    cover = masks.sum(axis=0).astype(np.float64)
    # (1/2) sum_i sum_j |m_il - m_jl| counts each pair that differs once.
    differing = float((cover * (len(masks) - cover)).sum())
    return float(np.asarray(values, np.float64)[masks].sum()) - agreement * differing


def choose_layers(
    values: NDArray[np.floating],
    costs: Sequence[int],
    budgets: Sequence[int],
    *,
    agreement: float = 0.0,
    min_cover: int = 0,
) -> LayerChoice:
    """Masks by importance and agreement.

    Args:
        values: v, (num_devices, num_layers), at least 0.
        costs: bytes of each layer, at least 1.
        budgets: R, bytes of each device, at least 0. A device whose budget holds no layer gets none.
        agreement: lambda, at least 0.
        min_cover: devices that each layer should have; layers are swapped for it, at the least loss of the objective,
            where budgets allow. `LayerChoice.cover` tells what came of it.

    Raises:
        InputError: shapes or numbers are wrong, or the layers have so many sizes that the knapsack grows too large.

    Example:
        >>> values = np.array([[9.0, 4.0, 1.0], [1.0, 4.0, 5.0]])
        >>> choose_layers(values, [1, 1, 1], [1, 1]).masks.argmax(axis=1).tolist()
        [0, 2]
        >>> choose_layers(values, [1, 1, 1], [1, 1], agreement=4.0).masks.argmax(axis=1).tolist()
        [0, 0]
    """
    wide, sizes, limits = _checked(values, costs, budgets)
    if not 0 <= agreement < float("inf"):
        raise InputError(f"agreement is {agreement}, expected a finite number of at least 0")
    _check_cover(min_cover, len(wide))
    alone = np.stack([_knapsack(own, sizes, limit) for own, limit in zip(wide, limits, strict=True)])
    best = alone
    if agreement > 0:
        together = np.stack([_knapsack(wide.mean(axis=0), sizes, limit) for limit in limits])
        starts = [alone, together, np.zeros_like(alone)]
        ends = [_climb(wide, sizes, limits, start, agreement) for start in starts]
        best = max(ends, key=lambda masks: objective(wide, masks, agreement))
    masks = cover_layers(wide, sizes, limits, best, agreement=agreement, min_cover=min_cover)
    return LayerChoice(masks=masks, objective=objective(wide, masks, agreement))


def cover_layers(
    values: NDArray[np.floating],
    costs: Sequence[int],
    budgets: Sequence[int],
    masks: Masks,
    *,
    agreement: float = 0.0,
    min_cover: int,
) -> Masks:
    """The masks with layers swapped until each has `min_cover` devices, where budgets allow.

    A layer that lacks a device gets one with room for it, or one that gives up another layer: one that more than
    `min_cover` devices have, or one that then gets a device in the same way. The shortest such chain is taken, of equal
    ones that of least loss. With layers of one size this reaches every cover that the budgets allow (augmenting paths
    of a bipartite matching); with several sizes it may miss one.

    Args:
        values, costs, budgets, agreement, min_cover: as for `choose_layers`.
        masks: what to start from, bool (num_devices, num_layers), within the budgets.

    Returns:
        A new array.

    Raises:
        InputError: shapes or numbers are wrong.

    Example:
        >>> masks = np.array([[True, False], [True, False]])
        >>> cover_layers(np.array([[9.0, 1.0], [9.0, 2.0]]), [1, 1], [1, 1], masks, min_cover=1).tolist()
        [[True, False], [False, True]]
    """
    wide, sizes, limits = _checked(values, costs, budgets)
    _check_cover(min_cover, len(wide))
    if masks.shape != wide.shape:
        raise InputError(f"masks have shape {masks.shape}, expected {wide.shape} as values")
    done = masks.copy()
    while True:
        short = [
            int(layer) for layer in np.argsort(done.sum(axis=0), kind="stable") if done[:, layer].sum() < min_cover
        ]
        chains = [_shortest_chain(wide, sizes, limits, done, layer, agreement, min_cover) for layer in short]
        better = next((chain for chain in chains if chain is not None), None)
        if better is None:
            return done
        done = better


def _climb(values: NDArray[np.float64], costs: list[int], budgets: list[int], start: Masks, agreement: float) -> Masks:
    """Turns of devices and of layers, until nothing gains."""
    masks, height = start, objective(values, start, agreement)
    while True:
        masks = _device_turns(values, costs, budgets, masks, agreement)
        masks = _layer_turns(values, costs, budgets, masks, agreement)
        reached = objective(values, masks, agreement)
        if reached <= height + _margin(values, agreement):
            return masks
        height = reached


def _margin(values: NDArray[np.float64], agreement: float) -> float:
    """A gain that is more than rounding; without it two equal choices could take turns for ever."""
    return 1e-12 * (float(values.sum()) + agreement * values.size * len(values))


def _device_turns(
    values: NDArray[np.float64], costs: list[int], budgets: list[int], start: Masks, agreement: float
) -> Masks:
    """Each device once, with the best mask given the others."""
    masks = start.copy()
    num_devices = len(masks)
    for device in range(num_devices):
        others = masks.sum(axis=0) - masks[device]
        worth = values[device] - agreement * (num_devices - 1 - 2 * others)
        new = _knapsack(worth, costs, budgets[device])
        if float(worth[new].sum() - worth[masks[device]].sum()) > _margin(values, agreement):
            masks[device] = new
    return masks


def _layer_turns(
    values: NDArray[np.float64], costs: list[int], budgets: list[int], start: Masks, agreement: float
) -> Masks:
    """Each layer once: to all who have room, from all, or in the place of another one wherever that stands."""
    sizes, limits = np.array(costs), np.array(budgets)
    masks = start.copy()
    num_devices, num_layers = masks.shape

    def price(cover: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.asarray(agreement * cover * (num_devices - cover), np.float64)

    for layer in range(num_layers):
        own = masks[:, layer]
        room = limits - masks @ sizes
        takers = ~own & (room >= sizes[layer])
        # One column for each layer whose place is taken.
        swaps = masks & ~own[:, None] & (room[:, None] + sizes >= sizes[layer])
        worth = values[:, layer]
        num_own, cover, num_swaps = own.sum(), masks.sum(axis=0), swaps.sum(axis=0)
        gains = (swaps * (worth[:, None] - values)).sum(axis=0)
        gains += price(num_own) + price(cover) - price(num_own + num_swaps) - price(cover - num_swaps)
        given = float(worth[takers].sum()) + price(num_own) - price(num_own + takers.sum())
        taken = float(price(num_own)) - float(worth[own].sum())
        best = max(float(given), taken, float(gains.max()))
        if best <= _margin(values, agreement):
            continue
        if best == given:
            masks[takers, layer] = True
        elif best == taken:
            masks[:, layer] = False
        else:
            other = int(np.argmax(gains))
            moved = swaps[:, other].copy()
            masks[moved, layer] = True
            masks[moved, other] = False
    return masks


def _knapsack(worth: NDArray[np.float64], costs: list[int], budget: int) -> Masks:
    """The layers of largest worth within a budget, exactly; none of worth 0 or less."""
    layers = [int(layer) for layer in np.flatnonzero(worth > 0) if costs[layer] <= budget]
    mask = np.zeros(len(worth), np.bool_)
    if sum(costs[layer] for layer in layers) <= budget:
        mask[layers] = True
        return mask
    if len({costs[layer] for layer in layers}) == 1:
        # Layers of one size, as in usual models: the worthiest that fit.
        order = sorted(layers, key=lambda layer: -worth[layer])
        mask[order[: budget // costs[layers[0]]]] = True
        return mask
    # Nemhauser and Ullmann: the sets of which none is both worthier and cheaper, as bits of an int, by rising cost.
    kept: list[tuple[int, float, int]] = [(0, 0.0, 0)]
    for layer in sorted(layers, key=lambda layer: -worth[layer] / costs[layer]):
        longer = [
            (cost + costs[layer], value + float(worth[layer]), chosen | 1 << layer)
            for cost, value, chosen in kept
            if cost + costs[layer] <= budget
        ]
        best = -1.0
        merged = sorted([*kept, *longer], key=lambda one: (one[0], -one[1]))
        kept = []
        for one in merged:
            if one[1] > best:
                kept.append(one)
                best = one[1]
        if len(kept) > MAX_SETS:
            raise InputError(
                f"costs has {len(set(costs))} different sizes, and more than {MAX_SETS:,} sets of layers compete; "
                "round the costs up to fewer sizes"
            )
    chosen = kept[-1][2]
    mask[[layer for layer in layers if chosen >> layer & 1]] = True
    return mask


def _shortest_chain(
    values: NDArray[np.float64],
    costs: list[int],
    budgets: list[int],
    masks: Masks,
    short: int,
    agreement: float,
    min_cover: int,
) -> Masks | None:
    """The masks after the shortest chain of swaps that gives a layer one more device at the cost of none in need."""
    waiting = deque([(short, masks)])
    seen = {short}
    while waiting:
        # All chains of one length, so that of those the one of least loss is taken.
        ends: list[Masks] = []
        for _ in range(len(waiting)):
            layer, now = waiting.popleft()
            cover = now.sum(axis=0)
            for device in np.flatnonzero(~now[:, layer]):
                room = budgets[device] - sum(costs[other] for other in np.flatnonzero(now[device]))
                given = now.copy()
                given[device, layer] = True
                if room >= costs[layer]:
                    ends.append(given)
                    continue
                for other in np.flatnonzero(now[device]):
                    if room + costs[other] < costs[layer]:
                        continue
                    swapped = given.copy()
                    swapped[device, other] = False
                    if cover[other] > min_cover:
                        ends.append(swapped)
                    elif int(other) not in seen:
                        seen.add(int(other))
                        waiting.append((int(other), swapped))
        if ends:
            return max(ends, key=lambda one: objective(values, one, agreement))
    return None


def _checked(
    values: NDArray[np.floating], costs: Sequence[int], budgets: Sequence[int]
) -> tuple[NDArray[np.float64], list[int], list[int]]:
    wide = _checked_values(values)
    sizes, limits = _checked_sizes(costs, budgets)
    if wide.shape != (len(limits), len(sizes)):
        raise InputError(
            f"values have shape {wide.shape}, expected ({len(limits)}, {len(sizes)}), one row for each budget and one "
            "column for each cost"
        )
    return wide, sizes, limits


def _checked_values(values: NDArray[np.floating]) -> NDArray[np.float64]:
    wide = np.asarray(values, np.float64)
    if wide.ndim != 2 or 0 in wide.shape:
        raise InputError(f"values have shape {wide.shape}, expected (num_devices, num_layers), at least one of each")
    if not np.isfinite(wide).all() or (wide < 0).any():
        raise InputError("values hold a number that is negative, nan or inf, expected squared gradient norms")
    return wide


def _checked_sizes(costs: Sequence[int], budgets: Sequence[int]) -> tuple[list[int], list[int]]:
    sizes, limits = [int(cost) for cost in costs], [int(budget) for budget in budgets]
    if not sizes or min(sizes) < 1:
        raise InputError(f"costs are {sizes}, expected bytes of at least 1 for each of one or more layers")
    if not limits or min(limits) < 0:
        raise InputError(f"budgets are {limits}, expected bytes of at least 0 for each of one or more devices")
    return sizes, limits


def _check_cover(min_cover: int, num_devices: int) -> None:
    if not 0 <= min_cover <= num_devices:
        raise InputError(f"min_cover is {min_cover}, expected 0 to {num_devices}, the number of devices")
