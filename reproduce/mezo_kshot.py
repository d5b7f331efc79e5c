"""MeZO (Malladi et al., arXiv 2305.17333), k-shot study: 16 texts of each class, five draws, label words in a prompt.

Zero-shot and in-context learning, back-propagation on all parameters and on a LoRA, MeZO on both, MeZO on accuracy
itself, and MeZO on the best hundredth of the parameters. Every learning rate is chosen on the draw's own questions to
choose by; accuracy is on the test part. The issue behind it: does the order zero-shot < in-context < MeZO <= LoRA <=
full hold on small models too?
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from cells import OutOfTimeError, Value
from kshot_tasks import MADE, PROMPTS, SEEDS, ChoiceEncoder, KShot, load_kshot
from kshot_training import LEARNERS, MASK_SHARE, Course, Learner, judge, judge_adapted, learn, stepping
from mean import Mean
from page import Page, about_run
from result_folder import grid, plot_groups
from study_options import add_run_options, at_least_one, open_cells, positive, results_of, study_parser
from tokenizers import Tokenizer

from cotune.errors import CotuneError, InputError
from cotune.evaluation.markup import Html
from cotune.evaluation.measured_memory import peak_bytes, run_measured
from cotune.evaluation.report import Section
from cotune.models.backbone import Backbone
from cotune.tuning.choice_objectives import ChoiceBatch, ChoiceExample

HERE = Path(__file__).parent
# The meaning of a cell: one more, and all are run again.
PROTOCOL = 1
UNTRAINED = ("zero_shot", "icl")
METHODS = (*UNTRAINED, *LEARNERS)
# Zero-shot < in-context < MeZO <= LoRA <= full.
ORDER = ("zero_shot", "icl", "mezo", "lora", "full")
PAIRS = tuple(pairwise(ORDER))
NUM_MEASURED_STEPS = 3
EXPECTED = {
    "order": ORDER,
    "steps": 20_000,
    "claims": "within 1 % of Adam on 7 of 11 tasks and up to 12 times less memory, OPT-13B with 1,000 training texts",
}


def make_parser() -> argparse.ArgumentParser:
    parser = study_parser(
        "mezo_kshot",
        __doc__,
        "examples:\n"
        "  python reproduce/mezo_kshot.py                              # opinions that cotune makes itself\n"
        "  python reproduce/mezo_kshot.py --data-root kshot16 --tasks sst2 trec --budget-minutes 60\n"
        "  python reproduce/mezo_kshot.py --model ./llama-7b --device cuda --dtype bfloat16 --data-root kshot16 \\\n"
        "      --steps 20000 --search each --rate-scale 0.01\n\n"
        "--data-root holds TASK/seed13/train.jsonl, TASK/seed13/validation.jsonl and TASK/test.jsonl with lines of "
        "text and label.\nFinished cells are kept in --cells and never run again.",
        data="folder of k-shot sets",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=list(PROMPTS),
        help=f"folders there, or {MADE}, opinions that cotune makes itself (default: all of --data-root, else {MADE})",
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="(default: all)")
    parser.add_argument(
        "--seeds", type=at_least_one, default=len(SEEDS), help=f"of {SEEDS} the first (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=at_least_one, default=400, help="of MeZO; the paper took 20,000 (default: %(default)s)"
    )
    parser.add_argument(
        "--backprop-steps", type=at_least_one, default=80, help="of back-propagation (default: %(default)s)"
    )
    parser.add_argument(
        "--checks", type=at_least_one, default=8, help="times that the best so far is looked for in a run"
    )
    parser.add_argument("--batch", type=at_least_one, default=16, help="texts in a step of MeZO, the paper's 16")
    parser.add_argument(
        "--backprop-batch", type=at_least_one, default=8, help="of back-propagation (default: %(default)s)"
    )
    parser.add_argument("--zo-eps", type=positive, default=1e-3, help="distance of MeZO's two passes, the paper's 1e-3")
    parser.add_argument(
        "--search",
        choices=("first", "each"),
        default="first",
        help="learning rates are searched on the first draw, or on each of them (default: %(default)s)",
    )
    parser.add_argument(
        "--rate-scale", type=positive, default=1.0, help="times all learning rates: large models want 0.01 and less"
    )
    parser.add_argument("--num-test", type=at_least_one, default=500, help="test texts (default: %(default)s)")
    parser.add_argument(
        "--max-length", type=at_least_one, default=256, help="tokens of a prompt (default: %(default)s)"
    )
    add_run_options(parser, "mezo_kshot")
    parser.add_argument("--measure", choices=("zero_shot", *LEARNERS), help=argparse.SUPPRESS)
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
        if args.seeds > len(SEEDS):
            raise InputError(f"--seeds is {args.seeds}, expected 1 to {len(SEEDS)}")
        if args.max_length < 8:
            raise InputError(f"--max-length is {args.max_length}, expected at least 8")
        self.args = args
        self.tasks: list[str] = args.tasks or ([MADE] if args.data_root is None else [t for t in PROMPTS if t != MADE])
        self.seeds = SEEDS[: args.seeds]
        # Before the model is loaded: what is missing is told at once.
        self.draws = {
            task: {seed: load_kshot(args.data_root, task, seed, args.num_test) for seed in self.seeds}
            for task in self.tasks
        }
        self.cells = open_cells(args)
        self.backbone = Backbone.from_pretrained(args.model, dtype=args.dtype, device=args.device)
        self.model_name = Path(args.model).name
        self._tokenizer = Tokenizer.from_str(self.backbone.tokenizer_json.decode())
        self._max_length = min(args.max_length, self.backbone.spec.max_context)

    @property
    def drawn_tasks(self) -> list[str]:
        """Tasks whose questions to choose by are drawn from the test file."""
        return [task for task, draws in self.draws.items() if any(one.is_validation_drawn for one in draws.values())]

    def course(self, learner: Learner) -> Course:
        """How long a method learns."""
        args = self.args
        forward = learner.is_forward_only
        return Course(
            num_steps=args.steps if forward else args.backprop_steps,
            num_checks=args.checks,
            num_batch_examples=args.batch if forward else args.backprop_batch,
            zo_eps=args.zo_eps,
        )

    def runs(self, task: str, method: str) -> list[Value]:
        """What a method came to, by seed."""
        if method in UNTRAINED:
            # Without demonstrations all draws are the same.
            seeds = self.seeds[:1] if method == "zero_shot" else self.seeds
            return [self._cell(task, method, seed, {}, lambda s=seed: self._ask(task, method, s)) for seed in seeds]
        rate = best_rate(self.search(task, method, self.seeds[0]))
        if self.args.search == "first":
            return [self.run(task, method, seed, rate) for seed in self.seeds]
        found = [self.search(task, method, seed) for seed in self.seeds]
        return [runs[best_rate(runs)] for runs in found]

    def search(self, task: str, method: str, seed: int) -> dict[float, Value]:
        """What a draw came to, by learning rate."""
        rates = [self.args.rate_scale * rate for rate in LEARNERS[method].learning_rates]
        return {rate: self.run(task, method, seed, rate) for rate in rates}

    def run(self, task: str, method: str, seed: int, rate: float) -> Value:
        """One training."""
        learner = LEARNERS[method]
        course = self.course(learner)
        key = {
            "learning_rate": rate,
            "steps": course.num_steps,
            "checks": course.num_checks,
            "batch": course.num_batch_examples,
            "zo_eps": course.zo_eps if learner.is_forward_only else None,
        }
        return self._cell(task, method, seed, key, lambda: self._learn(task, learner, course, seed, rate))

    def memory(self, task: str, method: str) -> Value:
        """Bytes that a method takes above the weights, measured in a process of its own."""
        learner = LEARNERS.get(method)
        args, size = self.args, self.args.batch if learner is None else self.course(learner).num_batch_examples
        command = [str(Path(__file__)), "--measure", method, "--tasks", task, "--model", str(args.model)]
        command += ["--seeds", "1", "--dtype", args.dtype, "--device", args.device, "--threads", str(args.threads)]
        command += ["--batch", str(args.batch), "--backprop-batch", str(args.backprop_batch)]
        command += ["--max-length", str(args.max_length), "--num-test", "1", "--zo-eps", str(args.zo_eps)]
        command += [] if args.data_root is None else ["--data-root", str(args.data_root)]
        key = {"what": "memory", "batch": size, "device": args.device}
        return self._cell(task, method, self.seeds[0], key, lambda: run_measured(command))

    def measure(self, task: str, method: str) -> int:
        """In this process: bytes beyond what is resident with the weights loaded."""
        train = self._questions(task, self.seeds[0], "train")
        learner = LEARNERS.get(method)
        course = None if learner is None else self.course(learner)
        size = self.args.batch if course is None else course.num_batch_examples

        def work(examples: Sequence[ChoiceExample]) -> None:
            if learner is None or course is None:
                judge(self.backbone, examples)
                return
            batch = ChoiceBatch.of(examples, self.backbone.spec.pad_token_id)
            with stepping(self.backbone, learner, batch, course, seed=self.seeds[0]) as step:
                for _ in range(NUM_MEASURED_STEPS):
                    step()

        # The same on two texts: what is loaded at the first use of anything must not count.
        work(train[:2])
        return peak_bytes(lambda: work(train[:size]), self.args.device)

    def _learn(self, task: str, learner: Learner, course: Course, seed: int, rate: float) -> Value:
        train, validation, test = (self._questions(task, seed, part) for part in ("train", "validation", "test"))
        learnt = learn(self.backbone, learner, train, validation, course, learning_rate=rate, seed=seed)
        chosen, judged = judge_adapted(self.backbone, learnt.adapted, validation, test)
        return {
            "accuracy": 1 - judged["errors"],
            "nats": judged["nats"],
            "validation_errors": chosen["errors"],
            "validation_nats": chosen["nats"],
            "train_s": learnt.curve[-1].elapsed_s,
            "num_trained": learnt.num_trained,
            "best_check": learnt.best_check,
            "checks": [[one.num_steps, one.train_loss, one.heldout_loss] for one in learnt.curve],
        }

    def _ask(self, task: str, method: str, seed: int) -> Value:
        draw, encoder = self.draws[task][seed], self._encoder(task)
        text = ""
        if method == "icl":
            longest = max(len(one.prompt_ids) + max(map(len, one.choices)) for one in map(encoder.encode, draw.test))
            text = encoder.demonstrations(draw.train, longest, seed)
        judged = judge(self.backbone, [encoder.encode(one, text) for one in draw.test])
        return {"accuracy": 1 - judged["errors"], "nats": judged["nats"], "demonstrations": text.count("\n")}

    def _questions(self, task: str, seed: int, part: str) -> list[ChoiceExample]:
        encoder = self._encoder(task)
        return [encoder.encode(one) for one in getattr(self.draws[task][seed], part)]

    def _encoder(self, task: str) -> ChoiceEncoder:
        return ChoiceEncoder(self._tokenizer, PROMPTS[task], self._max_length)

    def _cell(self, task: str, method: str, seed: int, key: Mapping[str, Any], run: Callable[[], Value]) -> Value:
        draw: KShot = self.draws[task][seed]
        whole = {
            "method": method,
            "seed": seed,
            **key,
            "protocol": PROTOCOL,
            "dtype": self.args.dtype,
            "num_test": len(draw.test),
            "max_length": self._max_length,
            "data": draw.digest,
            "backbone": self.backbone.spec.backbone_digest[:16],
        }
        return self.cells.get(f"{self.model_name}-kshot-{task}", whole, run)


def best_rate(runs: Mapping[float, Value]) -> float:
    """The learning rate with the fewest errors on the questions to choose by, then the fewest nats.

    Example:
        >>> runs = {
        ...     0.1: {"validation_errors": 0.25, "validation_nats": 0.5},
        ...     0.2: {"validation_errors": 0.25, "validation_nats": 0.4},
        ... }
        >>> best_rate(runs)
        0.2
    """
    return min(runs, key=lambda rate: (runs[rate]["validation_errors"], runs[rate]["validation_nats"]))


def order_of(accuracy: Mapping[str, Mean]) -> list[dict[str, Any]]:
    """For each two neighbours of `ORDER` that were measured, whether the first is the worse one, by means.

    Trained methods may be equal.
    """
    return [
        {
            "worse": first,
            "better": second,
            "difference": 100 * (accuracy[second].mean - accuracy[first].mean),
            "holds": accuracy[first].mean < accuracy[second].mean
            or (first not in UNTRAINED and accuracy[first].mean == accuracy[second].mean),
        }
        for first, second in PAIRS
        if first in accuracy and second in accuracy
    ]


def build(study: Study) -> Page:
    """The table, the order and the memory."""
    methods: list[str] = [method for method in METHODS if method in study.args.methods]
    accuracy: dict[str, dict[str, Mean]] = {task: {} for task in study.tasks}
    seconds: dict[str, dict[str, float]] = {task: {} for task in study.tasks}
    rates: dict[str, dict[str, list[int]]] = {task: {} for task in study.tasks}
    memory: dict[str, dict[str, float]] = {task: {} for task in study.tasks}
    fitting: dict[str, list[int]] = {}
    unfinished = []
    for task in study.tasks:
        for method in methods:
            try:
                runs = study.runs(task, method)
                accuracy[task][method] = Mean.of([run["accuracy"] for run in runs])
                if method in LEARNERS:
                    seconds[task][method] = sum(run["train_s"] for run in runs) / len(runs)
                    rates[task][method] = [run["best_check"] for run in runs]
                if method == "icl":
                    fitting[task] = [run["demonstrations"] for run in runs]
                else:
                    memory[task][method] = study.memory(task, method)["peak_bytes"] / 1e6
            except OutOfTimeError:
                unfinished.append(f"{method} on {task}")
    orders = {task: order_of(found) for task, found in accuracy.items()}
    percent = {
        task: {method: _percent(mean) for method, mean in found.items()} for task, found in accuracy.items() if found
    }
    sections = []
    if percent:
        bars = {
            method: [percent[task][method].point() if method in percent[task] else None for task in percent]
            for method in methods
            if any(method in found for found in percent.values())
        }
        sections = [
            Section(
                name="accuracy",
                short="Accuracy",
                heading="Accuracy with 16 texts of each class",
                content=Html(
                    plot_groups(
                        "accuracy", "Mean over draws, 95 % intervals.", list(percent), bars, y_label="accuracy, %"
                    )
                    + grid(
                        "Accuracy on the test part, %, mean ± 95 % over draws",
                        "method",
                        methods,
                        {task: [_word(found.get(method)) for method in methods] for task, found in percent.items()},
                    )
                    + grid(
                        "The order: zero-shot < in-context < MeZO <= LoRA <= full, by means",
                        "pair",
                        [f"{first} to {second}" for first, second in PAIRS],
                        {task: [_pair(orders[task], first) for first in ORDER[:-1]] for task in percent},
                    )
                    + (
                        grid(
                            "Demonstrations that fit beside the longest question; without any it is zero-shot",
                            "",
                            ["of each draw"],
                            {task: [", ".join(map(str, numbers))] for task, numbers in fitting.items()},
                        )
                        if fitting
                        else ""
                    )
                ),
            ),
            Section(
                name="cost",
                short="Cost",
                heading="What it costs",
                content=Html(
                    "".join(
                        grid(
                            f"{task}: peak above the weights in a process of its own, and seconds of one training",
                            "method",
                            methods,
                            {
                                "MB": [_number(memory[task].get(method)) for method in methods],
                                "s": [_number(seconds[task].get(method)) for method in methods],
                            },
                        )
                        for task in percent
                    )
                ),
            ),
        ]
    return Page(
        title="MeZO with 16 texts of each class",
        lead="Forward passes alone against back-propagation.",
        expected=EXPECTED,
        measured={
            "accuracy": percent,
            "order": orders,
            "memory_mb": memory,
            "demonstrations": fitting,
            "train_s": seconds,
            "best_check": rates,
        },
        sections=sections,
        deviations=deviations_of(study.args, study.drawn_tasks),
        lines=[
            f"{task} {method:14s} {mean!s}"
            + (f", {memory[task][method]:.0f} MB above the weights" if method in memory[task] else "")
            for task, found in percent.items()
            for method, mean in found.items()
        ],
        unfinished=unfinished,
    )


def deviations_of(args: argparse.Namespace, drawn_tasks: Sequence[str]) -> list[str]:
    """Where this is another study than the paper's.

    Args:
        args: of the command.
        drawn_tasks: whose questions to choose by are not those of the files.
    """
    drawn = (
        f"Questions to choose by of {', '.join(drawn_tasks)} are drawn from the test file's other texts, because those "
        "of their files are training texts."
    )
    return [
        *([drawn] if drawn_tasks else []),
        f"MeZO takes {args.steps:,} steps here, the paper 20,000; learning rates are larger in turn and fall as a "
        "cosine, the paper's are constant.",
        "The models are decoders of the settings' size; the paper's k-shot study has an encoder of 355 M parameters "
        "that fills a gap. Here the label word ends the prompt, and where the paper's template needs a gap it is ours.",
        f"The best of {args.checks} checks is taken by the objective on the questions to choose by, the learning rate "
        f"by their accuracy, then nats, {'on the first draw' if args.search == 'first' else 'on each draw'}.",
        "Directions have signs, not Gaussian numbers; parameters are exact between updates.",
        f"The sparse mask ({100 * MASK_SHARE:g} %) is chosen once by squared gradients on the same texts, which needs "
        "the memory of back-propagation there; measured memory is that of the steps.",
        f"At most {args.num_test} test texts; in-context learning has as many demonstrations as fit {args.max_length} "
        "tokens beside the longest question.",
    ]


def _percent(mean: Mean) -> Mean:
    low, high = (None if end is None else 100 * end for end in (mean.low, mean.high))
    return Mean(mean=100 * mean.mean, low=low, high=high, num=mean.num)


def _word(mean: Mean | None) -> str:
    return "" if mean is None else str(mean)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _pair(order: Sequence[Mapping[str, Any]], first: str) -> str:
    pair = next((one for one in order if one["worse"] == first), None)
    if pair is None:
        return ""
    return f"{pair['difference']:+.1f}, {'holds' if pair['holds'] else 'does not hold'}"


def main() -> None:
    """Entry point."""
    args = make_parser().parse_args()
    try:
        study = Study(args)
        if args.measure is not None:
            print(json.dumps({"peak_bytes": study.measure(study.tasks[0], args.measure)}))
            return
        page = build(study)
    except CotuneError as error:
        sys.exit(f"error: {error}")
    page.publish(
        results_of(args, "mezo_kshot"),
        about=about_run(
            {**vars(args), "model": study.model_name, "tasks": study.tasks},
            device=args.device,
            threads=args.threads,
            backbone_parameters=sum(p.numel() for p in study.backbone.model.parameters()),
        ),
        lead=f"Model {study.model_name}, tasks {', '.join(study.tasks)}.",
    )


if __name__ == "__main__":
    main()
