"""A plugin that has learnt nothing is exactly the base model: over a socket, in text and in logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from clouds import restartable
from tiny_models import device_for, probe_ids, random_plugin, untrained_plugin

from cotune.cloud.hosted import HostedModel
from cotune.device.client import CloudClient
from cotune.device.runtime import Device, GenerationOptions
from cotune.generation.modes import mode_named
from cotune.generation.reference import generate
from cotune.generation.request import ANSWERS, SCHEDULES
from cotune.generation.sampling import Sampling
from cotune.models import load_side_network
from cotune.models.backbone import Backbone
from cotune.wire.codec import dequantise, quantise

pytestmark = pytest.mark.integration

PROMPT = "Write a short note to Anna about the garden."


@pytest.mark.parametrize("mode", ["integration", "spa"])
async def test_its_texts_are_those_of_the_base_model(backbone: Backbone, mode: str) -> None:
    plugin = untrained_plugin(backbone)
    for sampling in (Sampling(), Sampling(temperature=0.8, top_p=0.95, seed=3)):
        async with restartable(HostedModel.of(backbone)) as cloud:
            device = Device(plugin, cloud.connect)
            async with CloudClient(cloud.connect) as client:
                made = [
                    await device.generate_with(
                        client,
                        PROMPT,
                        GenerationOptions(
                            mode=mode, schedule=schedule, answer=answer, sampling=sampling, max_new_tokens=9
                        ),
                    )
                    for schedule in SCHEDULES
                    for answer in ANSWERS
                ]
        request = device.request_for(
            PROMPT, GenerationOptions(sampling=sampling, max_new_tokens=9), backbone.spec.eos_token_ids
        )
        base = generate(backbone, None, request)
        for one in made:
            assert one.token_ids == base.token_ids
            assert one.text == device.text.decode(base.token_ids)
            assert any(decision.consulted for decision in one.decisions)
            assert not any(decision.changed for decision in one.decisions)


@pytest.mark.parametrize("mode", ["integration", "spa"])
def test_its_logits_are_those_of_the_base_model_to_the_last_bit(backbone: Backbone, mode: str) -> None:
    personal = device_for(untrained_plugin(backbone)).personal
    cursor = backbone.cursor()
    tokens = probe_ids(backbone, 6)
    for _ in range(8):
        features = cursor.extend(tokens)
        correction = personal.corrector.open().correct(1, *quantise(features.taps))
        logits = mode_named(mode).combine(features.logits, personal.output_basis.delta(correction))
        assert np.array_equal(logits, features.logits)
        tokens = np.array([int(logits.argmax())])


def test_greedy_is_what_transformers_itself_generates(backbone: Backbone) -> None:
    device = device_for(untrained_plugin(backbone))
    options = GenerationOptions(max_new_tokens=20)
    for prompt in (PROMPT, "a", "When is the meeting with Ben?"):
        request = device.request_for(prompt, options, backbone.spec.eos_token_ids)
        ids = torch.from_numpy(request.prompt_ids)[None]
        with torch.inference_mode():
            theirs = backbone.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=20,
                pad_token_id=backbone.spec.pad_token_id,
            )
        assert generate(backbone, device.personal, request).token_ids == theirs[0, ids.shape[1] :].tolist()


def test_the_heads_two_forms_are_one(backbone: Backbone) -> None:
    """P s + p0 = Q (R s + r) for P = Q R and p0 = Q r, on the backbone's own taps; and Q is W_lm B, rounded."""
    plugin = random_plugin(backbone, ratio=0.5)
    network = load_side_network(plugin.kind, plugin.config, plugin.tensors).double()
    with torch.no_grad():
        network.head_bias.normal_(generator=torch.Generator().manual_seed(0))
    features = backbone.features(probe_ids(backbone), 1, top_k=1)
    taps = torch.from_numpy(dequantise(features.tap_codes, features.tap_scales)).double()
    basis = backbone.output_basis
    q = torch.from_numpy(basis.matrix()).double()
    with torch.no_grad():
        s = network.side_state(taps)  # (positions, side)
        p, p0 = q @ network.head_weight, q @ network.head_bias
        torch.testing.assert_close(s @ p.T + p0, network(taps) @ q.T)
    w_lm = backbone.model.get_output_embeddings().weight.detach().double()
    exact = w_lm @ torch.from_numpy(backbone.projections.basis).double()
    # Each entry is rounded to one of 127 steps up to the largest of its row.
    step = exact.abs().amax(dim=1, keepdim=True) / 127
    assert ((q - exact).abs() <= 0.501 * step).all()


def test_the_device_adds_what_the_head_says_up_to_int8(backbone: Backbone) -> None:
    """NumPy on the device, from the int8 taps to logits, against float64 without any rounding of the correction."""
    plugin = random_plugin(backbone, ratio=0.5)
    personal = device_for(plugin).personal
    network = load_side_network(plugin.kind, plugin.config, plugin.tensors).double()
    features = backbone.features(probe_ids(backbone), 1, top_k=1)
    taps = torch.from_numpy(dequantise(features.tap_codes, features.tap_scales)).double()
    q = personal.output_basis.matrix().astype(np.float64)
    with torch.no_grad():
        corrections = network(taps).numpy()
    for t, correction in enumerate(corrections):
        delta = personal.output_basis.delta(
            personal.corrector.open().correct(1, features.tap_codes[t], features.tap_scales[t])
        )
        # Half a step of the correction's int8 in every direction of the basis, and a little for float16 and float32.
        step = np.abs(correction).max() / 127
        bound = (0.51 * step + 1e-3 * np.abs(correction).max()) * np.abs(q).sum(axis=1) + 1e-5
        assert (np.abs(delta - (q * correction).sum(axis=1)) <= bound).all()
