"""Judging an exported model by its own runtime: what `cotune evaluate` and `cotune compress` share. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cotune.cli.output import Advance
from cotune.data.batches import EncodedExample, encode_example, fit_example
from cotune.data.label_words import candidate_texts, encode_labelled
from cotune.data.templates import Example
from cotune.device.offline.generate import generate_offline
from cotune.device.offline.memory import PROMPT_PIECE
from cotune.device.offline.model import Adapter, OfflineModel, OfflineSettings
from cotune.device.offline.runtimes import load_offline_model
from cotune.errors import InputError
from cotune.evaluation.judgement import Judgement, judge
from cotune.evaluation.label_accuracy import label_accuracy
from cotune.generation.request import GenerationRequest
from cotune.generation.sampling import log_probabilities
from cotune.generation.text import TextCodec


def judge_offline(
    folder: Path,
    examples: Sequence[Example],
    *,
    max_new_tokens: int,
    adapter: Path | None = None,
    labels: Sequence[str] = (),
    seed: int = 0,
    num_threads: int | None = None,
    advance: Advance,
) -> Judgement:
    """Greedy texts and exact likelihoods of an offline model, the same scores as of any other.

    Args:
        folder: of the model.
        examples: held-out texts; documents too long for the context are cut as `fit_example` does.
        max_new_tokens: of each generated text.
        adapter: that it is run with.
        labels: label words, where accuracy by their likelihood is asked for too.
        seed: of the bootstrap.
        num_threads: that compute.
        advance: told about progress.

    Raises:
        InputError: the folder is damaged, its runtime is missing, or the model names no token that ends a text.
    """
    settings = OfflineSettings(num_threads=num_threads, has_adapter=adapter is not None)
    model = load_offline_model(folder, settings)
    try:
        return _judge(model, examples, max_new_tokens, adapter, labels, seed, advance)
    finally:
        model.close()


def _judge(
    model: OfflineModel,
    examples: Sequence[Example],
    max_new_tokens: int,
    adapter_path: Path | None,
    labels: Sequence[str],
    seed: int,
    advance: Advance,
) -> Judgement:
    adapter = None if adapter_path is None else model.load_adapter(adapter_path)
    text, end_ids, longest = TextCodec(model.folder.tokenizer_json), model.description.end_ids, model.context
    if not end_ids:
        raise InputError(f"{model.folder.path} names no token that ends a text; set eos_token_id before exporting")
    examples = [fit_example(text.tokenizer, each, max_length=longest, room=max_new_tokens) for each in examples]
    written: list[str] = []
    for example in examples:
        prompt_ids = text.encode_prompt(example.prompt)
        request = GenerationRequest(prompt_ids=prompt_ids, max_new_tokens=max_new_tokens, stop_token_ids=end_ids)
        written.append(text.decode(generate_offline(model, request, adapter=adapter).token_ids))
        advance(len(written), len(examples), "texts")
    accuracy = None
    if labels:
        asked = [
            encode_labelled(text.tokenizer, each, labels, eos_token_id=end_ids[0], max_length=longest)
            for each in examples
        ]
        candidates = [one for example in asked for one in candidate_texts(example)]
        accuracy = label_accuracy(asked, target_nats(model, candidates, adapter))
    encoded = [encode_example(text.tokenizer, each, eos_token_id=end_ids[0], max_length=longest) for each in examples]
    return judge(
        [example.target for example in examples],
        predictions=written,
        token_nats=target_nats(model, encoded, adapter).tolist(),
        label_accuracy=accuracy,
        seed=seed,
    )


def target_nats(
    model: OfflineModel, examples: Sequence[EncodedExample], adapter: Adapter | None = None
) -> NDArray[np.float64]:
    """-log p(target) of every target position, float64 (positions,)."""
    nats: list[float] = []
    text = model.open(adapter)
    try:
        for example in examples:
            text.truncate(0)
            ids, first = example.input_ids.tolist(), example.first_target
            for start in range(0, len(ids) - 1, PROMPT_PIECE):
                piece = ids[start : min(start + PROMPT_PIECE, len(ids) - 1)]
                logits = text.extend(piece, num_logits=len(piece))
                for place in range(max(start, first - 1), start + len(piece)):
                    nats.append(-float(log_probabilities(logits[place - start])[ids[place + 1]]))
    finally:
        text.close()
    return np.array(nats, np.float64)
