"""Every kind of side network that the SPA study compares, trained on a backbone's features and served by its cloud."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clouds import restartable
from tiny_models import device_for, plugin_of, tiny_backbone, tokenizer_json

from cotune.cloud.hosted import HostedModel
from cotune.data.batches import EncodedExample
from cotune.device.client import CloudClient
from cotune.device.likelihood import token_nats
from cotune.device.stream import DeviceStream
from cotune.generation.reference import generate
from cotune.generation.request import GenerationRequest
from cotune.models.backbone import Backbone
from cotune.models.projections import Projections, spread_taps
from cotune.tuning.backbone_start import ladder_from_backbone
from cotune.tuning.feature_cache import FeatureCache, collect_features
from cotune.tuning.loop import LoopConfig
from cotune.tuning.side import AttentionShape, SideConfig, tune_side
from cotune.tuning.side_evaluation import evaluate_side

pytestmark = pytest.mark.integration

LAYERS, HIDDEN = 3, 24
ALL = tuple(range(LAYERS + 1))


def shared() -> Projections:
    return Projections.random(tap_layers=ALL, hidden_size=HIDDEN, tap_dim=12, basis_dim=16)


ATTENTION = AttentionShape(head_dim=6, context=9, prompt_window=5)
VARIANTS: dict[str, tuple[Callable[[], Projections], dict[str, Any]]] = {
    "shared": (shared, {}),
    "narrow": (shared, {"side_width": 4}),
    "two taps": (lambda: shared().keep_taps(spread_taps(LAYERS + 1, 2)), {}),
    "one tap": (lambda: shared().keep_taps(spread_taps(LAYERS + 1, 1)), {}),
    "personal": (lambda: Projections.whole_states(tap_layers=ALL, basis=shared().basis), {}),
    "published": (lambda: Projections.identity(tap_layers=ALL, hidden_size=HIDDEN), {"is_published": True}),
    "attention": (shared, {"attention": ATTENTION}),
    "lst": (shared, {"attention": ATTENTION, "init": "backbone", "side_width": 12}),
}


def texts(num: int) -> list[EncodedExample]:
    """A prompt of any tokens, then a count upwards from its last."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(num):
        prompt = rng.integers(2, 30, rng.integers(3, 9))
        made.append(EncodedExample(np.concatenate([prompt, prompt[-1] + np.arange(1, 7), [1]]), len(prompt)))
    return made


@pytest.mark.parametrize("family", ["parallel", "serial"])
@pytest.mark.parametrize("variant", VARIANTS)
async def test_it_trains_and_runs_on_the_device(tmp_path: Path, variant: str, family: str) -> None:
    make, changes = VARIANTS[variant]
    backbone = Backbone.from_model(tiny_backbone("llama").model, tokenizer_json(), projections=make())
    vocab_size = backbone.spec.vocab_size
    config = SideConfig(
        **{"side_width": 16, "inner_width": 16, **changes},
        family=family,
        loop=LoopConfig(epochs=6, learning_rate=0.02),
        num_batch_positions=40,
    )
    examples = texts(24)
    cache = FeatureCache(tmp_path, backbone_digest="b", projections_digest="p")
    features = collect_features(cache, backbone, examples, vocab_size, prompt_window=config.prompt_window)
    network = ladder_from_backbone(backbone, examples, config) if config.init == "backbone" else None
    result = tune_side(features, backbone.output_basis, config, heldout=features, network=network)
    losses = [record.heldout_loss for record in result.curve]
    assert losses[result.best_epoch] < losses[0] - 0.2  # type: ignore[operator]

    # On the device each position costs what training says.
    personal = device_for(plugin_of(backbone, result.network, None, family)).personal
    mode = {"parallel": "integration", "serial": "ladder"}[family]
    first = cache.get(cache.key(examples[0], vocab_size, config.prompt_window))
    assert first is not None
    num_lead = len(first) - int(features.offsets[1])
    nats = token_nats(first, personal, mode, start=examples[0].first_target - num_lead, num_lead=num_lead)
    expected = evaluate_side(features, result.network, backbone.output_basis, family).side_nats[: len(nats)]
    np.testing.assert_allclose(nats, expected, atol=0.05)

    # And the cloud serves it: the reference's tokens, and no more bytes than its taps have.
    request = GenerationRequest(
        prompt_ids=examples[1].input_ids[: examples[1].first_target],
        max_new_tokens=8,
        stop_token_ids=backbone.spec.eos_token_ids,
        mode=mode,
    )
    description = backbone.description
    shape = description.num_taps, description.tap_dim
    async with restartable(HostedModel.of(backbone)) as cloud, CloudClient(cloud.connect) as client:
        stream = DeviceStream(request, personal, tap_shape=shape, schedule="blocking", answer="token")
        before = client.bytes_received
        await client.generate(stream)
        num_bytes = client.bytes_received - before
    reference = generate(backbone, personal, request)
    assert stream.token_ids == reference.token_ids
    tap_bytes, num_tokens = shape[0] * (shape[1] + 2), len(stream.token_ids)
    assert num_bytes >= tap_bytes * num_tokens
    if family == "serial":
        # Nothing but taps and heads of frames; the parallel family asks for base logits as well.
        assert num_bytes <= (tap_bytes + 80) * (num_tokens + config.prompt_window) + 200
