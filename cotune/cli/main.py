"""The `cotune` command: words to config to one call.

Errors that cotune raises on purpose end as one sentence on standard error and an exit status that is not 0.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated, NoReturn

import typer
from rich.text import Text

from cotune import __version__
from cotune.cli.audit_command import audit
from cotune.cli.cloud_command import cloud
from cotune.cli.compress_command import compress
from cotune.cli.demo_command import demo
from cotune.cli.device_commands import device
from cotune.cli.evaluate_command import evaluate
from cotune.cli.federate_command import federate
from cotune.cli.ledger_command import ledger
from cotune.cli.output import stderr
from cotune.cli.plan_command import plan
from cotune.cli.sandwich_ask import ask
from cotune.cli.sandwich_command import sandwich
from cotune.cli.sandwich_fit import fit, script
from cotune.cli.sandwich_leaks import leaks
from cotune.cli.tune_command import tune
from cotune.errors import CotuneError, InputError

INTERRUPTED = 130

app = typer.Typer(
    name="cotune",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="One large language model in the cloud and many private devices learn and generate together; "
    "what is personal stays on the device.",
)
app.command()(demo)
app.command()(cloud)
app.add_typer(device)
app.command()(tune)
app.command()(compress)
app.command()(plan)
app.command()(evaluate)
app.add_typer(audit)
app.add_typer(federate)
for command in (ask, fit, leaks, script):
    sandwich.command()(command)
app.add_typer(sandwich)
app.command()(ledger)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cotune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _is_worth_saying(record: logging.LogRecord) -> bool:
    """Anything but that bitsandbytes, which peft loads for whole weights too, lacks a kernel that it can do without."""
    return not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward from kernels-community")


def main() -> None:
    """Entry point of the command line."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_worth_saying)
    try:
        app()
    except CotuneError as error:
        _refuse(str(error), error.exit_code)
    except SystemExit as ended:
        if ended.code == INTERRUPTED:  # what Typer makes of Ctrl-C, without a word
            stderr.print("interrupted; run the same command with --resume where it offers that, to go on")
        raise
    except BrokenPipeError:
        # The reader of our output is gone (as with `| head`): end quietly, also when Python flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        # What the file system says of a path, such as a name too long, where nobody knew better. All else is a fault.
        if error.filename is None:
            raise
        _refuse(f"{error.filename!s:.200}: {error.strerror}; give another path", InputError.exit_code)


def _refuse(reason: str, exit_code: int) -> NoReturn:
    # As text, not markup: a message may hold brackets.
    stderr.print(Text.assemble(("error:", "bold red"), " ", reason), soft_wrap=True)
    sys.exit(exit_code)
