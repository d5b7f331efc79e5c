"""An exported graph, run by onnxruntime here, to hold it against its source.

Devices run it with `cotune.device.offline`, which needs neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from cotune.compression.llama_folder import LlamaShape
from cotune.errors import InputError

onnxruntime: Any = importlib.import_module("onnxruntime")  # it has no types
_EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"


class OnnxDecoder:
    """One text in one exported model, with keys and values in buffers of the whole context.

    Attributes:
        length: tokens that have been read.

    Raises:
        InputError: onnxruntime cannot run the graph.

    Example:
        >>> decoder = OnnxDecoder(Path("starter-int4/model.onnx"), shape)  # doctest: +SKIP
        >>> decoder.extend([1, 17, 4]).shape  # doctest: +SKIP
        (3, 2048)
    """

    def __init__(
        self, graph: Path, shape: LlamaShape, *, activation_bits: int | None = None, num_threads: int = 1
    ) -> None:
        """Open a graph.

        Args:
            graph: `model.onnx`, with its data beside it.
            shape: of the model.
            activation_bits: of quantised layers, 8 or 32; None as exported.
            num_threads: for products.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = num_threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        opened: Path | bytes = graph
        if activation_bits is not None:
            options.add_session_config_entry(_EXTERNAL_FOLDER, str(graph.parent))
            opened = _with_activations(graph, activation_bits)
        try:
            self._session = onnxruntime.InferenceSession(opened, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise _refused(graph, error) from error
        self._graph, self._shape = graph, shape
        room = (1, shape.num_kv_heads, shape.context, shape.head_dim)
        self._buffers = {
            f"{index}.{half}": onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(room, np.float32))
            for index in range(shape.num_layers)
            for half in ("key", "value")
        }
        self._adapter: dict[str, NDArray[np.float32]] = {}
        self.length = 0

    def set_adapter(self, adapter: Mapping[str, NDArray[np.float32]]) -> None:
        """Use `MODULE.lora_A` and `MODULE.lora_B` of these modules from now on; {} for none."""
        self._adapter = dict(adapter)

    def truncate(self, length: int) -> None:
        """Forget all tokens from index `length` on."""
        self.length = min(self.length, length)

    def extend(self, token_ids: Sequence[int], *, first_logit: int = 0) -> NDArray[np.float32]:
        """Append tokens; logits float32 (seq, vocab), of those from `first_logit` on, -1 for the last alone.

        Raises:
            InputError: the text would be longer than the context, or onnxruntime refuses.
        """
        total = self.length + len(token_ids)
        if not self.length < total <= self._shape.context:
            raise InputError(f"the text would have {total} tokens, expected at most {self._shape.context} and one more")
        inputs: dict[str, Any] = {
            "input_ids": np.array([token_ids], np.int64),
            "attention_mask": np.ones((1, total), np.int64),
            "first_logit": np.array([first_logit], np.int64),
            **self._adapter,
        }
        binding = self._session.io_binding()
        try:
            binding.bind_output("logits")  # outputs come back in the order in which they are bound
            for name, value in inputs.items():
                # bind_cpu_input knows no inputs that may be left out.
                binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value))
            for name, buffer in self._buffers.items():
                binding.bind_ortvalue_input(f"past_key_values.{name}", buffer)
                binding.bind_ortvalue_output(f"present.{name}", buffer)
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise _refused(self._graph, error) from error
        self.length = total
        logits: NDArray[np.float32] = binding.get_outputs()[0].numpy()[0]
        return logits


def _with_activations(graph: Path, activation_bits: int) -> bytes:
    """The graph with other activations in its quantised layers; the weights are the same."""
    model = onnx.load(str(graph), load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = 4 if activation_bits == 8 else 1
    data: bytes = model.SerializeToString()
    return data


def _refused(graph: Path, error: Exception) -> InputError:
    """onnxruntime's errors have no class of their own in common."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return InputError(f"onnxruntime {onnxruntime.__version__} cannot run {graph.name}: {reason}; export it again")
