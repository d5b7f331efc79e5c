"""The likeliest next token, again and again, by any causal language model: attention, state space or recurrent.

Nothing is cached between tokens, so that no model has to know how. Texts whose prompts have as many tokens go together,
so that nothing is padded. For short answers; `cotune.generation` is for long ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from cotune.distillation.paired_texts import Reader

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def write_greedily(
    model: PreTrainedModel, reader: Reader, prompts: Sequence[str], *, max_new_tokens: int, batch_size: int = 32
) -> list[str]:
    """What the model writes behind each prompt, up to its end token, or as many tokens.

    Args:
        model: loaded.
        reader: its own.
    """
    encoded = [reader.tokenizer.encode(one).ids for one in prompts]
    order = sorted(range(len(prompts)), key=lambda number: len(encoded[number]))
    found = [""] * len(prompts)
    while order:
        length = len(encoded[order[0]])
        same = [number for number in order[:batch_size] if len(encoded[number]) == length]
        order = order[len(same) :]
        ids = torch.tensor([encoded[number] for number in same], device=model.device)
        going = torch.ones(len(same), dtype=torch.bool, device=model.device)
        for _ in range(max_new_tokens):
            following = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(1)
            # Behind the end of a row there is nothing but ends.
            following[~going] = reader.end_id
            going &= following != reader.end_id
            ids = torch.cat([ids, following[:, None]], dim=1)
            if not going.any():
                break
        for number, row in zip(same, ids[:, length:].tolist(), strict=True):
            pieces = (reader.table.pieces[one] or b"" for one in row)
            found[number] = b"".join(pieces).decode(errors="replace")
    return found
