"""Bytes and operations of tuning a side network, from shapes alone.

The side network trains on features, int8 taps and a few base logits, which a backbone made before, here or in the
cloud. No backbone is needed in the process then, and no gradient ever reaches one. Symbols beside those of
`cotune.evaluation.backbone_memory`: t taps of width d, s side width, i inner width, c width of a correction, k base
logits kept for a position, P positions kept in memory, N positions of a step.
"""

from __future__ import annotations

from dataclasses import dataclass

from cotune.errors import InputError
from cotune.evaluation.model_shape import ModelShape
from cotune.evaluation.workload import FLOAT32_BYTES, Workload


@dataclass(frozen=True, kw_only=True)
class SideSettings:
    """Widths of a tap ladder, and how much of the data is in memory."""

    side_width: int = 64
    """s."""
    inner_width: int = 64
    """i."""
    tap_dim: int = 32
    """d."""
    basis_dim: int = 96
    """c."""
    top_k: int = 1024
    """k, at most the vocabulary."""
    num_steps: int = 1
    """Steps whose features are in memory: all of an epoch's are."""

    def __post_init__(self) -> None:
        for name in ("side_width", "inner_width", "tap_dim", "basis_dim", "top_k", "num_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1")


def num_side_parameters(shape: ModelShape, side: SideSettings) -> int:
    """t s (d + 1) + (t - 1) (2 s i + s + i) + s + c (s + 1), with t = L + 1; the s is a norm's."""
    taps, s, i = shape.layers + 1, side.side_width, side.inner_width
    d, c = min(side.tap_dim, shape.hidden), min(side.basis_dim, shape.hidden)
    return taps * s * (d + 1) + (taps - 1) * (2 * s * i + s + i) + s + c * (s + 1)


def basis_bytes(shape: ModelShape, side: SideSettings) -> int:
    """The output basis: int8 and a scale for each word as it is kept, float32 as it is multiplied; V (5 c + 4)."""
    return shape.vocab * ((1 + FLOAT32_BYTES) * min(side.basis_dim, shape.hidden) + FLOAT32_BYTES)


def position_bytes(shape: ModelShape, side: SideSettings) -> int:
    """Features of one position: t (d + 2) + 8 k + 2 D + 16, and 8 (k + 1) + 8 in the table that the loss reads."""
    taps, k = shape.layers + 1, min(side.top_k, shape.vocab)
    features = taps * (min(side.tap_dim, shape.hidden) + 2) + 8 * k + 2 * shape.hidden + 16
    return features + 8 * (k + 1) + 8


def side_step_bytes(shape: ModelShape, load: Workload, side: SideSettings) -> int:
    """Activations of a step on N positions, float32.

        4 N (t d + (t - 1) (s + i) + 6 s + 2 c + V) + N (k + 1) 24

    the taps; what each rung keeps; the ends of the ladder; the correction; one number for each word, worked on in
    place; what is known of the base logits.
    """
    n, taps = load.num_targets, shape.layers + 1
    d, c = min(side.tap_dim, shape.hidden), min(side.basis_dim, shape.hidden)
    rungs = (taps - 1) * (side.side_width + side.inner_width) + 6 * side.side_width
    known = 24 * (min(side.top_k, shape.vocab) + 1)
    return FLOAT32_BYTES * n * (taps * d + rungs + 2 * c + shape.vocab) + n * known


def features_bytes(shape: ModelShape, load: Workload, side: SideSettings) -> int:
    """What making the features of one text needs beside the weights.

        max(n (a (2 D + 3 F) + a t D), N (a t D + 4 t (D + d) + V (a + 4)))

    texts are read one at a time; the states of all taps are kept until the pass ends, then stacked and projected.
    """
    a, taps = load.number_bytes, shape.layers + 1
    n, targets = load.length, load.num_targets // load.batch
    states = a * taps * shape.hidden
    copy = 0 if a == FLOAT32_BYTES else FLOAT32_BYTES
    forward = n * a * (2 * shape.hidden + 3 * shape.inner) + targets * states
    after = targets * (states + taps * min(side.tap_dim, shape.hidden) * FLOAT32_BYTES)
    after += targets * shape.vocab * (a + copy + FLOAT32_BYTES)
    return max(forward, after, targets * (2 * states + a * shape.vocab))


def side_step_flops(shape: ModelShape, load: Workload, side: SideSettings) -> int:
    """Forwards 2 N (t d s + 2 (t - 1) s i + s c), as much again for the matrices, and the rungs' and head's inputs.

    The loss multiplies with the output basis twice, 4 N c V.
    """
    n, taps, s, i = load.num_targets, shape.layers + 1, side.side_width, side.inner_width
    d, c = min(side.tap_dim, shape.hidden), min(side.basis_dim, shape.hidden)
    mixing, rungs, head = taps * d * s, 2 * (taps - 1) * s * i, s * c
    return 2 * n * (2 * mixing + 3 * rungs + 3 * head) + 4 * n * c * shape.vocab
