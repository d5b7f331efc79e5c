"""Texts that are written in one batch are those that are written alone."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_models import tiny_backbone, untrained_plugin

from cotune.device.side_network import gate_of, open_side_network
from cotune.errors import InputError
from cotune.generation.output_basis import OutputBasis
from cotune.generation.reference import Personal, generate
from cotune.generation.request import GenerationRequest
from cotune.generation.sampling import Sampling
from cotune.generation.together import generate_together
from cotune.models.backbone import Backbone
from cotune.plugin import Plugin


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone("llama")


def loud(plugin: Plugin) -> Personal:
    """A side network whose corrections change what is written."""
    generator = np.random.default_rng(3)
    head = plugin.tensors["head_weight"]
    plugin.tensors["head_weight"] = generator.normal(0, 2.0, head.shape).astype(np.float32)
    return Personal(
        corrector=open_side_network(plugin),
        output_basis=OutputBasis.from_bytes(plugin.output_basis),
        gate=gate_of(plugin),
    )


def requests(backbone: Backbone, mode: str, num: int) -> list[GenerationRequest]:
    generator = np.random.default_rng(5)
    return [
        GenerationRequest(
            prompt_ids=generator.integers(3, backbone.spec.vocab_size, 3 + 5 * i),
            mode=mode,
            max_new_tokens=2 + 3 * (i % 3),
            sampling=Sampling(temperature=1.0, seed=i) if i % 2 else Sampling(),
            stop_token_ids=backbone.spec.eos_token_ids,
        )
        for i in range(num)
    ]


@pytest.mark.parametrize("mode", ["integration", "spa"])
def test_each_text_is_the_one_written_alone(backbone: Backbone, mode: str) -> None:
    personal = loud(untrained_plugin(backbone))
    asked = requests(backbone, mode, 7)
    alone = [generate(backbone, personal, request) for request in asked]
    told: list[int] = []
    together = generate_together(backbone, personal, asked, num_rows=3, tell=told.append)
    assert together == alone
    assert told == list(range(1, 8))
    assert any(decision.changed for one in alone for decision in one.decisions)
    assert together != generate_together(backbone, None, asked, num_rows=3)


def test_the_base_model_alone_and_one_row(backbone: Backbone) -> None:
    asked = requests(backbone, "integration", 3)
    alone = [generate(backbone, None, request) for request in asked]
    assert generate_together(backbone, None, asked, num_rows=1) == alone
    assert generate_together(backbone, None, []) == []


def test_what_it_cannot_do_is_refused(backbone: Backbone) -> None:
    request = GenerationRequest(prompt_ids=np.array([3]), max_new_tokens=2, stop_strings=("x",))
    with pytest.raises(InputError, match="stop_strings"):
        generate_together(backbone, None, [request])
    with pytest.raises(InputError, match="num_rows is 0"):
        generate_together(backbone, None, [], num_rows=0)
