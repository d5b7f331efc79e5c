"""The loss of methods that change the backbone itself: -log p(target) over answer tokens only.

Logits are computed at target positions alone, so that the vocabulary costs nothing elsewhere.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from cotune.data.batches import IGNORED_LABEL, EncodedExample, TokenBatch, token_batches
from cotune.errors import InputError


class TokenBatches:
    """Padded batches of similar length, in an order that depends on seed and epoch only.

    Args:
        examples: token ids and where the targets begin.
        num_batch_sequences: the most in one batch.
        pad_token_id: fills short rows.
        seed: of the order.
    """

    def __init__(
        self, examples: Sequence[EncodedExample], num_batch_sequences: int, *, pad_token_id: int, seed: int
    ) -> None:
        check_targets(examples)
        self._examples, self._size = examples, num_batch_sequences
        self._pad_token_id, self._seed = pad_token_id, seed

    def __len__(self) -> int:
        return math.ceil(len(self._examples) / self._size)

    def epoch(self, epoch: int) -> Iterator[TokenBatch]:
        seed = int(np.random.SeedSequence((self._seed, epoch)).generate_state(1)[0])
        return token_batches(self._examples, self._size, self._pad_token_id, seed)


def check_targets(examples: Sequence[EncodedExample]) -> None:
    """Refuse texts that nothing can be learnt from.

    Raises:
        InputError: there are none, or one has no target token.
    """
    if not examples:
        raise InputError("there are no examples, expected at least one")
    for index, example in enumerate(examples):
        if not 1 <= example.first_target < len(example.input_ids):
            raise InputError(
                f"example {index} has {len(example.input_ids)} tokens and its first target at "
                f"{example.first_target}, so that all its labels are ignored; leave it out, or mark its answer"
            )


def answer_nats(model: nn.Module, head: nn.Module, params: dict[str, Tensor], batch: TokenBatch) -> Tensor:
    """-log p of each target token, float32 (targets,); arguments and errors as of `answer_logits`."""
    logits, targets = answer_logits(model, head, params, batch)
    return F.cross_entropy(logits, targets, reduction="none")


def answer_logits(
    model: nn.Module, head: nn.Module, params: dict[str, Tensor], batch: TokenBatch
) -> tuple[Tensor, Tensor]:
    """Logits where a target token is predicted, float32 (targets, vocab), and the targets, int64 (targets,).

    Args:
        model: a causal language model with an adapter attached, as transformers or peft give it. It may put
            positions of its own in front, such as a soft prompt.
        head: its output embedding.
        params: stand in for the model's parameters of these names.
        batch: padded sequences.

    Raises:
        InputError: all labels are ignored.
    """
    if not params:
        raise InputError("there are no parameters to tune, expected at least one tensor; choose another method")
    device = next(iter(params.values())).device
    labels = torch.from_numpy(batch.labels[:, 1:])
    is_target = labels != IGNORED_LABEL
    if not bool(is_target.any()):
        raise InputError(f"all labels of the batch are ignored ({IGNORED_LABEL}), expected at least one target token")
    # The last token is predicted, never read.
    # No attention mask: rows are padded on the right, where causal attention ignores them. With one, autograd would
    # keep a matrix of seq x seq for each layer, and keys and values copied for every head.
    inputs = {"input_ids": torch.from_numpy(batch.input_ids[:, :-1]).to(device), "use_cache": False}
    with only_rows(head, is_target.to(device)):
        logits = functional_call(model, params, kwargs=inputs).logits
    return logits.float(), labels[is_target].to(device)


@contextmanager
def only_rows(head: nn.Module, wanted: Tensor) -> Iterator[None]:
    """Inside, the output embedding computes logits (rows, vocab) for the wanted ones of the last seq positions only.

    Args:
        wanted: bool (batch, seq).
    """
    num_positions = wanted.shape[1]
    # Before other hooks, so that they see the wanted rows alone.
    handle = head.register_forward_pre_hook(lambda module, args: (args[0][:, -num_positions:][wanted],), prepend=True)
    try:
        yield
    finally:
        handle.remove()


def digest_examples(*parts: Sequence[EncodedExample]) -> str:
    """SHA-256, hex, of all token ids and of where the targets begin; tells whether a checkpoint belongs to them."""
    state = hashlib.sha256()
    for part in parts:
        state.update(f"{len(part)}\n".encode())
        for example in part:
            state.update(f"{len(example.input_ids)} {example.first_target}\n".encode())
            state.update(np.ascontiguousarray(example.input_ids, "<i8").data)
    return state.hexdigest()
