"""A cloud as a source of training features: the device asks, sequence by sequence, and keeps what comes."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cotune.device.client import ClientConfig, CloudClient, Connector
from cotune.errors import ConnectionLostError
from cotune.wire.description import CloudDescription
from cotune.wire.event_loop import make_runner
from cotune.wire.features import SequenceFeatures
from cotune.wire.frames import AssetKind


class RemoteFeatureSource:
    """Fits `cotune.wire.features.FeatureSource` over the network; for code without an event loop.

    Args:
        connector: makes a connection to the cloud.
        config: patience.
        want_hidden: whether final hidden states come too, which a gate reads; a teacher's student has no use for them.

    Example:
        >>> with RemoteFeatureSource(lambda: connect("ws://127.0.0.1:7070")) as source:  # doctest: +SKIP
        ...     features = source.features(input_ids, first_target=12, top_k=256)
    """

    def __init__(self, connector: Connector, config: ClientConfig | None = None, *, want_hidden: bool = True) -> None:
        self._client = CloudClient(connector, config)
        self._want_hidden = want_hidden
        self._runner = make_runner()

    def __enter__(self) -> Self:
        try:
            self._runner.run(self._client.__aenter__())
        except BaseException:
            self._runner.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._runner.run(self._client.close())
        finally:
            self._runner.close()

    @property
    def description(self) -> CloudDescription:
        """What the cloud hosts."""
        return self._client.description

    @property
    def bytes_received(self) -> int:
        return self._client.bytes_received

    @property
    def bytes_sent(self) -> int:
        return self._client.bytes_sent

    def fetch(self, kind: AssetKind) -> bytes:
        """A public part of the hosted model."""
        return self._runner.run(self._client.fetch(kind))

    def features(self, input_ids: NDArray[np.int64], first_target: int, top_k: int) -> SequenceFeatures:
        """Features of one sequence; asked for once more where the connection breaks."""
        try:
            return self._ask(input_ids, first_target, top_k)
        except ConnectionLostError:
            self._runner.run(self._client.close())
            return self._ask(input_ids, first_target, top_k)

    def _ask(self, input_ids: NDArray[np.int64], first_target: int, top_k: int) -> SequenceFeatures:
        return self._runner.run(self._client.features(input_ids, first_target, top_k, want_hidden=self._want_hidden))
