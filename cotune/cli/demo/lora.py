"""The baseline: LoRA with as many parameters as the plugin, tuned where the model is.

It needs the personal texts and keeps the personal weights in the cloud, which is what a plugin is there to avoid.
Run as `python -m cotune.cli.demo.lora FOLDER`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from cotune.cli.demo.plan import DemoFolder, DemoPlan
from cotune.cli.demo.processes import say
from cotune.cli.run_folder import write_json
from cotune.errors import CotuneError


def tune(folder: DemoFolder, plan: DemoPlan, num_parameters: int) -> dict[str, Any]:
    """Tune and judge LoRA with about `num_parameters`: ranks are whole numbers, so it may have 6 % more."""
    import torch

    from cotune.cli.backbone_judging import judge_backbone
    from cotune.data.records import read_examples
    from cotune.models.adapters import LoraShape, rank_for_budget
    from cotune.models.backbone import Backbone
    from cotune.tuning.loop import LoopConfig
    from cotune.tuning.lora import LoraConfig, tune_lora
    from cotune.tuning.personal import encode_examples, split_examples

    torch.set_num_threads(1)
    backbone = Backbone.from_pretrained("starter")
    examples = encode_examples(backbone.tokenizer_json, read_examples(folder.train), backbone.description)
    # The same split as the plugin's, so that both learn from the same texts.
    train, first, second = split_examples(examples, 0.2, plan.seed)
    started_s = time.perf_counter()
    result = tune_lora(
        backbone,
        train,
        LoraConfig(
            loop=LoopConfig(epochs=plan.lora_epochs, learning_rate=plan.lora_learning_rate),
            shape=LoraShape(rank=rank_for_budget(backbone.model, int(1.06 * num_parameters))),
            seed=plan.seed,
        ),
        heldout=[*first, *second],
        progress=lambda p: say("LoRA baseline", p.step, p.num_steps, f"loss {p.loss:.3f}"),
    )
    seconds = time.perf_counter() - started_s
    with result.adapter.attach(backbone.model):
        judgement = judge_backbone(
            backbone,
            read_examples(folder.heldout),
            max_new_tokens=plan.max_new_tokens,
            seed=plan.seed,
            advance=lambda done, total, note="": say("LoRA baseline, judged", done, total),
        )
    curve = result.curve
    return {
        "num_parameters": result.adapter.num_parameters,
        "seconds": seconds,
        "judgement": judgement.to_dict(),
        "training": {
            "name": "lora",
            "points": [(r.epoch, r.train_loss) for r in curve if r.train_loss is not None],
            "held_out": [(r.epoch, r.heldout_loss) for r in curve if r.heldout_loss is not None],
            "unit": "epoch",
        },
    }


def main() -> None:
    """Entry point of the process."""
    folder = DemoFolder(Path(sys.argv[1]))
    try:
        num_parameters = int(sys.argv[2])
    except (IndexError, ValueError) as error:
        raise CotuneError("give the demo's folder and the number of parameters") from error
    write_json(folder.result("lora"), tune(folder, DemoPlan.load(folder.plan), num_parameters))


if __name__ == "__main__":
    main()
