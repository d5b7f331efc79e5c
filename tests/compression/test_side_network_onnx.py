"""The graph of a ladder against the NumPy that devices run."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from toy_plugin import toy_plugin

from cotune.compression.side_network_onnx import OnnxSideNetwork, side_network_graph
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


def test_its_answers_are_its_caller_s_to_keep() -> None:
    plugin = trained("tap_ladder", {"num_taps": 2, "tap_dim": 3, "basis_dim": 4})
    network = OnnxSideNetwork(side_network_graph(plugin))
    codes, scales = np.ones((2, 3), np.int8), np.ones(2, np.float16)
    first = network.correct_exactly(codes, scales)
    kept = first.copy()
    assert not np.array_equal(network.correct_exactly(-codes, scales), kept)
    np.testing.assert_array_equal(first, kept)


def test_taps_of_another_shape_are_refused() -> None:
    plugin = trained("tap_ladder", {"num_taps": 2, "tap_dim": 3, "basis_dim": 4})
    network = OnnxSideNetwork(side_network_graph(plugin))
    with pytest.raises(InputError, match=r"shapes \(3, 3\) and \(2,\), expected \(2, 3\) and \(2,\)"):
        network.correct(np.zeros((3, 3), np.int8), np.ones(2, np.float16))


def test_a_network_with_a_memory_is_refused() -> None:
    plugin = trained("attention_ladder", {"num_taps": 3, "tap_dim": 4, "basis_dim": 5, "side_width": 16, "head_dim": 8})
    with pytest.raises(
        InputError, match="is of kind attention_ladder, expected one of tap_ladder, spa_ladder; run it in"
    ):
        side_network_graph(plugin)


def test_a_foreign_graph_is_refused() -> None:
    with pytest.raises(InputError, match="the side network's graph is no model that onnxruntime"):
        OnnxSideNetwork(b"no graph")


def test_without_onnxruntime_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"side network's graph needs onnxruntime .*cotune\[edge\]"):
        OnnxSideNetwork(b"")
