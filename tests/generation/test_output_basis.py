from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotune.errors import InputError
from cotune.generation.output_basis import OutputBasis
from cotune.generation.protocols import Correction


def _random(vocab: int, dim: int, seed: int) -> tuple[OutputBasis, Correction]:
    rng = np.random.default_rng(seed)
    basis = OutputBasis.from_matrix(rng.standard_normal((vocab, dim)).astype(np.float32))
    codes = rng.integers(-127, 128, dim).astype(np.int8)
    return basis, Correction(codes=codes, scale=np.float16(rng.uniform(1e-3, 0.1)))


@given(st.integers(1, 40), st.sampled_from([1, 7, 64, 1024, 1025, 2100]), st.integers(0, 1000))
def test_delta_is_the_exact_integer_product_scaled_once(vocab: int, dim: int, seed: int) -> None:
    basis, correction = _random(vocab, dim, seed)
    sums = basis.codes.astype(np.int64) @ correction.codes.astype(np.int64)
    expected = sums.astype(np.float32) * (basis.scales * np.float32(correction.scale))
    assert basis.delta(correction).tobytes() == expected.tobytes()


def test_delta_is_close_to_the_unquantised_product() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((200, 32)).astype(np.float32)
    basis = OutputBasis.from_matrix(matrix)
    correction = Correction(codes=np.arange(-16, 16, dtype=np.int8), scale=np.float16(0.05))
    exact = matrix @ (correction.codes.astype(np.float32) * np.float32(correction.scale))
    assert np.abs(basis.delta(correction) - exact).max() < 0.05 * np.abs(exact).std()


def test_largest_codes_stay_exact() -> None:
    full = np.full((3, 1024), 127, np.int8)
    basis = OutputBasis(full, np.ones(3, np.float32))
    delta = basis.delta(Correction(codes=full[0], scale=np.float16(1)))
    assert delta.tolist() == [127 * 127 * 1024] * 3


def test_a_file_gives_the_same_basis_back() -> None:
    basis, _ = _random(20, 6, 3)
    again = OutputBasis.from_bytes(basis.to_bytes())
    assert again.digest == basis.digest
    assert _random(20, 6, 4)[0].digest != basis.digest


@pytest.mark.parametrize("data", [b"", b"not safetensors", b"\x08\0\0\0\0\0\0\0{}      "])
def test_other_bytes_are_refused_in_one_sentence(data: bytes) -> None:
    with pytest.raises(InputError, match="output basis cannot be read"):
        OutputBasis.from_bytes(data)


def test_shapes_are_checked() -> None:
    with pytest.raises(InputError, match="expected int8"):
        OutputBasis(np.zeros((3, 2), np.float32), np.zeros(3, np.float32))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="scales"):
        OutputBasis(np.zeros((3, 2), np.int8), np.zeros(4, np.float32))
    basis, _ = _random(5, 4, 0)
    with pytest.raises(InputError, match="correction"):
        basis.delta(Correction(codes=np.zeros(3, np.int8), scale=np.float16(1)))
