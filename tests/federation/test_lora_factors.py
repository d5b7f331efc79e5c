from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_models import tiny_backbone

from cotune.errors import InputError
from cotune.federation.lora_factors import (
    LoraFactors,
    join_layers,
    layer_names,
    matching_layers,
    normalised_weights,
    split_layers,
)
from cotune.models.adapters import LoraAdapter, LoraShape

A = np.array([[1.0, 2.0]], np.float32)
B = np.array([[3.0], [4.0]], np.float32)


def factors(*, out: int = 2, rank: int = 1, width: int = 2, scale: float = 1.0) -> LoraFactors:
    return LoraFactors(np.ones((rank, width), np.float32), np.ones((out, rank), np.float32), scale)


def test_the_product_by_hand() -> None:
    """2 [3, 4]^T [1, 2] = [[6, 12], [8, 16]]."""
    layer = LoraFactors(A, B, 2.0)
    assert layer.product().tolist() == [[6.0, 12.0], [8.0, 16.0]]
    assert layer.product().dtype == np.float32
    assert (layer.rank, layer.num_bytes) == (1, 16)


def test_a_real_adapter_there_and_back() -> None:
    model = tiny_backbone("llama").model
    adapter = LoraAdapter.fresh(model, LoraShape(rank=3, alpha=6.0), seed=1)
    arrays = {name: tensor.numpy() for name, tensor in adapter.params.items()}
    layers = split_layers(arrays, adapter.shape.scale)
    assert len(layers) == len(arrays) // 2
    first = layers["base_model.model.model.layers.0.self_attn.q_proj"]
    assert (first.rank, first.scale) == (3, 2.0)
    back = join_layers(layers, layer_names(list(arrays)))
    assert back.keys() == arrays.keys()
    assert all(np.array_equal(back[name], arrays[name]) for name in arrays)


def test_names_of_files_and_of_other_adapters() -> None:
    names = layer_names(["m.lora_A.weight", "m.lora_B.weight", "n.lora_B.mine.weight", "n.lora_A.mine.weight"])
    assert list(names) == ["m", "n"]
    assert names["n"].a == "n.lora_A.mine.weight"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["q.lora_magnitude_vector.default.weight"], "'q.lora_magnitude_vector.default.weight', expected only names"),
        (["q.lora_B.default.bias"], "expected only names of LoRA factors"),
        (["lora_A.weight"], "expected only names of LoRA factors"),
        (["q.lora_A.default.weight"], "layer 'q' has no lora_B"),
        (["q.lora_B.default.weight"], "layer 'q' has no lora_A"),
        (["q.lora_A.one.weight", "q.lora_A.two.weight"], "lora_A of 'q' twice"),
    ],
)
def test_wrong_names(names: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        layer_names(names)


@pytest.mark.parametrize(
    ("a", "b", "scale", "message"),
    [
        (A, B.T, 1.0, r"shapes \(1, 2\) and \(1, 2\), expected \(rank, in\) and \(out, rank\)"),
        (A[0], B, 1.0, "the factors have shapes"),
        (A[:0], B[:, :0], 1.0, "at least 1"),
        (A, B, 0.0, "scale is 0.0, expected a positive number"),
        (A, B, float("nan"), "scale is nan"),
        (A * np.float32("inf"), B, 1.0, "holds nan or inf"),
        (A, B * np.float32("nan"), 1.0, "holds nan or inf"),
    ],
)
def test_wrong_factors_name_their_layer(
    a: NDArray[np.float32], b: NDArray[np.float32], scale: float, message: str
) -> None:
    with pytest.raises(InputError, match=f"layer 'q': .*{message}"):
        split_layers({"q.lora_A.weight": a, "q.lora_B.weight": b}, scale)


def test_numbers_beyond_float32_are_refused() -> None:
    with pytest.raises(InputError, match="nan or inf"):
        split_layers({"q.lora_A.weight": A.astype(np.float64) * 1e300, "q.lora_B.weight": B}, 1.0)


def test_scales_by_layer() -> None:
    arrays = {f"{layer}.lora_{side}.weight": x for layer in "qv" for side, x in (("A", A), ("B", B))}
    layers = split_layers(arrays, {"q": 2.0, "v": 0.5})
    assert [layers[layer].scale for layer in "qv"] == [2.0, 0.5]
    with pytest.raises(InputError, match="no entry for layer 'v'"):
        split_layers(arrays, {"q": 2.0})
    with pytest.raises(InputError, match="the adapter is empty"):
        split_layers({}, 1.0)
    with pytest.raises(InputError, match="names has no entry for layer 'v'"):
        join_layers(layers, layer_names(["q.lora_A.weight", "q.lora_B.weight"]))


def test_adapters_that_do_not_match() -> None:
    with pytest.raises(InputError, match="there are no adapters"):
        matching_layers([])
    with pytest.raises(InputError, match="adapter 1 differs from adapter 0 in layer 'v'"):
        matching_layers([{"q": factors()}, {"q": factors(), "v": factors()}])
    with pytest.raises(InputError, match=r"adapter 1 has \(out, in\) \(3, 2\) in layer 'q', expected \(2, 2\)"):
        matching_layers([{"q": factors()}, {"q": factors(out=3)}])
    with pytest.raises(InputError, match="expected \\(2, 2\\)"):
        matching_layers([{"q": factors()}, {"q": factors(width=3)}])
    mixed = [{"q": factors()}, {"q": factors(rank=2)}]
    assert matching_layers(mixed) == ["q"]


def test_weights() -> None:
    assert normalised_weights([1, 0, 3], 3).tolist() == [0.25, 0.0, 0.75]
    assert normalised_weights([1.7e308, 1.7e308], 2).tolist() == [0.5, 0.5]
    with pytest.raises(InputError, match=r"weights have shape \(2,\), expected \(3,\)"):
        normalised_weights([1, 2], 3)
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="expected finite numbers of at least 0"):
            normalised_weights([1.0, wrong], 2)
    with pytest.raises(InputError, match="all weights are 0"):
        normalised_weights([0.0, 0.0], 2)
    with pytest.raises(InputError, match="there are no devices"):
        normalised_weights([], 0)
