"""The shared frozen output basis: from a correction of a few dozen numbers to logits of the whole vocabulary.

A side network's correction c lives in the span of a frozen matrix B (hidden, basis_dim). Logits are linear after
the final norm (SPA, arXiv 2403.07088, equation 1, read per position), so W_lm (f + B c) = z + (W_lm B) c, and
the device needs Q = W_lm B, (vocab, basis_dim), instead of the language-model head (vocab, hidden). With the
head c = R s + r of a side network this is P s + p0 for P = Q R and p0 = Q r.

Q is stored as int8 rows with one scale each, and c as int8 codes with one scale, so that the inner products are
sums of small integers. Float32 holds every integer below 2^24 exactly, so matrix products of up to 1,040
columns are exact in any order of summation: the device and the cloud get the same logits to the last bit,
whatever their BLAS, thread count or processor.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from cotune.errors import InputError
from cotune.generation.protocols import Correction

# 127 * 127 * 1024 < 2^24: a block this wide is exact in float32.
EXACT_BLOCK = 1024


@dataclass(frozen=True)
class OutputBasis:
    """Q = W_lm B, quantised by rows.

    Attributes:
        codes: int8 (vocab, basis_dim).
        scales: float32 (vocab,), Q[v] = codes[v] * scales[v].

    Example:
        >>> basis = OutputBasis.from_matrix(np.eye(3, 2, dtype=np.float32))
        >>> c = Correction(codes=np.array([127, 0], np.int8), scale=np.float16(0.5))
        >>> basis.delta(c).round(2).tolist()
        [63.5, 0.0, 0.0]
    """

    codes: NDArray[np.int8]
    scales: NDArray[np.float32]

    def __post_init__(self) -> None:
        if self.codes.ndim != 2 or self.codes.dtype != np.int8 or 0 in self.codes.shape:
            raise InputError(
                f"output basis codes are {self.codes.dtype} {self.codes.shape}, expected int8 (vocab, basis_dim)"
            )
        if self.scales.shape != self.codes.shape[:1] or self.scales.dtype != np.float32:
            raise InputError(
                f"output basis scales are {self.scales.dtype} {self.scales.shape}, "
                f"expected float32 ({len(self.codes)},)"
            )
        if not np.isfinite(self.scales).all():
            raise InputError("output basis scales hold nan or inf, expected finite numbers")

    @classmethod
    def from_matrix(cls, matrix: NDArray[np.float32]) -> OutputBasis:
        """Quantise W_lm B, float32 (vocab, basis_dim), each row to int8 by its largest magnitude."""
        largest = np.abs(matrix).max(axis=1)
        scales = (largest / np.float32(127)).astype(np.float32)
        safe = np.where(scales > 0, scales, np.float32(1))
        codes = np.clip(np.rint(matrix / safe[:, None]), -127, 127).astype(np.int8)
        return cls(codes, scales)

    @property
    def vocab_size(self) -> int:
        return len(self.codes)

    @property
    def dim(self) -> int:
        """Length of a correction."""
        return len(self.codes[0])

    @cached_property
    def _blocks(self) -> list[NDArray[np.float32]]:
        # Float copies in (basis_dim, vocab) layout: the vector-matrix product is a third faster that way round.
        return [
            np.ascontiguousarray(self.codes[:, i : i + EXACT_BLOCK].T, dtype=np.float32)
            for i in range(0, self.dim, EXACT_BLOCK)
        ]

    def delta(self, correction: Correction) -> NDArray[np.float32]:
        """Change of the logits, float32 (vocab,), for one correction; exact and equal everywhere."""
        if correction.codes.shape != (self.dim,):
            raise InputError(
                f"the correction has shape {correction.codes.shape}, expected ({self.dim},) for this output basis"
            )
        codes = correction.codes.astype(np.float32)
        # BLAS may set the flag for invalid operations over numbers beside the vectors, which it never uses.
        with np.errstate(invalid="ignore"):
            if len(self._blocks) == 1:
                sums = codes @ self._blocks[0]
            else:
                wide = np.zeros(self.vocab_size, np.float64)
                for i, block in enumerate(self._blocks):
                    wide += codes[i * EXACT_BLOCK : (i + 1) * EXACT_BLOCK] @ block
                sums = wide.astype(np.float32)
        sums *= self.scales * np.float32(correction.scale)
        return np.asarray(sums, np.float32)

    def matrix(self) -> NDArray[np.float32]:
        """Q as float32 (vocab, basis_dim), for training."""
        return self.codes.astype(np.float32) * self.scales[:, None]

    @cached_property
    def digest(self) -> str:
        """SHA-256, hex, of shape, codes and scales."""
        state = hashlib.sha256(str(self.codes.shape).encode())
        state.update(np.ascontiguousarray(self.codes).tobytes())
        state.update(np.ascontiguousarray(self.scales, dtype="<f4").tobytes())
        return state.hexdigest()

    def to_bytes(self) -> bytes:
        """A safetensors file with `codes` and `scales`."""
        return save({"codes": np.ascontiguousarray(self.codes), "scales": np.ascontiguousarray(self.scales)})

    @classmethod
    def from_bytes(cls, data: bytes) -> OutputBasis:
        """Read what `to_bytes` wrote.

        Raises:
            InputError: the bytes are no such file.
        """
        try:
            tensors = load(data)
            return cls(tensors["codes"], tensors["scales"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise InputError(
                f"the output basis cannot be read ({error}), expected a safetensors file with codes and scales; "
                "fetch it again from the cloud"
            ) from error
