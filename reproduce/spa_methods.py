"""One cell of SPA's tables: train one method on one data set, then judge it on texts that it has not seen.

Every method gets the same training texts, the same split of these for the choice of an epoch and of the gate, and at
most the same number of trainable parameters; it is judged by the same greedy decoding and the same exact likelihoods.

    base       the frozen backbone
    lora       LoRA on every linear layer, in the cloud, through peft
    parallel   the side network beside the backbone: Fully Integration, and SPA with its gate
    serial     the side network in place of the head: LST, and Fully Separation with its gate
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cotune.data.batches import EncodedExample
from cotune.data.templates import Example
from cotune.device.likelihood import base_nats, token_nats
from cotune.device.side_network import gate_of, open_side_network
from cotune.errors import InputError
from cotune.evaluation.judgement import judge
from cotune.generation.beam_reference import search
from cotune.generation.beams import BeamCounters, BeamOptions
from cotune.generation.modes import MODES
from cotune.generation.output_basis import OutputBasis
from cotune.generation.reference import Generation, Personal, generate
from cotune.generation.request import GenerationRequest
from cotune.generation.side_state import first_position
from cotune.generation.text import TextCodec
from cotune.models.adapters import LoraShape, rank_for_budget
from cotune.models.backbone import Backbone
from cotune.models.tap_ladder import TapLadderConfig
from cotune.plugin import Plugin
from cotune.tuning.feature_cache import FeatureCache
from cotune.tuning.loop import EpochRecord, LoopConfig
from cotune.tuning.lora import LoraConfig, target_nats, tune_lora
from cotune.tuning.personal import PersonalConfig, PublicParts, encode_examples, split_examples, tune_plugin
from cotune.tuning.side import AttentionShape, SideConfig

FAMILIES = {"parallel": ("integration", "spa"), "serial": ("ladder", "separation")}
HELDOUT_SHARE = 0.2


@dataclass(frozen=True, kw_only=True)
class Training:
    """How one method is trained.

    Attributes:
        learning_rate, epochs: of the one loop that all methods share.
        side_width: of side networks; their parameters are the budget of every other method.
        remembers: side networks with attention.
        seed: of the split, the initial weights and the order.
        max_length: tokens of one text.
    """

    learning_rate: float
    epochs: int
    side_width: int = 64
    remembers: bool = False
    seed: int = 0
    max_length: int = 256


def train_plugin(
    backbone: Backbone, examples: Sequence[Example], family: str, training: Training, cache: Path
) -> tuple[Plugin, dict[str, Any]]:
    """A plugin with its gate, and what its training came to."""
    config = PersonalConfig(
        side=SideConfig(
            loop=LoopConfig(epochs=training.epochs, learning_rate=training.learning_rate),
            family=family,
            side_width=training.side_width,
            inner_width=training.side_width,
            attention=AttentionShape() if training.remembers else None,
            seed=training.seed,
        ),
        heldout_share=HELDOUT_SHARE,
        max_length=training.max_length,
        seed=training.seed,
    )
    store = FeatureCache(
        cache, backbone_digest=backbone.spec.backbone_digest, projections_digest=backbone.projections.digest
    )
    public = PublicParts(tokenizer_json=backbone.tokenizer_json, output_basis=backbone.output_basis)
    started_s = time.perf_counter()
    stages: dict[str, float] = {}

    def tell(stage: str, done: int, total: int, note: str) -> None:
        stages[stage.partition(",")[0]] = time.perf_counter() - started_s

    result = tune_plugin(backbone, public, examples, config, cache=store, progress=tell)
    learnt = {
        "num_parameters": result.plugin.num_parameters,
        "train_s": time.perf_counter() - started_s - stages.get("features", 0.0),
        "features_s": stages.get("features", 0.0),
        "selection_nats": result.summary.get("side_nats_per_token"),
        "epochs": _losses(result.side_curve),
        "gate_curve": [[point.consult_rate, point.nats_per_token] for point in result.gate_curve[::5]],
    }
    return result.plugin, learnt


@contextmanager
def trained_lora(
    backbone: Backbone, examples: Sequence[Example], budget: int, training: Training
) -> Iterator[dict[str, Any]]:
    """Within it the backbone is the adapted one; what the training came to."""
    encoded = encode_examples(backbone.tokenizer_json, examples, backbone.description, training.max_length)
    train, first, second = split_examples(encoded, HELDOUT_SHARE, training.seed)
    config = LoraConfig(
        loop=LoopConfig(epochs=training.epochs, learning_rate=training.learning_rate),
        shape=LoraShape(rank=rank_for_budget(backbone.model, budget)),
        seed=training.seed,
    )
    started_s = time.perf_counter()
    # As for side networks: one half of what is held out chooses the epoch, the other judges the learning rate.
    result = tune_lora(backbone, train, config, heldout=first)
    train_s = time.perf_counter() - started_s
    with result.adapter.attach(backbone.model):
        yield {
            "num_parameters": result.adapter.num_parameters,
            "train_s": train_s,
            "features_s": 0.0,
            "selection_nats": float(target_nats(backbone, second).mean(dtype=np.float64)),
            "epochs": _losses(result.curve),
        }


def parameter_budget(backbone: Backbone, side_width: int) -> int:
    """Trainable numbers of a tap ladder of that width; a gate is not counted."""
    description = backbone.description
    return TapLadderConfig(
        num_taps=description.num_taps,
        tap_dim=description.tap_dim,
        basis_dim=description.basis_dim,
        side_width=side_width,
        inner_width=side_width,
    ).num_parameters


def judge_backbone(backbone: Backbone, test: Sequence[Example], max_new_tokens: int, max_length: int) -> dict[str, Any]:
    """What the backbone, as it is now, writes and finds likely."""
    encoded = encode_examples(backbone.tokenizer_json, test, backbone.description, max_length)
    text = TextCodec(backbone.tokenizer_json)
    made = [generate(backbone, None, _request(each, backbone, "integration", max_new_tokens)) for each in encoded]
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
    for each in encoded:
        request = _request(each, backbone, "spa", max_new_tokens)
        if num_beams == 1:
            asked = [decision.consulted for decision in generate(backbone, personal, request).decisions]
            counters.num_steps += len(asked)
            counters.num_beam_steps += len(asked)
            counters.num_consulted += sum(asked)
            counters.num_trips += sum(asked)
            continue
        made = search(backbone, personal, request, BeamOptions(num_beams=num_beams)).counters
        for name in vars(counters):
            setattr(counters, name, getattr(counters, name) + getattr(made, name))
    return {
        "m_per_step": counters.trips_per_step,
        "consult_rate": counters.consult_rate,
        "independent": counters.predicted_trips_per_step(num_beams),
    }


def judge_plugin(
    backbone: Backbone, plugin: Plugin, test: Sequence[Example], max_new_tokens: int, max_length: int
) -> dict[str, Any]:
    """By mode of the plugin's family: what it writes and finds likely, how often the device is asked and decides.

    Also, as `teacher_forced` and `free_running`, the shares of tokens by two facts: the gate asks, and the
    device's choice is another one than the base model's (SPA, table 4).
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
        nats = [
            token_nats(one, personal, mode, start=first, num_lead=lead)
            for one, first, lead in zip(features, firsts, leads, strict=True)
        ]
        made = [generate(backbone, personal, _request(each, backbone, mode, max_new_tokens)) for each in encoded]
        decisions = [decision for one in made for decision in one.decisions]
        results[mode] = {
            **_scores(text, test, made, np.concatenate(nats)),
            "consult_rate": float(np.mean([d.consulted for d in decisions])),
            "changed_rate": float(np.mean([d.changed for d in decisions])),
        }
        if mode == FAMILIES[plugin.family][1]:
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
    }


def _losses(curve: Sequence[EpochRecord]) -> list[list[float | None]]:
    """[epoch, training loss, held-out loss] of each epoch."""
    return [[record.epoch, record.train_loss, record.heldout_loss] for record in curve]
