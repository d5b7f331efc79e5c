from __future__ import annotations

import numpy as np
import peft
import pytest
import torch

from cotune.errors import InputError
from cotune.models import Backbone
from cotune.models.peft_adapter import PeftAdapter
from cotune.models.prompted import generate_prompted

PROMPT = np.arange(3, 9)
CONFIGS = {
    "prompt": peft.PromptTuningConfig(task_type=peft.TaskType.CAUSAL_LM, num_virtual_tokens=4),
    "prefix": peft.PrefixTuningConfig(task_type=peft.TaskType.CAUSAL_LM, num_virtual_tokens=4),
}


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_each_token_is_the_likeliest_after_the_prompt_and_those_before(backbone: Backbone, kind: str) -> None:
    """With the whole text read again for each token, by peft's own forward."""
    adapter = PeftAdapter.fresh(backbone.model, CONFIGS[kind], seed=1)
    with adapter.attach(backbone.model) as model:
        made = generate_prompted(model, PROMPT, max_new_tokens=9, stop_token_ids=())
        for count in range(9):
            ids = torch.tensor([[*PROMPT, *made[:count]]])
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1]
            assert made[count] == int(logits.argmax())
        stop = made[3]
        first = made.index(stop)
        assert generate_prompted(model, PROMPT, max_new_tokens=9, stop_token_ids=(stop,)) == made[: first + 1]


def test_a_soft_prompt_of_real_embeddings_is_that_text(llama: Backbone) -> None:
    """Three tokens as virtual ones, against the same three in the text."""
    adapter = PeftAdapter.fresh(
        llama.model, peft.PromptTuningConfig(task_type=peft.TaskType.CAUSAL_LM, num_virtual_tokens=3)
    )
    (name,) = adapter.params
    front = torch.tensor([7, 21, 13])
    adapter = adapter.trained({name: llama.model.get_input_embeddings().weight[front].detach()})
    with adapter.attach(llama.model) as model:
        made = generate_prompted(model, PROMPT, max_new_tokens=8, stop_token_ids=())
    expected: list[int] = []
    for _ in range(8):
        states = llama.forward_states(torch.tensor([[*front, *PROMPT, *expected]]))
        expected.append(int(states.logits[0, -1].argmax()))
    assert made == expected


@pytest.mark.parametrize(("prompt", "num_new"), [(PROMPT[:0], 3), (PROMPT, 31)])
def test_what_does_not_fit_is_refused(llama: Backbone, prompt: np.ndarray, num_new: int) -> None:
    with (
        PeftAdapter.fresh(llama.model, CONFIGS["prompt"]).attach(llama.model) as model,
        pytest.raises(InputError, match=f"the prompt has {len(prompt)} tokens beside 4 virtual and {num_new} new"),
    ):
        generate_prompted(model, prompt, max_new_tokens=num_new, stop_token_ids=())
