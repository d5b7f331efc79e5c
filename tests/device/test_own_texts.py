"""A plugin's own texts are those of the reference, whatever else is written beside them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from toy import STOP, ToyBackbone
from toy_plugin import toy_plugin

from cotune.device.own_texts import write_texts
from cotune.device.side_network import gate_of, open_side_network
from cotune.generation.output_basis import OutputBasis
from cotune.generation.reference import Personal, generate
from cotune.generation.request import GenerationRequest


@pytest.mark.parametrize(
    ("family", "has_gate", "mode"),
    [
        ("parallel", False, "integration"),
        ("parallel", True, "spa"),
        ("serial", False, "ladder"),
        ("serial", True, "separation"),
    ],
)
def test_they_are_those_of_the_mode(family: str, has_gate: bool, mode: str) -> None:
    plugin = toy_plugin(family=family, **({} if has_gate else {"gate": None}))
    personal = Personal(
        corrector=open_side_network(plugin),
        output_basis=OutputBasis.from_bytes(plugin.output_basis),
        gate=gate_of(plugin),
    )
    prompts = [np.arange(3, 3 + length) for length in (1, 4, 9)]
    written = write_texts(ToyBackbone(), plugin, prompts, max_new_tokens=12, stop_token_ids=[STOP])

    def alone(prompt: Any) -> list[int]:
        request = GenerationRequest(prompt_ids=prompt, mode=mode, max_new_tokens=12, stop_token_ids=(STOP,))
        return generate(ToyBackbone(), personal, request).token_ids

    assert written == [alone(prompt) for prompt in prompts]
    assert all(0 < len(ids) <= 12 for ids in written)
