from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import tiny_models
import torch

from cotune.cli.audit_scoring import backbone_scores
from cotune.data.assistant_text import generate_exchanges
from cotune.data.templates import Example, format_answer, format_request
from cotune.evaluation.canaries import SecretSpace, plant
from cotune.evaluation.memorisation import Audit, AuditConfig, Limits, TextScore, audit
from cotune.generation.reference import generate
from cotune.generation.request import GenerationRequest
from cotune.models.adapters import LoraAdapter, LoraShape
from cotune.models.backbone import Backbone
from cotune.models.bottleneck import BottleneckAdapter
from cotune.tuning.loop import LoopConfig
from cotune.tuning.lora import LoraConfig, target_nats, tune_lora
from cotune.tuning.personal import encode_examples
from cotune.tuning.private import PrivateConfig, tune_private

TEXTS = [Example(format_request(each.request), format_answer(each.answer)) for each in generate_exchanges(6, seed=1)]
SPACE = SecretSpace(kind="digits", length=4)
CONFIG = AuditConfig(num_prefix_tokens=1, num_next_tokens=4, num_candidates=255)
LOOP = LoopConfig(epochs=6, learning_rate=0.02)
SHAPE = LoraShape(rank=4)


def silent(done: int, total: int, note: str = "") -> None:
    pass


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_models.tiny_backbone("llama")


def by_generating(backbone: Backbone, example: Example) -> list[bool]:
    """Each target token by a generation of one token behind the true text before it."""
    (encoded,) = encode_examples(backbone.tokenizer_json, [example], backbone.description)
    found = []
    for place in range(encoded.first_target, len(encoded.input_ids)):
        request = GenerationRequest(prompt_ids=encoded.input_ids[:place], max_new_tokens=1, stop_token_ids=())
        found.append(generate(backbone, None, request).token_ids == [int(encoded.input_ids[place])])
    return found


def test_scores_are_the_likelihoods_and_the_greedy_tokens(backbone: Backbone) -> None:
    # So little rank that some tokens are right and some are not.
    encoded = encode_examples(backbone.tokenizer_json, TEXTS, backbone.description)
    config = LoraConfig(loop=LoopConfig(epochs=8, learning_rate=0.02), shape=SHAPE)
    adapter = tune_lora(backbone, encoded, config).adapter
    found = backbone_scores(backbone, adapter, None, "lora", silent, num_batch_texts=4)(TEXTS)
    assert list(found) == ["lora", "base"]
    np.testing.assert_allclose(
        np.concatenate([each.nats for each in found["base"]]), target_nats(backbone, encoded), atol=1e-4
    )
    with adapter.attach(backbone.model):
        np.testing.assert_allclose(
            np.concatenate([each.nats for each in found["lora"]]), target_nats(backbone, encoded), atol=1e-4
        )
        likeliest = [by_generating(backbone, text) for text in TEXTS[:2]]
    assert 0 < sum(map(sum, likeliest)) < sum(map(len, likeliest))
    assert [each.is_likeliest.tolist() for each in found["lora"][:2]] == likeliest
    assert not backbone.model.get_output_embeddings()._forward_hooks


def test_greedy_continuation_is_what_extraction_asks(backbone: Backbone) -> None:
    encoded = encode_examples(backbone.tokenizer_json, TEXTS[:3], backbone.description)
    config = LoraConfig(loop=LoopConfig(epochs=45, learning_rate=0.02), shape=SHAPE)
    adapter = tune_lora(backbone, encoded, config).adapter
    score = backbone_scores(backbone, adapter, None, "lora", silent)
    audited = audit(score, TEXTS[:3], CONFIG).models[0].extraction
    reproduced = 0
    with adapter.attach(backbone.model):
        for each in encoded:
            first = each.first_target + 1
            request = GenerationRequest(prompt_ids=each.input_ids[:first], max_new_tokens=4, stop_token_ids=())
            reproduced += generate(backbone, None, request).token_ids == each.input_ids[first : first + 4].tolist()
    assert audited.num_extracted == reproduced > 0


@pytest.mark.parametrize("which", ["adapter", "other model", "alone"])
def test_what_stands_beside_it(backbone: Backbone, which: str) -> None:
    if which == "adapter":
        fresh = BottleneckAdapter.fresh(backbone.model, 2)
        found = backbone_scores(backbone, fresh, None, "adapter", silent)(TEXTS[:2])
        # An untrained adapter is the base model.
        np.testing.assert_allclose(found["adapter"][0].nats, found["base"][0].nats, atol=1e-5)
    elif which == "other model":
        other = tiny_models.tiny_backbone("gpt2")
        found = backbone_scores(backbone, None, other, "model", silent)(TEXTS[:2])
        alone = backbone_scores(other, None, None, "model", silent)(TEXTS[:2])
        np.testing.assert_array_equal(found["base"][0].nats, alone["model"][0].nats)
        assert not np.allclose(found["model"][0].nats, found["base"][0].nats)
    else:
        assert list(backbone_scores(backbone, None, None, "model", silent)(TEXTS[:2])) == ["model"]


def audited_after(backbone: Backbone, train: Callable[[list[Example]], LoraAdapter]) -> Audit:
    texts, manifest = plant(TEXTS, (1, 16), space=SPACE, seed=2)
    score = backbone_scores(backbone, train(texts), None, "lora", silent)
    return audit(score, texts, CONFIG, manifest=manifest)


def test_a_canary_planted_16_times_is_learnt_by_heart_and_breaks_a_limit(backbone: Backbone) -> None:
    def train(texts: list[Example]) -> LoraAdapter:
        encoded = encode_examples(backbone.tokenizer_json, texts, backbone.description)
        return tune_lora(backbone, encoded, LoraConfig(loop=LOOP, shape=SHAPE)).adapter

    found = audited_after(backbone, train)
    after, before = (model.exposures[-1] for model in found.models)
    assert after.times == before.times == 16
    assert after.bits > before.bits + 2 and after.bits >= 6
    with pytest.raises(Exception, match="memorised too much"):
        found.check(Limits(max_exposure=6.0))


def test_training_with_privacy_does_not_learn_it(backbone: Backbone) -> None:
    pytest.importorskip("opacus", reason="gradients of single texts come from Opacus")

    def train(texts: list[Example]) -> LoraAdapter:
        encoded = encode_examples(backbone.tokenizer_json, texts, backbone.description)
        config = PrivateConfig(
            noise_multiplier=4.0, clip=0.1, delta=0.01, num_batch_texts=8, secret_seed=1, loop=replace(LOOP, epochs=3)
        )
        fresh = LoraAdapter.fresh(backbone.model, SHAPE)
        return LoraAdapter(shape=SHAPE, params=tune_private(backbone, fresh, encoded, config).params)

    found = audited_after(backbone, train)
    found.check(Limits(max_exposure=6.0))


def test_scores_are_in_the_order_of_the_texts(backbone: Backbone) -> None:
    score = backbone_scores(backbone, None, None, "model", silent, num_batch_texts=2)
    together: list[TextScore] = score(TEXTS)["model"]
    for text, found in zip(TEXTS, together, strict=True):
        np.testing.assert_allclose(found.nats, score([text])["model"][0].nats, atol=1e-4)
    assert torch.is_grad_enabled()
