"""What a model writes after many prompts at once, token by token, while its parameters are being tuned."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Next token ids, int64 (texts,), of logits (texts, vocab).
Choose = Callable[[Tensor], Tensor]


@torch.no_grad()
def continuations(
    model: PreTrainedModel,
    params: Mapping[str, Tensor],
    prompts: Sequence[NDArray[np.int64]],
    choose: Choose,
    *,
    max_new_tokens: int,
    stop_token_ids: Collection[int] = (),
) -> list[list[int]]:
    """All prompts in one batch; a text that has ended waits for the others.

    Args:
        model: as it is, or with an adapter attached.
        params: stand in for the model's parameters of these names.
        prompts: token ids, at least one each.
        choose: the next token of each text.
        max_new_tokens: longest text, at least 1.
        stop_token_ids: a text ends with any of them.

    Returns:
        New token ids of each text, at least one, with the stop token where it came to one.
    """
    from transformers import DynamicCache

    device = next(iter(params.values())).device
    longest = max(map(len, prompts))
    ids, mask = (
        torch.zeros(len(prompts), longest, dtype=torch.int64),
        torch.zeros(len(prompts), longest, dtype=torch.int64),
    )
    for row, prompt in enumerate(prompts):
        # On the left, so that all texts go on at the same column.
        ids[row, longest - len(prompt) :] = torch.from_numpy(prompt)
        mask[row, longest - len(prompt) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    texts: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    cache = DynamicCache(config=model.config)
    for _ in range(max_new_tokens):
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :],
            "past_key_values": cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        ids = choose(functional_call(model, dict(params), kwargs=inputs).logits[:, -1])[:, None]
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
        for row, token in enumerate(ids[:, 0].tolist()):
            if row in running:
                texts[row].append(token)
            if token in stop_token_ids:
                running.discard(row)
        if not running:
            break
    return texts


def sampled(generator: torch.Generator, temperature: float) -> Choose:
    """Draws from softmax(logits / temperature), on the CPU, so that a seed gives the same texts anywhere.

    Args:
        generator: on the CPU; goes on with each token.
        temperature: above 0.
    """

    def choose(logits: Tensor) -> Tensor:
        probabilities = (logits.float().cpu() / temperature).softmax(-1)
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(logits.device)

    return choose
