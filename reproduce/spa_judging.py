"""What a trained method of SPA's studies is worth: the texts that it writes, and how likely it finds what was written.

All methods are judged by the same greedy decoding and the same exact likelihoods, on texts that none has seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from spa_training import FAMILIES

from cotune.data.batches import EncodedExample
from cotune.data.templates import Example
from cotune.device.likelihood import base_nats, token_nats
from cotune.device.side_network import gate_of, open_side_network
from cotune.errors import InputError
from cotune.evaluation.judgement import judge
from cotune.evaluation.text_metrics import rouge_l
from cotune.generation.beam_reference import search
from cotune.generation.beams import BeamCounters, BeamOptions
from cotune.generation.modes import MODES
from cotune.generation.output_basis import OutputBasis
from cotune.generation.reference import Generation, Personal
from cotune.generation.request import GenerationRequest
from cotune.generation.side_state import first_position
from cotune.generation.text import TextCodec
from cotune.generation.together import generate_together
from cotune.models.backbone import Backbone
from cotune.plugin import Plugin
from cotune.tuning.lora import target_nats
from cotune.tuning.personal import encode_examples


def judge_backbone(backbone: Backbone, test: Sequence[Example], max_new_tokens: int, max_length: int) -> dict[str, Any]:
    """What the backbone, as it is now, writes and finds likely."""
    encoded = encode_examples(backbone.tokenizer_json, test, backbone.description, max_length)
    text = TextCodec(backbone.tokenizer_json)
    requests = [_request(each, backbone, "integration", max_new_tokens) for each in encoded]
    made = generate_together(backbone, None, requests)
    return _scores(text, test, made, target_nats(backbone, encoded))


def personal_of(plugin: Plugin) -> Personal:
    """The device's part, as a device runs it."""
    return Personal(
        corrector=open_side_network(plugin),
        output_basis=OutputBasis.from_bytes(plugin.output_basis),
        gate=gate_of(plugin),
    )


def beam_trips(
    backbone: Backbone, plugin: Plugin, test: Sequence[Example], num_beams: int, max_new_tokens: int, max_length: int
) -> dict[str, float]:
    """How often mode spa asks the device with so many beams: M per step, and what independent gates would come to.

    One beam is greedy decoding.
    """
    encoded = encode_examples(backbone.tokenizer_json, test, backbone.description, max_length)
    personal, counters = personal_of(plugin), BeamCounters()
    requests = [_request(each, backbone, "spa", max_new_tokens) for each in encoded]
    if num_beams == 1:
        asked = [one.consulted for made in generate_together(backbone, personal, requests) for one in made.decisions]
        counters.num_steps = counters.num_beam_steps = len(asked)
        counters.num_consulted = counters.num_trips = sum(asked)
    else:
        for request in requests:
            found = search(backbone, personal, request, BeamOptions(num_beams=num_beams)).counters
            for name in vars(counters):
                setattr(counters, name, getattr(counters, name) + getattr(found, name))
    return {
        "m_per_step": counters.trips_per_step,
        "consult_rate": counters.consult_rate,
        "independent": counters.predicted_trips_per_step(num_beams),
    }


def judge_plugin(
    backbone: Backbone, plugin: Plugin, test: Sequence[Example], max_new_tokens: int, max_length: int
) -> dict[str, Any]:
    """By mode of the plugin's family: what it writes and finds likely, how often the device is asked and decides.

    Without a gate there is only the mode that asks for every token. With one also, as `teacher_forced` and
    `free_running`, the shares of tokens by two facts: the gate asks, and the device's choice is another one than the
    base model's (SPA, table 4).
    """
    encoded = encode_examples(backbone.tokenizer_json, test, backbone.description, max_length)
    personal = personal_of(plugin)
    text = TextCodec(backbone.tokenizer_json)
    results: dict[str, Any] = {}
    window = personal.corrector.prompt_window
    firsts = [first_position(each.first_target, window) for each in encoded]
    leads = [each.first_target - first for each, first in zip(encoded, firsts, strict=True)]
    features = [
        backbone.features(each.input_ids, first, backbone.spec.vocab_size)
        for each, first in zip(encoded, firsts, strict=True)
    ]
    for mode in FAMILIES[plugin.family]:
        if MODES[mode].is_gated and personal.gate is None:
            continue
        nats = [
            token_nats(one, personal, mode, start=first, num_lead=lead)
            for one, first, lead in zip(features, firsts, leads, strict=True)
        ]
        requests = [_request(each, backbone, mode, max_new_tokens) for each in encoded]
        made = generate_together(backbone, personal, requests)
        decisions = [decision for one in made for decision in one.decisions]
        results[mode] = {
            **_scores(text, test, made, np.concatenate(nats)),
            "consult_rate": float(np.mean([d.consulted for d in decisions])),
            "changed_rate": float(np.mean([d.changed for d in decisions])),
        }
        if MODES[mode].is_gated:
            own = [
                EncodedExample(np.array([*each.input_ids[: each.first_target], *one.token_ids]), each.first_target)
                for each, one in zip(encoded, made, strict=True)
            ]
            results["teacher_forced"] = _two_by_two(backbone, personal, encoded, plugin.family)
            results["free_running"] = _two_by_two(backbone, personal, own, plugin.family)
            results["example"] = {
                "prompt": test[0].prompt[-400:],
                "pieces": text.pieces(made[0].token_ids),
                "token_ids": [int(token) for token in made[0].token_ids],
                "sources": [decision.source for decision in made[0].decisions],
                "consulted": [decision.consulted for decision in made[0].decisions],
            }
    results["base_nats"] = float(
        np.concatenate([base_nats(one, num_lead=lead) for one, lead in zip(features, leads, strict=True)]).mean()
    )
    return results


def _two_by_two(
    backbone: Backbone, personal: Personal, texts: Sequence[EncodedExample], family: str
) -> dict[str, float]:
    """Shares of all positions: asks and differs, asks and agrees, passes and differs, passes and agrees."""
    if personal.gate is None:
        raise InputError("the plugin has no gate, expected one; tune with more texts")
    combination = MODES[FAMILIES[family][0]]
    asks: list[bool] = []
    differs: list[bool] = []
    for each in texts:
        if len(each.input_ids) == each.first_target:
            continue
        first = first_position(each.first_target, personal.corrector.prompt_window)
        features = backbone.features(each.input_ids, first, backbone.spec.vocab_size)
        side = personal.corrector.open()
        for t in range(len(features)):
            correction = side.correct(first + t, features.tap_codes[t], features.tap_scales[t])
            if first + t < each.first_target:
                continue
            base = features.top_logits[t]
            logits = combination.combine(base, personal.output_basis.delta(correction))
            asks.append(personal.gate.consults(features.hidden[t].astype(np.float32)))
            differs.append(int(logits.argmax()) != int(base.argmax()))
    s, d = np.array(asks), np.array(differs)
    return {
        "asks_and_differs": float((s & d).mean()),
        "asks_and_agrees": float((s & ~d).mean()),
        "passes_and_differs": float((~s & d).mean()),
        "passes_and_agrees": float((~s & ~d).mean()),
    }


def _request(each: EncodedExample, backbone: Backbone, mode: str, max_new_tokens: int) -> GenerationRequest:
    return GenerationRequest(
        prompt_ids=np.asarray(each.input_ids[: each.first_target], np.int64),
        mode=mode,
        max_new_tokens=max_new_tokens,
        stop_token_ids=backbone.spec.eos_token_ids,
    )


def _scores(text: TextCodec, test: Sequence[Example], made: Sequence[Generation], nats: NDArray[Any]) -> dict[str, Any]:
    written = [text.decode(one.token_ids) for one in made]
    judged = judge([each.target for each in test], predictions=written)
    return {
        # Points of 100, as the paper gives them.
        "rouge_l": 100 * (judged.rouge_l or 0.0),
        "token_f1": 100 * (judged.token_f1 or 0.0),
        "exact_match": 100 * (judged.exact_match or 0.0),
        "nats_per_token": float(nats.mean(dtype=np.float64)),
        # Of each text, for differences between methods.
        "rouge_l_each": [
            round(100 * rouge_l(one.strip(), each.target.strip()), 2) for one, each in zip(written, test, strict=True)
        ],
    }
