"""The loss of preferences: of two texts after the same one, make the better one likelier than a reference does.

    loss = -log sigmoid(beta [(log pi(w) - log pi_ref(w)) - (log pi(l) - log pi_ref(l))])

w is the better text, l the worse one, log pi the sum over a text's tokens. pi_ref is the model as it was before; only
its log-probabilities are needed, so that they are computed once and no second model is held.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cotune.errors import InputError


def preference_losses(log_probs: Tensor, reference: Tensor, *, beta: float) -> Tensor:
    """DPO (Rafailov et al., arXiv 2305.18290), eq. 7, without its mean over pairs.

    At the reference it is log 2 for every pair, with the slope -beta/2 along log pi(w) and beta/2 along log pi(l).

    Args:
        log_probs: nats, float (pairs, 2): of the better text and of the worse one.
        reference: the same under the reference; no gradient goes there.
        beta: how strongly the reference holds, above 0; small values let the model go far from it.

    Returns:
        float (pairs,), above 0.

    Raises:
        InputError: other shapes, or beta is not above 0.

    Example:
        >>> log_probs = torch.tensor([[-10.0, -12.0]])
        >>> preference_losses(log_probs, torch.tensor([[-11.0, -11.0]]), beta=0.1)
        tensor([0.5981])
    """
    if log_probs.ndim != 2 or log_probs.shape[1] != 2 or reference.shape != log_probs.shape:
        raise InputError(
            f"log_probs is {tuple(log_probs.shape)} and reference {tuple(reference.shape)}, expected (pairs, 2) of both"
        )
    check_beta(beta)
    better, worse = (log_probs - reference.detach()).unbind(1)
    return -F.logsigmoid(beta * (better - worse))


def check_beta(beta: float) -> None:
    """Refuse a beta that cannot be.

    Raises:
        InputError: it is not above 0, or not finite.
    """
    if not 0 < beta < math.inf:
        raise InputError(f"beta is {beta}, expected a positive number, such as 0.1")


def text_log_probs(nats: Tensor, lengths: Sequence[int]) -> Tensor:
    """log p of whole texts from the nats of their tokens, one text behind the other: `answer_nats` gives them.

    Args:
        nats: -log p of each token, float (tokens,).
        lengths: tokens of each text.

    Returns:
        float (texts,).

    Example:
        >>> text_log_probs(torch.tensor([1.0, 2.0, 0.5]), [2, 1])
        tensor([-3.0000, -0.5000])
    """
    return torch.stack([-part.sum() for part in torch.split(nats, list(lengths))])
