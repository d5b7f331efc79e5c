from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import probe_ids, tiny_backbone

from cotune.compression.fewer_layers import spread_layers, with_fewer_layers
from cotune.errors import InputError
from cotune.models.anatomy import decoder_layers
from cotune.models.backbone import Backbone


def logits_of(backbone: Backbone) -> torch.Tensor:
    return backbone.target_logits([(probe_ids(backbone, 12), 1)])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_student_is_the_teacher_without_some_layers(architecture: str) -> None:
    teacher, cut = tiny_backbone(architecture), tiny_backbone(architecture)
    before = torch.get_rng_state()
    everything, student = with_fewer_layers(teacher, (0, 1, 2)), with_fewer_layers(teacher, (0, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(logits_of(everything), logits_of(teacher))
    # The layer in the middle passes the residual stream on as it is.
    decoder_layers(cut.model)[1].register_forward_hook(
        lambda layer, args, output: (args[0], *output[1:]) if isinstance(output, tuple) else args[0]
    )
    torch.testing.assert_close(logits_of(student), logits_of(cut), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits_of(student), logits_of(teacher), atol=0.1)
    assert (student.spec.num_layers, student.model.config.num_hidden_layers) == (2, 2)
    assert student.spec.tokenizer_digest == teacher.spec.tokenizer_digest
    assert student.spec.eos_token_ids == teacher.spec.eos_token_ids
    assert student.spec.num_parameters < teacher.spec.num_parameters
    generated = student.cursor().extend(np.array([3, 4, 5]))
    torch.testing.assert_close(
        torch.from_numpy(generated.logits), student.model(torch.tensor([[3, 4, 5]])).logits[0, -1], atol=1e-4, rtol=1e-4
    )


def test_nothing_is_shared() -> None:
    teacher = tiny_backbone("llama")
    expected = logits_of(teacher)
    student = with_fewer_layers(teacher, [1])
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.zero_()
    assert torch.equal(logits_of(teacher), expected)


@pytest.mark.parametrize("kept", [[], [3], [-1, 0], [1, 0], [1, 1]])
def test_layers_that_are_none_are_refused(kept: list[int]) -> None:
    with pytest.raises(InputError, match=r"kept is .* some of 0 to 2"):
        with_fewer_layers(tiny_backbone("llama"), kept)


def test_layers_are_spread_evenly() -> None:
    assert [spread_layers(6, num) for num in (1, 2, 3, 6)] == [(0,), (0, 5), (0, 2, 5), (0, 1, 2, 3, 4, 5)]
    for num_layers in range(1, 30):
        for num_kept in range(1, num_layers + 1):
            kept = spread_layers(num_layers, num_kept)
            assert len(set(kept)) == num_kept and list(kept) == sorted(kept) and kept[-1] < num_layers
    for num_kept in (0, 7):
        with pytest.raises(InputError, match="expected 1 to 6"):
            spread_layers(6, num_kept)
