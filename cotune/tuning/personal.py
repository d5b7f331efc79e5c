"""All three stages of SPA in one call: from texts and a source of features to a plugin with its gate.

    stage 1   the side network, consulted everywhere                         cotune.tuning.side
    stage 2   the gate, which tells where the device is worth a round trip   cotune.tuning.gate
    stage 3   the gate's threshold, from held-out quality against M          cotune.tuning.gate, own_texts

The texts are split three ways by a seed: most train the side network; of the rest one half chooses the epoch, the
other half draws the curve. What the gate learns from is up to its aim, see `cotune.tuning.gate`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Protocol, TypeVar

from tokenizers import Tokenizer

from cotune.data.batches import EncodedExample, encode_example
from cotune.data.label_words import encode_labelled
from cotune.data.templates import Example
from cotune.errors import InputError
from cotune.generation.output_basis import OutputBasis
from cotune.models.side_network import SideNetwork
from cotune.plugin import Plugin
from cotune.tuning.feature_cache import CollectProgress, FeatureCache, collect_features
from cotune.tuning.feature_set import FeatureSet
from cotune.tuning.gate import (
    GateConfig,
    GateData,
    GateResult,
    QualityPoint,
    choose_threshold,
    quality_curve,
    tune_gate,
)
from cotune.tuning.loop import EpochRecord, LoopProgress
from cotune.tuning.own_texts import LimitedWriter, Writer, own_texts, threshold_for_rate
from cotune.tuning.plugin_folder import build_plugin, gate_parameters
from cotune.tuning.side import SideConfig, tune_side
from cotune.tuning.side_evaluation import evaluate_side
from cotune.wire.description import CloudDescription
from cotune.wire.features import FeatureSource


class PersonalSource(FeatureSource, Protocol):
    """Features, and what they are features of: a cloud over the network, or a backbone in this process."""

    @property
    def description(self) -> CloudDescription:
        """The model."""
        ...


@dataclass(frozen=True, kw_only=True)
class PublicParts:
    """What a device fetches once from its cloud.

    Attributes:
        tokenizer_json: the bytes of `tokenizer.json`.
        output_basis: the shared basis in which corrections are spoken.
    """

    tokenizer_json: bytes
    output_basis: OutputBasis


@dataclass(frozen=True, kw_only=True)
class PersonalConfig:
    """How to make a plugin.

    Attributes:
        side: stage 1.
        gate: stage 2; None leaves the gate out.
        max_consult_rate: stage 3, the largest M that the gate may ask for on held-out texts.
        heldout_share: part of the texts that does not train the side network; 0 keeps all for it, and no gate.
        top_k: base logits kept for each training position; the exact loss needs all of the vocabulary.
        max_length: tokens of one sequence; None is the backbone's context.
        prompt_format: how a bare prompt becomes one like those in the texts, with {prompt} in it.
        seed: of the split.
    """

    side: SideConfig = field(default_factory=SideConfig)
    gate: GateConfig | None = field(default_factory=GateConfig)
    max_consult_rate: float = 0.25
    heldout_share: float = 0.2
    top_k: int = 1024
    max_length: int | None = None
    prompt_format: str = "{prompt}"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.heldout_share < 1:
            raise InputError(f"heldout_share is {self.heldout_share}, expected 0 <= heldout_share < 1")
        if self.top_k < 1:
            raise InputError(f"top_k is {self.top_k}, expected at least 1")
        if not 0 <= self.max_consult_rate <= 1:
            raise InputError(f"max_consult_rate is {self.max_consult_rate}, expected 0 to 1")
        if "{prompt}" not in self.prompt_format:
            raise InputError(f"prompt_format is {self.prompt_format!r}, expected a text with {{prompt}} in it")


@dataclass(frozen=True, kw_only=True)
class PersonalResult:
    """A plugin and how it came about.

    Attributes:
        plugin: ready to be saved.
        network: its side network, in PyTorch.
        side_curve: loss by epoch of stage 1.
        best_epoch: of these, whose side network it is.
        gate_curve: quality against M on held-out texts; empty without a gate.
        summary: held-out numbers, also in the plugin's `training`.
    """

    plugin: Plugin
    network: SideNetwork
    side_curve: list[EpochRecord]
    best_epoch: int
    gate_curve: list[QualityPoint]
    summary: dict[str, float]


ExampleT = TypeVar("ExampleT", Example, EncodedExample)
# Told the name of the stage, how much of it is done, out of how much, and a remark.
StageProgress = Callable[[str, int, int, str], None]


def encode_examples(
    tokenizer_json: bytes,
    examples: Sequence[Example],
    description: CloudDescription,
    max_length: int | None = None,
    *,
    labels: Sequence[str] = (),
) -> list[EncodedExample]:
    """Token ids of all examples, each at most the backbone's context long; with label words, also of each of these."""
    try:
        tokenizer = Tokenizer.from_str(tokenizer_json.decode())
    except Exception as error:  # the library raises bare Exceptions
        raise InputError(
            f"the tokenizer of {description.model} cannot be read ({error}), expected a tokenizer.json; ask its host"
        ) from error
    if not description.stop_token_ids:
        raise InputError(f"{description.model} names no token that ends a text; set eos_token_id in its config.json")
    longest, eos = min(max_length or description.max_context, description.max_context), description.stop_token_ids[0]
    if labels:
        return [
            encode_labelled(tokenizer, example, labels, eos_token_id=eos, max_length=longest) for example in examples
        ]
    return [encode_example(tokenizer, example, eos_token_id=eos, max_length=longest) for example in examples]


def split_examples(
    examples: Sequence[ExampleT], heldout_share: float, seed: int
) -> tuple[list[ExampleT], list[ExampleT], list[ExampleT]]:
    """For the side network, for the gate, and for the curve; the last two are empty where there is too little."""
    order = list(range(len(examples)))
    Random(seed).shuffle(order)
    num_each = int(len(examples) * heldout_share / 2)
    if num_each == 0:
        return list(examples), [], []
    gate, curve, side = order[:num_each], order[num_each : 2 * num_each], order[2 * num_each :]
    return [examples[i] for i in side], [examples[i] for i in gate], [examples[i] for i in curve]


def ungated_plugin(
    network: SideNetwork,
    family: str,
    description: CloudDescription,
    public: PublicParts,
    training: dict[str, object],
) -> Plugin:
    """A tuned network bound to the model that it was tuned on.

    Args:
        network: as tuned.
        family: `parallel` or `serial`, as it was tuned.
        description, public: of the model.
        training: a summary of the tuning, JSON values.
    """
    return build_plugin(
        network,
        None,
        family=family,
        backbone_digest=description.backbone_digest,
        projections_digest=description.projections_digest,
        tokenizer_digest=description.tokenizer_digest,
        tokenizer_json=public.tokenizer_json,
        output_basis=public.output_basis,
        training=training,
    )


def tune_plugin(
    source: PersonalSource,
    public: PublicParts,
    examples: Sequence[Example],
    config: PersonalConfig,
    *,
    cache: FeatureCache,
    network: SideNetwork | None = None,
    write: LimitedWriter | None = None,
    run_dir: Path | None = None,
    resume: bool = False,
    progress: StageProgress | None = None,
) -> PersonalResult:
    """Make a plugin from texts.

    Args:
        source: of features; asked once for each text, whatever the number of epochs.
        public: the model's public parts.
        examples: prompts and targets.
        config: how.
        cache: where features are kept.
        network: a side network to start from instead of a fresh one, such as that of `ladder_from_backbone`.
        write: writes texts with a plugin, at most as long as the longest given answer. A gate that aims at choices then
            learns from what the side network writes, and the threshold is set on what is written with the gate.
            None: from and on the given texts, which asks a little more or less in texts of its own.
        run_dir: for metrics and checkpoints.
        resume: go on from the checkpoints in `run_dir`.
        progress: told about each stage.

    Raises:
        InputError: too few texts, or settings that do not fit.
        NonFiniteLossError: a loss is nan or inf.
    """
    tell = progress or (lambda stage, done, total, note: None)
    description = source.description
    encoded = encode_examples(public.tokenizer_json, examples, description, config.max_length)
    for_side, for_gate, for_curve = split_examples(encoded, config.heldout_share, config.seed)
    if not for_side:
        raise InputError("there are no examples to tune on, expected at least one")

    def collect(what: str, part: list[EncodedExample]) -> FeatureSet:
        def told(p: CollectProgress) -> None:
            tell(f"features, {what}", p.num_done, p.num_sequences, f"{p.num_fetched} asked of the cloud")

        return collect_features(cache, source, part, config.top_k, told, prompt_window=config.side.prompt_window)

    features = collect("training", for_side)
    gate_features = collect("gate", for_gate) if for_gate else None
    curve_features = collect("held-out", for_curve) if for_curve else None

    def stage_dir(name: str) -> Path | None:
        return None if run_dir is None else run_dir / name

    def told_loop(stage: str) -> Callable[[LoopProgress], None]:
        return lambda p: tell(stage, p.step, p.num_steps, f"loss {p.loss:.3f}")

    side = tune_side(
        features,
        public.output_basis,
        config.side,
        heldout=gate_features,
        network=network,
        run_dir=stage_dir("side"),
        resume=resume,
        progress=told_loop("side network"),
    )
    summary: dict[str, float] = {}
    if curve_features is not None:
        evaluation = evaluate_side(curve_features, side.network, public.output_basis, config.side.family)
        summary = evaluation.summary()
    training: dict[str, object] = {
        "num_examples": len(examples),
        "num_target_tokens": len(features),
        "epochs": config.side.loop.epochs,
        "best_epoch": side.best_epoch,
        "seed": config.seed,
        "prompt_format": config.prompt_format,
        "heldout": summary,
    }
    plugin = ungated_plugin(side.network, config.side.family, description, public, training)
    curve: list[QualityPoint] = []
    if config.gate is not None and gate_features is not None and curve_features is not None:

        def gate_data(part: FeatureSet) -> GateData:
            return GateData(part.hidden, evaluate_side(part, side.network, public.output_basis, config.side.family))

        writer: Writer | None = None
        if write is not None:
            longest = max(len(one.input_ids) - one.first_target for one in encoded)
            writer = partial(write, max_new_tokens=longest, stop_token_ids=description.stop_token_ids)
        if config.gate.objective == "marginal":
            learnt_from = gate_data(gate_features)
        elif writer is None:
            learnt_from = GateData.joined([gate_data(features), gate_data(gate_features)])
        else:
            tell("own texts", 0, 1, "")
            learnt_from = gate_data(collect("own texts", own_texts(writer, plugin, [*for_side, *for_gate])))
        result: GateResult = tune_gate(
            learnt_from, config.gate, run_dir=stage_dir("gate"), resume=resume, progress=told_loop("gate")
        )
        curve = quality_curve(result.gate, gate_data(curve_features))
        point = choose_threshold(curve, max_consult_rate=config.max_consult_rate)
        gate = dataclasses.replace(result.gate, threshold=point.threshold)
        if writer is not None:
            tell("threshold", 0, 1, "from own texts")
            threshold = threshold_for_rate(
                writer, plugin, gate, source, [*for_gate, *for_curve], config.max_consult_rate
            )
            gate = dataclasses.replace(gate, threshold=threshold)
        plugin = dataclasses.replace(plugin, gate=gate_parameters(gate))
    return PersonalResult(
        plugin=plugin,
        network=side.network,
        side_curve=side.curve,
        best_epoch=side.best_epoch,
        gate_curve=curve,
        summary=summary,
    )
