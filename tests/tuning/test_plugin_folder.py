from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cotune.errors import InputError
from cotune.generation.gate import Gate
from cotune.generation.output_basis import OutputBasis
from cotune.models import load_side_network
from cotune.plugin import Plugin
from cotune.tuning.loop import LoopConfig
from cotune.tuning.plugin_folder import build_plugin
from cotune.tuning.side import SideConfig, tune_side
from cotune.tuning.side_evaluation import nats_per_token

DIGESTS = {"backbone_digest": "b" * 64, "projections_digest": "p" * 64, "tokenizer_digest": "t" * 64}


def test_a_tuned_plugin_comes_back_from_its_folder(
    tmp_path: Path, draw_world: Callable[..., Any], output_basis: OutputBasis
) -> None:
    features = draw_world(100, 0).features(10)
    config = SideConfig(side_width=4, inner_width=4, loop=LoopConfig(epochs=2))
    network = tune_side(features, output_basis, config).network
    gate = Gate(weight=np.arange(6, dtype=np.float32), bias=0.25, threshold=-1.5)
    build_plugin(
        network,
        gate,
        family="parallel",
        tokenizer_json=b"{}",
        output_basis=output_basis,
        training={"nats_per_token": 1.5},
        **DIGESTS,
    ).save(tmp_path / "plugin")

    plugin = Plugin.load(tmp_path / "plugin")
    plugin.check_backbone(*DIGESTS.values())
    assert (plugin.family, plugin.training) == ("parallel", {"nats_per_token": 1.5})
    assert plugin.gate is not None
    assert (plugin.gate.weight.tolist(), plugin.gate.bias, plugin.gate.threshold) == ([0, 1, 2, 3, 4, 5], 0.25, -1.5)
    again = load_side_network(plugin.kind, plugin.config, plugin.tensors)
    basis = OutputBasis.from_bytes(plugin.output_basis)
    assert basis.digest == output_basis.digest
    expected = nats_per_token(features, network, output_basis, "parallel")
    assert nats_per_token(features, again, basis, "parallel") == expected


def test_a_plugin_needs_no_gate_but_a_known_family(draw_world: Callable[..., Any], output_basis: OutputBasis) -> None:
    features = draw_world(20, 0).features(10)
    network = tune_side(features, output_basis, SideConfig(loop=LoopConfig(epochs=1))).network
    parts: dict[str, Any] = {"tokenizer_json": b"{}", "output_basis": output_basis, **DIGESTS}
    assert build_plugin(network, None, family="serial", **parts).gate is None
    with pytest.raises(InputError, match="family"):
        build_plugin(network, None, family="diagonal", **parts)
