"""An offline model on ONNX Runtime, the default: weights mapped from the file, one cache that is written in place.

Keys and values of a text live in one buffer for each layer, as long as the context, bound as input and output of the
graph alike: a step writes its own and reads those before it, and cutting a text back is a smaller number. Adapters are
inputs of the graph, so that another one is another pointer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cotune.device.offline.folder import OfflineDescription, OfflineFolder
from cotune.device.offline.huge_pages import huge_pages
from cotune.device.offline.lora_adapter import LoraAdapter
from cotune.device.offline.model import Adapter, OfflineSettings, check_extension, check_truncation
from cotune.device.offline.onnx_session import open_session
from cotune.errors import InputError, first_line

PLAIN_FILE = "model.plain.onnx"
"""The same graph without inputs for adapters, where an exporter wrote one: it is faster."""

_FIRST_LOGIT = "first_logit"
_NUMBER_TYPES: dict[str, Any] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True)
class _Graph:
    """An open graph.

    Attributes:
        session: runs it.
        cache_type, logit_type: NumPy types of its numbers.
        takes_first_logit: it computes the logits of the last positions alone where it is told so.
        has_one_rank: the adapters of all modules must have the same one.
    """

    session: Any
    cache_type: Any
    logit_type: Any
    takes_first_logit: bool
    has_one_rank: bool


class OnnxModel:
    """A graph in an inference session. Fits `OfflineModel`.

    Args:
        folder: of runtime `onnx`.
        settings: context and threads; memory is the business of `fit_memory`.
        graph: another one over the same weights, to be run in place of the folder's, as bytes.

    Raises:
        InputError: onnxruntime is not installed, the file is damaged, or the graph is another one than described.

    Example:
        >>> model = OnnxModel(OfflineFolder.open("my-model"), OfflineSettings(num_threads=1))   # doctest: +SKIP
        >>> text = model.open()                                                                 # doctest: +SKIP
        >>> int(text.extend([5, 9, 30])[-1].argmax())                                           # doctest: +SKIP
        17
    """

    def __init__(
        self, folder: OfflineFolder, settings: OfflineSettings | None = None, *, graph: bytes | None = None
    ) -> None:
        settings = settings or OfflineSettings()
        self.folder = folder
        self.context = settings.context_of(folder.description)
        self.num_texts = settings.num_texts
        self._num_threads = settings.threads
        self._graphs: dict[str, _Graph] = {}
        self._other_graph = graph
        self._is_closed = False
        self._plain_file = PLAIN_FILE if PLAIN_FILE in folder.description.files else folder.model_file.name
        # Two open graphs hold the weights twice.
        self._graph(folder.model_file.name if settings.has_adapter else self._plain_file)

    @property
    def description(self) -> OfflineDescription:
        return self.folder.description

    def load_adapter(self, path: Path) -> LoraAdapter:
        shapes = self.description.adapter_modules
        adapter = LoraAdapter.read(path, shapes)
        return adapter.filled(shapes) if self._graph(self.folder.model_file.name).has_one_rank else adapter

    def open(self, adapter: Adapter | None = None) -> OnnxText:
        if adapter is not None and not isinstance(adapter, LoraAdapter):
            raise InputError(f"adapter {adapter.name} was loaded by another runtime; load it with this model")
        if adapter is None and self._plain_file in self._graphs:
            graph = self._graph(self._plain_file)
        else:
            graph = self._graph(self.folder.model_file.name)
        return OnnxText(graph, self.description, self.context, adapter)

    def close(self) -> None:
        self._graphs.clear()
        self._is_closed = True

    def _graph(self, name: str) -> _Graph:
        if self._is_closed:
            raise InputError("the offline model is closed, expected an open one; load it again")
        if name not in self._graphs:
            # onnxruntime lays the weights out anew while it opens a graph, in memory of its own.
            with huge_pages():
                session = open_session(
                    self._other_graph or self.folder.path / name,
                    name=str(self.folder.path / name),
                    num_threads=self._num_threads,
                    weights=self.folder.path,
                )
            self._graphs[name] = _checked(session, self.folder, name)
        return self._graphs[name]


class OnnxText:
    """One text: its buffers and their binding. Fits `OfflineText`; `OnnxModel.open` makes it."""

    def __init__(
        self, graph: _Graph, description: OfflineDescription, context: int, adapter: LoraAdapter | None
    ) -> None:
        self.length = 0
        self._lock = Lock()
        self._graph = graph
        self._vocab_size = description.vocab_size
        self._context = context
        self._adapter = adapter
        self._binding: Any = graph.session.io_binding()
        # One mask for all lengths: a step sees as much of it as the text is long.
        self._mask = np.ones((1, context), np.int64)
        shape = 1, description.num_kv_heads, context, description.head_dim
        # Memory that is never touched is never taken, so that a short text costs little.
        self._caches = [np.zeros(shape, graph.cache_type) for _ in range(2 * description.num_layers)]
        for layer in range(description.num_layers):
            for kind, cache in zip(("key", "value"), self._caches[2 * layer : 2 * layer + 2], strict=True):
                self._bind(f"past_key_values.{layer}.{kind}", cache)
                self._bind_output(f"present.{layer}.{kind}", cache)
        for name, factors in ({} if adapter is None else adapter.modules).items():
            self._bind(f"{name}.lora_A", factors.a)
            self._bind(f"{name}.lora_B", factors.b)

    def extend(self, token_ids: Sequence[int] | NDArray[np.int64], *, num_logits: int = 1) -> NDArray[np.float32]:
        with self._lock:
            return self._extend(token_ids, num_logits)

    def _extend(self, token_ids: Sequence[int] | NDArray[np.int64], num_logits: int) -> NDArray[np.float32]:
        if self._binding is None:
            raise InputError("the text is closed, expected an open one; open another")
        checked = check_extension(
            token_ids, length=self.length, context=self._context, vocab_size=self._vocab_size, num_logits=num_logits
        )
        ids = np.ascontiguousarray(checked[None])
        total = self.length + ids.shape[1]
        first = np.array([ids.shape[1] - num_logits], np.int64)
        num_computed = num_logits if self._graph.takes_first_logit else ids.shape[1]
        logits = np.empty((1, num_computed, self._vocab_size), self._graph.logit_type)
        self._bind("input_ids", ids)
        self._bind("attention_mask", self._mask[:, :total])
        if self._graph.takes_first_logit:
            self._bind(_FIRST_LOGIT, first)
        self._bind_output("logits", logits)
        try:
            self._graph.session.run_with_iobinding(self._binding)
        except Exception as error:  # onnxruntime raises bare ones
            raise InputError(
                f"the offline model failed at token {self.length} ({first_line(error)}); is there enough memory?"
            ) from error
        self.length = total
        return np.asarray(logits[0, num_computed - num_logits :], np.float32)

    def truncate(self, length: int) -> None:
        check_truncation(length, length=self.length)
        self.length = length

    def close(self) -> None:
        # A step that is under way writes into the buffers until its end.
        with self._lock:
            self._binding = None
            self._caches = []

    def _bind(self, name: str, array: NDArray[Any]) -> None:
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def _bind_output(self, name: str, array: NDArray[Any]) -> None:
        self._binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _checked(session: Any, folder: OfflineFolder, file: str) -> _Graph:
    """Hold a graph against the description.

    Raises:
        InputError: it is another model; names what differs.
    """
    description = folder.description
    inputs = {one.name: one for one in (*session.get_inputs(), *session.get_overridable_initializers())}
    outputs = {one.name: one for one in session.get_outputs()}
    cache = [1, description.num_kv_heads, None, description.head_dim]
    wanted_inputs: dict[str, list[int | None]] = {"input_ids": [1, None], "attention_mask": [1, None]}
    wanted_outputs: dict[str, list[int | None]] = {"logits": [1, None, description.vocab_size]}
    for layer in range(description.num_layers):
        for kind in ("key", "value"):
            wanted_inputs[f"past_key_values.{layer}.{kind}"] = list(cache)
            wanted_outputs[f"present.{layer}.{kind}"] = list(cache)
    for name, shape in ({} if file == PLAIN_FILE else description.adapter_modules).items():
        wanted_inputs[f"{name}.lora_A"] = [shape.in_dim, None]
        wanted_inputs[f"{name}.lora_B"] = [None, shape.out_dim]
    for what, wanted, there in (("input", wanted_inputs, inputs), ("output", wanted_outputs, outputs)):
        for name, expected in wanted.items():
            if name not in there:
                raise _foreign(folder, file, f"it has no {what} {name}")
            found = list(there[name].shape)
            if not _fits(found, expected):
                raise _foreign(folder, file, f"its {what} {name} has shape {found}, expected {_shown(expected)}")
    unknown = sorted(one.name for one in session.get_inputs() if one.name not in wanted_inputs)
    if unknown:
        raise _foreign(folder, file, f"it has the input {unknown[0]}, which nothing here fills")
    caches = {one.type for name, one in (inputs | outputs).items() if name.startswith(("past_key_values.", "present."))}
    logits = {outputs["logits"].type}
    for what, types in (("caches", caches), ("logits", logits)):
        if len(types) != 1 or not types <= _NUMBER_TYPES.keys():
            found_types = ", ".join(sorted(types))
            raise _foreign(folder, file, f"its {what} are {found_types}, expected all float or all float16")
    ranks = [inputs[f"{name}.lora_A"].shape[1] for name in description.adapter_modules if f"{name}.lora_A" in inputs]
    return _Graph(
        session=session,
        cache_type=_NUMBER_TYPES[caches.pop()],
        logit_type=_NUMBER_TYPES[logits.pop()],
        takes_first_logit=_FIRST_LOGIT in inputs,
        # onnxruntime plans by the names of dimensions: what has one name has one size.
        has_one_rank=len(set(ranks)) < len(ranks),
    )


def _fits(found: list[Any], expected: list[int | None]) -> bool:
    """Names of dimensions, and None, stand for any number."""
    if len(found) != len(expected):
        return False
    pairs = zip(found, expected, strict=True)
    return all(want is None or not isinstance(have, int) or have == want for have, want in pairs)


def _shown(shape: list[int | None]) -> str:
    return "[" + ", ".join("any" if one is None else str(one) for one in shape) + "]"


def _foreign(folder: OfflineFolder, file: str, what: str) -> InputError:
    return InputError(f"{folder.path / file} is another model than {folder.path} describes: {what}; export it again")
