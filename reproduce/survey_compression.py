"""Compressed models on a set of downstream tasks, compressed after tuning and tuned after compressing.

The edge fine-tuning survey (arXiv 2408.10691) names it as its second experiment: how much of a task is left of a model
that was pruned or quantised. For each task the model is tuned with LoRA; then each recipe compresses either the tuned
model (calibrated on the task's training texts), or the model as it was, which is tuned afterwards with as many steps.
Texts that no one trained on judge both.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptation_study import DEVIATIONS, AdaptationStudy, at_edge, best_rate, make_parser, worded
from cells import OutOfTimeError, Value
from mean import Mean
from page import Page
from result_folder import Point, grid, plot_groups
from study_options import at_least_one, plain_endings, positive, results_of
from tokenizers import Tokenizer

from cotune.cli.backbone_judging import judge_model
from cotune.compression.calibration import CalibrationTexts
from cotune.compression.compress import CompressInputs, CompressResult, compress
from cotune.compression.model_folder import save_model
from cotune.compression.prune import PRUNERS
from cotune.compression.quantise import QUANTISERS
from cotune.compression.stage_words import parse_stage
from cotune.compression.stages import HELDOUT_SHARE, Recover, Stage
from cotune.compression.stored_layers import folder_bytes, stored_layers
from cotune.data.batches import EncodedExample
from cotune.errors import InputError
from cotune.evaluation.markup import Html, bullets
from cotune.evaluation.report import Section
from cotune.models.backbone import Backbone
from cotune.models.weights import find_model_folder
from cotune.tuning.loop import LoopConfig
from cotune.tuning.personal import split_examples
from cotune.tuning.tune import TuneResult, tune

NAME = "survey_compression"
BASE, TUNED = "model as it was", "tuned, not compressed"
ORDERS = ("tuned, then compressed", "compressed, then tuned")
# In a model this small the embedding has to shrink too, and scales count.
GOAL_RECIPE, GOAL_LOSS, GOAL_SIZE = "gptq:4,orders_by_activation=true,embedding_bits=4", 0.02, 0.30
THINNER = "channels:0.25+gptq:4"
GOAL_RECIPES = (GOAL_RECIPE, THINNER)
"""4 bits at under 30 % of the size: with the embedding in 4 bits, or in 8 and a quarter less in each feed-forward."""
RECIPES = (
    *("depth:2", "channels:0.25", "magnitude:0.5", "wanda:0.5", "sparse_gpt:0.5"),
    *("rtn:4", "gptq:4", GOAL_RECIPE, "awq:4", "gptq:3", THINNER),
)
SPARSE_PAIR = ("wanda:0.5", "magnitude:0.5")


def parse_recipe(text: str) -> tuple[Stage, ...]:
    """Stages of pruning and quantising behind each other.

    Raises:
        argparse.ArgumentTypeError: it names none.

    Example:
        >>> [stage.label for stage in parse_recipe("channels:0.25+gptq:4")]
        ['prune channels 0.25', 'quantise gptq 4 bits']
    """
    stages = []
    for part in text.split("+"):
        name = part.partition(":")[0]
        kind = "prune" if name in PRUNERS else "quantise"
        if name not in PRUNERS and name not in QUANTISERS:
            raise argparse.ArgumentTypeError(f"is {text}, expected {' or '.join((*PRUNERS, *QUANTISERS))} with amounts")
        try:
            stages.append(parse_stage(kind, part))
        except InputError as error:
            raise argparse.ArgumentTypeError(f"is {text}: {error}") from error
    return tuple(stages)


def recipe(text: str) -> str:
    """The type of `--recipes`: checked, and kept as it was written."""
    parse_recipe(text)
    return text


def parser() -> argparse.ArgumentParser:
    """The study's options."""
    made = make_parser(NAME, __doc__)
    made.add_argument("--datasets", nargs="+", help="several tasks, instead of --dataset")
    made.add_argument("--recipes", nargs="+", type=recipe, default=list(RECIPES), help="(default: %(default)s)")
    made.add_argument("--epochs", type=at_least_one, default=3, help="of tuning (default: %(default)s)")
    made.add_argument("--rank", type=at_least_one, default=8, help="of the LoRA (default: %(default)s)")
    made.add_argument("--learning-rates", nargs="+", type=positive, default=[2e-3, 8e-3, 3e-2])
    made.add_argument("--calibration-texts", type=at_least_one, default=64, help="rows (default: %(default)s)")
    made.add_argument("--calibration-length", type=at_least_one, default=128, help="tokens (default: %(default)s)")
    made.add_argument("--max-new-tokens", type=at_least_one, default=48, help="of an answer (default: %(default)s)")
    return made


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model on one task, over seeds."""

    dataset: str
    name: str
    order: str
    rouge_l: Mean
    rouge_l_each: list[float]
    exact_match: Mean
    nats: Mean
    size_bytes: float
    share_of_bf16: float


class Task:
    """One data set: its tuned models and its cells.

    Args:
        args: of the study.
        dataset: its name.
        scratch: for models that are needed again.
    """

    def __init__(self, args: argparse.Namespace, dataset: str, scratch: Path) -> None:
        self.study = AdaptationStudy(NAME, argparse.Namespace(**{**vars(args), "dataset": dataset}))
        self.dataset, self._args = dataset, args
        self._scratch = scratch / str(len(list(scratch.iterdir())))
        self._scratch.mkdir()
        self._rate: float | None = None
        self.searched: dict[float, float | None] = {}

    def rate(self) -> float:
        """The best learning rate of the model as it was; compressed ones take it too."""
        if self._rate is None:
            for rate in self._args.learning_rates:
                key = self._key({"part": "search", "learning_rate": rate})
                found = self.study.cell(key, lambda rate=rate: self._searched(rate))
                self.searched[rate] = None if found["diverged"] else found["nats"]
            self._rate = best_rate(self.searched)
        return self._rate

    def rows(self, name: str, order: str, stages: Sequence[Stage]) -> Row:
        """Measure a recipe, or the model without one.

        Raises:
            InputError: the model does not allow the recipe.
            OutOfTimeError: the budget is spent.
        """
        rate = None if name == BASE else self.rate()
        values = []
        for seed in self.study.seeds():
            key = self._key({"part": "score", "recipe": name, "order": order, "learning_rate": rate, "seed": seed})
            values.append(self.study.cell(key, lambda seed=seed: self._measured(name, order, stages, seed)))
        good = [value for value in values if not value["diverged"]]
        if not good:
            raise InputError("every run diverged")
        return Row(
            dataset=self.dataset,
            name=name,
            order=order,
            rouge_l=Mean.of([value["rouge_l"] for value in good]),
            rouge_l_each=[value["rouge_l"] for value in good],
            exact_match=Mean.of([value["exact_match"] for value in good]),
            nats=Mean.of([value["nats"] for value in good]),
            size_bytes=good[0]["size_bytes"],
            share_of_bf16=good[0]["size_bytes"] / (2 * good[0]["source_parameters"]),
        )

    def _key(self, key: Mapping[str, Any]) -> dict[str, Any]:
        names = ("epochs", "rank", "calibration_texts", "calibration_length", "max_new_tokens")
        return {**key, **{name: getattr(self._args, name) for name in names}}

    def _searched(self, rate: float) -> Value:
        train, judges = self.study.selection()
        result = self._tuned(self.study.backbone(), self.study.encode(train), self.study.encode(judges), rate, seed=0)
        return {"nats": result.curve[-1].heldout_loss}

    def _tuned(
        self,
        backbone: Backbone,
        train: Sequence[EncodedExample],
        judges: Sequence[EncodedExample],
        rate: float,
        *,
        seed: int,
    ) -> TuneResult:
        return tune(backbone, train, self._recover(rate).config(seed), heldout=judges)

    def _recover(self, rate: float) -> Recover:
        loop = LoopConfig(epochs=self._args.epochs, learning_rate=rate)
        return Recover(rank=self._args.rank, loop=loop, num_batch_sequences=self._args.batch_size)

    def _measured(self, name: str, order: str, stages: Sequence[Stage], seed: int) -> Value:
        source = find_model_folder(self._args.model)
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            if name == BASE:
                return self._judged(source, None, seed)
            if name == TUNED:
                return self._judged(self._tuned_model(seed), None, seed)
            if order == ORDERS[0]:
                made = self._compressed(self._tuned_model(seed), stages, place, seed)
            else:
                made = self._compressed(source, [*stages, self._recover(self.rate())], place, seed)
            return self._judged(made.out, made.adapter, seed)

    def _tuned_model(self, seed: int) -> Path:
        """The whole model with its LoRA merged, made once."""
        folder = self._scratch / f"tuned-{seed}"
        if not folder.is_dir():
            backbone = Backbone.from_pretrained(self._args.model)
            encoded = self.study.encode(self.study.train)
            # As `Recover` splits them.
            train, first, second = split_examples(encoded, HELDOUT_SHARE, seed)
            result = self._tuned(backbone, train, [*first, *second], self.rate(), seed=seed)
            with result.adapter.merge(backbone.model).attach(backbone.model) as model:
                save_model(folder, model, source=self._args.model, dtype="bfloat16")
        return folder

    def _compressed(self, source: Path, stages: Sequence[Stage], place: Path, seed: int) -> CompressResult:
        args = self._args
        calibration = CalibrationTexts.from_texts(
            [each.prompt + each.target for each in self.study.train],
            Tokenizer.from_str(self.study.backbone().tokenizer_json.decode()),
            num_texts=args.calibration_texts,
            length=min(args.calibration_length, self.study.backbone().spec.max_context),
            seed=seed,
            takes_fewer=True,
        )
        inputs = CompressInputs(
            calibration=calibration,
            examples=self.study.train,
            max_length=min(args.max_length, self.study.backbone().spec.max_context),
            dtype="bfloat16",
            seed=seed,
        )
        return compress(str(source), stages, place / "out", place / "run", inputs)

    def _judged(self, folder: Path, adapter: Path | None, seed: int) -> Value:
        judgement = judge_model(
            Backbone.from_pretrained(str(folder)),
            adapter,
            self.study.test,
            max_new_tokens=self._args.max_new_tokens,
            seed=seed,
            advance=lambda done, total, note="": None,
        )
        beside = 0 if adapter is None else folder_bytes(adapter)
        return {
            "rouge_l": judgement.rouge_l,
            "exact_match": judgement.exact_match,
            "nats": judgement.nats_per_token,
            "size_bytes": folder_bytes(folder) + beside,
            "source_parameters": sum(layer.num_numbers for layer in stored_layers(self._args.model)),
        }


def _goal(small: Row, tuned: Row) -> str:
    """What a compressed model keeps of the tuned one, of which something is right."""
    lost = 1 - small.rouge_l.mean / tuned.rouge_l.mean
    kept = [100 * a / b for a, b in zip(small.rouge_l_each, tuned.rouge_l_each, strict=False) if b > 0]
    by_seed = f" ({min(kept):.1f} to {max(kept):.1f} by seed)" if len(kept) > 1 else ""
    holds = lost <= GOAL_LOSS and small.share_of_bf16 < GOAL_SIZE
    return (
        f"{small.dataset}: {small.name} keeps {100 * (1 - lost):.1f} % of Rouge-L{by_seed} at "
        f"{100 * small.share_of_bf16:.0f} % of the size in bf16, for {small.nats.mean - tuned.nats.mean:+.3f} "
        f"nats per token: the goal (98 % of Rouge-L under 30 %) {'holds' if holds else 'is missed'}."
    )


def verdicts(rows: Sequence[Row]) -> list[str]:
    """What came of the goals, a sentence for each task: 4 bits, Wanda beside magnitude, and the two orders."""
    said = []
    for dataset in dict.fromkeys(row.dataset for row in rows):
        own = {(row.name, row.order): row for row in rows if row.dataset == dataset}
        if (tuned := own.get((TUNED, ""))) is not None and tuned.rouge_l.mean > 0:
            said += [_goal(own[name, ORDERS[0]], tuned) for name in GOAL_RECIPES if (name, ORDERS[0]) in own]
        wanda, magnitude = (own.get((name, ORDERS[0])) for name in SPARSE_PAIR)
        if wanda is not None and magnitude is not None:
            gain = magnitude.nats.mean - wanda.nats.mean
            word = "better" if gain > 0 else "worse"
            said.append(f"{dataset}: half of the weights gone, Wanda is {abs(gain):.3f} nats {word} than magnitude.")
        firsts, seconds = ([one for (_, order), one in own.items() if order == wanted] for wanted in ORDERS)
        names = {one.name for one in firsts} & {one.name for one in seconds}
        if names:
            gains = [own[name, ORDERS[1]].nats.mean - own[name, ORDERS[0]].nats.mean for name in sorted(names)]
            num = sum(gain > 0 for gain in gains)
            said.append(
                f"{dataset}: to compress the tuned model is better by nats than to tune the compressed one in {num} of "
                f"{len(gains)} recipes, by {sum(gains) / len(gains):+.3f} in the mean."
            )
    return said


def build(args: argparse.Namespace, scratch: Path) -> tuple[Page, AdaptationStudy]:
    """Measure what is missing, and the page of what is there."""
    tasks = [Task(args, dataset, scratch) for dataset in args.datasets or [args.dataset]]
    rows: list[Row] = []
    refused: dict[str, str] = {}
    unfinished: list[str] = []
    wanted: list[tuple[str, str, tuple[Stage, ...]]] = [(BASE, "", ()), (TUNED, "", ())]
    wanted += [(text, order, parse_recipe(text)) for text in args.recipes for order in ORDERS]
    # Recipe by recipe, so that a budget that ends has something of every task.
    for name, order, stages in wanted:
        for task in tasks:
            what = ", ".join(word for word in (task.dataset, name, order) if word)
            try:
                rows.append(task.rows(name, order, stages))
            except InputError as error:
                refused[what] = str(error)
            except OutOfTimeError:
                unfinished.append(what)
    if not rows:
        raise OutOfTimeError("the budget is spent before anything is finished; run again to go on")
    said = verdicts(rows)
    sections = []
    for task in tasks:
        own = [row for row in rows if row.dataset == task.dataset]
        if own:
            sections.append(_section(task.dataset, own, args.recipes))
    if refused:
        content = grid("What the product said", "task, recipe", list(refused), {"reason": list(refused.values())})
        sections.append(Section(name="refused", short="Refused", heading="Not run", content=content))
    edges = [
        f"{task.dataset}: the best learning rate is the {end} that was searched."
        for task in tasks
        if task.searched and (end := at_edge(task.rate(), list(task.searched)))
    ]
    page = Page(
        title="Compressed models on downstream tasks",
        lead=" ".join(said),
        expected={
            "arXiv 2408.10691": "compressed models on downstream tasks are named as an experiment, without numbers",
            "arXiv 2306.11695": "LLaMA-7B, WikiText perplexity at 50 %: dense 5.68, Wanda 7.26, magnitude 17.29",
        },
        measured={"rows": rows, "said": said, "refused": refused},
        sections=sections,
        deviations=[
            *edges,
            "Compressed models take the learning rate of the whole one. A tenth of the training texts chooses the "
            "epoch, for all alike.",
            "After quantising, the LoRA stays beside the model and counts for its size; in a sparse model, zeros stay.",
            "Zeros make no file smaller: sparse rows have the size of the whole model.",
        ],
        lines=[
            *(
                f"{row.dataset:12s} {row.name:24s} {row.order:24s} Rouge-L {worded(row.rouge_l)}, {worded(row.nats)} "
                f"nats, {row.size_bytes / 1e6:.2f} MB"
                for row in rows
            ),
            *said,
        ],
        unfinished=unfinished,
    )
    return page, tasks[0].study


def _section(dataset: str, rows: Sequence[Row], recipes: Sequence[str]) -> Section:
    columns = {
        "order": ["-" if not row.order else f"{row.order.partition(',')[0]} first" for row in rows],
        "MB": [f"{row.size_bytes / 1e6:.2f}" for row in rows],
        "of bf16, %": [f"{100 * row.share_of_bf16:.0f}" for row in rows],
        "Rouge-L": [worded(row.rouge_l) for row in rows],
        "exact match": [worded(row.exact_match) for row in rows],
        "nats": [worded(row.nats) for row in rows],
    }
    # With spaces a long one can be broken.
    content = grid("Each model", "recipe", [row.name.replace(",", ", ") for row in rows], columns)
    by_name = {(row.name, row.order): row for row in rows}
    shown = [name for name in recipes if any((name, order) in by_name for order in ORDERS)]
    if shown:
        bars: dict[str, list[Point | None]] = {
            order: [row.nats.point() if (row := by_name.get((name, order))) else None for name in shown]
            for order in ORDERS
        }
        numbered = [str(index) for index in range(1, len(shown) + 1)]
        caption = "Nats per token, lower is better: " + ", ".join(
            f"{index} {name}" for index, name in zip(numbered, shown, strict=True)
        )
        plot = plot_groups(f"nats-{dataset}", caption, numbered, bars, y_label="nats per token")
        content = Html(plot + content)
    content = Html(content + bullets(verdicts(rows)))
    return Section(name=dataset, short=dataset, heading=f"Task {dataset}", content=content)


def main() -> None:
    """Entry point."""
    args = parser().parse_args()
    with plain_endings(), tempfile.TemporaryDirectory() as scratch:
        page, study = build(args, Path(scratch))
        about = study.describe()
    page.publish(
        results_of(args, NAME),
        about=about,
        lead=f"Model {study.model_name}.",
        deviations=DEVIATIONS[:1],
    )


if __name__ == "__main__":
    main()
