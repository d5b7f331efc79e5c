"""A ladder side network as an ONNX graph, by hand, beside the NumPy of `cotune.device.side_network`.

    taps = codes * scale                       int8 (taps, 1, tap_dim), float16 (taps, 1, 1), as the cloud sends them
    u_i  = A_i t_i + (a_i + b2_i)              all in one product
    h    = B_i relu(A'_i r + b1_i) + (r + u_i)     with r = relu(h): two Gemm, two Relu and an Add for each rung
    c    = R s + r                             float32 (1, basis_dim), which the caller quantises

`cotune.device.onnx_side_network` runs it, without PyTorch. It is a choice, not the default. Measured on one x86 core
with one thread, from int8 taps to the quantised correction, it takes about 0.85 of NumPy's time for the ladder of
`starter` (7 taps: 44 against 53 microseconds), 0.7 of it for 33 taps (128 against 177), and the same where the weights
no longer fit the cache. That is little beside a network's round trip, and costs 40 MB of onnxruntime. An attention
ladder has no graph here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cotune.compression.onnx_export import check_onnx
from cotune.errors import InputError
from cotune.models import load_side_network
from cotune.plugin import Plugin

KINDS = ("tap_ladder", "spa_ladder")
"""Kinds of side networks that have a graph."""

_RMS_EPS = 1e-6


def side_network_graph(plugin: Plugin) -> bytes:
    """The plugin's ladder as an ONNX model, weights included.

    Args:
        plugin: with a ladder without a memory.

    Raises:
        InputError: it has another side network, tensors that do not fit its config, or onnx is not installed.

    Example:
        >>> Path("side.onnx").write_bytes(side_network_graph(Plugin.load(Path("my-plugin"))))  # doctest: +SKIP
    """
    check_onnx()
    if plugin.kind not in KINDS:
        raise InputError(
            f"the plugin's side network is of kind {plugin.kind}, expected one of {', '.join(KINDS)}; run it in NumPy"
        )
    tensors = load_side_network(plugin.kind, plugin.config, plugin.tensors).to_arrays()
    graph: bytes = _ladder(tensors).SerializeToString()
    return graph


def _ladder(tensors: dict[str, NDArray[np.float32]]) -> Any:
    from onnx import TensorProto

    from cotune.compression.onnx_graph import GraphParts

    num_taps, side, tap_dim = tensors["ladder.mix_weight"].shape
    parts = GraphParts()
    parts.input("codes", TensorProto.INT8, [num_taps, 1, tap_dim])
    parts.input("scales", TensorProto.FLOAT16, [num_taps, 1, 1])
    parts.output("correction", TensorProto.FLOAT, [1, len(tensors["head_weight"])])
    # The bias behind a rung joins the one before its sum.
    bias = tensors["ladder.mix_bias"].copy()
    bias[1:] += tensors["ladder.down_bias"]
    for name in ("codes", "scales"):
        parts.node("Cast", [name], f"{name}_32", to=TensorProto.FLOAT)
    taps = parts.node("Mul", ["codes_32", "scales_32"], "taps")
    mixing = parts.tensor("mix_weight", tensors["ladder.mix_weight"].transpose(0, 2, 1))  # (taps, tap_dim, side)
    mixed = parts.node("MatMul", [taps, mixing], "mixed")  # (taps, 1, side)
    mixed = parts.node("Add", [mixed, parts.tensor("mix_bias", bias[:, None])], "inputs")
    inputs = [f"input_{i}" for i in range(num_taps)]
    rows = parts.node("Reshape", [mixed, parts.tensor("rows", np.array([num_taps, side], np.int64))], "input_rows")
    parts.split(rows, inputs, axis=0)
    h = inputs[0]  # (1, side)
    for i in range(1, num_taps):
        r = parts.node("Relu", [h], f"r_{i}")
        up = parts.tensor(f"up_weight_{i}", tensors["ladder.up_weight"][i - 1])
        up_bias = parts.tensor(f"up_bias_{i}", tensors["ladder.up_bias"][i - 1])
        inner = parts.node("Relu", [parts.node("Gemm", [r, up, up_bias], f"up_{i}", transB=1)], f"inner_{i}")
        kept = parts.node("Add", [r, inputs[i]], f"kept_{i}")
        down = parts.tensor(f"down_weight_{i}", tensors["ladder.down_weight"][i - 1])
        h = parts.node("Gemm", [inner, down, kept], f"h_{i}", transB=1)
    if "norm_weight" in tensors:
        scale = parts.tensor("norm_weight", tensors["norm_weight"])
        s = parts.node("SimplifiedLayerNormalization", [h, scale], "s", axis=-1, epsilon=_RMS_EPS, stash_type=1)
    else:
        s = parts.node("Relu", [h], "s")
    head = [parts.tensor(name, tensors[name]) for name in ("head_weight", "head_bias")]
    parts.node("Gemm", [s, *head], "correction", transB=1)
    return parts.model("side network", {})
