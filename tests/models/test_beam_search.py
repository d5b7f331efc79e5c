"""Beam search of the base model against transformers' own, and what it leaves in the cache: nothing."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import device_for, random_plugin, tiny_backbone

from cotune.generation.beam_reference import search
from cotune.generation.beams import BeamOptions
from cotune.generation.request import GenerationRequest
from cotune.models.backbone import Backbone

MANY_STOPS = tuple(range(1, 60))


def by_transformers(backbone: Backbone, request: GenerationRequest, options: BeamOptions) -> Any:
    model, prompt = backbone.model, torch.from_numpy(request.prompt_ids)[None]
    config = model.generation_config
    before = config.eos_token_id
    config.eos_token_id = list(request.stop_token_ids) or None
    try:
        return model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            num_beams=options.num_beams,
            num_return_sequences=options.num_beams,
            length_penalty=options.length_penalty,
            early_stopping=False,
            do_sample=False,
            max_new_tokens=request.max_new_tokens,
            pad_token_id=backbone.spec.vocab_size - 1,
            return_dict_in_generate=True,
            output_scores=True,
        )
    finally:
        config.eos_token_id = before


@pytest.mark.parametrize("num_beams", [2, 3, 8])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_same_texts_and_scores_as_transformers(architecture: str, num_beams: int) -> None:
    backbone = tiny_backbone(architecture, seed=num_beams)
    lengths = set[int]()
    cases = itertools.product(enumerate(((1,), MANY_STOPS, ())), (0.0, 1.0, 2.0, -1.0))
    for (seed, stops), length_penalty in cases:
        request = GenerationRequest(
            prompt_ids=np.random.default_rng(seed).integers(60, backbone.spec.vocab_size, 7),
            max_new_tokens=10,
            stop_token_ids=stops,
        )
        options = BeamOptions(num_beams=num_beams, length_penalty=length_penalty)
        ours, theirs = search(backbone, None, request, options), by_transformers(backbone, request, options)
        for text, sequence in zip(ours.beams, theirs.sequences[:, 7:].tolist(), strict=True):
            padding = sequence[len(text.token_ids) :]
            assert (sequence[: len(text.token_ids)], set(padding) <= {399}) == (text.token_ids, True)
        scores = [text.score for text in ours.beams]
        assert scores == pytest.approx(theirs.sequences_scores.tolist(), rel=1e-4)
        lengths |= {len(text.token_ids) for text in ours.beams}
    assert len(lengths) > 1  # some texts end early
    assert backbone.kv_pool.num_used == 0


def test_long_prompts_and_texts_share_blocks_and_give_them_back() -> None:
    """Beams of 100 tokens in blocks of 64: forks copy what they write to, and nothing else."""
    backbone = tiny_backbone("llama")
    personal = device_for(random_plugin(backbone, 0.5)).personal
    prompt = np.random.default_rng(0).integers(60, backbone.spec.vocab_size, 62)
    request = GenerationRequest(prompt_ids=prompt, max_new_tokens=10, mode="spa")
    found = search(backbone, personal, request, BeamOptions(num_beams=4))
    assert backbone.kv_pool.num_used == 0
    assert 0 < found.counters.num_consulted < found.counters.num_beam_steps
    # Each text by itself, read in one go, is worth what the search said.
    for text in found.beams:
        log_prob = 0.0
        cursor = backbone.cursor()
        features = cursor.extend(prompt)
        for decision in text.decisions:
            logits = features.logits
            if decision.consulted:
                assert personal.gate is not None and personal.gate.consults(features.hidden)
                correction = personal.corrector.open().correct(1, *features.quantised_taps())
                logits = logits + personal.output_basis.delta(correction)
            wide = logits.astype(np.float64)
            log_prob += wide[decision.token_id] - np.logaddexp.reduce(wide)
            features = cursor.extend(np.array([decision.token_id]))
        assert log_prob == pytest.approx(text.log_prob, rel=1e-9)
        cursor.close()
