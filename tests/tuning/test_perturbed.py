from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from cotune.errors import InputError
from cotune.tuning import perturbed
from cotune.tuning.directions import Direction
from cotune.tuning.perturbed import PerturbedTensor, block_elements, representable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLACE = 256
EPS = 0.25


def moved_by_hand(theta: torch.Tensor, place: int = PLACE) -> torch.Tensor:
    return theta + EPS * Direction(9).signs(place, theta.numel(), theta.dtype).view(theta.shape)


def pair(*shape: int, place: int = PLACE, dtype: torch.dtype = torch.float32) -> tuple[PerturbedTensor, torch.Tensor]:
    """A moved tensor, and the same written out."""
    theta = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return PerturbedTensor.of(theta, Direction(9), place=place, zo_eps=EPS), moved_by_hand(theta, place)


@pytest.fixture(params=[2**20, 600, 1])
def block_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in one block, in several, and one row at a time."""
    monkeypatch.setitem(perturbed.BLOCK_ELEMENTS, "cpu", request.param)


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("place", [PLACE, 131])
@pytest.mark.parametrize("width", [128, 50])
@pytest.mark.parametrize("biased", [True, False])
def test_layers_see_the_moved_numbers(place: int, width: int, biased: bool) -> None:
    x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(2))
    weight, expected = pair(70, width, place=place)
    bias, expected_bias = pair(70, place=1000)
    torch.testing.assert_close(
        F.linear(x, weight, bias if biased else None), F.linear(x, expected, expected_bias if biased else None)
    )
    for columns in (300, 384):
        weight, expected = pair(width, columns, place=place)
        bias, expected_bias = pair(columns, place=1000)
        torch.testing.assert_close(
            torch.addmm(bias, x.view(-1, width), weight), torch.addmm(expected_bias, x.view(-1, width), expected)
        )
    ids = torch.tensor([[3, 0], [69, 3], [1, 1]])
    weight, expected = pair(70, width, place=place)
    assert torch.equal(F.embedding(ids, weight, 0), F.embedding(ids, expected, 0))
    assert torch.equal(F.embedding(input=ids, weight=weight, max_norm=None), F.embedding(ids, expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_keep_their_number_type(dtype: torch.dtype) -> None:
    x = torch.randn(4, 20).to(dtype)
    weight, expected = pair(30, 20, dtype=dtype)
    assert torch.equal(F.linear(x, weight), F.linear(x, expected))
    assert torch.equal(F.embedding(torch.tensor([5]), weight), F.embedding(torch.tensor([5]), expected))


@pytest.mark.parametrize(
    "function",
    [
        lambda p: p * 2,
        lambda p: 2 * p,
        lambda p: torch.cat([p, p]),
        lambda p: p.sum(dim=0),
        lambda p: p[1],
        lambda p: p.t() @ p,
        lambda p: p.to(torch.float64),
        lambda p: F.layer_norm(torch.ones(3, 4), (4,), weight=p[0], bias=p[1]),
        lambda p: torch.stack((p, p)).norm(),
        lambda p: F.embedding(torch.tensor([1, 2]), p, max_norm=1.0),
        lambda p: F.linear(p, torch.ones(2, 4)),
        lambda p: torch.addmm(p, torch.ones(3, 4), torch.ones(4, 4), beta=0.5),
        lambda p: torch.addmm(torch.ones(3, 4), torch.ones(3, 3), p, alpha=2.0),
        lambda p: torch.addmm(torch.ones(3, 4), torch.ones(3, 3), p),
    ],
)
def test_any_other_function_sees_them_too(function: Any) -> None:
    moved, expected = pair(3, 4)
    result = function(moved)
    assert type(result) is torch.Tensor
    assert torch.equal(result, function(expected))


def test_its_form_is_known_without_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PerturbedTensor, "elements", lambda *_: pytest.fail("numbers were made"))
    moved = PerturbedTensor.of(torch.zeros(3, 4, dtype=torch.float16), Direction(0), place=0, zo_eps=1.0)
    assert (moved.shape, moved.dtype, moved.device.type, moved.ndim) == ((3, 4), torch.float16, "cpu", 2)
    assert (moved.size(1), moved.dim(), moved.numel(), len(moved)) == (4, 2, 12, 3)
    assert moved.is_floating_point() and not moved.requires_grad


@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    zo_eps=st.floats(-1e3, 1e3),
    seed=st.integers(0, 2**63),
    bits=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_the_weights_are_never_written(
    dtype: torch.dtype, shape: list[int], zo_eps: float, seed: int, bits: int
) -> None:
    """Weights of arbitrary bits, zeros of both signs, infinities and nan among them."""
    size = 4 if dtype == torch.float32 else 2
    num = torch.Size(shape).numel() * size
    raw = torch.randint(0, 256, (num,), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    theta = raw.clone().view(dtype).view(shape)
    moved = PerturbedTensor.of(theta, Direction(seed), place=0, zo_eps=zo_eps)
    moved.add_(1)
    (moved * 2).sum()
    if theta.ndim == 2:
        F.linear(torch.ones(1, shape[1], dtype=dtype), moved)
        F.embedding(torch.tensor([0]), moved)
    assert torch.equal(theta.view(-1).view(torch.uint8), raw)


@pytest.mark.parametrize("zo_eps", [1e-6, 1e-3, 0.01, 0.7, 1e3])
def test_every_type_has_a_representable_eps(zo_eps: float) -> None:
    eps = representable(zo_eps)
    assert eps == pytest.approx(zo_eps, rel=2**-8)
    for dtype in (torch.bfloat16, torch.float32):
        assert float(torch.tensor(eps, dtype=dtype)) == eps


def test_a_kernel_that_reads_memory_is_told_so() -> None:
    moved = PerturbedTensor.of(torch.zeros(3), Direction(0), place=0, zo_eps=1.0)
    with pytest.raises(InputError, match="data_ptr asks for the memory of a perturbed parameter"):
        moved.data_ptr()


def test_a_block_fits_its_device() -> None:
    assert block_elements(torch.device("cpu")) < block_elements(torch.device("cuda"))
