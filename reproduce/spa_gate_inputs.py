"""What a gate should see: the hidden state alone, as in SPA, or also what the base model's logits say of its doubt.

For each choice a linear gate and one with a hidden layer are trained by marginal likelihood on texts that the side
network has not seen, and their curves of quality against M are drawn on the test texts, teacher-forced. Served gates
read the hidden state alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from cells import Value
from mean import Mean
from page import Page
from result_folder import grid, plot_groups
from spa_gate_curve import at
from spa_study import Study, run_study
from spa_training import HELDOUT_SHARE, Method

from cotune.data.batches import EncodedExample
from cotune.evaluation.markup import Html
from cotune.evaluation.report import Section
from cotune.generation.output_basis import OutputBasis
from cotune.models.backbone import Backbone
from cotune.models.tap_ladder import TapLadder
from cotune.plugin import Plugin
from cotune.tuning.feature_set import FeatureSet
from cotune.tuning.gate import GateConfig, GateData, quality_curve, tune_gate
from cotune.tuning.gate_inputs import GATE_INPUTS, gate_inputs
from cotune.tuning.personal import encode_examples, split_examples
from cotune.tuning.side_evaluation import SideEvaluation, evaluate_side

MARKS = (0.1, 0.25, 0.5)
TOP_K = 1024
METHOD = Method(family="parallel")
SHAPES = {"linear": 0, "16 units": 16}
GATES = [f"{choice}, {shape}" for shape in SHAPES for choice in GATE_INPUTS]


def compare(study: Study, dataset: str, seed: int, plugin: Plugin) -> Value:
    """Nats per test token at each of `MARKS`, by choice of inputs."""
    backbone, args = study.backbone, study.args
    train, test = study.data(dataset)
    encoded = [
        encode_examples(backbone.tokenizer_json, part, backbone.description, args.max_length)
        for part in (train[: args.num_train], test)
    ]
    _, first, second = split_examples(encoded[0], HELDOUT_SHARE, seed)
    learn, judge = (_read(backbone, plugin, part) for part in ([*first, *second], encoded[1]))
    vocab_size = backbone.spec.vocab_size
    value: Value = {
        "base": float(judge[1].base_nats.mean(dtype=np.float64)),
        "integration": float(judge[1].side_nats.mean(dtype=np.float64)),
    }
    for choice in GATE_INPUTS:
        data, heldout = (
            GateData(gate_inputs(features, choice, vocab_size), evaluation) for features, evaluation in (learn, judge)
        )
        for shape, units in SHAPES.items():
            config = GateConfig(objective="marginal", units=units, seed=seed)
            curve = quality_curve(tune_gate(data, config).gate, heldout)
            points = [[point.consult_rate, point.nats_per_token] for point in curve]
            value[f"{choice}, {shape}"] = {str(mark): at(points, mark) for mark in MARKS}
    return value


def _read(backbone: Backbone, plugin: Plugin, texts: Sequence[EncodedExample]) -> tuple[FeatureSet, SideEvaluation]:
    network = TapLadder.from_config(plugin.config)
    network.load_state_dict({name: torch.from_numpy(tensor.copy()) for name, tensor in plugin.tensors.items()})
    features = FeatureSet.from_sequences(
        [backbone.features(np.asarray(one.input_ids, np.int64), one.first_target, TOP_K) for one in texts]
    )
    return features, evaluate_side(features, network, OutputBasis.from_bytes(plugin.output_basis), plugin.family)


def build(study: Study) -> Page:
    """Means over seeds for each data set."""
    measured: dict[str, dict[str, dict[str, Mean]]] = {}
    ends: dict[str, dict[str, Mean]] = {}
    for dataset in study.args.datasets:
        runs = [
            study.measured(
                dataset,
                METHOD,
                seed,
                {"what": "gate inputs"},
                lambda plugin, dataset=dataset, seed=seed: compare(study, dataset, seed, plugin),
            )
            for seed in range(study.args.seeds)
        ]
        measured[dataset] = {
            choice: {str(mark): Mean.of([run[choice][str(mark)] for run in runs]) for mark in MARKS} for choice in GATES
        }
        ends[dataset] = {name: Mean.of([run[name] for run in runs]) for name in ("base", "integration")}
    datasets, choices = study.args.datasets, GATES
    without = ["base", "integration"]
    columns = {
        f"{dataset}, M {mark}": [str(measured[dataset][choice][str(mark)]) for choice in choices]
        for dataset in datasets
        for mark in MARKS
    }
    bars = {choice: [measured[dataset][choice]["0.25"].point() for dataset in datasets] for choice in choices}
    return Page(
        title="SPA: what the gate sees",
        lead="Gates with the hidden state alone, and with entropy, margin and largest logits of the base model.",
        expected={"inputs": "the paper's gate reads the hidden state alone"},
        measured={"nats": measured, "ends": ends},
        sections=[
            Section(
                name="inputs",
                short="Inputs",
                heading="Nats per token by what the gate sees",
                content=Html(
                    plot_groups("inputs", "At M = 0.25, with 95 % intervals.", datasets, bars, y_label="nats per token")
                    + grid("Nats per test token, mean and 95 % interval over seeds", "gate sees", choices, columns)
                    + grid(
                        "Without a gate",
                        "always",
                        without,
                        {
                            dataset: [str(ends[dataset][name]) for name in ("base", "integration")]
                            for dataset in datasets
                        },
                    )
                ),
            )
        ],
        lines=[
            f"{dataset}, {choice:24s} " + "  ".join(f"M {mark} {found[choice][str(mark)]!s}" for mark in MARKS)
            for dataset, found in measured.items()
            for choice in choices
        ],
    )


if __name__ == "__main__":
    run_study("spa_gate_inputs", __doc__ or "", build)
