from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.errors import InputError
from cotune.tuning import perturbed
from cotune.tuning.directions import Direction
from cotune.tuning.perturbed import PerturbedTensor
from cotune.tuning.sparse_mask import SparseMask, mask_by_magnitude
from cotune.tuning.tuned_numbers import TunedNumbers

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: tensor.reshape(-1).view(torch.uint8).tolist() for name, tensor in tensors.items()}


def raw_tensors(dtype: torch.dtype, shapes: list[list[int]], seed: int) -> dict[str, torch.Tensor]:
    """Arbitrary bits, so zeros of both signs, the smallest numbers, infinities and nan too."""
    generator = torch.Generator().manual_seed(seed)
    size = 4 if dtype == torch.float32 else 2
    return {
        f"p{i}": torch.randint(0, 256, (int(np.prod(shape)) * size,), dtype=torch.uint8, generator=generator)
        .view(dtype)
        .view(shape)
        for i, shape in enumerate(shapes)
    }


SHAPES = st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=3), min_size=1, max_size=4)


@given(
    dtype=st.sampled_from(DTYPES),
    shapes=SHAPES,
    zo_eps=st.floats(1e-6, 1e3),
    seed=st.integers(0, 2**63),
    masked=st.booleans(),
    fails=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_moving_there_and_back_changes_no_bit(
    dtype: torch.dtype, shapes: list[list[int]], zo_eps: float, seed: int, masked: bool, fails: bool
) -> None:
    tensors = raw_tensors(dtype, shapes, seed % 2**31)
    before = bits(tensors)
    mask = None
    if masked:
        generator = np.random.default_rng(seed)
        mask = SparseMask(
            indices={
                name: torch.from_numpy(np.sort(generator.permutation(t.numel())[: 1 + t.numel() // 3]).astype(np.int32))
                for name, t in tensors.items()
            }
        )
    numbers = TunedNumbers(tensors, mask)
    for eps in (zo_eps, -zo_eps):
        try:
            with numbers.moved(Direction(seed), eps) as moved:
                assert [tensor.shape for tensor in moved.values()] == [tensor.shape for tensor in tensors.values()]
                for tensor in moved.values():
                    (tensor * 2).sum()
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        assert bits(tensors) == before


@pytest.mark.parametrize("block", [2**20, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_moved_numbers_by_hand(block: int, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs count the tuned numbers: b from 0 on, w from 128 on, since b has fewer."""
    monkeypatch.setitem(perturbed.BLOCK_ELEMENTS, "cpu", block)
    tensors = {"w": torch.arange(12.0).view(3, 4), "b": torch.arange(7.0)}
    mask = SparseMask(indices={"w": torch.tensor([1, 2, 3, 7, 8, 10, 11]), "b": torch.tensor([4])}) if masked else None
    numbers = TunedNumbers(tensors, mask)
    z = Direction(5)
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    if mask is None:
        expected["w"] += 0.5 * z.signs(128, 12).view(3, 4)
        expected["b"] += 0.5 * z.signs(0, 7)
        assert numbers.num_numbers == 19
    else:
        expected["w"].view(-1)[mask.indices["w"]] += 0.5 * z.signs(128, 7)
        expected["b"][4] += 0.5 * z.signs(0, 1)[0]
        assert numbers.num_numbers == 8
    with numbers.moved(z, 0.5) as moved:
        assert all(torch.equal(moved[name] + 0, expected[name]) for name in tensors)
    numbers.add([z], [0.5])
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)


@given(dtype=st.sampled_from(DTYPES), shapes=SHAPES, seed=st.integers(0, 2**31), weight=st.floats(-10, 10))
@settings(max_examples=50, deadline=None)
def test_updates_are_rounded_once(dtype: torch.dtype, shapes: list[list[int]], seed: int, weight: float) -> None:
    """The short way for one direction, the general way, and NumPy give the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    start = {f"p{i}": torch.randn(shape, generator=generator).to(dtype) for i, shape in enumerate(shapes)}
    short, general = ({name: t.clone() for name, t in start.items()} for _ in range(2))
    z = Direction(seed)
    TunedNumbers(short).add([z], [weight])
    TunedNumbers(general).add([z, Direction(1)], [weight, 0.0])
    numbers = TunedNumbers(start)
    for name, tensor in start.items():
        signs = z.signs(numbers.places[name], tensor.numel()).numpy().reshape(tensor.shape)
        by_hand = torch.from_numpy(tensor.float().numpy() + np.float32(weight) * signs).to(dtype)
        assert torch.equal(short[name], by_hand) and torch.equal(general[name], by_hand)


def test_decay_is_for_matrices_only() -> None:
    tensors = {"w": torch.full((2, 2), 8.0), "b": torch.full((3,), 8.0)}
    TunedNumbers(tensors).add([], [], keep=0.75)
    assert tensors["w"].tolist() == [[6.0, 6.0], [6.0, 6.0]] and tensors["b"].tolist() == [8.0] * 3


def test_adding_nothing_changes_no_bit() -> None:
    tensors = {"w": torch.full((2, 40), -0.0)}
    TunedNumbers(tensors).add([Direction(0)], [0.0])
    assert torch.signbit(tensors["w"]).all(), "whatever z is, -0 does not become +0"


def test_whole_tensors_are_not_written_while_they_are_moved() -> None:
    tensors = {"w": torch.zeros(4, 4)}
    with TunedNumbers(tensors).moved(Direction(0), 1.0) as moved:
        assert isinstance(moved["w"], PerturbedTensor)
        assert moved["w"].theta.data_ptr() == tensors["w"].data_ptr() and not tensors["w"].any()


def test_parameters_that_cannot_be_tuned_are_refused() -> None:
    with pytest.raises(InputError, match=r"w is torch\.float32 with strides"):
        TunedNumbers({"w": torch.zeros(3, 4).T})
    with pytest.raises(InputError, match=r"w is torch\.int8"):
        TunedNumbers({"w": torch.zeros(3, dtype=torch.int8)})
    for nothing in ({}, {"w": torch.zeros(0, 4)}):
        with pytest.raises(InputError, match="nothing to tune"):
            TunedNumbers(nothing)
    with pytest.raises(InputError, match="not tuned"):
        TunedNumbers({"b": torch.zeros(3)}, mask_by_magnitude({"w": torch.ones(3)}, 1.0))


def test_an_empty_tensor_among_others_does_no_harm() -> None:
    numbers = TunedNumbers({"w": torch.zeros(3), "empty": torch.zeros(0, 4)})
    with numbers.moved(Direction(0), 1.0) as moved:
        assert moved["empty"].shape == (0, 4) and moved["w"].abs().tolist() == [1.0] * 3
    assert [block.name for block in numbers.blocks()] == ["w"]
