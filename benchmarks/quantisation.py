"""What quantising costs in perplexity: every method, by bits and group size, on texts that no method has seen.

Perplexity is that of all next tokens of rows of tokens, each read by itself. Sizes are those of the files' weights;
whole numbers count 16 bits. Seconds are of the quantisation alone, on one thread.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measurement import Target, describe_machine, finish, make_parser
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from cotune.compression.awq import Awq
from cotune.compression.calibration import CalibrationTexts
from cotune.compression.gptq import Gptq
from cotune.compression.quantise import Quantiser, quantise
from cotune.compression.round_to_nearest import RoundToNearest
from cotune.models.backbone import Backbone

METHODS: dict[str, Quantiser] = {
    "rtn": RoundToNearest(),
    "awq": Awq(),
    "awq, no clipping": Awq(max_clip=0.0),
    "gptq": Gptq(),
    "gptq, by activation": Gptq(orders_by_activation=True),
}
ROWS_AT_A_TIME = 8


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to quantise the model.

    Attributes:
        method: a key of `METHODS`.
        bits, group_size, is_symmetric, embedding_bits: see `quantise`; the head has the embedding's bits.
    """

    method: str
    bits: int
    group_size: int | None
    is_symmetric: bool = False
    embedding_bits: int | None = None


CASES = (
    *(Case(method=method, bits=8, group_size=128) for method in ("rtn", "gptq")),
    *(Case(method=method, bits=bits, group_size=size) for bits in (4, 3) for size in (128, 32) for method in METHODS),
    *(Case(method=method, bits=4, group_size=32, is_symmetric=True) for method in ("rtn", "gptq")),
    *(
        Case(method=method, bits=4, group_size=32, embedding_bits=bits)
        for bits in (8, 4)
        for method in ("rtn", "gptq, by activation")
    ),
)


def nats_per_token(model: PreTrainedModel, rows: NDArray[np.int64]) -> float:
    """The mean of -ln p of all tokens but the first of each row."""
    total = 0.0
    with torch.inference_mode():
        for ids in torch.from_numpy(rows).split(ROWS_AT_A_TIME):
            logits = model(ids, use_cache=False).logits[:, :-1].float()
            total += float(
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            )
    return total / (rows.shape[0] * (rows.shape[1] - 1))


def measure(model: str, case: Case, calibration: CalibrationTexts, rows: NDArray[np.int64]) -> dict[str, Any]:
    """Quantise a fresh copy of the model, and read the rows with it."""
    quantised = Backbone.from_pretrained(model).model
    started_s = time.process_time()
    report = quantise(
        quantised,
        METHODS[case.method],
        bits=case.bits,
        group_size=case.group_size,
        is_symmetric=case.is_symmetric,
        calibration=calibration,
        embedding_bits=case.embedding_bits,
        head_bits=case.embedding_bits,
    )
    return {
        **asdict(case),
        "seconds": time.process_time() - started_s,
        "nats": nats_per_token(quantised, rows),
        "bits_per_weight": report.bits_per_weight,
        "size_bytes": report.size_bytes,
        "share_of_bf16": report.share_of_bf16,
    }


def main() -> None:
    parser = make_parser(
        "quantisation",
        "Perplexity of a model by quantisation method, bits and group size.",
        "  python benchmarks/quantisation.py --model ../shared/models/books-8m \\\n"
        "      --calibration ../shared/data/lm_wikitext2/validation.jsonl \\\n"
        "      --texts ../shared/data/lm_wikitext2/test.jsonl\n",
    )
    parser.add_argument("--model", default="starter", help="folder, hub name or starter (default: %(default)s)")
    parser.add_argument("--calibration", type=Path, required=True, help="texts that methods may learn from")
    parser.add_argument("--texts", type=Path, required=True, help="texts that the models are judged on")
    parser.add_argument("--rows", type=int, default=64, help="rows of tokens of either (default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens in a row (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    machine = describe_machine()
    whole = Backbone.from_pretrained(args.model)
    sizes = {"num_texts": args.rows, "length": args.length, "seed": args.seed}
    calibration, judged = (
        CalibrationTexts.read(path, whole.tokenizer_json, **sizes) for path in (args.calibration, args.texts)
    )
    base = nats_per_token(whole.model, judged.input_ids)
    table = Table("method", "bits", "group", "zero point", "embedding", "perplexity", "more by", "of bf16", "s")
    table.add_row("whole", "32", "", "", "", f"{math.exp(base):.3f}", "", "", "")
    results = []
    for case in CASES:
        found = measure(args.model, case, calibration, judged.input_ids)
        results.append(found)
        console.print(f"{len(results)} of {len(CASES)}: {case}, perplexity {math.exp(found['nats']):.3f}", style="dim")
        table.add_row(
            *(case.method, str(case.bits), str(case.group_size), "middle" if case.is_symmetric else "own"),
            str(case.embedding_bits or "whole"),
            *(f"{math.exp(found['nats']):.3f}", f"{math.expm1(found['nats'] - base):+.2%}"),
            *(f"{found['share_of_bf16']:.1%}", f"{found['seconds']:.0f}"),
        )
    console.print(table)
    small = [found for found in results if found["bits"] == 4 and found["share_of_bf16"] < 0.3]
    least = min(math.expm1(found["nats"] - base) for found in small)
    target = Target(
        what="perplexity at 4 bits under 30 % of bf16, above the whole model's", measured=100 * least, limit=2, unit="%"
    )
    finish("quantisation", args, machine, {"base_nats": base, "cases": results}, [target])


if __name__ == "__main__":
    main()
