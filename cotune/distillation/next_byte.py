"""What a model expects as the next byte, out of what it expects as the next token; the loss L_byte.

At a shared boundary

    P_m(c) = sum over tokens v that begin with byte c of softmax(z_m)_v,    L_byte = KL(P_T^(1/T) || P_S^(1/T))

each side normalised, over 256 bytes and one event more for the end of the text. Each token counts for one event, so
that P_m is exact, and two models with any two vocabularies can be compared. Tokens that say nothing of the text
(padding, begin, unknown) are left out, and so are events that one of the vocabularies cannot bring about at all; the
rest is normalised.

The temperature T flattens the bytes, and not the tokens, softmax(z_m / T), before they are summed. At T = 1 that is the
same. At another T, flattened tokens give a byte the more the more tokens begin with it, so
that two models which agree on every byte would still differ because their vocabularies do.

How far P_m is from what the model expects as the next byte of the *text*: having read a token, a model with BPE knows
that the longer tokens which begin with it did not come. At a boundary inside of a word two models can know different
things of this kind; `cotune.distillation.merged_bytes` says where.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cotune.distillation.divergences import Divergence, ForwardKl, check_temperature
from cotune.distillation.grouped_log_sum_exp import grouped_log_sum_exp
from cotune.distillation.token_bytes import NO_EVENT, NUM_EVENTS, TokenBytes
from cotune.errors import InputError


def next_byte_log_probs(logits: Tensor, table: TokenBytes) -> Tensor:
    """log P_m of each event.

    Args:
        logits: float (positions, vocab), at shared boundaries.
        table: of this model's tokenizer, with as many tokens.

    Returns:
        float32 (positions, 257), nats, normalised; -inf for events that this vocabulary does not have. float64 for
        float64 logits.

    Raises:
        InputError: a vocabulary of another size.

    Example:
        >>> table = TokenBytes((b"a", b"ab", b"b"), frozenset())
        >>> log_probs = next_byte_log_probs(torch.log(torch.tensor([[0.2, 0.3, 0.5]])), table)
        >>> log_probs.exp()[0, ord("a")]
        tensor(0.5000)
    """
    if logits.ndim != 2 or logits.shape[1] != len(table):
        raise InputError(
            f"the logits are {tuple(logits.shape)}, expected (positions, {len(table)}), the size of the table; "
            "make the table with vocab_size of this model"
        )
    events = torch.from_numpy(table.first_events).to(logits.device)
    sums = grouped_log_sum_exp(logits, events, NO_EVENT + 1)
    possible = torch.from_numpy(table.possible_events).to(logits.device).nonzero()[:, 0]
    log_probs = sums.new_full((len(sums), NUM_EVENTS), -torch.inf)
    return log_probs.index_copy(1, possible, sums[:, possible].log_softmax(dim=1))


def shared_events(first: TokenBytes, second: TokenBytes) -> Tensor:
    """int64 (events,): those that both vocabularies can bring about, ascending.

    Raises:
        InputError: there is none.
    """
    shared = torch.from_numpy(first.possible_events & second.possible_events).nonzero()[:, 0]
    if not len(shared):
        raise InputError("the two vocabularies have no first byte in common, expected at least one")
    return shared


def next_byte_divergence(
    teacher: Tensor,
    student: Tensor,
    events: Tensor,
    *,
    merged: Tensor | None = None,
    temperature: float = 1.0,
    divergence: Divergence | None = None,
) -> Tensor:
    """L_byte of each position; zero where both expect the same.

    Args:
        teacher, student: from `next_byte_log_probs`, (positions, 257).
        events: from `shared_events`; both sides are normalised over them.
        merged: bool (positions, 257), events to leave out at each position, such as those of
            `cotune.distillation.merged_bytes`; a position where nothing is left has a loss of zero.
        temperature: T.
        divergence: KL if None.

    Returns:
        (positions,), nats.

    Raises:
        InputError: the temperature is not positive.

    Example:
        >>> table = TokenBytes((b"a", b"b"), frozenset())
        >>> sure, unsure = (next_byte_log_probs(torch.tensor([[z, 0.0]]), table) for z in (9.0, 0.0))
        >>> round(float(next_byte_divergence(sure, unsure, shared_events(table, table))), 3)
        0.692
    """
    check_temperature(temperature)
    divergence = divergence or ForwardKl()
    events = events.to(student.device)
    sides = [side[:, events] / temperature for side in (teacher, student)]
    if merged is None:
        return divergence(*(side.log_softmax(dim=1) for side in sides))
    left_out = merged[:, events]
    loss = divergence(*(side.masked_fill(left_out, -torch.inf).log_softmax(dim=1) for side in sides))
    # Where all is left out this is nan; neither that nor a gradient of it goes on.
    return loss.masked_fill(left_out.all(dim=1), 0.0)
