"""Tokens that two vocabularies have in common, and the loss L_tok on the likeliest of them.

The teacher's top k among tokens of the same bytes, and one bucket for the rest. At a shared boundary, with v_1 .. v_k
the teacher's likeliest common tokens,

    p~ = (p_v1 .. p_vk, 1 - sum p_vi),  q~ = (q_v1 .. q_vk, 1 - sum q_vi),    L_tok = KL(p~^(1/T) || q~^(1/T))

where p = softmax(z_T), q = softmax(z_S), each over its own whole vocabulary; the flattened sides are normalised. Summed
first and flattened after, as in `cotune.distillation.next_byte`, so that the size of a vocabulary changes nothing.

Two tokens of the same bytes are still two events where longer tokens begin with them in only one vocabulary: with
"there" at hand, "the" says that no "re" follows. Those are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cotune.distillation.divergences import Divergence, ForwardKl, check_temperature
from cotune.distillation.token_bytes import TokenBytes
from cotune.distillation.top_log_probs import check_top_k, lumped_logits
from cotune.errors import InputError
from cotune.models.largest import largest_ids


@dataclass(frozen=True, eq=False)
class CommonTokens:
    """Pairs of tokens with the same bytes.

    Attributes:
        first_ids, second_ids: int64 (common,), in the one and in the other vocabulary; ascending in the first.
    """

    first_ids: Tensor
    second_ids: Tensor

    @classmethod
    def of_tables(cls, first: TokenBytes, second: TokenBytes) -> CommonTokens:
        """All pairs that say the same. Time: that of sorting the vocabularies.

        Raises:
            InputError: there is none.

        Example:
            >>> first = TokenBytes((b"a", b"b", b"c", b"cd"), frozenset())
            >>> second = TokenBytes((b"c", b"b", b"ax", b"a"), frozenset())
            >>> CommonTokens.of_tables(first, second).first_ids.tolist()  # "a" and "c" go on in only one of them
            [1]
        """
        theirs = second.ids_by_bytes
        pairs = sorted(
            (own, theirs[piece])
            for piece, own in first.ids_by_bytes.items()
            if piece in theirs and first.is_prefix[own] == second.is_prefix[theirs[piece]]
        )
        if not pairs:
            raise InputError(
                "the two vocabularies have no token in common, expected at least one; set token_weight to 0"
            )
        first_ids, second_ids = torch.tensor(pairs).unbind(dim=1)
        return cls(first_ids.contiguous(), second_ids.contiguous())

    def __len__(self) -> int:
        return len(self.first_ids)

    def swapped(self) -> CommonTokens:
        """The same, seen from the other side."""
        order = self.second_ids.argsort()
        return CommonTokens(self.second_ids[order], self.first_ids[order])


@dataclass(frozen=True, eq=False)
class TopCommon:
    """A teacher's likeliest common tokens at each position: all that L_tok needs of it.

    Attributes:
        places: int64 (positions, k), ascending, in `CommonTokens`.
        log_probs: float32 (positions, k + 1), log p~ at temperature 1, the rest last.
    """

    places: Tensor
    log_probs: Tensor

    @classmethod
    def of_logits(cls, logits: Tensor, common: CommonTokens, *, top_k: int, student_vocab: int) -> TopCommon:
        """Of the first vocabulary's model.

        Args:
            logits: float (positions, vocab).
            top_k: k; at most as many as there are, with one token left for the rest on either side.
            student_vocab: the size of the second vocabulary.

        Raises:
            InputError: `top_k` is less than 1.
        """
        check_top_k(top_k)
        top_k = min(top_k, len(common), logits.shape[1] - 1, student_vocab - 1)
        ids = common.first_ids.to(logits.device)
        places = largest_ids(logits[:, ids], top_k)
        return cls(places, _log_shares(logits, ids[places]))

    def divergence(
        self,
        student: Tensor,
        common: CommonTokens,
        *,
        temperature: float = 1.0,
        divergence: Divergence | None = None,
    ) -> Tensor:
        """L_tok of each position.

        Args:
            student: logits, float (positions, vocab), of the second vocabulary's model.
            common: as for the teacher.
            temperature: T.
            divergence: KL if None.

        Returns:
            (positions,), nats.

        Raises:
            InputError: the temperature is not positive.
        """
        check_temperature(temperature)
        divergence = divergence or ForwardKl()
        ids = common.second_ids.to(student.device)[self.places.to(student.device)]
        q = _log_shares(student, ids)
        p, q = ((side / temperature).log_softmax(dim=1) for side in (self.log_probs.to(q), q))
        return divergence(p, q)


def _log_shares(logits: Tensor, ids: Tensor) -> Tensor:
    return lumped_logits(logits, ids).log_softmax(dim=1)
