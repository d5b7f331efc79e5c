"""The NumPy side network against the one that was trained in torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.device.side_network import SideNetwork, gate_of, open_side_network
from cotune.errors import InputError
from cotune.models import SIDE_NETWORKS
from cotune.models import SideNetwork as TorchSideNetwork
from cotune.plugin import GateParameters, Plugin
from cotune.wire.codec import dequantise, quantise

TAP = {"num_taps": 3, "tap_dim": 4, "basis_dim": 5, "side_width": 6, "inner_width": 7}
SPA = {"num_taps": 3, "hidden_size": 9, "side_width": 4}


def trained(kind: str, config: dict[str, Any], seed: int = 0) -> TorchSideNetwork:
    """A network with random values everywhere, of the size that training leaves."""
    generator = torch.Generator().manual_seed(seed)
    network = SIDE_NETWORKS[kind].from_config(config, generator).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def plugin_of(network: TorchSideNetwork, **changes: Any) -> Plugin:
    fields: dict[str, Any] = {
        "kind": network.kind,
        "config": network.config_dict(),
        "tensors": network.to_arrays(),
        "backbone_digest": "b",
        "projections_digest": "p",
        "tokenizer_digest": "t",
        "tokenizer_json": b"{}",
        "output_basis": b"",
    }
    return Plugin(**{**fields, **changes})


dims = st.integers(1, 40)


@settings(max_examples=60, deadline=None)
@given(num_taps=st.integers(1, 9), tap_dim=dims, basis=dims, side=dims, inner=dims, seed=st.integers(0, 99))
def test_tap_ladder_equals_torch(num_taps: int, tap_dim: int, basis: int, side: int, inner: int, seed: int) -> None:
    config = {"num_taps": num_taps, "tap_dim": tap_dim, "basis_dim": basis, "side_width": side, "inner_width": inner}
    check_equal(trained("tap_ladder", config, seed), seed)


@settings(max_examples=40, deadline=None)
@given(num_taps=st.integers(1, 6), hidden=st.integers(1, 80), side=dims, seed=st.integers(0, 99))
def test_spa_ladder_equals_torch(num_taps: int, hidden: int, side: int, seed: int) -> None:
    config = {"num_taps": num_taps, "hidden_size": hidden, "side_width": side}
    check_equal(trained("spa_ladder", config, seed), seed)


def check_equal(network: TorchSideNetwork, seed: int) -> None:
    device = SideNetwork.from_plugin(plugin_of(network))
    generator = np.random.default_rng(seed)
    for _ in range(2):  # twice: nothing may be left over from the first position
        taps = generator.standard_normal((network.config.num_taps, network.config.tap_dim)).astype(np.float32)
        codes, scales = quantise(taps)
        taps = dequantise(codes, scales)
        expected = network(torch.tensor(taps)).detach().numpy()
        got = device.correct_exactly(taps)
        np.testing.assert_allclose(got, expected, atol=1e-5 * max(1.0, float(np.abs(expected).max())))
        expected_codes, expected_scale = quantise(got)
        correction = device.correct(codes, scales)
        np.testing.assert_array_equal(correction.codes, expected_codes)
        assert correction.scale == expected_scale
        assert isinstance(correction.scale, np.float16)


def test_the_default_size_equals_torch() -> None:
    config = {"num_taps": 33, "tap_dim": 32, "basis_dim": 64}
    check_equal(trained("tap_ladder", config), 0)


def test_corrections_do_not_share_memory() -> None:
    device = SideNetwork.from_plugin(plugin_of(trained("tap_ladder", TAP)))
    one = quantise(np.ones((3, 4), np.float32))
    first = device.correct(*one)
    kept = first.codes.copy()
    device.correct(*quantise(-np.ones((3, 4), np.float32)))
    np.testing.assert_array_equal(first.codes, kept)
    np.testing.assert_array_equal(device.correct(*one).codes, kept)


def test_the_plugin_keeps_its_tensors() -> None:
    plugin = plugin_of(trained("tap_ladder", TAP))
    before = {name: tensor.copy() for name, tensor in plugin.tensors.items()}
    device = SideNetwork.from_plugin(plugin)
    device.correct(*quantise(np.ones((3, 4), np.float32)))
    for name, tensor in plugin.tensors.items():
        np.testing.assert_array_equal(tensor, before[name])


def test_an_untrained_plugin_corrects_nothing() -> None:
    network = SIDE_NETWORKS["tap_ladder"].from_config(TAP)
    correction = SideNetwork.from_plugin(plugin_of(network)).correct(*quantise(np.ones((3, 4), np.float32)))
    assert not correction.codes.any() and correction.scale == 0


def test_opening_finds_the_kind_and_any_position_may_come_at_any_time() -> None:
    plugin = plugin_of(trained("tap_ladder", TAP))
    network = open_side_network(plugin)
    assert isinstance(network, SideNetwork) and not network.reads_every_position and network.prompt_window == 0
    taps = quantise(np.ones((3, 4), np.float32))
    side = network.open()
    for position in (9, 2, 400):
        side.read(position - 1, *quantise(-np.ones((3, 4), np.float32)))
        np.testing.assert_array_equal(side.correct(position, *taps).codes, network.correct(*taps).codes)
        assert side.next_position is None
    with pytest.raises(InputError, match="expected one of tap_ladder, spa_ladder, attention_ladder"):
        open_side_network(plugin_of(trained("tap_ladder", TAP), kind="other"))


def test_its_size_is_what_it_holds() -> None:
    device = SideNetwork.from_plugin(plugin_of(trained("spa_ladder", SPA)))
    assert (device.num_taps, device.tap_dim, device.basis_dim) == (3, 9, 9)
    assert 0 < device.size_bytes < 10_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "other"}, "expected one of tap_ladder, spa_ladder, attention_ladder"),
        ({"config": {}}, "does not fit tap_ladder"),
        ({"config": {**TAP, "side_width": True}}, "does not fit tap_ladder"),
        ({"config": {**TAP, "side_width": 10**9}}, "does not fit tap_ladder"),
        ({"config": {**TAP, "inner_width": 8}}, "expected float32"),
        ({"tensors": {}}, "the plugin has tensors"),
    ],
)
def test_plugins_that_do_not_fit_are_input_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SideNetwork.from_plugin(plugin_of(trained("tap_ladder", TAP), **changes))


def test_taps_that_do_not_fit_are_input_errors() -> None:
    device = SideNetwork.from_plugin(plugin_of(trained("tap_ladder", TAP)))
    with pytest.raises(InputError, match=r"expected \(3, 4\) and \(3,\)"):
        device.correct(np.zeros((3, 5), np.int8), np.zeros(3, np.float16))
    with pytest.raises(InputError, match=r"expected \(3, 4\) and \(3,\)"):
        device.correct(np.zeros((3, 4), np.int8), np.zeros((), np.float16))


def test_the_gate_comes_along() -> None:
    network = trained("tap_ladder", TAP)
    assert gate_of(plugin_of(network)) is None
    parameters = GateParameters(weight=np.array([1.0, -2.0], np.float32), bias=0.5, threshold=0.25)
    gate = gate_of(plugin_of(network, gate=parameters))
    assert gate is not None
    assert gate.score(np.array([1.0, 1.0], np.float32)) == pytest.approx(-0.5)
    assert (gate.bias, gate.threshold) == (0.5, 0.25)
    layer = {"layer": np.array([[1, 2], [3, 4]], np.float32), "layer_bias": np.array([0, 1], np.float32)}
    gate = gate_of(plugin_of(network, gate=replace(parameters, **layer)))
    assert gate is not None and gate.layer is not None
    assert gate.layer.weight.dtype == np.float16
    assert gate.layer.weight.tolist() == [[1, 2], [3, 4]]


def test_importing_it_does_not_import_torch() -> None:
    code = "import sys, cotune.device.side_network, cotune.plugin; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
