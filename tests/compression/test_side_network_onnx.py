"""The graph of a ladder against the NumPy that devices run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from toy_plugin import toy_plugin

from cotune.compression.side_network_onnx import side_network_graph
from cotune.device.onnx_side_network import OnnxSideNetwork
from cotune.device.side_network import SideNetwork
from cotune.errors import InputError
from cotune.models import SIDE_NETWORKS
from cotune.plugin import Plugin
from cotune.wire.codec import dequantise, quantise

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


def trained(kind: str, config: dict[str, Any]) -> Plugin:
    """A plugin whose side network has random values everywhere."""
    generator = torch.Generator().manual_seed(0)
    network = SIDE_NETWORKS[kind].from_config(config, generator)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return toy_plugin(kind=network.kind, config=network.config_dict(), tensors=network.to_arrays())


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("tap_ladder", {"num_taps": 7, "tap_dim": 32, "basis_dim": 96}),
        ("tap_ladder", {"num_taps": 1, "tap_dim": 3, "basis_dim": 1, "side_width": 1, "inner_width": 2}),
        ("tap_ladder", {"num_taps": 33, "tap_dim": 16, "basis_dim": 40, "side_width": 24, "inner_width": 56}),
        ("spa_ladder", {"num_taps": 5, "hidden_size": 48, "side_width": 8}),
    ],
)
def test_it_is_the_numpy_ladder(kind: str, config: dict[str, Any]) -> None:
    plugin = trained(kind, config)
    reference, found = SideNetwork.from_plugin(plugin), OnnxSideNetwork(side_network_graph(plugin))
    assert (found.num_taps, found.tap_dim, found.basis_dim) == (
        reference.num_taps,
        reference.tap_dim,
        reference.basis_dim,
    )
    generator = np.random.default_rng(1)
    for _ in range(3):  # nothing may be left over from the position before
        shape = (reference.num_taps, reference.tap_dim)
        codes, scales = quantise(generator.standard_normal(shape).astype(np.float32))
        expected = reference.correct_exactly(dequantise(codes, scales))
        exact = found.correct_exactly(codes, scales)
        np.testing.assert_allclose(exact, expected, rtol=0, atol=3e-6 * float(np.abs(expected).max()))
        correction = found.open().correct(1, codes, scales)
        np.testing.assert_array_equal(correction.codes, quantise(exact)[0])
        assert correction.scale == quantise(exact)[1]


def test_a_network_with_a_memory_is_refused() -> None:
    plugin = trained("attention_ladder", {"num_taps": 3, "tap_dim": 4, "basis_dim": 5, "side_width": 16, "head_dim": 8})
    with pytest.raises(
        InputError, match="is of kind attention_ladder, expected one of tap_ladder, spa_ladder; run it in"
    ):
        side_network_graph(plugin)
