"""What the sandwich's commands share: options, one cloud, and cells of one arm on one task with one budget and seed."""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from cells import Cells, Value
from mean import Mean
from page import about_run
from sandwich_arms import ARMS, FITTED, SANDWICH, WITH_FLOPS, WITHOUT_ADVICE
from sandwich_bench import Arm, Bench, Course, judge, opened_edge, own_cloud
from sandwich_tasks import SOURCES, TASKS, Sizes, Task, load_task
from study_options import StudyParser, add_run_options, at_least_one, open_cells, positive, study_parser

from cotune.errors import BudgetError, RefusedError
from cotune.evaluation.measured_memory import PeakMeter
from cotune.models.backbone import Backbone
from cotune.models.weights import digest_folder, find_model_folder
from cotune.sandwich.budget import Budget
from cotune.sandwich.cost import Price
from cotune.sandwich.edge_adapter import MERGE_TEMPLATE
from cotune.sandwich.openai_cloud import ApiKey, OpenAiCloud

PROTOCOL = 3
"""The meaning of a cell: one more, and all are run again."""
_TOO_LONG = (400, 413)
KEY_VARIABLE = "COTUNE_CLOUD_KEY"
EXPECTED = {
    "paper": "up to 47.9 % over traditional methods; set-up unknown, no code",
    "goals": "at equal cloud tokens, at least the best arm on three of four tasks; no raw unit sent; within 2 % of raw",
}


@dataclass(frozen=True)
class Where:
    """A cloud.

    Attributes:
        url, model: of the API.
        weights: the beginning of their digest, of a model that cotune hosts; empty: nobody can tell.
    """

    url: str
    model: str
    weights: str = ""


def make_parser(name: str, description: str | None, examples: str) -> StudyParser:
    """With the options that all of these studies have."""
    parser = study_parser(name, description, "examples:\n" + examples, data="folder with the data sets of the tasks")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="(default: all)")
    add_sources(parser)
    parser.add_argument(
        "--own-words",
        nargs="+",
        type=own_word,
        default=[],
        metavar="TASK:NAME=WORD",
        help="what the user calls a label, or a part of names, and nobody else is told, such as nlu:human=person",
    )
    parser.add_argument("--strict", action="store_true", help="replace all but common and public words, too")
    parser.add_argument("--cloud", help="base URL of an OpenAI-compatible API; cotune's own on loopback if left out")
    parser.add_argument(
        "--cloud-model", default="starter", help="its name there, or the model to host (default: %(default)s)"
    )
    parser.add_argument(
        "--cloud-dtype", default="float32", help="that cotune's own cloud holds it in (default: %(default)s)"
    )
    parser.add_argument("--key-env", default=KEY_VARIABLE, help="variable with the API key, if it is set")
    parser.add_argument("--usd-in", type=float, default=0.0, help="price of a million tokens that the cloud reads")
    parser.add_argument("--usd-out", type=float, default=0.0, help="of a million that it writes")
    add_sizes(parser)
    parser.add_argument(
        "--max-context", type=at_least_one, default=1024, help="tokens that the edge may read (default: %(default)s)"
    )
    for each in fields(Course):
        kind = at_least_one if each.type == "int" else positive
        parser.add_argument(
            f"--{each.name.replace('_', '-')}", type=kind, default=each.default, help="see sandwich_bench.Course"
        )
    add_run_options(parser, name)
    return parser


def add_sources(parser: argparse.ArgumentParser) -> None:
    """The data sets of the tasks that have several."""
    for task, names in SOURCES.items():
        if len(names) > 1:
            what = f"data of {task} (default: %(default)s)"
            parser.add_argument(f"--{task}", choices=names, default=names[0], help=what)


def source_of(args: argparse.Namespace, task: str) -> str | None:
    """The data set of a task, from the options of `add_sources`."""
    return getattr(args, task, None)


def own_word(text: str) -> tuple[str, str, str]:
    """A task, a label or a part of the names in its answers, and the user's word for it.

    Example:
        >>> own_word("nlu:human=person")
        ('nlu', 'human', 'person')
    """
    task, colon, rest = text.partition(":")
    name, sign, word = rest.partition("=")
    if not (colon and task in TASKS and name and sign and word):
        raise argparse.ArgumentTypeError(f"{text!r} is no TASK:NAME=WORD, such as nlu:human=person")
    return task, name, word


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """How many examples and draws."""
    for option, number, what in (
        ("--num-train", 32, "examples with targets that are trained on"),
        ("--num-unlabelled", 64, "other requests that a distillation may ask about"),
        ("--num-validation", 16, "examples to choose by"),
        ("--num-test", 100, "examples to judge by"),
        ("--seeds", 3, "runs of each arm"),
    ):
        parser.add_argument(option, type=at_least_one, default=number, help=f"{what} (default: %(default)s)")


def sizes_of(args: argparse.Namespace, seed: int) -> Sizes:
    """Of one draw, from the options of `add_sizes`."""
    return Sizes(
        num_train=args.num_train,
        num_unlabelled=args.num_unlabelled,
        num_validation=args.num_validation,
        num_test=args.num_test,
        seed=seed,
    )


class Study:
    """Cells of one edge model.

    Args:
        args: of `make_parser`.
        where: the cloud.
        name: of the file of cells.
    """

    def __init__(self, args: argparse.Namespace, where: Where, name: str) -> None:
        torch.set_num_threads(args.threads)
        self.args, self.where, self.name = args, where, name
        self.course = Course(**{each.name: getattr(args, each.name) for each in fields(Course)})
        self.cells: Cells = open_cells(args)
        self.model_name = Path(args.model).name
        self.backbone = Backbone.from_pretrained(args.model, dtype=args.dtype, device=args.device)
        self._tasks: dict[tuple[str, int], Task] = {}

    @property
    def seeds(self) -> range:
        """Of arms and draws."""
        return range(self.args.seeds)

    def task(self, name: str, seed: int) -> Task:
        """A task with this seed's draw.

        Raises:
            InputError: the data is not there.
        """
        if (name, seed) not in self._tasks:
            args = self.args
            self._tasks[name, seed] = load_task(
                name,
                args.data_root,
                sizes_of(args, seed),
                source=source_of(args, name),
                is_strict=args.strict,
                own_words={called: word for task, called, word in args.own_words if task == name},
            )
        return self._tasks[name, seed]

    def run(
        self,
        task: str,
        name: str,
        arm: Arm,
        seed: int,
        tokens: int,
        *,
        course: Course | None = None,
        where: Where | None = None,
        key: Mapping[str, Any] | None = None,
        template: str = MERGE_TEMPLATE,
        copies: bool = True,
    ) -> Value:
        """One arm, trained and judged; `refused` with a reason where the budget bought nothing or a text was too long.

        Args:
            task, name, seed, tokens: which; tokens is the budget of training, in and out.
            arm: what is run.
            course, where: other ones than the study's.
            key: what else the cell depends on.
            template: what the edge behind the cloud reads.
            copies: it has a copy gate there.

        Raises:
            OutOfTimeError: the time is spent.
        """
        flops = None
        if name in WITH_FLOPS:
            ours = self.run(task, SANDWICH, ARMS[SANDWICH], seed, tokens, course=course, where=where)
            flops = int(ours["train"]["edge_flops"]) if "train" in ours else None

        def work(bench: Bench) -> Value:
            meter = PeakMeter(self.args.device)
            try:
                value = judge(bench, arm(replace(bench, edge_flops=flops)))
            except BudgetError as error:
                return {"refused": str(error)}
            except RefusedError as error:
                # A request that is too long will always be; a key, a limit or a fault of the server will not.
                if error.code not in _TOO_LONG:
                    raise
                return {"refused": str(error)}
            held = meter.read()
            return {**value, "peak_memory_mb": None if held is None else held / 1e6}

        more = {
            "arm": name,
            "edge_flops": flops,
            **({"merging": "judged by folds", "search": "within the budget"} if name in FITTED else {}),
            **(key or {}),
        }
        return self.cell(task, seed, tokens, more, work, course=course, where=where, template=template, copies=copies)

    def cell(
        self,
        task: str,
        seed: int,
        tokens: int,
        key: Mapping[str, Any],
        work: Callable[[Bench], Value],
        *,
        course: Course | None = None,
        where: Where | None = None,
        template: str = MERGE_TEMPLATE,
        copies: bool = True,
    ) -> Value:
        """Whatever is done on a bench, kept."""
        where, course = where or self.where, course or self.course
        drawn = self.task(task, seed)
        args = self.args
        whole = {
            **key,
            **asdict(course),
            "protocol": PROTOCOL,
            "seed": seed,
            "budget_tokens": tokens,
            "cloud_model": where.model,
            # On loopback the port changes; elsewhere the URL says whose model it is.
            "cloud": "own" if args.cloud is None else where.url,
            **({"weights": where.weights} if where.weights else {}),
            # Cells of a cloud in 32 bits have no such word, so that they are what they were.
            **({"cloud_dtype": args.cloud_dtype} if where.weights and args.cloud_dtype != "float32" else {}),
            "usd_in": args.usd_in,
            "usd_out": args.usd_out,
            "max_context": args.max_context,
            "dtype": args.dtype,
            "has_draft": "{draft}" in template,
            # Cells without a copy gate have no such word, so that they are what they were. The first gate could not
            # find back, and learnt by another loss: its cells say True.
            **({"copies": "finds back"} if copies and key.get("arm") not in WITHOUT_ADVICE else {}),
            "data": digest_of(drawn),
        }
        return self.cells.get(
            f"{self.name}-{self.model_name}-{task}",
            whole,
            lambda: self._on_bench(drawn, seed, tokens, course, where, template, copies, work),
        )

    def _on_bench(
        self,
        task: Task,
        seed: int,
        tokens: int,
        course: Course,
        where: Where,
        template: str,
        copies: bool,
        work: Callable[[Bench], Value],
    ) -> Value:
        args = self.args
        with ExitStack() as stack:
            bench = Bench(
                task=task,
                cloud=stack.enter_context(opened_cloud(where.url, args.key_env)),
                model=where.model,
                price=Price(usd_per_million_in=args.usd_in, usd_per_million_out=args.usd_out),
                edge=stack.enter_context(
                    opened_edge(
                        self.backbone,
                        task,
                        course,
                        seed=seed,
                        max_context=args.max_context,
                        template=template,
                        copies=copies,
                    )
                ),
                budget=Budget(tokens=tokens),
                course=course,
                seed=seed,
                folder=Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="zocp-"))),
            )
            return work(bench)


@contextmanager
def opened_study(args: argparse.Namespace, name: str) -> Iterator[Study]:
    """A study with its cloud: that of `--cloud`, or cotune's own, which ends with the block."""
    with opened_where(args, args.cloud_model) as where:
        yield Study(args, where, name)


@contextmanager
def opened_where(args: argparse.Namespace, model: str) -> Iterator[Where]:
    """This model at `--cloud`, or hosted by cotune while the block runs."""
    if args.cloud:
        yield Where(args.cloud, model)
        return
    with own_cloud(model, dtype=args.cloud_dtype) as url:
        yield Where(url, Path(model).name, digest_folder(find_model_folder(model))[:16])


@contextmanager
def opened_cloud(url: str, key_variable: str) -> Iterator[OpenAiCloud]:
    """The client of a cloud, with the key of that variable where it is set."""
    secret = os.environ.get(key_variable)
    with closing(OpenAiCloud(url, ApiKey(secret) if secret else None)) as cloud:
        yield cloud


def about_study(study: Study) -> dict[str, Any]:
    """Settings, versions, machine and the size of the edge."""
    args = study.args
    size = sum(parameter.numel() for parameter in study.backbone.model.parameters())
    return about_run(vars(args), device=args.device, threads=args.threads, backbone_parameters=size)


def digest_of(task: Task) -> str:
    """Of all texts of a task and of its prompts, so that a cell is never taken for that of other data."""
    parts = [(each.request, each.target) for part in (task.train, task.validation, task.test) for each in part]
    told = repr(
        (parts, task.unlabelled, task.prompts, task.detectors, task.max_tokens, len(task.own_words), task.allow_list)
    )
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def score_of(runs: Sequence[Value]) -> Mean:
    """The mean score of an arm over its seeds, in percent."""
    return Mean.of([100 * sum(run["scores"]) / len(run["scores"]) for run in runs])


def difference(ours: Sequence[Value], theirs: Sequence[Value]) -> Mean:
    """Ours less theirs on the same test requests, in percent, with an interval over requests."""
    return Mean.of_differences(
        [[100 * score for score in run["scores"]] for run in ours],
        [[100 * score for score in run["scores"]] for run in theirs],
    )


def column(runs: Sequence[Value], *path: str) -> float:
    """The mean over seeds of a number of each run.

    Example:
        >>> column([{"serve": {"calls": 1.0}}, {"serve": {"calls": 2.0}}], "serve", "calls")
        1.5
    """
    found = []
    for run in runs:
        value: Any = run
        for name in path:
            value = value[name]
        found.append(float(value))
    return sum(found) / len(found)


def finished(runs: Sequence[Value]) -> bool:
    """Whether there is a run and all of them could be judged."""
    return bool(runs) and all("scores" in run for run in runs)
