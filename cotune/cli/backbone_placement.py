"""Where a model's parts are: in this process on one device or on all GPUs, or in several processes under torchrun."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cotune.cloud.hosted import HostedModel
from cotune.errors import InputError
from cotune.models.backbone import Backbone


def load_replica(
    model: str, *, dtype: str, device: str, projections: Path | None, device_map: str | None, threads: int
) -> HostedModel:
    """What one replica of a cluster hosts; runs in the replica's own process."""
    import torch

    if threads > 0:
        torch.set_num_threads(threads)
    return HostedModel.of(
        Backbone.from_pretrained(model, dtype=dtype, device=device, projections=projections, device_map=device_map)
    )


@contextmanager
def open_backbone(
    model: str,
    *,
    dtype: str,
    device: str,
    projections: Path | None,
    device_map: str | None = None,
    tensor_parallel: bool = False,
) -> Iterator[Backbone | None]:
    """The backbone; None in a process that served another as its rank, when all is done.

    Raises:
        InputError: the model cannot be loaded so.
        RanksLostError: another process of the group is gone.
    """
    if not tensor_parallel:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError(
                "torchrun started several processes, and each would host the whole model; give --tensor-parallel"
            )
        yield Backbone.from_pretrained(
            model, dtype=dtype, device=device, projections=projections, device_map=device_map
        )
        return
    if device_map is not None:
        raise InputError("--device-map and --tensor-parallel both say where the model's parts are; give one of them")
    from cotune.models.tensor_parallel import shared_backbone

    if int(os.environ.get("RANK", "0")) > 0:
        # Rank 0 hears the same signals, lets its devices finish, and then tells the others to end.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with shared_backbone(model, dtype=dtype, device=device, projections=projections, on_lost=stop) as backbone:
        yield backbone
