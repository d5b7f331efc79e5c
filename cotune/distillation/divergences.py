"""How far a student's next-token distribution q is from a teacher's p, in nats, from log-probabilities.

    forward KL     KL(p || q) = sum p (log p - log q)            q covers all that p does     arXiv 1503.02531
    reverse KL     KL(q || p)                                    q keeps to what p does       MiniLLM, arXiv 2306.08543
    JS(beta)       beta KL(p || m) + (1 - beta) KL(q || m)       between the two              GKD, arXiv 2306.13649
                   with m = beta p + (1 - beta) q

JS(beta) / beta tends to the forward KL as beta tends to 0, and JS(beta) / (1 - beta) to the reverse KL as beta tends
to 1 (GKD, section 2); JS(0) and JS(1) themselves are zero everywhere, so that beta lies between. JS(beta) is at most
-beta log beta - (1 - beta) log(1 - beta), which is log 2 for beta = 1/2, whatever p and q are; the other two have no
bound.

A temperature T flattens both sides: p and q are softmax(logits / T). The gradient then falls with 1 / T^2; who mixes
the divergence with another loss multiplies it by T^2 (arXiv 1503.02531, section 2). Nothing here is detached: gradients
reach both sides, unless one of them is a constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cotune.distillation.top_log_probs import TopLogProbs, lumped_logits
from cotune.errors import InputError


class Divergence(Protocol):
    """A divergence; its `repr` tells it from any other."""

    def __call__(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Of each position.

        Args:
            teacher, student: log p and log q, normalised, float (..., events); -inf where nothing can happen.

        Returns:
            float (...), nats, 0 or more up to rounding.
        """
        ...


@dataclass(frozen=True)
class ForwardKl:
    """KL(p || q): mean-seeking, infinite where q has none of what p has.

    Example:
        >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
        >>> round(float(ForwardKl()(p.log(), q.log())), 4)
        0.1438
    """

    def __call__(self, teacher: Tensor, student: Tensor) -> Tensor:
        return _kl(teacher, student)


@dataclass(frozen=True)
class ReverseKl:
    """KL(q || p): mode-seeking, infinite where p has none of what q has.

    Example:
        >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
        >>> round(float(ReverseKl()(p.log(), q.log())), 4)
        0.1308
    """

    def __call__(self, teacher: Tensor, student: Tensor) -> Tensor:
        return _kl(student, teacher)


@dataclass(frozen=True)
class JensenShannon:
    """Generalised Jensen-Shannon: always finite.

    Attributes:
        beta: share of the teacher in the mixture, above 0 and below 1; small is like the forward KL.

    Example:
        >>> p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> round(float(JensenShannon(0.5)(p.log(), q.log())), 4)
        0.6931
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise InputError(
                f"beta is {self.beta}, expected a number above 0 and below 1, where the divergence is not zero "
                "everywhere; take forward for its limit at 0, reverse for that at 1"
            )

    def __call__(self, teacher: Tensor, student: Tensor) -> Tensor:
        # Where both sides are -inf, logaddexp has no gradient; exp of the smallest number is zero just as well.
        smallest = torch.finfo(teacher.dtype).min / 4
        log_p, log_q = teacher.clamp(min=smallest), student.clamp(min=smallest)
        mixture = torch.logaddexp(log_p + math.log(self.beta), log_q + math.log1p(-self.beta))
        return self.beta * _kl(log_p, mixture) + (1 - self.beta) * _kl(log_q, mixture)


DIVERGENCES: dict[str, Callable[[float], Divergence]] = {
    "forward": lambda beta: ForwardKl(),
    "reverse": lambda beta: ReverseKl(),
    "js": JensenShannon,
}
"""By name; only `js` listens to its beta."""


def divergence_named(name: str, *, beta: float = 0.5) -> Divergence:
    """The divergence of that name.

    Raises:
        InputError: an unknown name, or a beta outside (0, 1).

    Example:
        >>> divergence_named("js", beta=0.1)
        JensenShannon(beta=0.1)
    """
    if name not in DIVERGENCES:
        raise InputError(f"divergence is {name!r}, expected one of {', '.join(DIVERGENCES)}")
    return DIVERGENCES[name](beta)


def check_temperature(temperature: float) -> None:
    """Refuse what cannot divide logits.

    Raises:
        InputError: not a positive number.
    """
    if not 0 < temperature < float("inf"):
        raise InputError(f"temperature is {temperature}, expected a positive number")


def divergence_of_logits(
    divergence: Divergence,
    teacher: Tensor,
    student: Tensor,
    *,
    wanted: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """The divergence at each wanted position, from the logits of the whole vocabulary on both sides.

    Args:
        divergence: which.
        teacher, student: logits, float (..., vocab), of the same shape.
        wanted: bool (...), the positions that count; None for all. Nothing is read at the others, not even nan, and no
            gradient reaches them.
        temperature: T, divides both.

    Returns:
        float32 (wanted positions,), or float64 for float64 logits; nats.

    Raises:
        InputError: shapes that differ, or a temperature that is not positive.

    Example:
        >>> logits = torch.zeros(2, 3, 5)
        >>> divergence_of_logits(ForwardKl(), logits, logits, wanted=torch.ones(2, 3, dtype=torch.bool)).shape
        torch.Size([6])
    """
    check_temperature(temperature)
    if teacher.shape != student.shape:
        raise InputError(
            f"the teacher's logits are {tuple(teacher.shape)} and the student's {tuple(student.shape)}, expected the "
            "same shape (..., vocab); give both the same texts and tokenizer"
        )
    if wanted is None:
        wanted = torch.ones(teacher.shape[:-1], dtype=torch.bool, device=teacher.device)
    if wanted.shape != teacher.shape[:-1]:
        raise InputError(
            f"wanted is {tuple(wanted.shape)}, expected one flag for each position, {tuple(teacher.shape[:-1])}"
        )
    return divergence(_log_softmax(teacher[wanted], temperature), _log_softmax(student[wanted], temperature))


def divergence_of_top(
    divergence: Divergence, teacher: TopLogProbs, student: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """The divergence at each position, where only the teacher's likeliest tokens are known.

    Both sides are seen as k + 1 events, the teacher's k listed tokens and the rest as one lump:

        p~ = (p_1 .. p_k, 1 - sum p_i),  q~ = (q_1 .. q_k, 1 - sum q_i),  at T  p~^(1/T) and q~^(1/T), normalised.

    With k = vocab nothing is lumped and the result is that of `divergence_of_logits`. Else, at T = 1:

    - D(p~, q~) <= D(p, q) for all three divergences; it is zero when the k + 1 shares agree, whatever is in the rest.
    - What is lost is what differs inside of the rest: KL(p || q) - KL(p~ || q~) = p_rest KL(p | rest || q | rest), and
      the same with p and q exchanged. For forward and reverse KL that has no bound; JS(beta) loses at most
      (beta p_rest + (1 - beta) q_rest) log 2.
    - The gradient moves all tokens of the student's rest together, in proportion to their own probabilities.

    At another T the rest is flattened as one event and not token by token, as its tokens are not known: still zero when
    the shares agree, but no bound of the divergence of the whole distributions.

    Args:
        divergence: which.
        teacher: what is known of p.
        student: logits, float (positions, vocab).
        temperature: T.

    Returns:
        float32 (positions,), or float64 for float64 logits; nats.

    Raises:
        InputError: another number of positions, a vocabulary smaller than k, or a temperature that is not positive.

    Example:
        >>> student = torch.tensor([[2.0, 1.0, 0.0, 0.0]])
        >>> teacher = TopLogProbs.of_logits(student, top_k=2)
        >>> abs(float(divergence_of_top(ForwardKl(), teacher, student))) < 1e-6
        True
    """
    check_temperature(temperature)
    if student.ndim != 2 or len(student) != len(teacher):
        raise InputError(
            f"the student's logits are {tuple(student.shape)}, expected ({len(teacher)}, vocab) as the teacher has "
            f"{len(teacher)} positions"
        )
    p = teacher.events(student.shape[1]).to(student.device)
    q = lumped_logits(student, teacher.ids.to(student.device))
    return divergence(_log_softmax(p, temperature).to(q.dtype), _log_softmax(q, temperature))


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    exact = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(exact / temperature, dim=-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum p (log p - log q) over the last dimension; what cannot happen under p adds nothing."""
    difference = torch.where(log_p == -torch.inf, 0.0, log_p - log_q)
    return (log_p.exp() * difference).sum(dim=-1)
