"""A cloud's model for the sandwich's studies that can do what it is asked.

A closed API's model was tuned by its provider on public texts; a small model was not, answers nothing, and every arm
that asks it is as good as none. Here the provider's part is played: all weights of a model learn the training part of
the tasks, in the form in which requests reach the cloud, without the examples that the studies' arms learn from, choose
by or are judged by with any of their seeds. Only the second half of the prompts to choose from was practised, so that
a prompt may matter. Half of the texts are in the clear, as public ones are, and half with placeholders, which a large
model copies without being taught to. A model with a chat template reads them in it.

The folder that it writes is for `--cloud-model` of the studies.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

from sandwich_bench import redactor_of
from sandwich_tasks import PARTS, SOURCES, Task, examples_of, load_task
from study_options import at_least_one, plain_endings, study_parser
from zocp_study import add_sizes, sizes_of

from cotune.data.templates import Example, format_answer
from cotune.errors import InputError
from cotune.models.chat_format import Turns, chat_format_of
from cotune.models.weights import find_model_folder
from cotune.openai_api.plain_chat import plain_chat_format
from cotune.openai_api.requests import Message
from cotune.sandwich.examples import PrivateExample

NAME = "practised_cloud"
_HIDDEN_SHARE = 0.5
# Of the texts, to tell the best epoch by; a large model reads them slowly.
_HELDOUT_SHARE = 0.05


def parser() -> argparse.ArgumentParser:
    """Of this command."""
    made = study_parser(
        NAME,
        __doc__,
        "examples:\n"
        "  python reproduce/practised_cloud.py --data-root data --data-sets trec --out runs/practised-trec\n"
        "  python reproduce/zocp_tasks.py --data-root data --tasks nlu --nlu trec --cloud-model runs/practised-trec\n"
        "  python reproduce/practised_cloud.py --data-root data --max-context 1024 --out runs/practised\n"
        "  python reproduce/practised_cloud.py --model runs/smollm2 --data-root data --method lora --dtype bfloat16 "
        "--num-texts 1500 --epochs 1 --out runs/practised-smollm2\n\n"
        "Sizes and seeds are those of the study. A run that was interrupted goes on when it is given again.",
        data="folder with the data sets of the tasks",
    )
    known = [name for names in SOURCES.values() for name in names]
    made.add_argument("--data-sets", nargs="+", choices=known, default=known, help="of the tasks (default: all)")
    add_sizes(made)
    made.add_argument(
        "--num-texts", type=at_least_one, help="of each data set at most, drawn by chance (default: all that are left)"
    )
    made.add_argument("--method", choices=("full", "lora"), default="full", help="what is tuned (default: %(default)s)")
    made.add_argument("--dtype", default="float32", help="that the model is held in meanwhile (default: %(default)s)")
    made.add_argument("--max-context", type=at_least_one, help="its window in tokens (default: the model's own)")
    made.add_argument("--epochs", type=at_least_one, default=3, help="(default: %(default)s)")
    made.add_argument("--batch-size", type=at_least_one, default=16, help="(default: %(default)s)")
    made.add_argument("--out", type=Path, required=True, help="a new folder for the model")
    return made


def drawn_tasks(name: str, source: str, args: argparse.Namespace) -> list[Task]:
    """What the study draws with each seed, or all that there is of it."""
    found = []
    for seed in range(args.seeds):
        sizes = sizes_of(args, seed)
        limits = {
            f"num_{part}": min(
                getattr(sizes, f"num_{part}"), len(examples_of(name, args.data_root, part, source=source))
            )
            for part in PARTS
        }
        found.append(load_task(name, args.data_root, replace(sizes, **limits), source=source))
    return found


def practice_texts(
    tasks: Sequence[Task],
    examples: Sequence[PrivateExample],
    others: Sequence[Task] = (),
    *,
    template: Callable[[Turns], str] | None = None,
) -> list[Example]:
    """What the model learns of one data set.

    Args:
        tasks: of all seeds of the study.
        examples: the training part.
        others: tasks of other data sets that may have the same texts.
        template: the model's own for a conversation; None: it has none, and reads one as plain text.

    Raises:
        InputError: the study needs all of them.
    """
    taken = {
        request
        for task in (*tasks, *others)
        for request in (
            *task.unlabelled,
            *(one.request for part in (task.train, task.validation, task.test) for one in part),
        )
    }
    prompts = tasks[0].prompts[len(tasks[0].prompts) // 2 :]
    rng, found = Random(0), []
    with redactor_of(tasks[0]) as redactor:
        for one in examples:
            if one.request in taken:
                continue
            request, target = one.request, one.target
            if rng.random() < _HIDDEN_SHARE:
                private = redactor.request(Random(rng.random()))
                request, target = private.redact(request).text, private.redact(target).text
            turns = [("system", rng.choice(prompts)), ("user", request)]
            if template is None:
                told = plain_chat_format([Message(role=role, content=content) for role, content in turns])
                found.append(Example(told, format_answer(target)))
            else:
                found.append(Example(template(turns), target))
    if not found:
        raise InputError(
            f"the training part of {tasks[0].name} has {len(examples)} examples, and the study takes all of them; give "
            "fewer --seeds, --num-train or --num-unlabelled"
        )
    return found


def with_window(model: Path, window: int, out: Path) -> Path:
    """A copy of a model with another window; rotary positions need no weights for it, only practice.

    Raises:
        InputError: the model has no rotary positions, which could be stretched.
    """
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if "rope_parameters" not in config and "rope_theta" not in config:
        raise InputError(f"--max-context is for models with rotary positions, and {model.name} has none; leave it out")
    begun = out.with_name(f"{out.name}.part")
    shutil.rmtree(begun, ignore_errors=True)
    shutil.copytree(model, begun)
    (begun / "config.json").write_text(json.dumps({**config, "max_position_embeddings": window}), encoding="utf-8")
    return begun.rename(out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    with plain_endings():
        args = parser().parse_args(arguments)
        if args.out.exists():
            raise InputError(f"--out is {args.out}, which is there, expected a new folder; move it, or use it")
        model = find_model_folder(args.model)
        texts, template = list[Example](), chat_format_of(model)
        for task, sources in SOURCES.items():
            chosen = [source for source in sources if source in args.data_sets]
            # All of them, since a text of one may be in another part of another one.
            drawn = {source: drawn_tasks(task, source, args) for source in sources} if chosen else {}
            for source in chosen:
                others = [one for name, each in drawn.items() if name != source for one in each]
                examples = examples_of(task, args.data_root, "train", source=source)
                practised = practice_texts(drawn[source], examples, others, template=template)
                if args.num_texts is not None and args.num_texts < len(practised):
                    practised = Random(source).sample(practised, args.num_texts)
                print(f"{len(practised)} texts of {source}, {args.epochs} epochs", flush=True)
                texts += practised
        args.out.parent.mkdir(parents=True, exist_ok=True)
        path, learnt = (args.out.with_name(f"{args.out.name}.{end}") for end in ("jsonl", "weights"))
        lines = [json.dumps({"prompt": one.prompt, "completion": one.target}) + "\n" for one in texts]
        path.write_text("".join(lines), encoding="utf-8")
        if args.max_context:
            base = args.out.with_name(f"{args.out.name}.base")
            model = base if base.is_dir() else with_window(model, args.max_context, base)
        command = [sys.executable, "-m", "cotune", "tune", str(model), str(path), "--method", args.method]
        command += ["--epochs", str(args.epochs), "--batch-size", str(args.batch_size)]
        command += [
            "--heldout-share",
            str(_HELDOUT_SHARE),
            "--dtype",
            args.dtype,
            "--out",
            str(learnt),
            "--merged",
            str(args.out),
        ]
        if learnt.with_name(f"{learnt.name}.run").is_dir():
            command.append("--resume")
        done = subprocess.run(command, check=False)
        if done.returncode:
            raise InputError(f"cotune tune ended with status {done.returncode}; see what it said above")


if __name__ == "__main__":
    main()
