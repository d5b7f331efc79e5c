"""What all studies of SPA share: options, data sets, the search for a learning rate, cells, means over seeds, pages."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from cells import Value
from page import Page, about_run
from spa_judging import judge_backbone, judge_plugin
from spa_training import (
    FAMILIES,
    IN_CLOUD,
    Method,
    Training,
    cloud_for,
    parameter_budget,
    train_plugin,
    trained_in_cloud,
)
from study_options import add_run_options, at_least_one, open_cells, plain_endings, positive, results_of, study_parser
from study_texts import persona_texts, with_training_texts

from cotune.data import read_splits
from cotune.data.templates import Example
from cotune.errors import InputError
from cotune.models.backbone import Backbone
from cotune.plugin import Plugin

HERE = Path(__file__).parent
# The meaning of a cell: one more, and all are run again.
PROTOCOL = 2
# The same for cells of side networks, and for those of them that have a gate.
SIDE_PROTOCOL = 1
GATE_PROTOCOL = 1
TIMED_RUNS = 3
# Folders of `--data-root` for the names that the paper uses.
DATASETS = {
    "xsum": ("xsum",),
    "cnn_dailymail": ("cnn_dailymail",),
    "coqa": ("coqa", "mctest_coqa_style"),
    "sciq": ("sciq",),
}
# Made, not read: the demo's persona, for whoever has no data.
PERSONA = "persona"
MODES = ("integration", "separation", "ladder", "spa")
DEVIATIONS = (
    "Backbone, data and their amounts are those of the settings below, not Llama-7B and the whole data sets: scores "
    "compare the methods with each other, not with published ones.",
    "All methods have at most as many trainable parameters as the tap ladder; LoRA is on every linear layer. "
    "Down-projections are shared and frozen, taps are int8.",
    "The learning rate of every method and data set is the one with the least held-out training loss, seed 0.",
    "The gate is set to ask, one standard error included, for at most a quarter of the tokens that are written with it "
    "on held-out texts; the paper's asks for 62 to 64 %. That of spa learns where choices differ, that of separation "
    "by marginal likelihood.",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table.

    Attributes:
        name: in the table.
        method: what is trained; None for the base model.
        mode: how a side network is used; does not matter for other methods.
    """

    name: str
    method: Method | None
    mode: str = ""


def plugin_row(mode: str, name: str = "", **method: Any) -> Row:
    """The row of one mode of a side network.

    Example:
        >>> plugin_row("spa", taps=1).method.name
        'parallel, 1 taps'
    """
    family = next(family for family, modes in FAMILIES.items() if mode in modes)
    return Row(name=name or mode, method=Method(family=family, **method), mode=mode)


def make_parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser with the options that all studies have."""
    parser = study_parser(
        name,
        description,
        "examples:\n"
        f"  python reproduce/{name}.py --datasets persona\n"
        f"  python reproduce/{name}.py --data-root my-data --datasets sciq coqa\n"
        f"  python reproduce/{name}.py --model ./llama-7b --dtype bfloat16 --device cuda --data-root my-data\n\n"
        "A data set is a folder of --data-root with train.jsonl and test.jsonl (or .csv, .parquet) of columns that "
        "`cotune tune` reads. Finished cells are kept in --cells and never run again.",
    )
    parser.add_argument(
        "--datasets",
        nargs="+",
        choices=[*DATASETS, PERSONA],
        default=list(DATASETS),
        help=f"folders there, or {PERSONA}, texts that cotune makes itself (default: %(default)s)",
    )
    parser.add_argument("--num-train", type=at_least_one, default=200, help="training texts (default: %(default)s)")
    parser.add_argument(
        "--train-share", type=positive, default=None, help="also at most this part of the training texts"
    )
    parser.add_argument("--num-test", type=at_least_one, default=120, help="test texts (default: %(default)s)")
    parser.add_argument("--seeds", type=at_least_one, default=3, help="runs of every cell (default: %(default)s)")
    parser.add_argument(
        "--learning-rates",
        type=positive,
        nargs="+",
        default=[1e-3, 3e-3, 1e-2],
        help="searched for every method on held-out training texts; the paper's 2e-4, 5e-4 and 1e-3 are for 7 B "
        "parameters, small models want larger ones (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs", type=at_least_one, default=15, help="of side networks (default: %(default)s, the paper's)"
    )
    parser.add_argument(
        "--cloud-epochs",
        type=at_least_one,
        default=3,
        help="of LoRA and adapters, which cost more each (default: %(default)s)",
    )
    parser.add_argument(
        "--side-width", type=at_least_one, default=64, help="decides the number of parameters of all methods"
    )
    parser.add_argument(
        "--max-length", type=at_least_one, default=256, help="tokens of one text (default: %(default)s)"
    )
    parser.add_argument(
        "--max-new-tokens", type=at_least_one, default=40, help="of a generated text (default: %(default)s)"
    )
    add_run_options(parser, name, has_cache=True)
    return parser


class Study:
    """Cells of one model: what every table is made of.

    Args:
        args: from `make_parser`.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        torch.set_num_threads(args.threads)
        self.args = args
        self.cells = open_cells(args)
        self.backbone = Backbone.from_pretrained(args.model, dtype=args.dtype, device=args.device)
        self.model_name = Path(args.model).name
        self.budget = parameter_budget(self.backbone, args.side_width)
        self._clouds: dict[tuple[Any, ...], Backbone] = {}
        self._data: dict[str, tuple[list[Example], list[Example]]] = {}

    def data(self, dataset: str) -> tuple[list[Example], list[Example]]:
        """Training and test texts, in an order of their own that seeds do not change: smaller draws are parts of it."""
        if dataset == PERSONA and dataset not in self._data:
            self._data[dataset] = persona_texts(self.args.num_train, self.args.num_test)
        elif dataset not in self._data:
            if self.args.data_root is None:
                raise InputError(
                    f"--data-root is not given and {dataset} is a folder there; give it, or take {PERSONA}"
                )
            folders = [self.args.data_root / name for name in DATASETS[dataset]]
            folder = next((one for one in folders if one.is_dir()), None)
            if folder is None:
                raise InputError(f"{self.args.data_root} has no folder {' or '.join(DATASETS[dataset])}; add it")
            splits = read_splits(folder, seed=1, train_share=self.args.train_share)
            train, test = with_training_texts(splits.train, splits.test)
            self._data[dataset] = train, test[: self.args.num_test]
        return self._data[dataset]

    def cloud(self, method: Method) -> Backbone:
        """The same model as the cloud that this method needs."""
        key = (method.side == "published", method.down, method.taps, method.bits)
        if key not in self._clouds:
            self._clouds[key] = cloud_for(self.backbone, method)
        return self._clouds[key]

    def base(self, dataset: str) -> Value:
        """The backbone alone."""
        _, test = self.data(dataset)
        limits = self.args.max_new_tokens, self.args.max_length
        return self.cell(dataset, {"method": "base"}, lambda: judge_backbone(self.backbone, test, *limits))

    def search(self, dataset: str, method: Method, num_train: int | None = None) -> dict[float, Value]:
        """What training with seed 0 came to, by learning rate."""
        found: dict[float, Value] = {}
        for rate in self.args.learning_rates:
            key = self._key(method, num_train, what="search", learning_rate=rate)
            found[rate] = self.cell(
                dataset, key, lambda rate=rate: self._train(dataset, method, rate, 0, num_train, None)
            )
        return found

    def learning_rate(self, dataset: str, method: Method, num_train: int | None = None) -> float:
        """The one with the least loss on held-out training texts, with seed 0."""
        found = self.search(dataset, method, num_train)
        return min(found, key=lambda rate: found[rate]["selection_nats"])

    def times(self, dataset: str, methods: Sequence[Method]) -> Value:
        """Seconds that training takes at the best learning rate, the methods in turn.

        Returns:
            By the method's name the seconds of each run; for side networks also NAME, features: features made anew.
        """
        rates = [self.learning_rate(dataset, method) for method in methods]
        key = self._key(methods[-1], None, what="times", beside=", ".join(one.name for one in methods[:-1]))
        return self.cell(dataset, key, lambda: self._time(dataset, methods, rates))

    def _time(self, dataset: str, methods: Sequence[Method], rates: Sequence[float]) -> Value:
        examples = self.data(dataset)[0][: self._num(None)]
        taken: dict[str, list[float]] = {}
        for _ in range(TIMED_RUNS):
            for method, rate in zip(methods, rates, strict=True):
                training = replace(self._training(method, rate, 0), has_gate=False)
                if method.family in IN_CLOUD:
                    with trained_in_cloud(self.backbone, examples, training) as learnt:
                        taken.setdefault(method.name, []).append(learnt["train_s"])
                    continue
                with TemporaryDirectory() as folder:
                    _, learnt = train_plugin(self.cloud(method), examples, training, Path(folder))
                taken.setdefault(method.name, []).append(learnt["train_s"])
                taken.setdefault(f"{method.name}, features", []).append(learnt["features_s"])
        return dict(taken)

    def runs(self, dataset: str, method: Method, num_train: int | None = None) -> list[Value]:
        """One judged run for each seed, at the best learning rate."""
        rate = self.learning_rate(dataset, method, num_train)
        _, test = self.data(dataset)
        found = []
        for seed in range(self.args.seeds):
            key = self._key(method, num_train, what="run", learning_rate=rate, seed=seed)
            if method.family in FAMILIES:
                key["gate_protocol"] = GATE_PROTOCOL
            found.append(
                self.cell(dataset, key, lambda seed=seed: self._train(dataset, method, rate, seed, num_train, test))
            )
        return found

    def measured(
        self, dataset: str, method: Method, seed: int, key: dict[str, Any], run: Callable[[Plugin], Value]
    ) -> Value:
        """A cell that measures a tuned plugin; it is tuned again only where the cell is not there yet.

        Args:
            dataset, method, seed: which plugin, at its best learning rate.
            key: what is measured, as far as the settings do not say it.
            run: measures.
        """
        rate = self.learning_rate(dataset, method)
        whole = self._key(method, None, learning_rate=rate, seed=seed, gate_protocol=GATE_PROTOCOL, **key)
        return self.cell(dataset, whole, lambda: run(self.plugin(dataset, method, seed)))

    def plugin(self, dataset: str, method: Method, seed: int) -> Plugin:
        """One that is tuned now, at the best learning rate."""
        examples = self.data(dataset)[0][: self._num(None)]
        training = self._training(method, self.learning_rate(dataset, method), seed)
        return self._tune(examples, training)[0]

    def _tune(self, examples: Sequence[Example], training: Training) -> tuple[Plugin, Value]:
        return train_plugin(self.cloud(training.method), examples, training, self.args.cache / "features")

    def _training(self, method: Method, rate: float, seed: int) -> Training:
        epochs = self.args.cloud_epochs if method.family in IN_CLOUD else self.args.epochs
        return Training(
            method=method,
            learning_rate=rate,
            epochs=method.epochs or epochs,
            budget=self.budget,
            side_width=self.args.side_width,
            seed=seed,
            max_length=self.args.max_length,
            # Claims about few epochs are about the side network alone.
            has_gate=method.epochs is None,
        )

    def _key(self, method: Method, num_train: int | None, **more: Any) -> dict[str, Any]:
        """What sets a cell apart beside the settings."""
        key = {"method": method.name, "num_train": self._num(num_train), **more}
        return key | {"side_protocol": SIDE_PROTOCOL} if method.family in FAMILIES else key

    def _num(self, num_train: int | None) -> int:
        return num_train or int(self.args.num_train)

    def _train(
        self,
        dataset: str,
        method: Method,
        rate: float,
        seed: int,
        num_train: int | None,
        test: Sequence[Example] | None,
    ) -> Value:
        args = self.args
        examples = self.data(dataset)[0][: self._num(num_train)]
        training = self._training(method, rate, seed)
        limits = args.max_new_tokens, args.max_length
        if method.family in FAMILIES:
            cloud = self.cloud(method)
            if test is None:
                return self._tune(examples, replace(training, has_gate=False))[1]
            plugin, value = self._tune(examples, training)
            return value | judge_plugin(cloud, plugin, test, *limits)
        with trained_in_cloud(self.backbone, examples, training) as value:
            if test is not None:
                value["cloud"] = judge_backbone(self.backbone, test, *limits)
            return value

    def cell(self, dataset: str, key: Mapping[str, Any], run: Callable[[], Value]) -> Value:
        """A cell of this model and data set: `key` and all settings decide."""
        args = self.args
        whole = {
            **key,
            "protocol": PROTOCOL,
            "dtype": args.dtype,
            "side_width": args.side_width,
            "max_length": args.max_length,
            "max_new_tokens": args.max_new_tokens,
            "num_test": args.num_test,
            "train_share": args.train_share,
            "epochs": args.epochs,
            "cloud_epochs": args.cloud_epochs,
            "backbone": self.backbone.spec.backbone_digest[:16],
        }
        return self.cells.get(f"{self.model_name}-{dataset}", whole, run)

    def describe(self) -> dict[str, Any]:
        """Settings, versions and machine, so that the numbers can be judged and repeated."""
        return about_run(
            {**vars(self.args), "model": self.model_name},
            device=self.args.device,
            threads=self.args.threads,
            parameter_budget=self.budget,
            backbone_parameters=sum(p.numel() for p in self.backbone.model.parameters()),
        )


def run_study(name: str, description: str, build: Callable[[Study], Page]) -> None:
    """A study's command: measure what is missing, write the result folder, say what came."""
    with plain_endings():
        study = Study(make_parser(name, description).parse_args())
        page = build(study)
    page.publish(
        results_of(study.args, name),
        about=study.describe(),
        lead=f"Model {study.model_name}, data {', '.join(study.args.datasets)}.",
        deviations=DEVIATIONS,
    )


def rows_of(study: Study, dataset: str, row: Row, num_train: int | None = None) -> list[Value]:
    """For each seed what a row came to, with the training's numbers; the base model has no seeds, so one."""
    if row.method is None:
        return [study.base(dataset)]
    runs = study.runs(dataset, row.method, num_train)
    return [{**run, **run[row.mode or "cloud"]} for run in runs]
