"""Greedy text from a model with a soft prompt or a prefix, through transformers' own forward pass.

The decoders of `Backbone` read text alone; what peft puts in front of it only peft's forward knows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from cotune.errors import InputError

if TYPE_CHECKING:
    import peft


@torch.inference_mode()
def generate_prompted(
    model: peft.PeftModel, prompt_ids: NDArray[np.int64], *, max_new_tokens: int, stop_token_ids: tuple[int, ...]
) -> list[int]:
    """The likeliest token after another, until one of `stop_token_ids`, which is the last.

    Args:
        model: what `PeftAdapter.attach` gives, for a soft prompt or a prefix.
        prompt_ids: int64 (seq,).
        max_new_tokens: the most tokens.
        stop_token_ids: tokens that end the text.

    Raises:
        InputError: an empty prompt, or more tokens than the context holds.
    """
    num_virtual = int(model.active_peft_config.num_virtual_tokens)
    wanted = num_virtual + len(prompt_ids) + max_new_tokens
    longest = int(model.config.max_position_embeddings)
    if len(prompt_ids) == 0 or wanted > longest:
        raise InputError(
            f"the prompt has {len(prompt_ids)} tokens beside {num_virtual} virtual and {max_new_tokens} new ones, "
            f"expected at least one and at most {longest} together; shorten it or max_new_tokens"
        )
    input_ids = torch.from_numpy(prompt_ids[None]).to(model.device)
    output = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=True)
    token_ids: list[int] = []
    while True:
        token_ids.append(int(output.logits[0, -1].argmax()))
        if token_ids[-1] in stop_token_ids or len(token_ids) == max_new_tokens:
            return token_ids
        # The cache holds what was put in front; from here on it is a text like any other.
        output = model.get_base_model()(
            input_ids=torch.tensor([[token_ids[-1]]], device=model.device),
            past_key_values=output.past_key_values,
            use_cache=True,
        )
