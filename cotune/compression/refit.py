"""Least squares for a linear layer that loses inputs: those that stay say what they can of those that go.

With inputs X, (rows, in), the columns K that stay and R that go, the best new weight is

    W' = W_K + W_R G_RK (G_KK + damping)^-1,   G = X^T X

the W' that minimises ||X W^T - X_K W'^T||^2 + damping ||W' - W_K||^2. It is the repair of Optimal Brain Surgeon
(Hassibi and Stork, 1992) for whole columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cotune.errors import InputError

DAMPING = 0.01


def refit(weight: Tensor, gram: Tensor, kept: Tensor, *, damping: float = DAMPING) -> Tensor:
    """The weight (out, kept) of a layer that keeps some of its inputs.

    Args:
        weight: W, (out, in).
        gram: X^T X, float64 (in, in).
        kept: int64, indices of the inputs that stay.
        damping: as a share of the mean diagonal of G_KK.

    Raises:
        InputError: G_KK cannot be inverted.

    Example:
        >>> gram = torch.tensor([[2.0, 2.0], [2.0, 2.0]]).double()  # both inputs are always the same
        >>> refit(torch.tensor([[1.0, 3.0]]), gram, torch.tensor([1]), damping=0.0)
        tensor([[4.]])
    """
    goes = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    goes[kept] = False
    of_kept = gram[kept][:, kept].clone()
    mean = float(of_kept.diagonal().mean()) or 1.0
    of_kept.diagonal().add_(damping * mean)
    lower, failed = torch.linalg.cholesky_ex(of_kept)
    if int(failed):
        raise InputError(
            f"the inputs' Gram matrix of {len(kept)} dimensions cannot be inverted with a damping of {damping}; "
            "take a larger damping or more calibration texts"
        )
    whole = weight.double()
    missing = whole[:, goes] @ gram[goes][:, kept]  # (out, kept)
    repaired = whole[:, kept] + torch.cholesky_solve(missing.T, lower).T
    return repaired.to(weight.dtype)
