"""From a folder to a model that runs, whatever runs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cotune.device.offline.folder import OfflineFolder
from cotune.device.offline.llama_model import LlamaModel
from cotune.device.offline.memory import fit_memory
from cotune.device.offline.model import OfflineModel, OfflineSettings
from cotune.device.offline.onnx_model import OnnxModel

RUNTIMES: dict[str, Callable[[OfflineFolder, OfflineSettings], OfflineModel]] = {"onnx": OnnxModel, "gguf": LlamaModel}
"""What runs a folder, by the runtime that it names."""


def load_offline_model(path: Path | str, settings: OfflineSettings | None = None) -> OfflineModel:
    """Read an offline model folder and make it ready, if it fits into memory.

    Args:
        path: of the folder.
        settings: context, threads and memory.

    Raises:
        InputError: the folder is missing, damaged or another model, its runtime is not installed, or it does not fit.

    Example:
        >>> model = load_offline_model("my-model", OfflineSettings(num_threads=2))   # doctest: +SKIP
        >>> model.context                                                            # doctest: +SKIP
        2048
    """
    folder = OfflineFolder.open(path)
    return RUNTIMES[folder.description.runtime](folder, fit_memory(folder, settings or OfflineSettings()))
