from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cotune.errors import InputError
from cotune.tuning.sparse_mask import MASK_FILE, SparseMask, mask_by_gradient, mask_by_magnitude

PARAMS = {"w": torch.tensor([[0.5, -4.0, 1.0], [3.0, -0.1, 2.0]]), "b": torch.tensor([-2.5, 0.2])}


def as_lists(mask: SparseMask) -> dict[str, list[int]]:
    return {name: places.tolist() for name, places in mask.indices.items()}


def test_the_largest_numbers_by_hand() -> None:
    """Sizes in order: 4, 3, 2.5, 2, 1, 0.5, 0.2, 0.1."""
    assert as_lists(mask_by_magnitude(PARAMS, 1 / 8)) == {"w": [1]}
    assert as_lists(mask_by_magnitude(PARAMS, 3 / 8)) == {"w": [1, 3], "b": [0]}
    assert as_lists(mask_by_magnitude(PARAMS, 1.0)) == {"w": [0, 1, 2, 3, 4, 5], "b": [0, 1]}
    assert as_lists(mask_by_magnitude(PARAMS, 1e-9)) == {"w": [1]}, "at least one"
    assert mask_by_magnitude(PARAMS, 0.5).indices["w"].dtype == torch.int32


def test_ties_go_to_the_first_name_and_place() -> None:
    params = {"b": torch.ones(3), "a": torch.ones(3)}
    assert as_lists(mask_by_magnitude(params, 4 / 6)) == {"b": [0], "a": [0, 1, 2]}


def test_squared_gradients_are_summed_over_batches_by_hand() -> None:
    """L = 3 w_0 and then -3 w_0 + 2 b_1: squares 18 and 4, although the gradients of w_0 cancel."""

    def loss(params: dict[str, torch.Tensor], batch: tuple[float, float]) -> torch.Tensor:
        return batch[0] * params["w"][0, 0] + batch[1] * params["b"][1]

    batches = [(3.0, 0.0), (-3.0, 2.0)]
    assert as_lists(mask_by_gradient(PARAMS, 1 / 8, loss, batches)) == {"w": [0]}
    assert as_lists(mask_by_gradient(PARAMS, 2 / 8, loss, batches)) == {"w": [0], "b": [1]}
    assert not any(tensor.requires_grad for tensor in PARAMS.values())


def test_a_parameter_that_the_loss_does_not_use_is_not_chosen() -> None:
    mask = mask_by_gradient(PARAMS, 1 / 8, lambda params, batch: params["b"].sum(), [None])
    assert as_lists(mask) == {"b": [0]}


def test_a_saved_mask_comes_back(tmp_path: Path) -> None:
    mask = mask_by_magnitude(PARAMS, 0.5)
    mask.save(tmp_path / "new")
    assert as_lists(SparseMask.load(tmp_path / "new")) == as_lists(mask)
    assert mask.num_numbers == 4


@pytest.mark.parametrize(
    ("places", "complaint"),
    [
        (torch.tensor([3, 1], dtype=torch.int32), "do not ascend"),
        (torch.tensor([-1, 1], dtype=torch.int32), "do not ascend"),
        (torch.tensor([1.0]), "no list of places"),
        (torch.empty(0, dtype=torch.int32), "no list of places"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, places: torch.Tensor, complaint: str) -> None:
    with pytest.raises(InputError, match="holds no sparse mask"):
        SparseMask.load(tmp_path)
    save_file({"w": places}, tmp_path / MASK_FILE, metadata={"format": "cotune sparse mask 1"})
    with pytest.raises(InputError, match=complaint):
        SparseMask.load(tmp_path)
    save_file({"w": torch.tensor([1])}, tmp_path / MASK_FILE)
    with pytest.raises(InputError, match="format is None"):
        SparseMask.load(tmp_path)


def test_a_mask_of_other_parameters_is_refused() -> None:
    mask = SparseMask(indices={"w": torch.tensor([5])})
    mask.check(PARAMS)
    with pytest.raises(InputError, match="numbers of w, which is not tuned"):
        mask.check({"b": PARAMS["b"]})
    with pytest.raises(InputError, match="number 5 of w, which has 5"):
        mask.check({"w": torch.zeros(5)})
    with pytest.raises(InputError, match="chooses no number"):
        SparseMask(indices={})


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, float("nan")])
def test_impossible_fractions_are_refused(fraction: float) -> None:
    with pytest.raises(InputError, match=r"fraction is .*expected 0 < fraction <= 1"):
        mask_by_magnitude(PARAMS, fraction)


def test_nan_and_no_batches_are_refused() -> None:
    with pytest.raises(InputError, match="scores of w have nan"):
        mask_by_magnitude({"w": torch.tensor([1.0, float("nan")])}, 0.5)
    with pytest.raises(InputError, match="no batches"):
        mask_by_gradient(PARAMS, 0.5, lambda params, batch: params["w"].sum(), [])
