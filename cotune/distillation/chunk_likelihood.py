"""How likely a model finds the text of a chunk, whichever tokens it has for it; the loss L_chunk.

After ALM (Minixhofer et al., arXiv 2503.20083):

    l_m(k) = sum of the log-probabilities of model m's tokens of chunk k, at temperature 1
    p = exp(l_T(k) / tau),  q = exp(l_S(k) / tau),
    L_chunk(k) = p log(p / q) + (1 - p) log((1 - p) / (1 - q))

a divergence between two events: this chunk, or not. One number for each chunk is all that has to be known of the other
model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cotune.distillation.chunk_index import ChunkIndex
from cotune.distillation.divergences import check_temperature
from cotune.distillation.grouped_log_sum_exp import grouped_log_sum_exp

SMALLEST_REST = 1e-6
"""No chunk is surer than 1 minus this: 1 - q in float32 is not known better, and none of it makes L_chunk infinite."""


def chunk_log_likelihoods(logits: Tensor, index: ChunkIndex) -> Tensor:
    """l_m of each chunk.

    The sum goes over each chunk's own tokens, and not over differences of a running sum, which in float32 would lose
    digits along a text.

    Args:
        logits: float (batch, seq, vocab), of the whole texts.
        index: this model's side.

    Returns:
        float32 (chunks,), nats, 0 or less; float64 for float64 logits.

    Example:
        >>> chunk_log_likelihoods(logits, ChunkIndex.of_batch(alignments, 0)).shape  # doctest: +SKIP
        torch.Size([17])
    """
    chosen = logits[index.token_rows, index.token_positions]  # (tokens, vocab)
    one_group = torch.zeros(chosen.shape[1], dtype=torch.int64, device=chosen.device)
    normalisers = grouped_log_sum_exp(chosen, one_group, 1)[:, 0]
    log_probs = chosen.gather(1, index.token_ids[:, None])[:, 0].to(normalisers.dtype) - normalisers
    return log_probs.new_zeros(len(index)).index_add(0, index.token_chunks, log_probs)


def chunk_divergence(teacher: Tensor, student: Tensor, *, tau: float = 2.0) -> Tensor:
    """L_chunk of each chunk; zero where both find it as likely.

    Args:
        teacher, student: l_T and l_S, (chunks,), nats.
        tau: flattens both likelihoods; more makes long chunks count more.

    Returns:
        (chunks,), nats, 0 or more up to rounding.

    Raises:
        InputError: tau is not positive.

    Example:
        >>> l_t, l_s = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
        >>> round(float(chunk_divergence(l_t, l_s, tau=1.0)), 4)
        0.1438
    """
    check_temperature(tau)
    log_p, log_q = ((side / tau).clamp(max=-SMALLEST_REST) for side in (teacher, student))
    log_not_p, log_not_q = (torch.log(-torch.expm1(side)) for side in (log_p, log_q))
    return log_p.exp() * (log_p - log_q) + log_not_p.exp() * (log_not_p - log_not_q)
