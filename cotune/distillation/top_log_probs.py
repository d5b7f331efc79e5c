"""What a teacher tells of its next-token distributions: its likeliest tokens, and by their sum how much is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cotune.errors import InputError
from cotune.models.largest import largest_ids

SMALLEST_REST = 1e-6
"""The unlisted tokens together have at least this probability. Log normalisers in float32, of 8 to 16 nats, are exact
to half of that, so that a smaller rest is not known; a rest of none would make the reverse KL infinite."""


@dataclass(frozen=True)
class TopLogProbs:
    """The k likeliest tokens of each position.

    Attributes:
        ids: int64 (positions, k), ascending in each row.
        log_probs: float32 (positions, k), nats, of the whole vocabulary's distribution: exp of them sums to at most 1.
    """

    ids: Tensor
    log_probs: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def top_k(self) -> int:
        return self.ids.shape[1]

    @classmethod
    def of_logits(cls, logits: Tensor, top_k: int) -> TopLogProbs:
        """From logits of the whole vocabulary.

        Args:
            logits: float (positions, vocab).
            top_k: vocab or more keeps all, which takes no room for ids.

        Raises:
            InputError: `top_k` is less than 1.

        Example:
            >>> top = TopLogProbs.of_logits(torch.tensor([[0.0, 3.0, 2.0]]), top_k=2)
            >>> top.ids.tolist(), [round(float(x), 3) for x in top.log_probs[0]]
            ([[1, 2]], [-0.349, -1.349])
        """
        check_top_k(top_k)
        exact = logits if logits.dtype == torch.float64 else logits.float()
        log_probs = exact.log_softmax(dim=1)
        num_positions, vocab_size = logits.shape
        if top_k >= vocab_size:
            return cls(torch.arange(vocab_size, device=logits.device).expand(num_positions, vocab_size), log_probs)
        ids = largest_ids(log_probs, top_k)
        return cls(ids, log_probs.gather(1, ids))

    @classmethod
    def joined(cls, parts: Sequence[TopLogProbs]) -> TopLogProbs:
        """Positions of several, one after the other.

        Raises:
            InputError: there are none, or they list different numbers of tokens.
        """
        if len({part.top_k for part in parts}) != 1:
            raise InputError(
                f"the parts list {sorted({part.top_k for part in parts})} tokens, expected one number for all"
            )
        return cls(torch.cat([part.ids for part in parts]), torch.cat([part.log_probs for part in parts]))

    def check(self, *, num_positions: int, top_k: int, vocab_size: int) -> None:
        """Refuse what no distribution over this vocabulary has: for numbers that come from elsewhere.

        Raises:
            InputError: another shape, ids out of order or range, or log-probabilities that are none.
        """
        expected = (num_positions, min(top_k, vocab_size))
        if tuple(self.ids.shape) != expected or tuple(self.log_probs.shape) != expected:
            raise InputError(
                f"the teacher told {tuple(self.ids.shape)} ids and {tuple(self.log_probs.shape)} log-probabilities, "
                f"expected {expected} of both"
            )
        if self.ids.numel() == 0:
            return
        is_ascending = bool((self.ids[:, 1:] > self.ids[:, :-1]).all())
        if not is_ascending or int(self.ids.min()) < 0 or int(self.ids.max()) >= vocab_size:
            raise InputError(
                f"the teacher's token ids are not ascending numbers from 0 to {vocab_size - 1}; "
                "ask a teacher with the student's tokenizer"
            )
        largest = float(self.log_probs.double().logsumexp(dim=1).max())
        # Rounding of a float32 log normaliser is far smaller.
        if not largest <= 1e-3 or bool(self.log_probs.isnan().any()):
            raise InputError(
                f"the teacher's listed probabilities sum to up to e^{largest:.3g} at a position, expected at most 1"
            )

    def events(self, vocab_size: int) -> Tensor:
        """log p~ of the listed tokens and, unless all are listed, of the rest as one, float32 (positions, k or k + 1).

        The rest has at least `SMALLEST_REST`; the shares are normalised.

        Raises:
            InputError: more tokens are listed than there are.
        """
        if self.top_k > vocab_size:
            raise InputError(
                f"the teacher lists {self.top_k} tokens of each position, expected at most the student's vocabulary "
                f"of {vocab_size}; take a student with the teacher's tokenizer"
            )
        if self.top_k == vocab_size:
            return self.log_probs
        listed = self.log_probs.double()
        rest = -torch.expm1(listed.logsumexp(dim=1, keepdim=True).clamp(max=0.0))
        events = torch.cat([listed, rest.clamp(min=SMALLEST_REST).log()], dim=1).log_softmax(dim=1)
        return events.to(self.log_probs.dtype)


def lumped_logits(logits: Tensor, ids: Tensor) -> Tensor:
    """Logits of the tokens in `ids` and, unless these are all, one for the rest, log sum exp of theirs.

    Their softmax is that of the whole vocabulary, with the probabilities of the unlisted added up, also where these are
    far below the rounding of 1.

    Args:
        logits: float (positions, vocab).
        ids: int64 (positions, k), ascending.

    Returns:
        float (positions, k + 1), or `logits` itself where k = vocab.
    """
    if ids.shape[1] == logits.shape[1]:
        return logits
    exact = logits if logits.dtype == torch.float64 else logits.float()
    rest = exact.scatter(1, ids, -torch.inf).logsumexp(dim=1, keepdim=True)
    return torch.cat([exact.gather(1, ids), rest], dim=1)


def check_top_k(top_k: int) -> None:
    """Refuse to list nothing.

    Raises:
        InputError: less than 1.
    """
    if top_k < 1:
        raise InputError(f"top_k is {top_k}, expected at least 1")
