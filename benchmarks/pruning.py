"""What every way to prune costs in quality: perplexity on texts that were not used to prune, beside the dense model.

Every case starts from the whole model, loaded as float32, and prunes it with the same calibration texts. Nothing is
trained afterwards. Numbers of parameters count zeros, as files and memory do.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measurement import describe_machine, finish, make_parser
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from transformers import PreTrainedModel

from cotune.compression.calibration import CalibrationTexts
from cotune.compression.channels import Channels
from cotune.compression.heads import Heads
from cotune.compression.prune import PRUNERS, prune
from cotune.compression.pruner import Pruner
from cotune.models.weights import find_model_folder, load_model, read_tokenizer

UNREPAIRED: dict[str, Pruner] = {
    "channels-unrepaired": Channels(repairs=False),
    "heads-unrepaired": Heads(repairs=False),
}
CASES = (
    *("magnitude:0.5", "wanda:0.5", "sparse_gpt:0.5", "magnitude:2:4", "wanda:2:4", "sparse_gpt:2:4"),
    *("depth:1", "depth:2", "channels:0.25", "channels-unrepaired:0.25", "heads:0.5", "heads-unrepaired:0.5"),
    *("hidden_size:0.25", "width:0.25"),
)


@torch.no_grad()
def nats_by_text(model: PreTrainedModel, texts: CalibrationTexts, batch_size: int) -> NDArray[np.float64]:
    """Mean -log p of the tokens of each text but its first, (num_texts,)."""
    nats: list[NDArray[np.float64]] = []
    for ids in torch.split(torch.from_numpy(texts.input_ids), batch_size):
        logits = model(ids).logits[:, :-1].float()  # (texts, length - 1, vocab)
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        nats.append(losses.view(len(ids), -1).double().mean(1).numpy())
    return np.concatenate(nats)


def measure(
    case: str, model: PreTrainedModel, calibration: CalibrationTexts, heldout: CalibrationTexts, args: Any
) -> Any:
    """Prune as the case says, and what came of it."""
    name, _, amount = case.partition(":")
    started_s = time.perf_counter()
    report = prune(model, UNREPAIRED.get(name, name), amount, calibration, batch_size=args.batch_size)
    seconds = time.perf_counter() - started_s
    errors = [layer.output_error for layer in report.layers if layer.output_error is not None]
    return {
        "case": case,
        "nats": nats_by_text(model, heldout, args.batch_size),
        "share_of_parameters": report.share_of_parameters,
        "mean_output_error": float(np.mean(errors)) if errors else None,
        "facts": report.facts,
        "seconds": seconds,
    }


def main() -> None:
    parser = make_parser(
        "pruning",
        "Perplexity of a model after every way to prune it.",
        "  python benchmarks/pruning.py --model MODEL --calibration train.jsonl --data test.jsonl\n"
        "  python benchmarks/pruning.py ... --cases depth:1 wanda:0.5",
    )
    parser.add_argument("--model", required=True, help="a Hugging Face causal-LM folder or hub name, or `starter`")
    parser.add_argument("--calibration", type=Path, required=True, help="texts to prune with")
    parser.add_argument("--data", type=Path, required=True, help="texts to judge by")
    parser.add_argument("--num-texts", type=int, default=32, help="calibration texts (default: %(default)s)")
    parser.add_argument("--num-heldout", type=int, default=64, help="texts to judge by (default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens of each text (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="texts in one pass (default: %(default)s)")
    parser.add_argument(
        "--cases", nargs="+", default=list(CASES), help=f"METHOD:AMOUNT; of {', '.join([*PRUNERS, *UNREPAIRED])}"
    )
    args = parser.parse_args()
    machine = describe_machine()
    torch.set_num_threads(1)
    folder = find_model_folder(args.model)
    tokenizer_json = read_tokenizer(folder)
    sizes = {"length": args.length, "seed": args.seed}
    calibration = CalibrationTexts.read(args.calibration, tokenizer_json, num_texts=args.num_texts, **sizes)
    heldout = CalibrationTexts.read(args.data, tokenizer_json, num_texts=args.num_heldout, **sizes)
    dense = nats_by_text(load_model(folder, dtype="float32", device="cpu").eval(), heldout, args.batch_size)
    results: list[dict[str, Any]] = [
        {"case": "dense", "nats": dense, "share_of_parameters": 1.0, "mean_output_error": 0.0, "seconds": 0.0}
    ]
    table = Table(title=f"{heldout.input_ids.size} tokens held out, {calibration.input_ids.size} to prune with")
    for heading in ("case", "perplexity", "nats above dense (standard error)", "parameters", "output lost", "s"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for case in args.cases:
        model = load_model(folder, dtype="float32", device="cpu").eval()
        results.append(measure(case, model, calibration, heldout, args))
        print(case, round(math.exp(float(results[-1]["nats"].mean())), 2), flush=True)
    for result in results:
        above = result["nats"] - dense
        error = result["mean_output_error"]
        result["perplexity"] = math.exp(float(result["nats"].mean()))
        result["nats_above_dense"] = float(above.mean())
        result["standard_error"] = float(above.std(ddof=1) / math.sqrt(len(above)))
        result["nats"] = result["nats"].round(4).tolist()
        table.add_row(
            result["case"],
            f"{result['perplexity']:.2f}",
            f"{result['nats_above_dense']:+.3f} ({result['standard_error']:.3f})",
            f"{result['share_of_parameters']:.3f}",
            "" if error is None else f"{error:.3f}",
            f"{result['seconds']:.0f}",
        )
    Console().print(table)
    finish("pruning", args, machine, results, [])


if __name__ == "__main__":
    main()
