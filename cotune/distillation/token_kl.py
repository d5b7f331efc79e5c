"""The plain divergence where both models have one tokenizer, as the cloud's model and its proxy: L_KD.

Ordinary KL over the top k and one bucket for the tail, scaled by T^2. With p = softmax(z_T / T), q = softmax(z_S / T)
and v_1 .. v_k the teacher's likeliest tokens,

    L = T^2 KL((p_v1 .. p_vk, 1 - sum p_vi) || (q_v1 .. q_vk, 1 - sum q_vi))

Other than in `divergence_of_top`, whose teacher may be far away, both sides' logits are here, so that the temperature
flattens token by token and before the tail becomes one event: at any T this is never more than the divergence of the
whole distributions, and tends to it as k grows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cotune.distillation.divergences import Divergence, ForwardKl, check_temperature
from cotune.distillation.top_log_probs import check_top_k, lumped_logits
from cotune.errors import InputError
from cotune.models.largest import largest_ids


def token_divergence(
    teacher: Tensor,
    student: Tensor,
    *,
    top_k: int = 64,
    temperature: float = 2.0,
    divergence: Divergence | None = None,
) -> Tensor:
    """T^2 times the divergence at each position.

    Args:
        teacher, student: logits, float (positions, vocab), of the same tokens.
        top_k: k; the vocabulary's size or more takes every token for itself.
        temperature: T.
        divergence: KL(p~ || q~) if None.

    Returns:
        float32 (positions,), nats; float64 for float64 logits.

    Raises:
        InputError: shapes differ, `top_k` is less than 1, or the temperature is not positive.

    Example:
        >>> logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
        >>> bool(token_divergence(logits, logits).abs().max() < 1e-6)
        True
    """
    check_top_k(top_k)
    check_temperature(temperature)
    if teacher.ndim != 2 or teacher.shape != student.shape:
        raise InputError(
            f"the teacher's logits are {tuple(teacher.shape)} and the student's {tuple(student.shape)}, expected the "
            "same (positions, vocab); give both the same texts and tokenizer"
        )
    divergence = divergence or ForwardKl()
    p, q = (side if side.dtype == torch.float64 else side.float() for side in (teacher, student))
    p, q = p / temperature, q / temperature
    ids = largest_ids(p, min(top_k, p.shape[1]))
    lumped = (lumped_logits(side, ids).log_softmax(dim=1) for side in (p, q))
    return temperature**2 * divergence(*lumped)
