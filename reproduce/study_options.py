"""The options that all studies have, and what is made of them: a parser, the cells, the folder of results."""

from __future__ import annotations

import argparse
import math
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from cells import Cells, OutOfTimeError

from cotune.errors import CotuneError

HERE = Path(__file__).parent
PERSONA = "persona"
"""The data set that cotune makes."""


class StudyParser(argparse.ArgumentParser):
    """A parser that refuses with one sentence, before anything is computed."""

    def error(self, message: str) -> NoReturn:
        sentence = re.sub(r"^argument (\S+): (is|are) ", r"\1 \2 ", message)
        self.exit(2, f"error: {sentence}; see {self.prog} --help\n")


def at_least_one(text: str) -> int:
    """The type of options that count something.

    Raises:
        argparse.ArgumentTypeError: it is less, or no whole number.

    Example:
        >>> at_least_one("3")
        3
    """
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"is {text}, expected a whole number of at least 1")
    return number


def positive(text: str) -> float:
    """The type of options that measure something.

    Raises:
        argparse.ArgumentTypeError: it is not positive, not finite, or no number.

    Example:
        >>> positive("1e-3")
        0.001
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"is {text}, expected a positive number")
    return number


def study_parser(name: str, description: str | None, epilog: str, *, data: str = "folder of data sets") -> StudyParser:
    """A parser with `--model` and `--data-root`.

    Args:
        name: of the study's file.
        description, epilog: printed as they are.
        data: what `--data-root` is.
    """
    parser = StudyParser(
        prog=f"python reproduce/{name}.py",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="starter", help="a Hugging Face folder, or starter (default: %(default)s)")
    parser.add_argument("--data-root", type=Path, help=data)
    return parser


def add_run_options(parser: argparse.ArgumentParser, name: str, *, has_cache: bool = False) -> None:
    """Where and how long it runs, and what it keeps.

    Args:
        parser: of the study.
        name: of its folder of results.
        has_cache: it keeps features too.
    """
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=at_least_one, default=1)
    parser.add_argument("--budget-minutes", type=positive, default=None, help="begin no cell after so much time")
    parser.add_argument("--cells", type=Path, default=HERE / "cells", help="folder of finished cells")
    if has_cache:
        parser.add_argument("--cache", type=Path, default=Path("runs/reproduce"), help="folder of features")
    parser.add_argument("--out", type=Path, help=f"folder of results (default: reproduce/results/MODEL/{name})")


def open_cells(args: argparse.Namespace) -> Cells:
    """The finished cells of `--cells`, within `--budget-minutes`.

    Raises:
        InputError: no time is given.
    """
    return Cells(args.cells, budget_minutes=args.budget_minutes, tell=lambda line: print(line, flush=True))


def results_of(args: argparse.Namespace, name: str) -> Path:
    """Where the pages of a study go: a folder for each model, and for each choice of data sets but cotune's own.

    Example:
        >>> results_of(argparse.Namespace(out=None, model="models/small"), "spa_table2").parts[-3:]
        ('results', 'small', 'spa_table2')
        >>> own = argparse.Namespace(out=None, model="models/small", datasets=["trec", "cola"])
        >>> results_of(own, "federated_methods").parts[-2:]
        ('small-trec+cola', 'federated_methods')
    """
    chosen: Path | None = args.out
    datasets = getattr(args, "datasets", None) or [PERSONA]
    where = Path(args.model).name + ("" if datasets == [PERSONA] else f"-{'+'.join(datasets)}")
    return chosen or HERE / "results" / where / name


@contextmanager
def plain_endings() -> Iterator[None]:
    """Inside, a budget that is spent and errors that are raised on purpose end the study with one sentence.

    SIGTERM ends it as Ctrl-C does, so that what it started, such as a cloud of its own, ends with it.
    """
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    except OutOfTimeError as error:
        sys.exit(str(error))
    except CotuneError as error:
        sys.exit(f"error: {error}")
    finally:
        signal.signal(signal.SIGTERM, before)
