"""The likeliest next token, again and again, by any causal language model: attention, state space or recurrent.

Nothing is cached between tokens, so that no model has to know how. Texts whose prompts have as many tokens go together,
so that nothing is padded. For short answers; `cotune.generation` is for long ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cotune.distillation.paired_texts import Reader

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class GreedyText:
    """What a model wrote.

    Attributes:
        text: without the end.
        log_likelihood: nats for each of its tokens, the mean, the end token too where it was written; 0 or less.
    """

    text: str
    log_likelihood: float


@torch.no_grad()
def write_greedily(
    model: PreTrainedModel, reader: Reader, prompts: Sequence[str], *, max_new_tokens: int, batch_size: int = 32
) -> list[GreedyText]:
    """What the model writes behind each prompt, up to its end token, or as many tokens.

    Args:
        model: loaded.
        reader: its own.
        max_new_tokens: at least 1.
    """
    encoded = [reader.tokenizer.encode(one).ids for one in prompts]
    order = sorted(range(len(prompts)), key=lambda number: len(encoded[number]))
    found = [GreedyText("", 0.0)] * len(prompts)
    while order:
        length = len(encoded[order[0]])
        same = [number for number in order[:batch_size] if len(encoded[number]) == length]
        order = order[len(same) :]
        ids = torch.tensor([encoded[number] for number in same], device=model.device)
        going = torch.ones(len(same), dtype=torch.bool, device=model.device)
        nats, num_tokens = (torch.zeros(len(same), device=model.device) for _ in range(2))
        for _ in range(max_new_tokens):
            log_probs = model(input_ids=ids, use_cache=False).logits[:, -1].float().log_softmax(1)
            likeliest, following = log_probs.max(1)
            nats, num_tokens = nats + likeliest * going, num_tokens + going
            # Behind the end of a row there is nothing but ends.
            following[~going] = reader.end_id
            going &= following != reader.end_id
            ids = torch.cat([ids, following[:, None]], dim=1)
            if not going.any():
                break
        means = (nats / num_tokens).tolist()
        for number, row, mean in zip(same, ids[:, length:].tolist(), means, strict=True):
            pieces = (reader.table.pieces[one] or b"" for one in row)
            found[number] = GreedyText(b"".join(pieces).decode(errors="replace"), mean)
    return found
