"""Texts of several sequences in one batch, from the bare passes of a backbone, whoever computes them.

As a script under torchrun this is one rank of a shared `starter`; rank 0 prints what all computed as one JSON object,
by number type.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from cotune.data.assistant_text import generate_exchanges
from cotune.data.templates import format_request
from cotune.generation.protocols import RowWork, StepFeatures
from cotune.generation.sampling import Sampling, choose
from cotune.models.backbone import Backbone, BackboneCursor

HELD_OUT_SEED = 20_777
NUM_TEXTS = 6
NUM_TOKENS = 16


def held_out_prompts(backbone: Backbone, num: int) -> list[np.ndarray]:
    """Prompts of exchanges that the starter was not trained on."""
    tokenizer = Tokenizer.from_str(backbone.tokenizer_json.decode())
    exchanges = generate_exchanges(num, HELD_OUT_SEED)
    return [np.array(tokenizer.encode(format_request(one.request)).ids, np.int64) for one in exchanges]


def batched_texts(backbone: Backbone, *, num_texts: int = NUM_TEXTS, num_tokens: int = NUM_TOKENS) -> dict[str, Any]:
    """Half of the texts greedy and half sampled, all in one batch that they join one after the other.

    One of them is forked and rolled back on the way, so that blocks are copied and read again.
    """
    prompts = held_out_prompts(backbone, num_texts)
    samplings = [Sampling(temperature=0.8 * (i % 2), seed=i) for i in range(num_texts)]
    cursors: list[BackboneCursor] = []
    tokens: list[list[int]] = []
    while len(cursors) < num_texts or min(map(len, tokens)) < num_tokens:
        work = []
        running = [i for i in range(len(cursors)) if len(tokens[i]) < num_tokens]
        for i in running:
            work.append(RowWork(cursor=cursors[i], token_ids=np.array(tokens[i][-1:], np.int64)))
        if len(cursors) < num_texts:
            running.append(len(cursors))
            work.append(_first_work(backbone, prompts[len(cursors)], cursors))
            tokens.append([])
        for i, (features,) in zip(running, backbone.extend(work), strict=True):
            tokens[i].append(_next(features, cursors[i], samplings[i]))
    again = cursors[0].fork()
    again.truncate(len(prompts[0]) + 2)
    repeated = backbone.extend([RowWork(cursor=again, token_ids=np.array(tokens[0][2:6], np.int64), num_outputs=4)])
    alone = backbone.cursor()
    alone.extend(prompts[0])
    (by_itself,) = backbone.extend([RowWork(cursor=alone, token_ids=np.array(tokens[0][:6], np.int64), num_outputs=1)])
    whole = np.concatenate([prompts[0], tokens[0]])
    return {
        "token_ids": tokens,
        "repeated": [int(step.logits.argmax()) for step in repeated[0]],
        "is_same_alone": np.array_equal(by_itself[-1].logits, repeated[0][-1].logits),
        "last_logits": repeated[0][-1].logits.tolist(),
        "target_logits": backbone.features(whole, len(prompts[0]), 8).target_logits.tolist(),
        "basis_digest": backbone.description.basis_digest,
        "rows_are_independent": backbone.rows_are_independent,
    }


def _first_work(backbone: Backbone, prompt: np.ndarray, cursors: list[BackboneCursor]) -> RowWork:
    cursors.append(backbone.cursor(len(prompt)))
    return RowWork(cursor=cursors[-1], token_ids=prompt)


def _next(features: StepFeatures, cursor: BackboneCursor, sampling: Sampling) -> int:
    return choose(features.logits, sampling, cursor.length)


def _one_rank(device: str, *dtypes: str) -> None:
    import torch

    from cotune.models.ranks import Ranks
    from cotune.models.tensor_parallel import Leader, follow, load_shared

    torch.set_num_threads(1)
    ranks = Ranks(device, timeout_s=30)
    found = {}
    try:
        # One after the other in the same processes: starting them takes longer than all else.
        for dtype in dtypes:
            backbone = load_shared("starter", ranks, dtype=dtype, device=device)
            if ranks.rank > 0:
                follow(backbone, ranks)
                continue
            leader = Leader(backbone, ranks)
            found[dtype] = batched_texts(backbone)
            leader.end()
        if ranks.rank == 0:
            print(json.dumps(found), flush=True)
    finally:
        ranks.close()


if __name__ == "__main__":
    _one_rank(*sys.argv[1:])
