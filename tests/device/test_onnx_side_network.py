"""A side network's graph on the device: its answers, what it refuses, and that it needs no PyTorch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from toy_plugin import toy_plugin

from cotune.compression.side_network_onnx import side_network_graph
from cotune.device.onnx_side_network import OnnxSideNetwork
from cotune.errors import InputError
from cotune.models import SIDE_NETWORKS
from cotune.plugin import Plugin

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


def plugin() -> Plugin:
    """Two taps of three numbers, with a bias that shows."""
    network = SIDE_NETWORKS["tap_ladder"].from_config({"num_taps": 2, "tap_dim": 3, "basis_dim": 4})
    tensors = network.to_arrays()
    generator = np.random.default_rng(0)
    tensors = {name: generator.standard_normal(array.shape).astype(np.float32) for name, array in tensors.items()}
    return toy_plugin(kind=network.kind, config=network.config_dict(), tensors=tensors)


def test_its_answers_are_its_caller_s_to_keep() -> None:
    network = OnnxSideNetwork(side_network_graph(plugin()))
    codes, scales = np.ones((2, 3), np.int8), np.ones(2, np.float16)
    first = network.correct_exactly(codes, scales)
    kept = first.copy()
    assert not np.array_equal(network.correct_exactly(-codes, scales), kept)
    np.testing.assert_array_equal(first, kept)


def test_taps_of_another_shape_are_refused() -> None:
    network = OnnxSideNetwork(side_network_graph(plugin()))
    with pytest.raises(InputError, match=r"shapes \(3, 3\) and \(2,\), expected \(2, 3\) and \(2,\)"):
        network.correct(np.zeros((3, 3), np.int8), np.ones(2, np.float16))


def test_a_foreign_graph_is_refused() -> None:
    with pytest.raises(InputError, match="the side network's graph is no model that onnxruntime"):
        OnnxSideNetwork(b"no graph")


def test_without_onnxruntime_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"side network's graph needs onnxruntime .*cotune\[edge\]"):
        OnnxSideNetwork(b"")


def test_a_process_without_torch_runs_it(tmp_path: Path) -> None:
    graph = side_network_graph(plugin())
    (tmp_path / "side.onnx").write_bytes(graph)
    code = (
        "import sys; sys.modules.update(torch=None, transformers=None, onnx=None); from pathlib import Path; "
        "import numpy as np; from cotune.device.onnx_side_network import OnnxSideNetwork; "
        "network = OnnxSideNetwork(Path(sys.argv[1]).read_bytes()); "
        "print(network.correct(np.ones((2, 3), np.int8), np.ones(2, np.float16)).codes.tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "side.onnx"], capture_output=True, text=True, timeout=60, check=True
    )
    expected = OnnxSideNetwork(graph).correct(np.ones((2, 3), np.int8), np.ones(2, np.float16))
    assert done.stdout.strip() == str(expected.codes.tolist())
