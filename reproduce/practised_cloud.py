"""A cloud's model for the sandwich's studies that can do what it is asked.

A closed API's model was tuned by its provider on public texts; a small model was not, answers nothing, and every arm
that asks it is as good as none. Here the provider's part is played: all weights of a model learn the training part of
one task, in the form in which requests reach the cloud, without the examples that the studies' arms learn from, choose
by or are judged by with any of their seeds. Only the second half of the prompts to choose from was practised, so that
a prompt may matter. Requests are in the clear, as public texts are: where a detector replaces what is private,
placeholders are new to the model.

The folder that it writes is for `--cloud-model` of the studies.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

from sandwich_tasks import TASKS, Task, examples_of, load_task
from study_options import at_least_one, plain_endings, study_parser
from zocp_study import add_sizes, sizes_of

from cotune.data.templates import Example, format_answer
from cotune.errors import InputError
from cotune.openai_api.plain_chat import plain_chat_format
from cotune.openai_api.requests import Message
from cotune.sandwich.examples import PrivateExample

NAME = "practised_cloud"


def parser() -> argparse.ArgumentParser:
    """Of this command."""
    made = study_parser(
        NAME,
        __doc__,
        "examples:\n"
        "  python reproduce/practised_cloud.py --data-root data --task nlu --nlu trec --out runs/practised-trec\n"
        "  python reproduce/zocp_tasks.py --data-root data --tasks nlu --nlu trec --cloud-model runs/practised-trec\n\n"
        "Sizes and seeds are those of the study. A run that was interrupted goes on when it is given again.",
        data="folder with the data sets of the tasks",
    )
    made.add_argument("--task", choices=TASKS, default="nlu", help="(default: %(default)s)")
    made.add_argument("--nlu", choices=("sst2", "trec"), default="sst2", help="data of nlu (default: %(default)s)")
    add_sizes(made)
    made.add_argument("--epochs", type=at_least_one, default=3, help="(default: %(default)s)")
    made.add_argument("--batch-size", type=at_least_one, default=16, help="(default: %(default)s)")
    made.add_argument("--out", type=Path, required=True, help="a new folder for the model")
    return made


def practice_texts(tasks: Sequence[Task], examples: Sequence[PrivateExample]) -> list[Example]:
    """What the model learns.

    Args:
        tasks: of all seeds of the study.
        examples: the training part.

    Raises:
        InputError: the study needs all of them.
    """
    taken = {
        request
        for task in tasks
        for request in (
            *task.unlabelled,
            *(one.request for part in (task.train, task.validation, task.test) for one in part),
        )
    }
    prompts = tasks[0].prompts[len(tasks[0].prompts) // 2 :]
    rng = Random(0)
    found = [
        Example(
            plain_chat_format(
                [Message(role="system", content=rng.choice(prompts)), Message(role="user", content=one.request)]
            ),
            format_answer(one.target),
        )
        for one in examples
        if one.request not in taken
    ]
    if not found:
        raise InputError(
            f"the training part of {tasks[0].name} has {len(examples)} examples, and the study takes all of them; give "
            "fewer --seeds, --num-train or --num-unlabelled"
        )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    with plain_endings():
        args = parser().parse_args(arguments)
        if args.out.exists():
            raise InputError(f"--out is {args.out}, which is there, expected a new folder; move it, or use it")
        tasks = [load_task(args.task, args.data_root, sizes_of(args, s), nlu=args.nlu) for s in range(args.seeds)]
        texts = practice_texts(tasks, examples_of(args.task, args.data_root, "train", nlu=args.nlu))
        print(f"{len(texts)} texts of {args.task}, {args.epochs} epochs", flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        path, learnt = (args.out.with_name(f"{args.out.name}.{end}") for end in ("jsonl", "weights"))
        lines = [json.dumps({"prompt": one.prompt, "completion": one.target}) + "\n" for one in texts]
        path.write_text("".join(lines), encoding="utf-8")
        command = [sys.executable, "-m", "cotune", "tune", args.model, str(path), "--method", "full"]
        command += ["--epochs", str(args.epochs), "--batch-size", str(args.batch_size)]
        command += ["--out", str(learnt), "--merged", str(args.out)]
        if learnt.with_name(f"{learnt.name}.run").is_dir():
            command.append("--resume")
        done = subprocess.run(command, check=False)
        if done.returncode:
            raise InputError(f"cotune tune ended with status {done.returncode}; see what it said above")


if __name__ == "__main__":
    main()
