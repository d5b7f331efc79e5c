"""Nats of a target under corrected logits, from the few base logits that the cloud sends.

The device knows delta = Q c for the whole vocabulary, but of the base logits z only those of the known tokens,
K = the top k and the target, and log Z = log sum exp z. For the `parallel` family, p = softmax(z + delta):

    -log p(target) = log Z' - (z_target + delta_target)
    Z' = sum_{j in K} exp(z_j + delta_j) + exp(log_tail) mean_{j not in K} exp(delta_j)
    log_tail = log(exp(log Z) - sum_{j in K} exp(z_j))

The tail is an approximation: the mean of exp(delta) over the tail should be weighted by the base probabilities,
which the device does not know. It is exact when K is the whole vocabulary, or delta or z is equal over the tail. The
target belongs to K always: in the tail its exp(delta) would count by the mean only, p could exceed 1, and training
would exploit that.

For the `serial` family, p = softmax(delta), which is exact: K = {target}, z = 0, every other token with weight 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cotune.tuning.feature_set import FeatureSet


@dataclass(frozen=True)
class KnownBase:
    """What the device knows of the base distribution at some positions.

    Attributes:
        token_ids: int64 (positions, known), the tokens of K; the target is the last.
        logits: float32 (positions, known), their z; a target that is in the top has -inf in the last place.
        target_logits: float32 (positions,), z of the target.
        log_tail_weight: float32 (positions,), log of the weight of each token outside K, -inf if there is none.
    """

    token_ids: Tensor
    logits: Tensor
    target_logits: Tensor
    log_tail_weight: Tensor


def corrected_nats(correction: Tensor, basis: Tensor, base: KnownBase) -> Tensor:
    """-log p(target) for each position; gradients reach `correction` only.

    Args:
        correction: c, float32 (positions, basis_dim).
        basis: Q, float32 (vocab, basis_dim), frozen.
        base: what is known of z.

    Returns:
        float32 (positions,), nats.
    """
    nats: Tensor = _CorrectedNats.apply(correction, basis, base)  # type: ignore[no-untyped-call]
    return nats


class _CorrectedNats(torch.autograd.Function):
    """The loss and its gradient in one pass over the vocabulary, four times as fast as autograd's chain.

    d/d delta_j = exp(z_j + delta_j - log Z') - 1[j = target] in K, exp(log_tail_weight + delta_j - log Z') outside.
    """

    @staticmethod
    def forward(ctx: Any, correction: Tensor, basis: Tensor, base: KnownBase) -> Tensor:
        delta = correction @ basis.T  # (positions, vocab)
        known_delta = delta.gather(1, base.token_ids)
        known = base.logits + known_delta
        target = base.target_logits + known_delta[:, -1]
        # From here on `delta` holds the tail alone, exp(delta_j) up to the factor exp(largest).
        delta.scatter_(1, base.token_ids, -torch.inf)
        largest = delta.amax(dim=1).clamp(min=torch.finfo(delta.dtype).min)
        delta.sub_(largest[:, None]).exp_()
        log_tail = delta.sum(dim=1).log_() + largest + base.log_tail_weight
        log_normalizer = torch.logaddexp(known.logsumexp(dim=1), log_tail)
        if ctx.needs_input_grad[0]:
            delta.mul_((base.log_tail_weight + largest - log_normalizer).exp_()[:, None])
            known_gradient = (known - log_normalizer[:, None]).exp_()
            known_gradient[:, -1] -= 1
            delta.scatter_add_(1, base.token_ids, known_gradient)
            ctx.save_for_backward(delta @ basis)
        return log_normalizer - target

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return gradient[:, None] * slope, None, None


@dataclass(frozen=True)
class BaseTable:
    """`KnownBase` for all positions of a feature set, in compact arrays; `rows` takes some of them.

    Attributes:
        token_ids: int32 (positions, known).
        logits: float32 (positions, known).
        target_logits: float32 (positions,).
        log_tail_weight: float32 (positions,).
    """

    token_ids: Tensor
    logits: Tensor
    target_logits: Tensor
    log_tail_weight: Tensor

    @classmethod
    def parallel(cls, features: FeatureSet, vocab_size: int) -> BaseTable:
        """For p = softmax(z + delta)."""
        in_top = (features.top_ids == features.target_ids[:, None]).any(axis=1)
        last = np.where(in_top, -np.inf, features.target_logits).astype(np.float32)
        ids = np.concatenate([features.top_ids, features.target_ids[:, None].astype(np.int32)], axis=1)
        logits = np.concatenate([features.top_logits, last[:, None]], axis=1)
        tail_size = vocab_size - features.top_ids.shape[1] - (~in_top)
        return cls(
            torch.from_numpy(ids),
            torch.from_numpy(logits),
            torch.from_numpy(features.target_logits),
            torch.from_numpy(_log_tail(features.log_normalizer, logits, tail_size)),
        )

    @classmethod
    def serial(cls, features: FeatureSet) -> BaseTable:
        """For p = softmax(delta)."""
        zeros = torch.zeros(len(features))
        ids = torch.from_numpy(features.target_ids[:, None].astype(np.int32))
        return cls(ids, zeros[:, None], zeros, zeros)

    def rows(self, positions: Tensor) -> KnownBase:
        """What is known at these positions."""
        return KnownBase(
            self.token_ids[positions].long(),
            self.logits[positions],
            self.target_logits[positions],
            self.log_tail_weight[positions],
        )


def _log_tail(
    log_normalizer: NDArray[np.float32], known_logits: NDArray[np.float32], tail_size: NDArray[np.int64]
) -> NDArray[np.float32]:
    """log of (exp(log Z) - sum exp z_known) / tail_size, float32 (positions,)."""
    logits = known_logits.astype(np.float64)
    largest = logits.max(axis=1)
    log_known = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))
    # The known tokens may seem to hold a hair more than everything: float32 rounding, no tail is left then.
    log_share = np.minimum(log_known - log_normalizer, 0.0)
    share = -np.expm1(log_share)
    with np.errstate(divide="ignore"):
        log_tail = np.where(tail_size > 0, log_normalizer + np.log(share), -np.inf)
    return (log_tail - np.log(np.maximum(tail_size, 1))).astype(np.float32)
