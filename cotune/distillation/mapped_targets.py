"""What a teacher says of a text, as distributions over the student's tokens, by MinED and DTW: two published ways.

With s the student's tokens of a text, t the teacher's, J(i) the teacher's tokens beside s_i by `warped_tokens`, and m
the map of `nearest_tokens`:

*Pooled*, as "aligned, pooled logits" of Co-PLMs may be read: the target of the position that predicts s_i is

    P_i(v) = mean over j in J(i) of sum over u with m(u) = v of softmax(z_j / T)_u

with z_j the logits that predict t_j.

*Matched*, FedMKT's as its code computes: a position that has read s_i takes over what the teacher's position says that
has read t_j, if J(i) = {j} and m(t_j) = s_i: of the teacher's likeliest tokens each is mapped, of several on one token
the largest logit counts, softmax. Every other position gets all of its probability on one token. As published that is
s_i, the token that was read, though the position predicts s_(i + 1): it teaches copying. Fixed, it is s_(i + 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cotune.distillation.nearest_tokens import NearestTokens, written
from cotune.distillation.paired_texts import PairedText
from cotune.distillation.token_bytes import TokenBytes
from cotune.distillation.warped_tokens import warp
from cotune.errors import InputError


@dataclass(frozen=True, eq=False)
class SparseTargets:
    """Distributions over a vocabulary, at the positions that predict a text's answer.

    Attributes:
        ids: int64 (targets, k).
        probs: float32 (targets, k), the rows' sums are 1; an id that stands twice counts twice.
    """

    ids: NDArray[np.int64]
    probs: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of_logits(cls, ids: NDArray[np.int64], logits: NDArray[np.float32]) -> SparseTargets:
        """Softmax of the logits of these ids alone; -inf for none."""
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        return cls(ids, (shares / shares.sum(axis=1, keepdims=True)).astype(np.float32))

    @classmethod
    def joined(cls, parts: Sequence[SparseTargets]) -> SparseTargets:
        """Of several texts; shorter rows are filled up with nothing."""
        width = max(one.ids.shape[1] for one in parts)
        padded = [[np.pad(a, ((0, 0), (0, width - a.shape[1]))) for a in (one.ids, one.probs)] for one in parts]
        return cls(np.concatenate([ids for ids, _ in padded]), np.concatenate([probs for _, probs in padded]))

    def cross_entropy(self, logits: Tensor) -> Tensor:
        """The mean over targets of -sum_v p(v) log softmax(logits)_v, nats, with its gradient.

        Raises:
            InputError: there is another number of rows.
        """
        if len(logits) != len(self):
            raise InputError(f"there are {len(logits)} rows of logits, expected {len(self)}, one for each target")
        told = logits.float().log_softmax(1).gather(1, torch.from_numpy(self.ids).to(logits.device))
        return -(torch.from_numpy(self.probs).to(told) * told).sum(1).mean()


@dataclass(frozen=True, eq=False)
class WarpedText:
    """A text on both sides with the teacher's tokens beside each of the student's.

    Attributes:
        text: as two models read it.
        teacher: which side the teacher's is, 0 or 1.
        beside: for each token of the student the teacher's.
    """

    text: PairedText
    teacher: int
    beside: list[list[int]]

    @property
    def student(self) -> int:
        """The other side."""
        return 1 - self.teacher

    def targets(self, side: int) -> NDArray[np.int64]:
        """int64 (targets,), the places of one side's target tokens."""
        return np.flatnonzero(self.text.sides[side].is_target)


class TokenMap:
    """The way from one tokenizer to another one.

    Args:
        teacher, student: their tables.

    Example:
        >>> mapped = TokenMap(proxy.reader.table, small.reader.table)  # doctest: +SKIP
        >>> mapped.warped(text, teacher=0).beside  # doctest: +SKIP
    """

    def __init__(self, teacher: TokenBytes, student: TokenBytes) -> None:
        self._words, self._sizes = (written(teacher), written(student)), (len(teacher), len(student))
        self.nearest = NearestTokens(teacher, student)

    @cached_property
    def _whole(self) -> Tensor:
        return torch.from_numpy(self.nearest.whole())

    def warped(self, text: PairedText, *, teacher: int) -> WarpedText:
        """Align a text; `teacher` says which of its sides is the teacher's."""
        ids = (text.sides[teacher].input_ids, text.sides[1 - teacher].input_ids)
        first, second = ([own[token] for token in one.tolist()] for own, one in zip(self._words, ids, strict=True))
        return WarpedText(text, teacher, warp(first, second))

    def pooled(self, texts: Sequence[WarpedText], logits: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
        """The targets of a batch, and which of the student's targets have one.

        Args:
            texts: of the batch, in its order.
            logits: float (teacher's targets, vocab), of all texts one after the other.
            temperature: T.

        Returns:
            float (rows, student's vocab), the rows' sums are 1; and int64 (rows,), places among the student's targets.

        Raises:
            InputError: there are other logits than the texts have targets.
        """
        wanted = sum(len(one.targets(one.teacher)) for one in texts)
        if logits.shape != (wanted, self._sizes[0]):
            raise InputError(
                f"logits are {tuple(logits.shape)}, expected {(wanted, self._sizes[0])}; give the teacher's"
            )
        rows, places, groups, first_row, first_place = [], [], 0, 0, 0
        owners: list[int] = []
        for one in texts:
            row_of = {int(token): first_row + row for row, token in enumerate(one.targets(one.teacher))}
            for place, token in enumerate(one.targets(one.student)):
                beside = [row_of[other] for other in one.beside[int(token)] if other in row_of]
                if beside:
                    rows += beside
                    owners += [groups] * len(beside)
                    places.append(first_place + place)
                    groups += 1
            first_row, first_place = first_row + len(row_of), first_place + len(one.targets(one.student))
        probs = (logits.float() / temperature).softmax(1)
        owner = torch.tensor(owners, dtype=torch.int64, device=probs.device)
        counts = torch.zeros(groups, device=probs.device).index_add(0, owner, torch.ones_like(owner, dtype=probs.dtype))
        mean = torch.zeros(groups, probs.shape[1], device=probs.device).index_add(0, owner, probs[rows])
        mean = mean / counts[:, None]
        mapped = torch.zeros(groups, self._sizes[1], device=probs.device)
        return mapped.index_add(1, self._whole.to(probs.device), mean), torch.tensor(places, dtype=torch.int64)

    def matched(
        self, one: WarpedText, ids: NDArray[np.int64], logits: NDArray[np.float32], *, is_fixed: bool
    ) -> SparseTargets:
        """FedMKT's targets of one text.

        Args:
            one: the text.
            ids: int64 (teacher's targets, k), its likeliest tokens at the positions that predict its targets.
            logits: float32, of the same shape.
            is_fixed: put what has no match on the token that comes next, and not on the one that was read.
        """
        own, told = (one.text.sides[side].input_ids for side in (one.student, one.teacher))
        # The row of the teacher's position that has read token j predicts token j + 1.
        row_of = {int(token) - 1: row for row, token in enumerate(one.targets(one.teacher))}
        found_ids = np.zeros((len(one.targets(one.student)), ids.shape[1]), np.int64)
        found = np.full(found_ids.shape, -np.inf, np.float32)
        for place, token in enumerate(one.targets(one.student)):
            read, beside = int(token) - 1, one.beside[int(token) - 1]
            row = row_of.get(beside[0]) if len(beside) == 1 else None
            if row is None or self.nearest([int(told[beside[0]])])[0] != own[read]:
                found_ids[place, 0], found[place, 0] = own[int(token) if is_fixed else read], 0.0
                continue
            largest: dict[int, float] = {}
            for mapped, value in zip(self.nearest(ids[row]).tolist(), logits[row].tolist(), strict=True):
                largest[mapped] = max(value, largest.get(mapped, -np.inf))
            found_ids[place, : len(largest)] = list(largest)
            found[place, : len(largest)] = list(largest.values())
        return SparseTargets.of_logits(found_ids, found)
