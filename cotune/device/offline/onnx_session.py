"""ONNX Runtime as all graphs here are run: on the CPU, without words on standard error, without threads that spin
between steps.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from cotune.errors import InputError, first_line

_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
# Errors are told by what is raised.
_FATAL_ONLY = 4
_SPIN_US = 20
"""What a thread waits awake for the next product of the same step: docs/log.md has what other times gave."""


def open_session(graph: Path | bytes, *, name: str, num_threads: int, weights: Path | None = None) -> Any:
    """An inference session.

    Args:
        graph: the file, or its bytes.
        name: what errors call it.
        num_threads: that compute one product.
        weights: the folder of the weights that bytes name; those of a file lie beside it.

    Raises:
        InputError: onnxruntime is not installed, or does not take the graph.

    Example:
        >>> open_session(b"no graph", name="mine", num_threads=1)   # doctest: +ELLIPSIS
        Traceback (most recent call last):
        cotune.errors.InputError: mine is no model that onnxruntime ... can open ...
    """
    try:
        runtime: Any = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise InputError(f"{name} needs onnxruntime ({error}); run: pip install 'cotune[edge]'") from error
    options = runtime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL_ONLY
    # A step is hundreds of products of some microseconds each, and waking a thread takes as long as half of one.
    # Spinning for longer makes steps slower where other programs want the processors, and takes them after a step.
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_US))
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if isinstance(graph, bytes) and weights is not None:
        options.add_session_config_entry(_WEIGHTS_FOLDER, str(weights))
    opened = graph if isinstance(graph, bytes) else str(graph)
    try:
        return runtime.InferenceSession(opened, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises bare ones
        raise InputError(
            f"{name} is no model that onnxruntime {runtime.__version__} can open ({first_line(error)}); copy the "
            "folder again, export the model again, or free some memory"
        ) from error
