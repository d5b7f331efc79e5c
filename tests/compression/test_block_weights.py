"""Blocks hold exactly what packed weights stand for, and onnxruntime multiplies with exactly that."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cotune.compression.block_weights import BlockWeight, stacked
from cotune.models.packed_weights import PackedWeight, num_groups

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

NUM_OUT = 6
GRIDS = [
    (bits, group_size, num_in, symmetric)
    for bits in (8, 4, 3)
    for group_size, num_in in ((32, 64), (64, 96), (128, 256), (48, 48), (24, 24), (512, 512))
    for symmetric in (True, False)
]


def random_weight(bits: int, group_size: int, num_in: int, symmetric: bool, seed: int = 0) -> PackedWeight:
    generator = np.random.default_rng(seed)
    groups = (NUM_OUT, num_groups(num_in, group_size))
    middle = np.full(groups, 2 ** (bits - 1), np.uint8)
    return PackedWeight(
        codes=generator.integers(0, 2**bits, (NUM_OUT, num_in), dtype=np.uint8),
        scales=generator.uniform(0.5, 2.0, groups).astype(np.float16).astype(np.float32),
        zeros=middle if symmetric else generator.integers(0, 2**bits, groups, dtype=np.uint8),
        bits=bits,
        group_size=group_size,
    )


def multiply(weight: BlockWeight, x: NDArray[np.float32]) -> Any:
    """x W^T by MatMulNBits."""
    helper = onnx.helper
    tensors = {"codes": weight.codes, "scales": weight.scales.astype(np.float32)}
    if weight.packed_zeros is not None:
        tensors["zeros"] = weight.packed_zeros
    num_out, num_in = weight.shape
    node = helper.make_node(
        "MatMulNBits",
        ["x", *tensors],
        ["y"],
        domain="com.microsoft",
        K=num_in,
        N=num_out,
        bits=weight.bits,
        block_size=weight.block_size,
        accuracy_level=1,
    )
    graph = helper.make_graph(
        [node],
        "one product",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None, num_in])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None, num_out])],
        [onnx.numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("grid", GRIDS)
def test_blocks_stand_for_the_same_numbers(grid: tuple[int, int, int, bool]) -> None:
    weight = random_weight(*grid)
    blocks = BlockWeight.from_packed(weight)
    np.testing.assert_array_equal(blocks.dequantised(), weight.dequantised())
    assert blocks.shape == weight.shape
    assert blocks.bits == (8 if weight.bits == 8 else 4)
    assert (blocks.zeros is None) == grid[-1]


@pytest.mark.parametrize("grid", GRIDS)
def test_onnxruntime_reads_them_so(grid: tuple[int, int, int, bool]) -> None:
    weight = random_weight(*grid)
    x = np.random.default_rng(1).normal(size=(3, weight.shape[1])).astype(np.float32)
    expected = x.astype(np.float64) @ weight.dequantised().T.astype(np.float64)
    found = multiply(BlockWeight.from_packed(weight), x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_group_is_one_block_where_it_can_be() -> None:
    sizes = {grid: BlockWeight.from_packed(random_weight(*grid)).block_size for grid in GRIDS}
    assert sizes[4, 32, 64, True] == 32
    assert sizes[4, 64, 96, True] == 64
    assert sizes[4, 48, 48, True] == 16
    assert sizes[4, 24, 24, True] == 32
    assert sizes[4, 512, 512, True] == 256


@pytest.mark.parametrize("symmetries", [(True, True), (True, False), (False, False)])
def test_stacked_weights_are_one_beneath_the_other(symmetries: tuple[bool, bool]) -> None:
    weights = [random_weight(4, 32, 64, symmetric, seed) for seed, symmetric in enumerate(symmetries)]
    together = stacked([BlockWeight.from_packed(weight) for weight in weights])
    assert together is not None
    np.testing.assert_array_equal(together.dequantised(), np.concatenate([w.dequantised() for w in weights]))


def test_different_blocks_are_not_stacked() -> None:
    blocks = [BlockWeight.from_packed(random_weight(4, size, 128, True)) for size in (32, 64)]
    assert stacked(blocks) is None
