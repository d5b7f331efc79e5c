"""Judging a backbone in this process, with or without an adapter: what `cotune evaluate` and the demo share."""

from __future__ import annotations

from collections.abc import Sequence

from cotune.cli.output import Advance
from cotune.data.batches import fit_example
from cotune.data.templates import Example
from cotune.evaluation.judgement import Judgement, judge
from cotune.generation.request import GenerationRequest
from cotune.generation.text import TextCodec
from cotune.generation.together import generate_together
from cotune.models.backbone import Backbone
from cotune.tuning.lora import target_nats
from cotune.tuning.personal import encode_examples


def judge_backbone(
    backbone: Backbone, examples: Sequence[Example], *, max_new_tokens: int, seed: int, advance: Advance
) -> Judgement:
    """Greedy texts and exact likelihoods of the backbone as it is now.

    Args:
        backbone: with an adapter attached, it is judged with it.
        examples: held-out texts; documents too long for the context are cut as `fit_example` does.
        max_new_tokens: of each generated text.
        seed: of the bootstrap.
        advance: told about progress.
    """
    text = TextCodec(backbone.tokenizer_json)
    longest = backbone.spec.max_context
    examples = [fit_example(text.tokenizer, each, max_length=longest, room=max_new_tokens) for each in examples]
    requests = [
        GenerationRequest(
            prompt_ids=text.encode_prompt(example.prompt),
            max_new_tokens=max_new_tokens,
            stop_token_ids=backbone.spec.eos_token_ids,
        )
        for example in examples
    ]
    written = generate_together(backbone, None, requests, tell=lambda num: advance(num, len(examples), "texts"))
    predictions = [text.decode(one.token_ids) for one in written]
    encoded = encode_examples(backbone.tokenizer_json, examples, backbone.description)
    return judge(
        [example.target for example in examples],
        predictions=predictions,
        token_nats=target_nats(backbone, encoded).tolist(),
        seed=seed,
    )
