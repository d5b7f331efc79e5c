"""The memory that a device's round of co-tuning really takes, measured in a child process.

python reproduce/coplms_memory.py --method ours --models my-models        measures one; the study starts it
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from coplms_contest import METHODS, CoPlmsStudy, make_parser
from coplms_texts import Questions, texts_of_test
from federated_memory import NUM_CHILDREN, TIMEOUT_S

from cotune.data.templates import Example
from cotune.errors import CotuneError, InputError
from cotune.evaluation.measured_memory import PeakMeter, run_measured
from cotune.federation.comparison.scene import CLOUD, Account

NAME = "coplms_memory"
# The second one has the optimiser's state from the first.
NUM_STEPS = 2
_OPTIONS = (
    "num_things",
    "num_skills",
    "num_test",
    "num_public",
    "batch_size",
    "rank",
    "top_k",
    "max_tokens",
    "num_train",
    "num_open",
    "dtype",
    "device",
    "threads",
)


@dataclass
class MeasuredAccount(Account):
    """An account that also tells what devices' work took.

    Attributes:
        torch_device: where models are.
        peak_bytes: the most that a device's work took beyond what was there before it.
    """

    torch_device: str = "cpu"
    peak_bytes: int = 0

    @contextmanager
    def at(self, name: str) -> Iterator[None]:
        """As `Account.at`.

        Raises:
            InputError: the system does not tell.
        """
        meter = PeakMeter(self.torch_device)
        with super().at(name):
            yield
        if name != CLOUD:
            took = meter.read()
            if took is None:
                raise InputError("memory cannot be measured here, expected Linux or CUDA; leave --measure-memory out")
            self.peak_bytes = max(self.peak_bytes, took)


def parser() -> argparse.ArgumentParser:
    """Of this command."""
    made = make_parser(NAME, __doc__ or "", examples=("--method ours --models my-models",))
    made.add_argument("--method", choices=METHODS, required=True)
    return made


def measured_peak(args: argparse.Namespace, models: Path, name: str) -> dict[str, Any]:
    """`peak_bytes` of a device's round, of the middle one of some children.

    Args:
        args: of the study; its first number of devices counts.
        models: folder of the models.
        name: of the method.

    Raises:
        CotuneError: a child failed.
    """
    options = ["--method", name, "--models", str(models), "--devices", str(args.devices[0])]
    for word in _OPTIONS:
        options += [f"--{word.replace('_', '-')}", str(getattr(args, word))]
    if args.datasets:
        options += ["--data-root", str(args.data_root), "--datasets", *args.datasets, "--school", *args.school]
    options += ["--rounds", "1", "--local-steps", str(NUM_STEPS), "--cloud-steps", "1", "--seeds", "1"]
    found = [run_measured([str(Path(__file__)), *options], timeout_s=TIMEOUT_S) for _ in range(NUM_CHILDREN)]
    return sorted(found, key=lambda one: int(one["peak_bytes"]))[NUM_CHILDREN // 2]


def measure(study: CoPlmsStudy, name: str) -> dict[str, int]:
    """A round of all devices, one after another. In a child only."""
    questions = texts_of_test(study.args, study.args.devices[0], 0)
    # First with little, after which all libraries are loaded.
    one_round(study, name, of_length(questions, 1, longest=False))
    return {"peak_bytes": one_round(study, name, of_length(questions, study.args.batch_size, longest=True)).peak_bytes}


def one_round(study: CoPlmsStudy, name: str, questions: Questions) -> MeasuredAccount:
    """What it cost."""
    account = MeasuredAccount(torch_device=study.args.device)
    with TemporaryDirectory() as folder:
        for _ in METHODS[name](study.args).rounds(study.scene(questions, Path(folder), seed=0), account):
            pass
    return account


def of_length(questions: Questions, num: int, *, longest: bool) -> Questions:
    """So many of each device's texts, the longest or the shortest."""

    def length(one: Example) -> int:
        return len(one.prompt + one.target)

    domains = [replace(one, train=sorted(one.train, key=length, reverse=longest)[:num]) for one in questions.domains]
    return replace(questions, domains=domains)


def main() -> None:
    """Entry point."""
    args = parser().parse_args()
    try:
        print(json.dumps(measure(CoPlmsStudy(NAME, args), args.method)))
    except CotuneError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
