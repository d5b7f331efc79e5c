"""`cotune federate answer`: after co-tuning, a device's own model and the proxy answer together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cotune.cli.output import print_json, progress, stderr, stdout
from cotune.durable import replacing
from cotune.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cotune.federation.agreed_answers import AgreedAnswer


SMALL, PROXY = "small", "proxy"


def answer(
    questions: Annotated[str, typer.Argument(help="Prompts: .jsonl, .csv or .parquet; rows need no answers.")],
    small: Annotated[str, typer.Option(help="The device's own model, such as OUT.run/devices/NAME/model.")],
    proxy: Annotated[str, typer.Option(help="The proxy, as it was downloaded.")],
    adapter: Annotated[
        Path | None, typer.Option(help="What the proxy has learnt, the OUT of `cotune federate`; none if left out.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A new .jsonl file, instead of the terminal.")] = None,
    own: Annotated[
        str | None,
        typer.Option(
            help="What the device's own model has learnt: the more a question is like it, the more it counts."
        ),
    ] = None,
    others: Annotated[
        list[str] | None,
        typer.Option(help="With --own: what anybody may ask, such as the server's public texts and questions."),
    ] = None,
    score: Annotated[
        bool, typer.Option("--score", help="Rows have answers: say how often each model, and both together, are right.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Of each answer.")] = 16,
    max_tokens: Annotated[int, typer.Option(help="Of prompt and answer; the start of a longer prompt is cut.")] = 256,
    template: Annotated[
        str | None, typer.Option(help="How columns become prompts; found by itself if left out.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many questions, the first ones.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    torch_device: Annotated[str, typer.Option("--device", help="A PyTorch device, such as cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Answer QUESTIONS with a device's own model and the proxy together, of any architectures and tokenizers.

    Each writes its likeliest answer, and the one is given whose probabilities, of both models, have the larger product.
    With --own and --others, the device's own model counts more where a question is of its domain, and less where it is
    not. One model at a time is in memory, and nothing leaves the device.

    Examples:

        cotune federate answer questions.jsonl --small my-small-model --proxy proxy --adapter together

        cotune federate answer ask.jsonl --small mine --proxy proxy --own texts.jsonl --others public.jsonl

        cotune federate answer heldout.jsonl --small together.run/devices/kitchen/model --proxy proxy --score --json
    """
    if out is not None and out.exists():
        raise InputError(f"--out is {out}, which exists; give a new file")
    if out is not None and not out.parent.is_dir():
        raise InputError(f"--out is {out}, but there is no folder {out.parent}; make it first")
    if max_new_tokens < 1:
        raise InputError(f"--max-new-tokens is {max_new_tokens}, expected at least 1")
    if (own is None) != (not others):
        given, lacking = ("--own", "--others") if own is not None else ("--others", "--own")
        raise InputError(
            f"{given} is given without {lacking}, expected both or none; add {lacking}, or weigh all alike"
        )
    if adapter is not None and not adapter.is_dir():
        raise InputError(f"--adapter is {adapter}, expected a folder that `cotune federate` wrote; there is none")
    from cotune.data.records import read_examples, read_prompts

    if score:
        examples = read_examples(questions, template, limit)
        prompts, truths = [one.prompt for one in examples], [one.target.strip() for one in examples]
    else:
        prompts, truths = read_prompts(questions, template, limit), []
    weights = None
    if own is not None:
        known, asked = (
            read_prompts(own, template),
            [one for path in others or () for one in read_prompts(path, template)],
        )
        weights = _weights(prompts, known, asked)

    # Only now: it loads PyTorch, which takes seconds.
    from cotune.federation.agreed_answers import Writer, answer_together
    from cotune.federation.causal_model import CausalModel
    from cotune.federation.tuned_model import TunedModel

    writers: dict[str, Writer] = {
        SMALL: TunedModel(CausalModel(small, dtype, torch_device)),
        PROXY: TunedModel(CausalModel(proxy, dtype, torch_device), adapter),
    }
    with progress("answering", enabled=not as_json) as advance:
        found = answer_together(
            writers, prompts, max_new_tokens=max_new_tokens, max_tokens=max_tokens, weights=weights, advance=advance
        )
    rows = [_row(prompt, one) for prompt, one in zip(prompts, found, strict=True)]
    scores = _scores(found, truths) if score else {}
    if out is not None:
        with replacing(out, mode=0o600) as unfinished:
            unfinished.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    if as_json:
        told = {"out": str(out)} if out is not None else {"answers": rows}
        print_json({"num_questions": len(rows), **told, **({"scores": scores} if score else {})})
        return
    if out is None:
        for row in rows:
            stdout.print(f"{row['prompt']}{row['answer']}", markup=False, highlight=False, soft_wrap=True)
    else:
        stderr.print(f"{len(rows)} answers in {out}", markup=False, soft_wrap=True)
    for name, means in scores.items():
        stderr.print(f"{name:9} exact match {means['exact_match']:.3f}, Rouge-L {means['rouge_l']:.3f}", markup=False)


def _weights(prompts: Sequence[str], own: Sequence[str], others: Sequence[str]) -> list[dict[str, float]]:
    """The small model counts by the chance that a prompt is of the device's domain, and the proxy for the rest."""
    from cotune.federation.own_domain import OwnDomain

    return [{SMALL: one, PROXY: 1 - one} for one in OwnDomain.of(own, others).chances(prompts)]


def _row(prompt: str, one: AgreedAnswer) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "answer": one.text,
        "by": one.by,
        "log_likelihoods": dict(one.log_likelihoods),
        "weights": dict(one.weights),
        "written": dict(one.written),
    }


def _scores(found: Sequence[AgreedAnswer], truths: Sequence[str]) -> Mapping[str, Mapping[str, float]]:
    """Of each model, and of both, means from 0 to 1."""
    from cotune.evaluation.text_metrics import exact_match, rouge_l

    said = {name: [one.written[name] for one in found] for name in found[0].written}
    said["together"] = [one.text for one in found]
    return {
        name: {metric.__name__: sum(map(metric, texts, truths)) / len(truths) for metric in (exact_match, rouge_l)}
        for name, texts in said.items()
    }
