"""`cotune device generate --offline MODEL PROMPT`: a text without a cloud, a plugin, or anything that leaves."""

from __future__ import annotations

import time
from pathlib import Path

from cotune.cli.offline_options import OfflineChoice
from cotune.cli.output import print_json, stderr, stdout
from cotune.generation.sampling import Sampling

LOCAL_STYLE = "green4"


def write_offline(
    choice: OfflineChoice,
    prompt: str,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop_strings: tuple[str, ...],
    raw: bool,
    ledger: Path | None,
    as_json: bool,
) -> None:
    """Write one text and print it.

    Args:
        choice: the model.
        prompt: what the user asks.
        max_new_tokens, sampling, stop_strings: how.
        raw: continue the prompt as it is, without the model's chat template.
        ledger: where what leaves would be written; nothing does.
        as_json: print one JSON object.
    """
    from cotune.device.offline.chat import chat_format_of
    from cotune.device.offline.generate import offline_generation
    from cotune.generation.request import GenerationRequest
    from cotune.generation.text import Detokenizer
    from cotune.ledger import EgressLedger
    from cotune.openai_api.requests import Message

    writer = choice.writer()
    folder, text = writer.model.folder, writer.text
    if folder.chat_template is not None and not raw:
        prompt = chat_format_of(folder, text)([Message(role="user", content=prompt)])
    request = GenerationRequest(
        prompt_ids=text.encode_prompt(prompt),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_token_ids=writer.model.description.end_ids,
        stop_strings=stop_strings,
    )
    started_s = time.perf_counter()
    first_s = 0.0
    shown = Detokenizer(text)
    with (
        EgressLedger(ledger) as book,
        offline_generation(writer.model, request, adapter=writer.adapter, detokenize=text.decode) as generation,
    ):
        while generation.ending is None:
            token = generation.advance()
            if token is None:
                continue
            first_s = first_s or time.perf_counter() - started_s
            if not as_json and token.token_id not in request.stop_token_ids:
                # What a stop string cuts off is in the last tokens: it is shown, as with a cloud.
                stdout.print(shown.add(token.token_id), style=LOCAL_STYLE, end="", markup=False, soft_wrap=True)
        wall_s = time.perf_counter() - started_s
        totals = book.totals()
    ids, ending = generation.token_ids, generation.ending
    speed = (len(ids) - 1) / (wall_s - first_s) if len(ids) > 1 and wall_s > first_s else 0.0
    if as_json:
        whole = text.decode(ids)
        print_json(
            {
                "mode": "offline",
                "seed": sampling.seed,
                "text": whole if ending.num_characters is None else whole[: ending.num_characters],
                "token_ids": ids,
                "num_tokens": len(ids),
                "num_prompt_tokens": len(request.prompt_ids),
                "first_token_s": first_s,
                "tokens_per_s": speed,
                "ending": ending.reason,
                "egress": totals,
            }
        )
        return
    stdout.print(shown.rest(), style=LOCAL_STYLE, markup=False, soft_wrap=True)
    stderr.print(
        f"[dim]{len(ids)} tokens on this device, the first after {first_s:.2f} s, then {speed:.1f}/s; nothing left it"
    )
