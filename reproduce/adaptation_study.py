"""What the studies of attached methods share: options, texts, cells, the search for a learning rate, words for numbers.

The methods are those of `cotune tune`: what is tuned (`cotune.tuning.adaptations`) and how
(`cotune.tuning.estimators`), through `cotune.tuning.tune.tune`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from cells import Value
from mean import Mean
from page import Page, about_run
from study_options import PERSONA, add_run_options, at_least_one, open_cells, plain_endings, results_of, study_parser
from study_texts import persona_texts, with_training_texts

from cotune.data import read_splits
from cotune.data.batches import EncodedExample
from cotune.data.templates import Example
from cotune.errors import InputError, NonFiniteLossError
from cotune.models.backbone import Backbone
from cotune.models.low_bit import is_low_bit
from cotune.tuning.personal import encode_examples, split_examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HERE = Path(__file__).parent
# Part of the training texts that judges learning rates.
SELECTION_SHARE = 0.2
# The meaning of a cell: one more, and all are run again.
PROTOCOL = 1
DEVIATIONS = (
    "Model, data and their amounts are those of the settings below: numbers compare the methods with each other.",
    "The learning rate of each method is the one with the least loss on a fifth of the training texts that are held "
    "out, seed 0; no test text chooses anything, and the last epoch counts.",
)


def make_parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser with the options that these studies have."""
    parser = study_parser(
        name,
        description,
        "examples:\n"
        f"  python reproduce/{name}.py\n"
        f"  python reproduce/{name}.py --budget-minutes 30\n"
        f"  python reproduce/{name}.py --model ./llama-1b --dtype bfloat16 --device cuda --data-root my-data "
        "--dataset sciq\n\n"
        "A data set is a folder of --data-root in any format that `cotune tune` reads. Finished cells are kept in "
        "--cells and never run again.",
    )
    parser.add_argument(
        "--dataset", default=PERSONA, help=f"folder there, or {PERSONA}, which cotune makes (default: %(default)s)"
    )
    parser.add_argument("--num-train", type=at_least_one, default=200, help="training texts (default: %(default)s)")
    parser.add_argument("--num-test", type=at_least_one, default=120, help="held-out texts (default: %(default)s)")
    parser.add_argument("--seeds", type=at_least_one, default=3, help="runs of every cell (default: %(default)s)")
    parser.add_argument("--batch-size", type=at_least_one, default=8, help="texts in one step (default: %(default)s)")
    parser.add_argument(
        "--max-length", type=at_least_one, default=256, help="tokens of one text (default: %(default)s)"
    )
    add_run_options(parser, name)
    return parser


class AdaptationStudy:
    """The model, the texts and the cells of one study.

    Args:
        name: of the study, for its cells.
        args: from `make_parser`.

    Attributes:
        train, test: texts, in an order that seeds do not change.
    """

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        torch.set_num_threads(args.threads)
        self.name, self.args = name, args
        self.model_name = Path(args.model).name
        self.cells = open_cells(args)
        self.train, self.test = self._read()
        self._backbones: dict[int | None, Backbone] = {}

    def backbone(self, bits: int | None = None) -> Backbone:
        """The model with whole weights, or with 4 or 8 bits for each.

        Raises:
            InputError: bitsandbytes is not installed, or the model cannot be used.
        """
        if bits not in self._backbones:
            args = self.args
            self._backbones[bits] = Backbone.from_pretrained(
                args.model, dtype=args.dtype, device=args.device, base_bits=bits
            )
        return self._backbones[bits]

    def encode(self, examples: Sequence[Example], num_virtual_tokens: int = 0) -> list[EncodedExample]:
        """Token ids, short enough to leave room for a prompt of so many virtual tokens."""
        backbone = self.backbone()
        longest = min(self.args.max_length, backbone.spec.max_context - num_virtual_tokens)
        return encode_examples(backbone.tokenizer_json, examples, backbone.description, longest)

    def selection(self) -> tuple[list[Example], list[Example]]:
        """Of the training texts those that train and those that judge in the search.

        Raises:
            InputError: too few texts.
        """
        train, first, second = split_examples(self.train, SELECTION_SHARE, 0)
        if not first:
            raise InputError(f"--num-train is {len(self.train)}, expected at least 10, a fifth of which is held out")
        return train, [*first, *second]

    def seeds(self) -> range:
        """Of the runs."""
        return range(self.args.seeds)

    def cell(self, key: Mapping[str, Any], run: Callable[[], Value]) -> Value:
        """A cell of this study: `key` and all settings decide. A loss that is nan or inf is a finding, too."""
        args = self.args
        whole = {
            **key,
            "protocol": PROTOCOL,
            "dtype": args.dtype,
            "max_length": args.max_length,
            "batch_size": args.batch_size,
            "num_train": args.num_train,
            "num_test": args.num_test,
            "backbone": self.backbone().spec.backbone_digest[:16],
        }

        def measured() -> Value:
            try:
                return {"diverged": False, **run()}
            except NonFiniteLossError:
                return {"diverged": True}

        return self.cells.get(f"{self.name}-{self.model_name}-{args.dataset}", whole, measured)

    def describe(self) -> dict[str, Any]:
        """Settings, versions and machine, so that the numbers can be judged and repeated."""
        return about_run(
            {**vars(self.args), "model": self.model_name},
            device=self.args.device,
            threads=self.args.threads,
            backbone_parameters=sum(p.numel() for p in self.backbone().model.parameters()),
        )

    def _read(self) -> tuple[list[Example], list[Example]]:
        args = self.args
        if args.dataset == PERSONA:
            return persona_texts(args.num_train, args.num_test)
        if args.data_root is None:
            raise InputError(f"--data-root is not given and {args.dataset} is a folder there; give it, or {PERSONA}")
        folder = args.data_root / args.dataset
        if not folder.is_dir():
            raise InputError(f"{args.data_root} has no folder {args.dataset}; add it")
        splits = read_splits(folder, seed=1)
        train, test = with_training_texts(splits.train, splits.test)
        return train[: args.num_train], test[: args.num_test]


def weight_bytes(model: PreTrainedModel) -> int:
    """Of the parameters and buffers, with the scales of 4-bit blocks, which bitsandbytes keeps beside them."""
    tensors = [*model.parameters(), *model.buffers()]
    if is_low_bit(model):
        import bitsandbytes as bnb

        tensors += [one.quant_state.absmax for one in model.parameters() if isinstance(one, bnb.nn.Params4bit)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def best_rate(nats: Mapping[float, float | None]) -> float:
    """The learning rate, or the factor of all rates, with the least held-out nats; None is a run that diverged.

    Raises:
        InputError: all of them did.

    Example:
        >>> best_rate({1e-3: 2.0, 1e-2: 1.5, 1e-1: None})
        0.01
    """
    finite = {rate: value for rate, value in nats.items() if value is not None}
    if not finite:
        raise InputError(
            f"every learning rate of {', '.join(f'{rate:g}' for rate in nats)} diverged; give smaller ones"
        )
    return min(finite, key=lambda rate: finite[rate])


def search_wider(
    rates: Sequence[float], measure: Callable[[float], float | None], *, most: int
) -> dict[float, float | None]:
    """Measure some learning rates, then halves or doubles beyond them for as long as the best one is at an end.

    Args:
        rates: measured in any case; one alone is what was asked for, and stays alone.
        measure: nats of a rate, or wrong answers: less is better; None where it diverged.
        most: rates in all, beyond which the best one may stay at an end.

    Returns:
        What was measured, by rate.

    Example:
        >>> search_wider([0.5, 1.0], lambda rate: abs(rate - 2.1), most=8)
        {0.5: 1.6, 1.0: 1.1, 2.0: 0.10000000000000009, 4.0: 1.9}
    """
    found = {rate: measure(rate) for rate in sorted(rates)}
    while len(found) < most and any(value is not None for value in found.values()):
        best = best_rate(found)
        end = at_edge(best, list(found))
        # As good as another one is no sign that a better one lies outside.
        if end is None or list(found.values()).count(found[best]) > 1:
            break
        further = best / 2 if end == "smallest" else best * 2
        found[further] = measure(further)
    return dict(sorted(found.items()))


def at_edge(rate: float, rates: Sequence[float]) -> str | None:
    """Whether a best learning rate is at an end of the search, where a better one may lie outside.

    Example:
        >>> at_edge(0.1, [0.01, 0.1]), at_edge(0.03, [0.01, 0.03, 0.1])
        ('largest', None)
    """
    if rate in (min(rates), max(rates)) and len(rates) > 1:
        return "smallest" if rate == min(rates) else "largest"
    return None


def edge_notes(chosen: Mapping[str, float], searched: Mapping[str, Sequence[float]]) -> list[str]:
    """A sentence for each end of the search at which best learning rates are."""
    at = {name: at_edge(rate, searched[name]) for name, rate in chosen.items()}
    return [
        f"The best learning rate is the {end} that was searched, so a better one may lie outside: {', '.join(names)}."
        for end in ("smallest", "largest")
        if (names := [name for name, where in at.items() if where == end])
    ]


def worded(mean: Mean | None, digits: int = 3) -> str:
    """A mean with half of its interval.

    Example:
        >>> worded(Mean(mean=1.0, low=0.9, high=1.1, num=3)), worded(None)
        ('1.000 ± 0.100', '-')
    """
    return "-" if mean is None else mean.worded(digits)


def run_study(name: str, parser: argparse.ArgumentParser, build: Callable[[AdaptationStudy], Page]) -> None:
    """A study's command: measure what is missing, write the result folder, say what came."""
    args = parser.parse_args()
    with plain_endings():
        study = AdaptationStudy(name, args)
        page = build(study)
    page.publish(
        results_of(args, name),
        about=study.describe(),
        lead=f"Model {study.model_name}, data {args.dataset}.",
        deviations=DEVIATIONS,
    )
