"""From examples to token ids, and from token ids to padded batches. NumPy only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from cotune.data.templates import Example
from cotune.errors import InputError

IGNORED_LABEL = -100
# Batches of similar length are drawn from pools of this many batches.
BATCHES_IN_POOL = 32


@dataclass(frozen=True)
class EncodedExample:
    """One sequence of prompt and target.

    Attributes:
        input_ids: int64 (seq,), the prompt with its special tokens, then the target and the end of sequence.
        first_target: index of the first target token, at least 1.
        choices: where the target is one of a few label words, the token ids of each, without the end of sequence.
        label: which of the choices the target is.
    """

    input_ids: NDArray[np.int64]
    first_target: int
    choices: tuple[NDArray[np.int64], ...] = ()
    label: int = 0


@dataclass(frozen=True)
class TokenBatch:
    """Sequences padded on the right.

    Attributes:
        input_ids: int64 (batch, seq).
        attention_mask: int64 (batch, seq), 1 on tokens and 0 on padding.
        labels: int64 (batch, seq), the token itself on targets, -100 on prompt and padding.
    """

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    labels: NDArray[np.int64]


def split_tokens(tokenizer: Tokenizer, example: Example) -> tuple[list[int], list[int]]:
    """Prompt ids as `tokenizer.encode(prompt)` gives them, and the ids of the target after them.

    Where the prompt's tokens begin the tokens of the whole text, the target has the rest of these, as in natural
    text; else the target is encoded alone, so that generation from the prompt always sees the same prompt ids.
    """
    prompt_ids = list(tokenizer.encode(example.prompt).ids)
    whole_ids = list(tokenizer.encode(example.prompt + example.target).ids)
    if whole_ids[: len(prompt_ids)] == prompt_ids and len(whole_ids) > len(prompt_ids):
        return prompt_ids, whole_ids[len(prompt_ids) :]
    return prompt_ids, list(tokenizer.encode(example.target, add_special_tokens=False).ids)


def encode_example(tokenizer: Tokenizer, example: Example, *, eos_token_id: int, max_length: int) -> EncodedExample:
    """Encode prompt and target and mark where the target begins.

    Too long a sequence loses the end of the document in its prompt, as `fit_example` says. Where there is none, or that
    is not enough, it loses the start of its prompt (special tokens in front stay), and where the prompt would keep less
    than half of `max_length`, the end of its target.

    Args:
        eos_token_id: appended to the target.
        max_length: tokens in all, at least 2.

    Raises:
        InputError: `max_length` leaves no room for a prompt token and a target token, or there is none.

    Example:
        >>> encode_example(tokenizer, Example("User: Hi\\nAssistant:", " Hello!"), eos_token_id=2, max_length=128)
    """
    special_ids = list(tokenizer.encode("").ids)
    shortest = max(1, len(special_ids)) + 1
    if max_length < shortest:
        raise InputError(
            f"max_length is {max_length}, expected at least {shortest}: "
            "the special tokens or one prompt token, and one target token"
        )
    prompt_ids, target_ids = split_tokens(tokenizer, example)
    if example.document is not None and len(prompt_ids) + len(target_ids) >= max_length:
        example = fit_example(tokenizer, example, max_length=max_length)
        prompt_ids, target_ids = split_tokens(tokenizer, example)
    if not target_ids or target_ids[-1] != eos_token_id:
        target_ids.append(eos_token_id)
    if not prompt_ids:  # without a start token, the first target token is the context of the others
        prompt_ids, target_ids = target_ids[:1], target_ids[1:]
    if not target_ids:
        raise InputError("the example has no target tokens, expected at least one; leave it out")

    kept_prompt = max(shortest - 1, min(len(prompt_ids), max_length // 2))
    target_ids = target_ids[: max_length - min(kept_prompt, len(prompt_ids))]
    prompt_ids = keep_end(prompt_ids, max_length - len(target_ids), special_ids)
    input_ids = np.array(prompt_ids + target_ids, dtype=np.int64)
    return EncodedExample(input_ids, len(prompt_ids))


def fit_example(tokenizer: Tokenizer, example: Example, *, max_length: int, room: int = 0) -> Example:
    """Cut the document in a prompt, from its end, until prompt, target and the end of sequence fit.

    The document alone gives way: the task around it, the earlier turns of a conversation and the target stay whole. If
    they are too long without it, nothing of it is left. An example without a document comes back as it is.

    Args:
        max_length: tokens in all.
        room: tokens to leave behind the prompt, at least; more than the target needs where text is to be generated.

    Example:
        >>> prompt = fit_example(tokenizer, example, max_length=2048, room=64).prompt
    """
    if example.document is None:
        return example
    (start, end), prompt = example.document, example.prompt
    longest = max_length - max(len(split_tokens(tokenizer, example)[1]) + 1, room)
    while end > start:
        encoding = tokenizer.encode(prompt)
        excess = len(encoding.ids) - longest
        if excess <= 0:
            break
        starts = [first for first, after in encoding.offsets if start <= first < min(end, after)]
        # Tokens at the cut may join with others than before, so that one pass can be too little.
        cut = min(starts[-excess], end - 1) if excess <= len(starts) else start
        kept = prompt[start:cut].rstrip()
        prompt, end = prompt[:start] + kept + prompt[end:], start + len(kept)
    return replace(example, prompt=prompt, document=(start, end))


def keep_end(prompt_ids: list[int], length: int, special_ids: list[int]) -> list[int]:
    """The last tokens of a prompt, with the special tokens that it starts with still in front."""
    if len(prompt_ids) <= length:
        return prompt_ids
    start = special_ids if prompt_ids[: len(special_ids)] == special_ids else []
    return start + prompt_ids[len(prompt_ids) - (length - len(start)) :]


def pad_batch(examples: Sequence[EncodedExample], pad_token_id: int) -> TokenBatch:
    """One batch, as long as its longest sequence."""
    shape = (len(examples), max(len(each.input_ids) for each in examples))
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORED_LABEL, dtype=np.int64)
    for row, each in enumerate(examples):
        length = len(each.input_ids)
        input_ids[row, :length] = each.input_ids
        attention_mask[row, :length] = 1
        labels[row, each.first_target : length] = each.input_ids[each.first_target :]
    return TokenBatch(input_ids, attention_mask, labels)


def token_batches(
    examples: Sequence[EncodedExample], batch_size: int, pad_token_id: int, seed: int
) -> Iterator[TokenBatch]:
    """One epoch: every example once, in an order that the seed decides, sequences of similar length together.

    Raises:
        InputError: `batch_size` is less than 1.
    """
    for batch in similar_lengths([len(example.input_ids) for example in examples], batch_size, seed):
        yield pad_batch([examples[index] for index in batch], pad_token_id)


def similar_lengths(lengths: Sequence[int], batch_size: int, seed: int) -> list[list[int]]:
    """Indices of one epoch's batches, each index once, in an order that the seed decides, similar lengths together.

    Raises:
        InputError: `batch_size` is less than 1.

    Example:
        >>> sorted(sorted(batch) for batch in similar_lengths([5, 90, 6, 80], batch_size=2, seed=0))
        [[0, 2], [1, 3]]
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, expected at least 1")
    rng = Random(seed)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    pool_size = batch_size * BATCHES_IN_POOL
    batches: list[list[int]] = []
    for start in range(0, len(order), pool_size):
        pool = sorted(order[start : start + pool_size], key=lambda index: lengths[index])
        batches += [pool[first : first + batch_size] for first in range(0, len(pool), batch_size)]
    rng.shuffle(batches)
    return batches
