"""Soft prompts as text: there and back, past every detector, and through the same fit as any other prompt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redactors import redactor_here
from tiny_models import tiny_backbone

from cotune.data.templates import format_request
from cotune.errors import InputError, RefusedError
from cotune.evaluation import token_f1
from cotune.sandwich.bilevel.solve import SolveConfig
from cotune.sandwich.budget import Budget
from cotune.sandwich.chat import ChatRequest
from cotune.sandwich.cloud_gate import CloudGate
from cotune.sandwich.examples import PrivateExample
from cotune.sandwich.fit import FitConfig, fit
from cotune.sandwich.pipeline import Pipeline, PipelineConfig
from cotune.sandwich.prompts.cma_response import CmaResponse
from cotune.sandwich.prompts.latent import LatentPrompt
from cotune.sandwich.prompts.soft_prefix import SoftPrefix
from cotune.sandwich.prompts.soft_prompt import HostedCloud, soft_numbers, soft_words
from cotune.sandwich.prompts.variable import PromptVariable
from cotune.sandwich.redact import RedactedJson


@settings(max_examples=50)
@given(st.lists(st.floats(-1e9, 1e9, width=32), min_size=1, max_size=20))
def test_numbers_come_back_in_single_precision(numbers: list[float]) -> None:
    assert soft_numbers(soft_words(np.array(numbers))).tolist() == numbers


def test_no_detector_takes_the_words_for_something_private() -> None:
    with redactor_here() as redactor:
        for seed in range(20):
            words = soft_words(np.random.default_rng(seed).normal(size=50))
            assert redactor.request().redact(words).replacements == ()


@pytest.mark.parametrize("text", ["", "soft", "hard aaaaaaaa", "soft aaaaaaa", "soft zzzzzzzz", "soft hpmaaaaa"])
def test_what_is_no_soft_prompt_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="no soft prompt"):
        soft_numbers(text)


def request(*contents: str) -> ChatRequest:
    roles = ("system", "user", "assistant")
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    return ChatRequest(model="m", messages=RedactedJson(messages, {}), max_tokens=4)


def test_the_hosted_model_writes_behind_the_prefix() -> None:
    prefix = SoftPrefix(tiny_backbone("llama"), num_tokens=2, dim=3)
    z = np.array([0.5, -1.0, 0.0])
    answer = HostedCloud(prefix).send(request(soft_words(z), "Hi"), timeout_s=1)
    assert answer.text == prefix.write(z, format_request("Hi"), max_new_tokens=4)
    assert answer.tokens_in == prefix.num_tokens_of(format_request("Hi")) + 2
    for wrong in (request("Be kind.", "Hi"), request(soft_words(np.zeros(2)), "Hi"), request(soft_words(z))):
        with pytest.raises(RefusedError) as caught:
            HostedCloud(prefix).send(wrong, timeout_s=1)
        assert caught.value.code == 400


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("has_cma", [False, True])
def test_a_fit_finds_numbers_and_pays_for_each_prompt_once(tmp_path: Path, has_cma: bool) -> None:
    """The target is what the model writes behind other numbers than those to begin with."""
    if has_cma:
        pytest.importorskip("cma", reason="cma is not installed")
    prefix = SoftPrefix(tiny_backbone("llama"), num_tokens=2, dim=2)
    inner = LatentPrompt(soft_words, dim=2, smoothing_radius=40.0, num_directions=2, response_steps=2)
    variable: PromptVariable = CmaResponse(inner, spread=40.0, max_evaluations=8) if has_cma else inner
    wanted = prefix.write(np.array([40.0, 0.0]), format_request("Hi"), max_new_tokens=4) or "x"
    examples = [PrivateExample("Hi", wanted), PrivateExample("Hi", wanted)]
    with redactor_here() as redactor:
        pipeline = Pipeline(redactor, CloudGate(HostedCloud(prefix)), PipelineConfig(model="m", max_tokens=4))
        found = fit(
            pipeline,
            examples,
            examples[:1],
            token_f1,
            variable=variable,
            budget=Budget(calls=60),
            folder=tmp_path,
            config=FitConfig(solve=SolveConfig(num_steps=1, num_restore_steps=0), certificate_share=0),
        )
    assert len(soft_numbers(found.prompt)) == 2 and found.score is not None and found.start_score is not None
    assert found.score >= found.start_score and 0 < found.spent.calls <= 60
