"""Learn from the other model only where it is the better one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cotune.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ChunkGate:
    """The weight of each chunk.

    Instead of a choice for each text as in FedMKT (arXiv 2406.02224):

        g_k = sigmoid((nll_S(k) - nll_T(k) - margin) / tau_g),    nll_m(k) = -l_m(k) / bytes of chunk k

    on the true text. A constant: no gradient goes through it. The end of a text, which has no bytes, counts as one.

    Attributes:
        margin: nats per byte by which the teacher has to be better for a weight of one half.
        tau_g: nats per byte; less is sharper, towards all or nothing.

    Example:
        >>> gate = ChunkGate(tau_g=0.5)
        >>> gate(torch.tensor([-2.0, -4.0]), torch.tensor([-4.0, -4.0]), torch.tensor([2, 2]))
        tensor([0.8808, 0.5000])
    """

    margin: float = 0.0
    tau_g: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.tau_g < float("inf"):
            raise InputError(f"tau_g is {self.tau_g}, expected a positive number of nats per byte")
        if not abs(self.margin) < float("inf"):
            raise InputError(f"margin is {self.margin}, expected a finite number of nats per byte")

    def __call__(self, teacher: Tensor, student: Tensor, num_bytes: Tensor) -> Tensor:
        """g of each chunk.

        Args:
            teacher, student: l_T and l_S, (chunks,), nats.
            num_bytes: int64 (chunks,).

        Returns:
            (chunks,), 0 to 1, without a gradient.
        """
        better_by = (teacher.detach() - student.detach()) / num_bytes.clamp(min=1).to(student.device)
        return torch.sigmoid((better_by - self.margin) / self.tau_g)
