"""What all studies of SPA share: options, data sets, the search for a learning rate, cells, means over seeds, pages."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cells import Cells, OutOfTimeError, Value
from result_folder import Point, write_results
from spa_methods import (
    FAMILIES,
    Training,
    judge_backbone,
    judge_plugin,
    parameter_budget,
    train_plugin,
    trained_lora,
)

from cotune.cli.run_folder import versions
from cotune.data.records import read_examples
from cotune.data.templates import Example
from cotune.errors import DataError, InputError
from cotune.evaluation.intervals import student_interval
from cotune.evaluation.report import Section
from cotune.models.backbone import Backbone
from cotune.plugin import Plugin

HERE = Path(__file__).parent
# The meaning of a cell: one more, and all are run again.
PROTOCOL = 1
# Folders of `--data-root` for the names that the paper uses.
DATASETS = {
    "xsum": ("xsum",),
    "cnn_dailymail": ("cnn_dailymail",),
    "coqa": ("coqa", "mctest_coqa_style"),
    "sciq": ("sciq",),
}
EPOCHS = {"lora": 3, "parallel": 12, "serial": 12}
MODES = ("integration", "separation", "ladder", "spa")
DEVIATIONS = (
    "Backbone, data and their amounts are those of the settings below, not Llama-7B and the whole data sets: scores "
    "compare the methods with each other, not with published ones.",
    "All methods have at most as many trainable parameters as the tap ladder; LoRA is on every linear layer. "
    "Down-projections are shared and frozen, taps are int8.",
    "The learning rate of every method and data set is the one with the least held-out training loss, seed 0.",
    "The gate of spa and separation is trained by marginal likelihood and may ask for at most a quarter of the "
    "held-out tokens; the paper's asks for 62 to 64 %.",
)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of a table: which training, and which part of what it was judged by."""

    family: str
    remembers: bool = False

    @property
    def name(self) -> str:
        return f"{self.family}, attention" if self.remembers else self.family


def make_parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser with the options that all studies have."""
    parser = argparse.ArgumentParser(
        prog=f"python reproduce/{name}.py",
        description=description,
        epilog=(
            "examples:\n"
            f"  python reproduce/{name}.py --model starter --data-root my-data --datasets sciq\n"
            f"  python reproduce/{name}.py --model ./llama-7b --dtype bfloat16 --device cuda --data-root my-data\n\n"
            "A data set is a folder of --data-root with train.jsonl and test.jsonl (or .csv, .parquet) of columns that "
            "`cotune tune` reads. Finished cells are kept in --cells and never run again."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="starter", help="a Hugging Face folder, or starter (default: %(default)s)")
    parser.add_argument("--data-root", type=Path, required=True, help="folder of data sets")
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=["xsum", "coqa", "sciq"])
    parser.add_argument("--num-train", type=int, default=240, help="training texts (default: %(default)s)")
    parser.add_argument("--num-test", type=int, default=60, help="test texts (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of every cell (default: %(default)s)")
    parser.add_argument(
        "--learning-rates",
        type=float,
        nargs="+",
        default=[2e-4, 1e-3, 3e-3, 1e-2],
        help="searched for every method on held-out training texts; the paper's 2e-4, 5e-4 and 1e-3 are for 7 B "
        "parameters, small models want larger ones (default: %(default)s)",
    )
    parser.add_argument("--side-width", type=int, default=64, help="decides the number of parameters of all methods")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of one text (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=40, help="of a generated text (default: %(default)s)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget-minutes", type=float, default=None, help="begin no cell after so much time")
    parser.add_argument("--cells", type=Path, default=HERE / "cells", help="folder of finished cells")
    parser.add_argument("--cache", type=Path, default=Path("runs/reproduce"), help="folder of features")
    parser.add_argument("--out", type=Path, default=HERE / name, help="folder of results (default: %(default)s)")
    return parser


class Study:
    """Cells of one model: what every table is made of.

    Args:
        args: from `make_parser`.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        torch.set_num_threads(args.threads)
        self.args = args
        self.cells = Cells(args.cells, budget_minutes=args.budget_minutes, tell=lambda line: print(line, flush=True))
        self.backbone = Backbone.from_pretrained(args.model, dtype=args.dtype, device=args.device)
        self.model_name = Path(args.model).name
        self.budget = parameter_budget(self.backbone, args.side_width)
        self._data: dict[str, tuple[list[Example], list[Example]]] = {}

    def data(self, dataset: str) -> tuple[list[Example], list[Example]]:
        """Training and test texts, in an order of their own that seeds do not change: smaller draws are parts of it."""
        if dataset not in self._data:
            folders = [self.args.data_root / name for name in DATASETS[dataset]]
            folder = next((one for one in folders if one.is_dir()), None)
            if folder is None:
                raise InputError(f"{self.args.data_root} has no folder {' or '.join(DATASETS[dataset])}; add it")
            test = read_examples(folder, seed=1, split="test")
            try:
                train = read_examples(folder, seed=1, split="train")
            except DataError:
                # Where there is a test part alone, one third of it stays for testing.
                cut = len(test) // 3
                train, test = test[cut:], test[:cut]
            self._data[dataset] = train, test[: self.args.num_test]
        return self._data[dataset]

    def base(self, dataset: str) -> Value:
        """The backbone alone."""
        _, test = self.data(dataset)
        limits = self.args.max_new_tokens, self.args.max_length
        return self._cell(dataset, {"method": "base"}, lambda: judge_backbone(self.backbone, test, *limits))

    def learning_rate(self, dataset: str, method: Method, num_train: int | None = None) -> float:
        """The one with the least loss on held-out training texts, with seed 0."""
        losses: dict[float, float] = {}
        for rate in self.args.learning_rates:
            key = {"method": method.name, "what": "search", "learning_rate": rate, "num_train": self._num(num_train)}
            value = self._cell(dataset, key, lambda rate=rate: self._train(dataset, method, rate, 0, num_train, None))
            losses[rate] = value["selection_nats"]
        return min(losses, key=lambda rate: losses[rate])

    def runs(self, dataset: str, method: Method, num_train: int | None = None) -> list[Value]:
        """One judged run for each seed, at the best learning rate."""
        rate = self.learning_rate(dataset, method, num_train)
        _, test = self.data(dataset)
        found = []
        for seed in range(self.args.seeds):
            key = {
                "method": method.name,
                "what": "run",
                "learning_rate": rate,
                "num_train": self._num(num_train),
                "seed": seed,
            }
            found.append(
                self._cell(dataset, key, lambda seed=seed: self._train(dataset, method, rate, seed, num_train, test))
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
        whole = {**key, "method": method.name, "learning_rate": rate, "num_train": self._num(None), "seed": seed}

        def tune_and_run() -> Value:
            training = self._training(method, rate, seed)
            examples = self.data(dataset)[0][: self._num(None)]
            features = self.args.cache / "features"
            return run(train_plugin(self.backbone, examples, method.family, training, features)[0])

        return self._cell(dataset, whole, tune_and_run)

    def _training(self, method: Method, rate: float, seed: int) -> Training:
        return Training(
            learning_rate=rate,
            epochs=EPOCHS[method.family],
            side_width=self.args.side_width,
            remembers=method.remembers,
            seed=seed,
            max_length=self.args.max_length,
        )

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
            plugin, value = train_plugin(self.backbone, examples, method.family, training, args.cache / "features")
            if test is not None:
                value |= judge_plugin(self.backbone, plugin, test, *limits)
            return value
        with trained_lora(self.backbone, examples, self.budget, training) as value:
            if test is not None:
                value["cloud"] = judge_backbone(self.backbone, test, *limits)
            return value

    def _cell(self, dataset: str, key: dict[str, Any], run: Any) -> Value:
        args = self.args
        whole = {
            **key,
            "protocol": PROTOCOL,
            "dtype": args.dtype,
            "side_width": args.side_width,
            "max_length": args.max_length,
            "max_new_tokens": args.max_new_tokens,
            "num_test": args.num_test,
            "backbone": self.backbone.spec.backbone_digest[:16],
        }
        return self.cells.get(f"{self.model_name}-{dataset}", whole, run)

    def describe(self) -> dict[str, Any]:
        """Settings, versions and machine, so that the numbers can be judged and repeated."""
        args = {name: value for name, value in vars(self.args).items() if not isinstance(value, Path)}
        args["model"] = self.model_name
        device = torch.cuda.get_device_name() if self.args.device.startswith("cuda") else platform.machine()
        return {
            "config": args,
            "parameter_budget": self.budget,
            "backbone_parameters": sum(p.numel() for p in self.backbone.model.parameters()),
            "versions": versions(),
            "hardware": {"device": device, "cores": os.cpu_count(), "threads": self.args.threads},
        }


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a study found.

    Attributes:
        title, lead: of its page.
        expected, measured: what the paper says, and what came.
        sections: tables and plots.
        deviations: beside those that all studies have.
        lines: for the terminal.
    """

    title: str
    lead: str
    expected: Mapping[str, Any]
    measured: Mapping[str, Any]
    sections: Sequence[Section]
    deviations: Sequence[str] = ()
    lines: Sequence[str] = ()


def run_study(name: str, description: str, build: Callable[[Study], Page]) -> None:
    """A study's command: measure what is missing, write the result folder, say what came."""
    study = Study(make_parser(name, description).parse_args())
    try:
        page = build(study)
    except OutOfTimeError as error:
        sys.exit(str(error))
    write_results(
        study.args.out,
        title=page.title,
        lead=f"{page.lead} Model {study.model_name}, data {', '.join(study.args.datasets)}.",
        about=study.describe(),
        expected=page.expected,
        measured=page.measured,
        sections=page.sections,
        deviations=(*DEVIATIONS, *page.deviations),
    )
    for line in page.lines:
        print(line)
    print(f"report: {study.args.out / 'report.html'}")


@dataclass(frozen=True, kw_only=True)
class Mean:
    """Mean over seeds with its 95 % interval."""

    mean: float
    low: float | None
    high: float | None
    num: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        mean, low, high = student_interval(values)
        return cls(mean=mean, low=None if low != low else low, high=None if high != high else high, num=len(values))

    def point(self, x: float = 0.0) -> Point:
        """For a plot."""
        return x, self.mean, self.low, self.high

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:.2f}"
        return f"{self.mean:.2f} ± {self.mean - self.low:.2f}"


def mode_runs(
    study: Study, dataset: str, mode: str, *, remembers: bool = False, num_train: int | None = None
) -> list[Value]:
    """For each seed what a mode came to, with the training's numbers."""
    family = next(family for family, modes in FAMILIES.items() if mode in modes)
    runs = study.runs(dataset, Method(family=family, remembers=remembers), num_train)
    return [{**run, **run[mode]} for run in runs]
