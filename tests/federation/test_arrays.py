"""Named arrays: digests, vectors and checks."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.federation.arrays import (
    add,
    check_arrays,
    difference,
    digest,
    from_vector,
    norm,
    num_bytes,
    shapes_of,
    to_vector,
)


def adapter() -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    return {
        "q.lora_B.weight": rng.standard_normal((4, 2)).astype(np.float32),
        "q.lora_A.weight": rng.standard_normal((2, 3)).astype(np.float32),
        "scale": np.array(2.5, np.float32),
    }


def test_the_digest_is_the_one_that_the_docstring_describes() -> None:
    numbers = np.array([[1.5], [-2.0]], np.float32)
    expected = hashlib.sha256(
        struct.pack("<Q", 1)
        + struct.pack("<Q", 1)
        + b"a"
        + struct.pack("<Q", 7)
        + b"float32"
        + struct.pack("<QQQ", 2, 2, 1)
        + struct.pack("<ff", 1.5, -2.0)
    ).hexdigest()
    assert digest({"a": numbers}) == expected


def test_the_digest_depends_on_content_alone() -> None:
    arrays = adapter()
    turned = {name: np.asarray(arrays[name], order="F") for name in reversed(list(arrays))}
    assert digest(turned) == digest(arrays)
    big: dict[str, NDArray[Any]] = {name: array.astype(">f4") for name, array in arrays.items()}
    assert digest(big) == digest(arrays)


def test_every_change_changes_the_digest() -> None:
    arrays = adapter()
    seen = {digest(arrays), digest({})}
    changes: list[dict[str, Any]] = [
        {**arrays, "scale": np.array(np.nextafter(np.float32(2.5), np.float32(3)))},
        {**arrays, "scale": np.array([2.5], np.float32)},
        {**arrays, "scale": np.array(2.5, np.float64)},
        {**arrays, "q.lora_A.weight": arrays["q.lora_A.weight"].reshape(3, 2)},
        {**arrays, "q.lora_A.weight": arrays["q.lora_A.weight"].view(np.int32)},
        {**arrays, "new": np.empty(0, np.float32)},
        {name: array for name, array in arrays.items() if name != "scale"},
        {name + "s": array for name, array in arrays.items()},
    ]
    for changed in changes:
        seen.add(digest(changed))
    assert len(seen) == 2 + len(changes)


def test_bytes_that_move_between_names_and_arrays_change_the_digest() -> None:
    assert digest({"ab": np.empty(0, np.uint8)}) != digest({"a": np.frombuffer(b"b", np.uint8)})
    assert digest({"a": np.zeros(2, np.float32), "b": np.zeros(1, np.float32)}) != digest(
        {"a": np.zeros(1, np.float32), "b": np.zeros(2, np.float32)}
    )


def test_a_vector_has_the_names_sorted_and_comes_back() -> None:
    arrays = adapter()
    vector = to_vector(arrays)
    assert vector.dtype == np.float32
    assert vector[:6].tolist() == arrays["q.lora_A.weight"].ravel().tolist()
    assert vector[-1] == 2.5
    back = from_vector(vector, shapes_of(arrays))
    assert digest(back) == digest(arrays)
    back["scale"][...] = 0
    assert vector[-1] == 2.5, "copies"
    assert to_vector({}).shape == (0,)


@settings(max_examples=20)
@given(st.dictionaries(st.sampled_from("abcd"), st.lists(st.integers(0, 3), max_size=3).map(tuple), max_size=4))
def test_vectors_of_all_shapes_come_back(shapes: dict[str, tuple[int, ...]]) -> None:
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    vector = np.arange(total, dtype=np.float32)
    arrays = from_vector(vector, shapes)
    assert shapes_of(arrays) == shapes
    assert to_vector(arrays).tolist() == vector.tolist()


@pytest.mark.parametrize("length", [14, 16])
def test_a_vector_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(InputError, match=rf"\({length},\), the shapes ask for \(15,\)"):
        from_vector(np.zeros(length, np.float32), shapes_of(adapter()))


def test_arithmetic_by_hand() -> None:
    base = {"a": np.array([1, 2], np.float32), "b": np.array([2], np.float32)}
    delta = {"a": np.array([4, -4], np.float32), "b": np.array([2], np.float32)}
    result = add(base, delta, scale=0.5)
    assert result["a"].tolist() == [3.0, 0.0]
    assert result["b"].tolist() == [3.0]
    assert result["a"].dtype == np.float32
    assert difference(base, delta)["a"].tolist() == [-3.0, 6.0]
    assert norm(base) == 3.0
    assert num_bytes(base) == 12


def test_sums_are_rounded_once() -> None:
    # In float32, 0.1 * delta would be rounded before it is added.
    base, delta = np.float32(-0.12853466), np.float32(1.3664634)
    exact = np.float32(np.float64(base) + 0.1 * np.float64(delta))
    assert exact != base + np.float32(0.1) * delta
    assert add({"a": np.array([base])}, {"a": np.array([delta])}, scale=0.1)["a"][0] == exact
    assert norm({"a": np.full(2, 3e38, np.float32)}) == pytest.approx(2**0.5 * 3e38)


def test_other_adapters_do_not_add_up() -> None:
    one = {"a": np.zeros(2, np.float32)}
    for other in ({"b": np.zeros(2, np.float32)}, {"a": np.zeros((2, 1), np.float32)}):
        with pytest.raises(InputError, match="differ in names or shapes at 'a'"):
            add(one, other)
        with pytest.raises(InputError, match="differ in names or shapes at 'a'"):
            difference(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": np.array(np.nan, np.float32)}, "'scale' holds nan or inf in 1 of 1 places"),
        ({"scale": np.array(-np.inf, np.float32)}, "'scale' holds nan or inf in 1 of 1 places"),
        ({"scale": np.array(1.0)}, r"'scale' is float64 \(\), expected float32 \(\)"),
        ({"scale": np.array([1.0], np.float32)}, r"'scale' is float32 \(1,\), expected float32 \(\)"),
        ({"more": np.array(1.0, np.float32)}, "4 names with an unknown 'more', expected the 3"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change: dict[str, NDArray[Any]], message: str) -> None:
    shapes = shapes_of(adapter())
    check_arrays(adapter(), shapes)
    with pytest.raises(InputError, match=message):
        check_arrays({**adapter(), **change}, shapes)


def test_missing_and_unknown_names_are_both_told() -> None:
    arrays = adapter()
    arrays["scales"] = arrays.pop("scale")
    with pytest.raises(InputError, match="no 'scale' and an unknown 'scales'"):
        check_arrays(arrays, shapes_of(adapter()))


def test_codes_are_bytes_and_everything_else_is_float32() -> None:
    arrays = {**adapter(), "codes": np.zeros(3, np.uint8)}
    shapes = shapes_of(arrays)
    check_arrays(arrays, shapes, codes=["codes"])
    with pytest.raises(InputError, match=r"'codes' is uint8 \(3,\), expected float32"):
        check_arrays(arrays, shapes)
    with pytest.raises(InputError, match=r"'scale' is float32 \(\), expected uint8"):
        check_arrays(arrays, shapes, codes=["codes", "scale"])
