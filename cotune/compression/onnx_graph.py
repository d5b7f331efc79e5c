"""A graph in the making: nodes, and tensors that are written to a file beside it as they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

OPSET, MICROSOFT_OPSET, IR_VERSION = 21, 1, 10
"""What onnxruntime from 1.20 on reads."""

_MICROSOFT = "com.microsoft"
_INLINE_BYTES = 1024  # smaller tensors stay in the graph
_ALIGNMENT_BYTES = 64


@dataclass
class GraphParts:
    """Nodes, inputs, outputs and tensors of one graph.

    Attributes:
        data: where large tensors go; None for into the graph itself, which may have two gigabytes.
        data_name: what that file is called beside the graph.
    """

    data: BinaryIO | None = None
    data_name: str = ""
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    tensors: list[TensorProto] = field(default_factory=list)

    def node(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Append a node of ONNX itself; the name of its output."""
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def microsoft(self, op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> str:
        """Append a node of onnxruntime's own; the name of its first output."""
        self.nodes.append(helper.make_node(op, inputs, outputs, name=outputs[0], domain=_MICROSOFT, **attributes))
        return outputs[0]

    def split(self, x: str, outputs: Sequence[str], *, axis: int = -1) -> None:
        """Cut a dimension into equal parts."""
        self.nodes.append(
            helper.make_node("Split", [x], outputs, name=x + ".split", axis=axis, num_outputs=len(outputs))
        )

    def tensor(self, name: str, array: NDArray[Any]) -> str:
        """Keep a constant; its name."""
        array = np.asarray(array, order="C")
        if self.data is None or array.nbytes < _INLINE_BYTES:
            self.tensors.append(numpy_helper.from_array(array, name))
            return name
        start = -(-self.data.tell() // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        self.data.write(bytes(start - self.data.tell()))
        self.data.write(array.data)
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor = TensorProto(name=name, data_type=kind, dims=array.shape, data_location=TensorProto.EXTERNAL)
        for key, value in {"location": self.data_name, "offset": start, "length": array.nbytes}.items():
            tensor.external_data.add(key=key, value=str(value))
        self.tensors.append(tensor)
        return name

    def input(self, name: str, kind: int, dims: Sequence[int | str], default: NDArray[Any] | None = None) -> str:
        """Declare an input; with a default, one that need not be given."""
        self.inputs.append(helper.make_tensor_value_info(name, kind, dims))
        if default is not None:
            self.tensors.append(numpy_helper.from_array(default, name))
        return name

    def output(self, name: str, kind: int, dims: Sequence[int | str]) -> str:
        """Declare an output that a node makes."""
        self.outputs.append(helper.make_tensor_value_info(name, kind, dims))
        return name

    def model(self, name: str, metadata: dict[str, str]) -> onnx.ModelProto:
        """All of it, without the bytes of tensors in `data`."""
        graph = helper.make_graph(self.nodes, name, self.inputs, self.outputs, initializer=self.tensors)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(_MICROSOFT, MICROSOFT_OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="cotune")
        helper.set_model_props(model, metadata)
        return model
