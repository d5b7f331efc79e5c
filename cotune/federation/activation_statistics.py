"""EVA for a federation: A from the inputs of a layer, out of statistics that the server sums.

EVA (Paischer et al., arXiv 2410.07170) starts A with the top right singular vectors of a layer's inputs X (tokens, in):
the eigenvectors of G = X^T X. Over devices X = [X_1; ...; X_n], and G = sum_c X_c^T X_c. What devices send is a sketch

    Y = X^T X Omega = G Omega       Omega (in, width) random, shared; V from Nystroem's G ~ Y (Omega^T Y)^+ Y^T

It adds up like G, and the server needs the total alone, so secure sums work. This is the randomised range finder of
Halko, Martinsson and Tropp (arXiv 0909.4061), width = rank + oversampling. Its error is small where the eigenvalues of
G fall off behind the rank. A second round with `next_omega` in the place of Omega (one step of their subspace
iteration) makes it smaller where they do not.

Bytes in float32 for each layer, up: 4 in width; down: 4 rank in. With in = 4096 and width = 16: 262 kB up, where one
triangle of G would be 33.6 MB. Memory while sketches are summed, on a device and on the server: 8 in width bytes.

X is not centred, as the layer sees it; peft's EVA subtracts the mean. Every token counts the same, so that a device
with many has much to say; divide a device's sketch by its number of tokens where all devices should count the same.
A sketch of few tokens betrays them: that of one token is that token, times a number for each column of Omega. Sum
secretly, or over many tokens.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.federation.orthonormal_rows import further_rows

_VANISHED = 1e-6
"""Eigenvalues below this share of the largest are rounding of float32."""
DEFAULT_OVERSAMPLING = 8
"""Columns of a sketch beyond the rank."""


def sketch(inputs: NDArray[np.floating], omega: NDArray[np.floating]) -> NDArray[np.float64]:
    """Y = X^T X Omega of one batch, without X^T X. Batches and devices add up; send it in float32.

    Args:
        inputs: (tokens, in), without padding.
        omega: (in, width), the same on all devices: `shared_omega`, or `next_omega` in a second round.

    Returns:
        float64 (in, width).

    Raises:
        InputError: the shapes do not meet, or a number is not finite.

    Example:
        >>> sketch(np.array([[1.0, 2.0]]), np.array([[1.0], [1.0]])).tolist()
        [[3.0], [6.0]]
    """
    wide, shared = _checked(inputs, "inputs"), _checked(omega, "omega")
    if shared.shape[0] != wide.shape[1]:
        raise InputError(
            f"omega has shape {shared.shape}, expected ({wide.shape[1]}, width) for inputs of {wide.shape[1]} numbers"
        )
    return np.asarray(wide.T @ (wide @ shared), np.float64)


def shared_omega(dim: int, width: int, *, seed: int) -> NDArray[np.float32]:
    """Random signs (in, width), the same on every machine: the raw bits of Philox, and nothing rounds.

    Args:
        dim: in.
        width: rank plus oversampling, at most `dim`.
        seed: 0 <= seed < 2^64; another one for each layer.

    Raises:
        InputError: a size or the seed is out of range.

    Example:
        >>> shared_omega(3, 2, seed=0).tolist()
        [[-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]]
    """
    if not 1 <= width <= dim:
        raise InputError(f"width is {width}, expected 1 to {dim}, the size of the layer's input")
    if not 0 <= seed < 2**64:
        raise InputError(f"seed is {seed}, expected 0 <= seed < 2^64")
    num_signs = dim * width
    words = np.random.Philox(key=seed).random_raw(-(-num_signs // 64))
    # Little-endian on every machine, so that bit i of the stream is the same sign everywhere.
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little", count=num_signs)
    return (1 - 2 * bits.astype(np.float32)).reshape(dim, width)


def next_omega(total_sketch: NDArray[np.floating]) -> NDArray[np.float32]:
    """What the devices take for Omega in a second round: an orthonormal basis of the summed sketch, (in, width).

    Raises:
        InputError: a number is not finite.
    """
    basis, _ = np.linalg.qr(_checked(total_sketch, "total_sketch"))
    return np.ascontiguousarray(basis, np.float32)


def directions_from_sketch(
    total_sketch: NDArray[np.floating], omega: NDArray[np.floating], rank: int
) -> NDArray[np.float32]:
    """A: the top eigenvectors of what the summed sketch tells of G, by Nystroem's approximation.

    With Omega^T Y = W M W^T, B = Y W M^(-1/2), and B B^T ~ G: the left singular vectors of B. Eigenvalues of rounding
    are left out.

    Args:
        total_sketch: (in, width), the sum over devices.
        omega: (in, width), what they took.
        rank: of A, at most the width.

    Returns:
        float32 (rank, in), orthonormal rows, strongest first; the largest number of each row is positive. Where the
        inputs span fewer directions, the others are any.

    Raises:
        InputError: the shapes do not meet, a number is not finite, or the rank is too large.

    Example:
        >>> omega = shared_omega(3, 2, seed=0)
        >>> np.abs(directions_from_sketch(sketch(np.array([[0.0, 2.0, 0.0]]), omega), omega, 1)).tolist()
        [[0.0, 1.0, 0.0]]
    """
    y, shared = _checked(total_sketch, "total_sketch"), _checked(omega, "omega")
    if y.shape != shared.shape:
        raise InputError(f"total_sketch has shape {y.shape}, expected {shared.shape} as omega")
    if not 1 <= rank <= y.shape[1]:
        raise InputError(f"rank is {rank}, expected 1 to {y.shape[1]}, the width of the sketch; widen it")
    core = shared.T @ y
    values, vectors = np.linalg.eigh((core + core.T) / 2)
    kept = values > _VANISHED * max(float(values[-1]), 0.0)
    factor = y @ (vectors[:, kept] / np.sqrt(values[kept]))  # (in, kept)
    u, s, _ = np.linalg.svd(factor, full_matrices=False)
    num_found = min(rank, int((s**2 > _VANISHED * s[0] ** 2).sum()) if len(s) else 0)
    rows = u[:, :num_found].T
    return _signed(np.concatenate([rows, further_rows(rows, rank - num_found)]))


def _checked(array: NDArray[np.floating], name: str) -> NDArray[np.float64]:
    if array.ndim != 2 or 0 in array.shape:
        raise InputError(f"{name} has shape {array.shape}, expected a matrix with at least one row and one column")
    if not np.isfinite(array).all():
        raise InputError(f"{name} holds nan or inf, expected finite numbers; leave this device out of the sum")
    return np.asarray(array, np.float64)


def _signed(rows: NDArray[np.float64]) -> NDArray[np.float32]:
    """Rows whose largest number is positive, so that no library decides the sign."""
    largest = rows[np.arange(len(rows)), np.argmax(np.abs(rows), axis=1)]
    return np.ascontiguousarray(rows * np.sign(largest)[:, None], np.float32)
