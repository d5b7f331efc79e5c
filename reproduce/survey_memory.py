"""Fine-tuning and deploying LLMs over edges (arXiv 2408.10691), first experiment: full, PEFT and MEFT side by side.

Each way to tune a model by its memory (peak above the weights in a process of its own, beside what `cotune plan`
predicts), its quality (nats per held-out token) and its time for a step. With `--shapes` the predicted memory of
published models, with `--measure-shapes` measured too, with random weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import OutOfTimeError, Value
from mean import Mean
from numpy.typing import NDArray
from page import Page, about_run
from result_folder import grid, plot_groups
from spa_judging import personal_of
from spa_training import HELDOUT_SHARE, Method, Training, parameter_budget, train_plugin
from study_options import add_run_options, at_least_one, open_cells, results_of, study_parser
from study_texts import persona_texts

from cotune.data import read_splits
from cotune.data.batches import EncodedExample
from cotune.data.templates import Example
from cotune.device.likelihood import token_nats
from cotune.errors import CotuneError, InputError
from cotune.evaluation.markup import Html
from cotune.evaluation.measured_memory import run_measured
from cotune.evaluation.method_cost import MethodCost, MethodSettings, predict_cost, quantised_bytes
from cotune.evaluation.model_shape import KNOWN_SHAPES, ModelShape
from cotune.evaluation.report import Section
from cotune.evaluation.workload import Workload
from cotune.generation.side_state import first_position
from cotune.models.backbone import Backbone
from cotune.models.low_bit import low_bit_placement
from cotune.models.weights import find_model_folder
from cotune.tuning.adaptations import ADAPTATIONS, AdaptationOptions, adaptation_named
from cotune.tuning.estimators import estimator_named
from cotune.tuning.loop import LoopConfig
from cotune.tuning.lora import target_nats
from cotune.tuning.personal import encode_examples, split_examples
from cotune.tuning.prompted_nats import prompted_nats
from cotune.tuning.tune import TuneConfig, tune

HERE = Path(__file__).parent
# Measures one method's peak and step in a process of its own.
BENCHMARK = HERE.parent / "benchmarks" / "method_memory.py"
# The meaning of a cell: one more, and all are run again.
PROTOCOL = 1
SIDE_WIDTH = 64
TIMEOUT_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """A way to tune.

    Attributes:
        group: full, PEFT or MEFT.
        case: of `benchmarks/method_memory.py`, what is measured.
        planned: the planner's word.
        has_checkpoints: gradient checkpointing.
        method: of `ADAPTATIONS`; None for the side network.
        estimator: of `ESTIMATORS`.
        base_bits: of the model, 4; None for whole weights.
        learning_rates: that are searched.
    """

    group: str
    case: str
    planned: str
    method: str | None
    learning_rates: tuple[float, ...]
    estimator: str = "backprop"
    has_checkpoints: bool = False
    base_bits: int | None = None


_LORA_RATES = (1e-3, 3e-3, 1e-2)
ROWS: dict[str, Row] = {
    "full": Row(group="full", case="full", planned="full", method="full", learning_rates=(2e-4, 6e-4, 2e-3)),
    "lora": Row(group="PEFT", case="lora", planned="lora", method="lora", learning_rates=_LORA_RATES),
    "adapter": Row(group="PEFT", case="adapter", planned="adapter", method="adapter", learning_rates=_LORA_RATES),
    "soft_prompt": Row(
        group="PEFT",
        case="soft prompt",
        planned="soft_prompt",
        method="soft_prompt",
        learning_rates=(1e-2, 3e-2, 1e-1),
    ),
    "prefix": Row(group="PEFT", case="prefix", planned="prefix", method="prefix", learning_rates=(3e-3, 1e-2, 3e-2)),
    "ia3": Row(group="PEFT", case="ia3", planned="ia3", method="ia3", learning_rates=(3e-3, 1e-2, 3e-2)),
    "bias": Row(group="PEFT", case="norms", planned="norms", method="bias", learning_rates=(1e-3, 3e-3, 1e-2)),
    "side": Row(group="MEFT", case="side", planned="side", method=None, learning_rates=_LORA_RATES),
    "side, local": Row(
        group="MEFT", case="side, features here", planned="side_local", method=None, learning_rates=_LORA_RATES
    ),
    "lora + checkpoints": Row(
        group="MEFT",
        case="lora + checkpoints",
        planned="lora",
        method="lora",
        has_checkpoints=True,
        learning_rates=_LORA_RATES,
    ),
    "mezo, lora": Row(
        group="MEFT",
        case="mezo, lora",
        planned="zeroth_order_lora",
        method="lora",
        estimator="zeroth_order",
        learning_rates=_LORA_RATES,
    ),
    "forward gradient": Row(
        group="MEFT",
        case="forward gradient",
        planned="forward_gradient",
        method="full",
        estimator="forward_gradient",
        learning_rates=(1e-5, 1e-4, 1e-3),
    ),
    "lora, 4 bits": Row(
        group="MEFT", case="qlora, 4 bits", planned="qlora", method="lora", base_bits=4, learning_rates=_LORA_RATES
    ),
}
EXPECTED = {
    "full": "weights, gradients and AdamW's two means: the most memory",
    "PEFT": "saves gradients and optimiser, not activations: LoRA keeps most of full tuning's",
    "MEFT": "saves activations: side networks at most 31 % of full tuning's memory (LST), MeZO that of inference",
}
DEVIATIONS = (
    "Quality is of the given model and texts, tuned for the epochs below; forward-only methods get more of them, and "
    "still far fewer steps than MeZO's 20,000.",
    "The learning rate of every method is the one with the least held-out loss, seed 0.",
    "Memory and time are of random texts of one length, all of them targets, random weights in the model's shape. "
    "What full and bias were before waits on disk.",
    "side has no model in its process: its features come from elsewhere; 'side, local' makes them anew in each step. "
    "They learn the same. A step's time is the median of a process's steps.",
    "LoRA with checkpoints learns what LoRA learns, so its quality is LoRA's.",
)


def make_parser() -> argparse.ArgumentParser:
    parser = study_parser(
        "survey_memory",
        __doc__,
        "examples:\n"
        "  python reproduce/survey_memory.py                           # texts that cotune makes itself\n"
        "  python reproduce/survey_memory.py --shapes llama-7b qwen2.5-0.5b --budget-minutes 30\n"
        "  python reproduce/survey_memory.py --data-root my-data --dataset sciq\n"
        "  python reproduce/survey_memory.py --device cuda --dtype bfloat16 --shapes llama-7b --measure-shapes\n\n"
        "A data set is a folder of --data-root with train.jsonl and test.jsonl of columns that `cotune tune` reads. "
        "Finished cells\nare kept in --cells and never run again.",
    )
    parser.add_argument("--dataset", default="sciq", help="folder there (default: %(default)s); not for the persona's")
    parser.add_argument("--methods", nargs="+", choices=list(ROWS), default=list(ROWS), help="(default: all)")
    parser.add_argument("--num-train", type=at_least_one, default=200, help="training texts (default: %(default)s)")
    parser.add_argument("--num-test", type=at_least_one, default=100, help="test texts (default: %(default)s)")
    parser.add_argument("--seeds", type=at_least_one, default=3, help="runs of every method (default: %(default)s)")
    parser.add_argument("--epochs", type=at_least_one, default=3, help="with gradients (default: %(default)s)")
    parser.add_argument(
        "--side-epochs", type=at_least_one, default=15, help="of the side network, which costs less each"
    )
    parser.add_argument(
        "--forward-epochs", type=at_least_one, default=10, help="of forward-only methods (default: %(default)s)"
    )
    parser.add_argument("--max-length", type=at_least_one, default=256, help="tokens of a text (default: %(default)s)")
    parser.add_argument("--batch", type=at_least_one, default=4, help="texts in a measured step (default: %(default)s)")
    parser.add_argument("--length", type=at_least_one, default=256, help="tokens of each (default: %(default)s)")
    parser.add_argument("--shapes", nargs="*", choices=list(KNOWN_SHAPES), default=[], help="published models")
    parser.add_argument(
        "--measure-shapes", action="store_true", help="measure them too, for a GPU or a machine with much memory"
    )
    add_run_options(parser, "survey_memory", has_cache=True)
    return parser


class Study:
    """Cells of one model.

    Args:
        args: from `make_parser`.

    Raises:
        InputError: the data is not there, or an option is out of range.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        torch.set_num_threads(args.threads)
        self.args = args
        self.load = Workload(batch=args.batch, length=args.length, dtype=args.dtype)
        self.train, self.test = self._read()
        least = round(2 / HELDOUT_SHARE)
        if len(self.train) < least:
            raise InputError(
                f"there are {len(self.train)} training texts, expected at least {least}, so that some are held out"
            )
        self.cells = open_cells(args)
        self.folder = find_model_folder(args.model)
        self.backbone = Backbone.from_pretrained(args.model, dtype=args.dtype, device=args.device)
        self.model_name = Path(args.model).name
        self.dataset = "persona" if args.data_root is None else args.dataset
        self.methods: list[str] = [name for name in args.methods if self.can_run(name)]

    def can_run(self, name: str) -> bool:
        """Whether what a row needs is installed; tells where not."""
        bits = ROWS[name].base_bits
        if bits is None:
            return True
        try:
            low_bit_placement(bits, dtype=self.args.dtype, device=self.args.device)
        except InputError as error:
            print(f"left out: {name}, {error}")
            return False
        return True

    def _read(self) -> tuple[list[Example], list[Example]]:
        args = self.args
        if args.data_root is None:
            return persona_texts(args.num_train, args.num_test)
        folder = args.data_root / args.dataset
        if not folder.is_dir():
            raise InputError(f"{args.data_root} has no folder {args.dataset}; give --dataset, or leave --data-root out")
        splits = read_splits(folder, seed=1)
        if not splits.train or not splits.test:
            raise InputError(f"{folder} has no training or no test part, expected both; take another data set")
        return splits.train[: args.num_train], splits.test[: args.num_test]

    def measured(self, name: str, shape: str) -> Value:
        """`peak_bytes` above the weights and `step_s` of a row, in a process of its own."""
        args = self.args
        command = [str(BENCHMARK), "--child", ROWS[name].case, "--shape", shape]
        command += ["--batch", str(args.batch), "--length", str(args.length), "--dtype", args.dtype]
        command += ["--device", args.device, "--threads", str(args.threads)]
        key = {
            "what": "memory",
            "case": ROWS[name].case,
            "batch": args.batch,
            "length": args.length,
            "dtype": args.dtype,
            "device": args.device,
            "threads": args.threads,
            "protocol": PROTOCOL,
        }
        group = self.model_name if shape == str(self.folder) else shape
        return self.cells.get(f"{group}-survey-memory", key, lambda: run_measured(command, timeout_s=TIMEOUT_S))

    def qualities(self, name: str) -> list[Value]:
        """What a row comes to on the texts, by seed, at its best learning rate."""
        found = {rate: self._quality(name, rate, 0) for rate in ROWS[name].learning_rates}
        best = min(found, key=lambda rate: found[rate]["heldout_nats"])
        return [self._quality(name, best, seed) for seed in range(self.args.seeds)]

    def base(self) -> float:
        """Nats per test token of the model as it is."""
        value = self.cells.get(self._group, self._key("base"), lambda: {"nats": self._nats(self.encoded(self.test))})
        return float(value["nats"])

    @property
    def _group(self) -> str:
        return f"{self.model_name}-survey-{self.dataset}"

    def _key(self, method: str, **more: Any) -> dict[str, Any]:
        args = self.args
        return {
            "method": method,
            "num_train": args.num_train,
            "num_test": args.num_test,
            "max_length": args.max_length,
            "dtype": args.dtype,
            "protocol": PROTOCOL,
            "backbone": self.backbone.spec.backbone_digest[:16],
            **more,
        }

    def _quality(self, name: str, rate: float, seed: int) -> Value:
        row = ROWS[name]
        # What a row is called in a cell says what is learnt: features from elsewhere and checkpoints change nothing.
        words = [row.method or "side", row.estimator, *([] if row.base_bits is None else [f"{row.base_bits} bits"])]
        epochs = self.args.side_epochs if row.method is None else self.args.epochs
        if row.estimator != "backprop":
            epochs = self.args.forward_epochs
        key = self._key(", ".join(words), learning_rate=rate, seed=seed, epochs=epochs)
        learn = self._tune_side if row.method is None else self._tune
        return self.cells.get(self._group, key, lambda: learn(row, rate, seed, epochs))

    def _tune(self, row: Row, rate: float, seed: int, epochs: int) -> Value:
        assert row.method is not None
        backbone = self.backbone
        if row.base_bits is not None:
            args = self.args
            backbone = Backbone.from_pretrained(
                args.model, dtype=args.dtype, device=args.device, base_bits=row.base_bits
            )
        options = AdaptationOptions()
        num_virtual = ADAPTATIONS[row.method].num_virtual_tokens(options)
        train, first, second = split_examples(self.encoded(self.train, num_virtual), HELDOUT_SHARE, seed)
        config = TuneConfig(
            what=adaptation_named(row.method, options),
            loop=LoopConfig(epochs=epochs, learning_rate=rate),
            seed=seed,
        )
        result = tune(backbone, train, config, estimator=estimator_named(row.estimator), heldout=[*first, *second])
        heldout = {record.epoch: record.heldout_loss for record in result.curve}
        test = self.encoded(self.test, num_virtual)
        with result.adapter.attach(backbone.model) as model:
            nats = prompted_nats(model, test) if num_virtual else target_nats(backbone, test)
        return {
            "nats": float(nats.mean(dtype=np.float64)),
            "heldout_nats": heldout[result.best_epoch],
            "num_trained": result.num_trained,
            "num_steps": result.curve[-1].num_steps,
            "train_s": result.curve[-1].elapsed_s,
        }

    def _tune_side(self, row: Row, rate: float, seed: int, epochs: int) -> Value:
        training = Training(
            method=Method(family="parallel"),
            learning_rate=rate,
            epochs=epochs,
            budget=parameter_budget(self.backbone, SIDE_WIDTH),
            side_width=SIDE_WIDTH,
            seed=seed,
            max_length=self._max_length(),
            has_gate=False,
        )
        plugin, learnt = train_plugin(self.backbone, self.train, training, self.args.cache / "features")
        personal = personal_of(plugin)
        nats: list[NDArray[np.float64]] = []
        for each in self.encoded(self.test):
            first = first_position(each.first_target, personal.corrector.prompt_window)
            features = self.backbone.features(each.input_ids, first, self.backbone.spec.vocab_size)
            lead = each.first_target - first
            nats.append(token_nats(features, personal, "integration", start=first, num_lead=lead))
        return {
            "nats": float(np.concatenate(nats).mean()),
            "heldout_nats": learnt["selection_nats"],
            "num_trained": learnt["num_parameters"],
            "num_steps": None,
            "train_s": learnt["train_s"] + learnt["features_s"],
        }

    def encoded(self, examples: Sequence[Example], num_virtual_tokens: int = 0) -> list[EncodedExample]:
        """Token ids; a prompt takes its part of the context."""
        backbone = self.backbone
        longest = self._max_length(num_virtual_tokens)
        return encode_examples(backbone.tokenizer_json, examples, backbone.description, longest)

    def _max_length(self, num_virtual_tokens: int = 0) -> int:
        return min(int(self.args.max_length), self.backbone.spec.max_context - num_virtual_tokens)

    def _nats(self, examples: Sequence[EncodedExample]) -> float:
        return float(target_nats(self.backbone, examples).mean(dtype=np.float64))


def above_weights(cost: MethodCost, shape: ModelShape, load: Workload) -> int:
    """Predicted bytes beyond those of the model that is loaded first; `side` has none in its process."""
    if cost.method == "side":
        return cost.peak
    if cost.method == "qlora":
        return cost.peak - quantised_bytes(shape, load, MethodSettings().base_bits)
    return cost.peak - load.number_bytes * shape.num_parameters


def predict(name: str, shape: ModelShape, load: Workload) -> MethodCost:
    """What `cotune plan` says of a row, as it is measured."""
    row = ROWS[name]
    return predict_cost(shape, row.planned, load, has_checkpoints=row.has_checkpoints)


def shape_rows(study: Study, shape_name: str, unfinished: list[str]) -> dict[str, dict[str, Any]]:
    """Predicted, and where it was asked for measured, memory of a published model."""
    shape, rows = KNOWN_SHAPES[shape_name], dict[str, dict[str, Any]]()
    for name in study.args.methods:
        cost = predict(name, shape, study.load)
        rows[name] = {
            "whole_mb": cost.peak / 1e6,
            "predicted_above_mb": above_weights(cost, shape, study.load) / 1e6,
            "measured_above_mb": None,
        }
        if study.args.measure_shapes and study.can_run(name):
            try:
                rows[name]["measured_above_mb"] = study.measured(name, shape_name)["peak_bytes"] / 1e6
            except OutOfTimeError:
                unfinished.append(f"memory of {name} on {shape_name}")
    return rows


def build(study: Study) -> Page:
    """The table of the model, and that of each shape."""
    shape = ModelShape.load(study.folder / "config.json")
    rows: dict[str, dict[str, Any]] = {}
    unfinished: list[str] = []
    base = None
    try:
        base = study.base()
    except OutOfTimeError:
        unfinished.append("the base model")
    for name in study.methods:
        cost = predict(name, shape, study.load)
        row: dict[str, Any] = {"group": ROWS[name].group, "measured_above_mb": None, "step_ms": None, "nats": None}
        row["predicted_above_mb"] = above_weights(cost, shape, study.load) / 1e6
        try:
            found = study.measured(name, str(study.folder))
            row |= {"measured_above_mb": found["peak_bytes"] / 1e6, "step_ms": 1000 * found["step_s"]}
        except OutOfTimeError:
            unfinished.append(f"memory of {name}")
        try:
            runs = study.qualities(name)
            row |= {"nats": Mean.of([run["nats"] for run in runs]), "num_trained": runs[0]["num_trained"]}
        except OutOfTimeError:
            unfinished.append(f"quality of {name}")
        rows[name] = row
    shapes = {name: shape_rows(study, name, unfinished) for name in study.args.shapes}
    verdicts = verdicts_of(rows)
    names = list(rows)
    return Page(
        title="Memory, quality and time of tuning on one device",
        lead=f"{study.args.batch} texts of {study.args.length} tokens in a measured step, {study.args.dtype}.",
        expected=EXPECTED,
        measured={"base_nats": base, "methods": rows, "verdicts": verdicts, "shapes": shapes},
        sections=[
            Section(
                name="methods",
                short="Methods",
                heading="Full, PEFT and MEFT",
                content=Html(
                    plots(rows, base)
                    + grid(
                        "Memory above the weights, time of a step, and quality on test texts",
                        "method",
                        names,
                        {
                            "group": [row["group"] for row in rows.values()],
                            "MB": [_number(row["measured_above_mb"], 1) for row in rows.values()],
                            "predicted": [_number(row["predicted_above_mb"], 1) for row in rows.values()],
                            "ms a step": [_number(row["step_ms"], 0) for row in rows.values()],
                            "nats": ["" if row["nats"] is None else str(row["nats"]) for row in rows.values()],
                            "trained": [
                                f"{row['num_trained']:,}" if "num_trained" in row else "" for row in rows.values()
                            ],
                        },
                    )
                    + grid(
                        "Goals",
                        "goal",
                        [one["what"] for one in verdicts],
                        {
                            "measured": [f"{one['measured']:.1f} {one['unit']}" for one in verdicts],
                            "at most": [f"{one['limit']:g} {one['unit']}" for one in verdicts],
                            "verdict": ["holds" if one["holds"] else "missed" for one in verdicts],
                        },
                    )
                ),
            ),
            *(_shape_section(study, name, found) for name, found in shapes.items()),
        ],
        deviations=DEVIATIONS,
        lines=[
            f"{name:20s} {_number(row['measured_above_mb'], 0):>8s} MB, predicted "
            f"{_number(row['predicted_above_mb'], 0):>8s}, {_number(row['step_ms'], 0):>6s} ms, "
            f"{'' if row['nats'] is None else row['nats']!s} nats"
            for name, row in rows.items()
        ],
        unfinished=unfinished,
    )


def plots(rows: dict[str, dict[str, Any]], base: float | None) -> Html:
    """Memory and quality, PEFT and MEFT apart, each beside full tuning."""
    made = ""
    for group in ("PEFT", "MEFT"):
        names = [name for name, row in rows.items() if row["group"] in ("full", group)]
        # One below the other: there are many of them.
        memory = {
            what: [_point(rows[name][f"{what}_above_mb"]) for name in names] for what in ("measured", "predicted")
        }
        if any(point is not None for bars in memory.values() for point in bars):
            caption = f"{group}: peak above the weights; where a bar is missing, it was not measured or not predicted."
            made += plot_groups(f"memory-{group}", caption, names, memory, y_label="MB above the weights")
        nats = [None if rows[name]["nats"] is None else rows[name]["nats"].point() for name in names]
        if any(point is not None for point in nats):
            caption = f"{group}: test texts, mean over seeds, 95 % intervals" + (
                "." if base is None else f"; base model {base:.3f}."
            )
            made += plot_groups(f"nats-{group}", caption, names, {"nats": nats}, y_label="nats per token")
    return Html(made)


def verdicts_of(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals that these rows are held against, as far as they were measured."""

    def share(what: str, name: str, of: str, key: str, limit: float) -> list[dict[str, Any]]:
        ours, theirs = rows.get(name, {}).get(key), rows.get(of, {}).get(key)
        if ours is None or not theirs:
            return []
        return [{"what": what, "measured": 100 * ours / theirs, "limit": limit, "unit": "%"}]

    found = [
        *share("side: memory of full tuning's", "side", "full", "measured_above_mb", 25.0),
        *share("side, local: memory of full tuning's", "side, local", "full", "measured_above_mb", 25.0),
        *share("side: time of LoRA's", "side", "lora", "step_ms", 50.0),
        *share("side, local: time of LoRA's", "side, local", "lora", "step_ms", 50.0),
    ]
    for name, row in rows.items():
        measured, predicted = row["measured_above_mb"], row["predicted_above_mb"]
        if measured:
            off = 100 * abs(predicted / measured - 1)
            found.append({"what": f"{name}: prediction off the peak", "measured": off, "limit": 15.0, "unit": "%"})
    return [{**one, "holds": one["measured"] <= one["limit"]} for one in found]


def _shape_section(study: Study, name: str, rows: dict[str, dict[str, Any]]) -> Section:
    shape = KNOWN_SHAPES[name]
    return Section(
        name=name.replace(".", "-"),
        short=name,
        heading=f"{name}: {shape.num_parameters / 1e9:.2f} billion parameters",
        content=Html(
            grid(
                f"GB in {study.args.dtype}, of random weights where measured",
                "method",
                list(rows),
                {
                    "whole, predicted": [_gigabytes(row["whole_mb"]) for row in rows.values()],
                    "above the weights, predicted": [_gigabytes(row["predicted_above_mb"]) for row in rows.values()],
                    "above the weights, measured": [_gigabytes(row["measured_above_mb"]) for row in rows.values()],
                },
            )
        ),
    )


def _point(value: float | None) -> tuple[float, float, None, None] | None:
    return None if value is None else (0.0, value, None, None)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _gigabytes(value_mb: float | None) -> str:
    return "" if value_mb is None else f"{value_mb / 1e3:,.2f}"


def main() -> None:
    """Entry point."""
    args = make_parser().parse_args()
    try:
        study = Study(args)
        page = build(study)
    except CotuneError as error:
        sys.exit(f"error: {error}")
    page.publish(
        results_of(args, "survey_memory"),
        about=about_run(
            {**vars(args), "model": study.model_name, "dataset": study.dataset},
            device=args.device,
            threads=args.threads,
            shape=asdict(ModelShape.load(study.folder / "config.json")),
            backbone_parameters=sum(p.numel() for p in study.backbone.model.parameters()),
        ),
        lead=f"Model {study.model_name}, data {study.dataset}.",
    )


if __name__ == "__main__":
    main()
