"""The processes that share one model: how they meet, exchange tensors, and tell each other what comes next.

torchrun starts them and gives each its rank. On CUDA the layers exchange through NCCL; what comes next, plain numbers
in main memory, always goes through gloo, which notices at once when another process dies. Every wait has a time-out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from cotune.errors import CotuneError, InputError

# Reading the weights of a large model takes minutes, and not the same on all ranks.
_LOAD_TIMEOUT_S = 1800.0
# More numbers than any message has: a pass's tokens and blocks.
_MAX_NUMBERS = 2**26
_MAX_ARRAYS = 16


class RanksLostError(CotuneError):
    """Another process of the group is gone, or answers no more. The group cannot go on; start it again."""


class Ranks:
    """This process's place among those that share a model.

    Attributes:
        rank: 0 leads.
        num_ranks: how many there are.
        timeout_s: of every exchange.

    Raises:
        InputError: the process was not started by torchrun, or as the only one.
    """

    def __init__(self, device: str, *, timeout_s: float = 60.0) -> None:
        if not dist.is_available() or not dist.is_torchelastic_launched():
            raise InputError(
                "tensor parallelism needs one process for each part, and this is one alone; start it as "
                "`torchrun --nproc-per-node 2 -m cotune cloud MODEL --tensor-parallel`"
            )
        is_cuda = torch.device(device).type == "cuda"
        if not is_cuda and torch.cuda.is_available():
            raise InputError(f"device is {device!r}, expected cuda where there are GPUs; give --device cuda")
        self.timeout_s = timeout_s
        with _translated():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if is_cuda else "gloo", timeout=timedelta(seconds=_LOAD_TIMEOUT_S)
            )
            self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
            timeout = timedelta(seconds=timeout_s)
            self._orders = dist.new_group(backend="gloo", timeout=timeout)
            self._layers = dist.new_group(backend="nccl", timeout=timeout) if is_cuda else self._orders
        if self.num_ranks < 2:
            self.close()
            raise InputError("torchrun started 1 process, expected at least 2; give it --nproc-per-node 2 or more")

    def close(self) -> None:
        """Leave the group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def gather(self, own: Tensor) -> Tensor:
        """All ranks' tensors of one shape, (ranks, ...), in the order of ranks."""
        parts = own.new_empty((self.num_ranks, *own.shape))
        with _translated():
            dist.all_gather(list(parts.unbind()), own, group=self._layers)
        return parts

    def agree(self, numbers: Sequence[int]) -> list[list[int]]:
        """Each rank's numbers, of the same count on all, in the order of ranks. May wait as long as loading takes."""
        own = torch.tensor(numbers, dtype=torch.int64)
        parts = [torch.empty_like(own) for _ in range(self.num_ranks)]
        with _translated():
            dist.all_gather(parts, own)
        return [part.tolist() for part in parts]

    def send(self, arrays: Sequence[NDArray[np.int64]]) -> None:
        """From rank 0 to all others."""
        head = np.zeros(_MAX_ARRAYS + 1, np.int64)
        head[0] = len(arrays)
        head[1 : len(arrays) + 1] = [len(array) for array in arrays]
        with _translated():
            dist.broadcast(torch.from_numpy(head), 0, group=self._orders)
            if head[1:].any():
                dist.broadcast(torch.from_numpy(np.concatenate(arrays)), 0, group=self._orders)

    def receive(self) -> list[NDArray[np.int64]]:
        """What rank 0 sent."""
        head = torch.zeros(_MAX_ARRAYS + 1, dtype=torch.int64)
        with _translated():
            dist.broadcast(head, 0, group=self._orders)
            num_arrays, *sizes = head.tolist()
            if not 0 <= num_arrays <= _MAX_ARRAYS or min(sizes) < 0 or sum(sizes) > _MAX_NUMBERS:
                raise RanksLostError(f"rank 0 announces {num_arrays} arrays with {sum(sizes)} numbers; start again")
            numbers = torch.empty(sum(sizes), dtype=torch.int64)
            if len(numbers):
                dist.broadcast(numbers, 0, group=self._orders)
        return [part.numpy() for part in torch.split(numbers, sizes[:num_arrays])] if num_arrays else []


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RanksLostError(
            f"the processes that share the model have lost each other ({reason}); start them again"
        ) from error
