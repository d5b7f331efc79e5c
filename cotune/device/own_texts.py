"""What a plugin writes, for those who learn from its own texts: many at once, beside a backbone in this process."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cotune.device.side_network import gate_of, open_side_network
from cotune.generation.output_basis import OutputBasis
from cotune.generation.protocols import DecodingBackbone
from cotune.generation.reference import Personal
from cotune.generation.request import GenerationRequest
from cotune.generation.together import generate_together
from cotune.plugin import Plugin


def write_texts(
    backbone: DecodingBackbone,
    plugin: Plugin,
    prompts: Sequence[NDArray[np.int64]],
    *,
    max_new_tokens: int,
    stop_token_ids: Sequence[int],
) -> list[list[int]]:
    """Token ids of one greedy answer to each prompt.

    Args:
        backbone: the frozen model.
        plugin: consulted where its gate opens, or everywhere if it has none.
        prompts: token ids, at least one each.
        max_new_tokens: of each answer.
        stop_token_ids: what ends an answer.

    Example:
        >>> write_texts(backbone, plugin, [np.array([1, 2])], max_new_tokens=8, stop_token_ids=(0,))  # doctest: +SKIP
        [[17, 4, 0]]
    """
    everywhere, gated = ("integration", "spa") if plugin.family == "parallel" else ("ladder", "separation")
    personal = Personal(
        corrector=open_side_network(plugin),
        output_basis=OutputBasis.from_bytes(plugin.output_basis),
        gate=gate_of(plugin),
    )
    requests = [
        GenerationRequest(
            prompt_ids=prompt,
            mode=everywhere if plugin.gate is None else gated,
            max_new_tokens=max_new_tokens,
            stop_token_ids=tuple(stop_token_ids),
        )
        for prompt in prompts
    ]
    return [generation.token_ids for generation in generate_together(backbone, personal, requests)]
