"""A ladder side network in ONNX Runtime, in place of the NumPy of `cotune.device.side_network`: the device's half.

`cotune.compression.side_network_onnx` writes the graph, where there is PyTorch, and says what it gains.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cotune.device.offline.onnx_session import open_session
from cotune.errors import InputError
from cotune.generation.protocols import Correction
from cotune.generation.side_state import StatelessCorrector
from cotune.wire.codec import quantise


class OnnxSideNetwork(StatelessCorrector):
    """A graph of `side_network_graph`, ready to run. Fits `Corrector`.

    It keeps working memory between calls: use one object in one thread.

    Attributes:
        num_taps, tap_dim: shape of the taps that it reads.
        basis_dim: length of its corrections.

    Raises:
        InputError: onnxruntime is not installed, or does not take the graph.

    Example:
        >>> network = OnnxSideNetwork(Path("side.onnx").read_bytes())   # doctest: +SKIP
        >>> network.correct(tap_codes, tap_scales).codes.shape          # doctest: +SKIP
        (96,)
    """

    def __init__(self, graph: bytes) -> None:
        self._session = open_session(graph, name="the side network's graph", num_threads=1)
        shapes = {one.name: one.shape for one in (*self._session.get_inputs(), *self._session.get_outputs())}
        if not {"codes", "correction"} <= shapes.keys():
            raise InputError(f"the graph has {', '.join(sorted(shapes))}, expected codes, scales and correction")
        self.num_taps, _, self.tap_dim = shapes["codes"]
        _, self.basis_dim = shapes["correction"]
        self._codes = np.empty((self.num_taps, 1, self.tap_dim), np.int8)
        self._scales = np.empty((self.num_taps, 1, 1), np.float16)
        self._correction = np.empty((1, self.basis_dim), np.float32)
        self._binding = self._session.io_binding()
        for name, array in (("codes", self._codes), ("scales", self._scales)):
            self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        output = self._correction
        self._binding.bind_output("correction", "cpu", 0, output.dtype.type, output.shape, output.ctypes.data)

    def correct(self, tap_codes: NDArray[np.int8], tap_scales: NDArray[np.float16]) -> Correction:
        """Correction for one position from int8 (taps, tap_dim) codes and float16 (taps,) scales.

        Raises:
            InputError: the taps have another shape than the plugin was tuned for.
        """
        codes, scale = quantise(self.correct_exactly(tap_codes, tap_scales))
        return Correction(codes=codes, scale=np.float16(scale))

    def correct_exactly(self, tap_codes: NDArray[np.int8], tap_scales: NDArray[np.float16]) -> NDArray[np.float32]:
        """c = R s + r, float32 (basis_dim,), before quantisation."""
        if tap_codes.shape != (self.num_taps, self.tap_dim) or tap_scales.shape != (self.num_taps,):
            raise InputError(
                f"the taps have shapes {tap_codes.shape} and {tap_scales.shape}, expected "
                f"({self.num_taps}, {self.tap_dim}) and ({self.num_taps},) for this plugin"
            )
        self._codes[:, 0] = tap_codes
        self._scales[:, 0, 0] = tap_scales
        self._session.run_with_iobinding(self._binding)
        correction: NDArray[np.float32] = self._correction[0].copy()
        return correction
