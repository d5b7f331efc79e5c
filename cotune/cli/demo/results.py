"""From what the demo's processes found to `metrics.json`, the report, and the last screen."""

from __future__ import annotations

from typing import Any

from cotune.cli.demo.plan import DemoPlan
from cotune.cli.run_folder import plain, versions
from cotune.evaluation.text_metrics import rouge_l

WHY = {
    "hello": "greets the cloud",
    "open": "the prompt as token ids, how to sample, and the gate vector where a gated mode or schedule needs it",
    "correct": "the side network's answer for one token, in the shared output basis",
    "object": "a token that the device decided otherwise",
    "ack": "the device agrees so far",
    "more": "asks for more base logits",
    "close": "ends a text",
    "features request": "personal texts as token ids, once, for training features",
    "asset request": "asks for the tokenizer and the output basis",
}
CLOUD_SEES = [
    "the prompt and every generated token",
    "the training texts, once, when it computes their features",
    "the gate vector, where a gated mode or schedule is used",
    "in the correction form: for each consulted token, the personal shift of the logits in the shared output basis",
    "in the token form: only the decided tokens",
]
CLOUD_DOES_NOT_SEE = [
    "the weights of the side network",
    "any gradient or loss",
    "in the token form: how the personal logits differ from its own",
]
MODE_ORDER = ("integration", "spa", "separation", "ladder")


def assemble(
    plan: DemoPlan,
    *,
    model: str,
    persona: str,
    tuning: dict[str, Any],
    lora: dict[str, Any],
    measuring: dict[str, Any],
    egress: dict[str, dict[str, int]],
    cloud_pid: int,
    device_pid: int,
    url: str,
    seconds: float,
) -> dict[str, Any]:
    """The metrics of the demo: one generation's keys at the top, and everything that the report shows."""
    quality = measuring["quality"]
    best = _example_index(measuring["texts"])
    base, plugin = quality["base"], quality["integration"]
    shown = measuring["texts"]["integration"][best]
    return {
        **shown,
        "title": "The cloud wrote, the device made it personal, and the plugin stayed at home",
        "summary": [
            f"With its private plugin the device's texts match the person's own with Rouge-L {plugin['rouge_l']:.2f}; "
            f"the cloud's model alone reaches {base['rouge_l']:.2f}.",
            f"A cloud process hosted the frozen model ({model}). A device process fetched features of "
            f"{plan.num_train} personal texts once, trained a side network of "
            f"{tuning['parallel']['num_parameters']:,} parameters on them, and threw no weight over the wall.",
            "Then both generated together: the cloud ran ahead with its own tokens, the device answered each with a "
            "small correction, and the cloud rolled back where the personal token was another one.",
            _story_of_speed(measuring["speed"]),
        ],
        "processes": {
            "cloud": [f"process {cloud_pid} at {url}", model],
            "device": [
                f"process {device_pid}, without PyTorch",
                f"at most {measuring['device_peak_mb']:.0f} MB of memory",
            ],
        },
        "model": model,
        "persona": persona,
        "quality": _quality_rows(quality, tuning, lora),
        "examples": _shown_examples(measuring["texts"], best),
        "speed": [_speed_row(row, measuring["speed"]) for row in measuring["speed"]],
        "gate_curve": tuning["gate_curve"],
        "egress": {kind: {**total, "why": WHY.get(kind)} for kind, total in egress.items()},
        "cloud_sees": CLOUD_SEES,
        "cloud_does_not_see": CLOUD_DOES_NOT_SEE,
        "training": [*tuning["training"], lora["training"]],
        "config": {**plain(plan), "seconds_in_all": round(seconds, 1)},
        "versions": versions(),
        "seeds": {"seed": plan.seed},
        "repeat": [f"cotune demo --seed {plan.seed}"],
        "notes": {
            "quality": [
                "Plain LoRA in the cloud has as many trainable parameters here. Where personal weights may live in "
                "the cloud it is the better choice: no round trips, and no side network.",
                "Rouge-L is of greedy texts, perplexity of the persona's own held-out texts; both exact, through the "
                "network. The bars show 95 % bootstrap intervals over the held-out texts.",
            ],
            "text": [
                "The first text is the one that came closest to the person's own; the others are the first of the "
                "held-out file, good or bad."
            ],
            "speed": [
                "M counts round trips that delayed the text, per token. The prediction is 1 / (c + M R) with the "
                "measured cloud step c, M, and R = round trip + device time."
            ],
        },
    }


def _quality_rows(quality: dict[str, Any], tuning: dict[str, Any], lora: dict[str, Any]) -> list[dict[str, Any]]:
    def row(name: str, scores: dict[str, Any], **more: Any) -> dict[str, Any]:
        names = ("rouge_l", "rouge_l_interval", "exact_match", "token_f1", "perplexity", "bits_per_byte")
        return {"name": name, **{key: scores[key] for key in names}, **more}

    rows = [row("base", quality["base"], trainable_parameters=0, M=0.0)]
    rows.append(row("lora", lora["judgement"], trainable_parameters=lora["num_parameters"], M=0.0))
    for mode in MODE_ORDER:
        family = "parallel" if mode in ("integration", "spa") else "serial"
        rows.append(
            row(
                "plugin",
                quality[mode],
                mode=mode,
                trainable_parameters=tuning[family]["num_parameters"],
                M=quality[mode]["generation"]["M"],
            )
        )
    return rows


def _example_index(texts: dict[str, Any]) -> int:
    """The text closest to the person's own; of equals, the one that the plugin gained most on."""

    def closeness(index: int) -> tuple[float, float]:
        reference = texts["references"][index]
        personal = rouge_l(texts["integration"][index]["text"].strip(), reference)
        return round(personal, 2), personal - rouge_l(texts["base"][index]["text"].strip(), reference)

    return max(range(len(texts["prompts"])), key=closeness)


def _shown_examples(texts: dict[str, Any], best: int) -> list[dict[str, Any]]:
    others = [index for index in range(len(texts["prompts"])) if index != best]
    return [_example(texts, index) for index in (best, *others[:4])]


def _example(texts: dict[str, Any], index: int) -> dict[str, Any]:
    return {
        "prompt": texts["prompts"][index],
        "reference": texts["references"][index],
        "base_text": texts["base"][index]["text"],
        "generation": texts["integration"][index],
    }


def _speed_row(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    names = (
        "schedule",
        "answer",
        "mode",
        "rtt_ms",
        "tokens_per_s",
        "M",
        "disagree_rate",
        "stall_ms_per_token",
        "bytes_down_per_token",
        "bytes_up_per_token",
        "wasted_cloud_steps",
    )
    per_token_ms = row["step_ms"] + row["M"] * (row["rtt_ms"] + row["device_ms_per_token"])
    return {**{name: row[name] for name in names}, "predicted_tokens_per_s": 1e3 / per_token_ms}


def _speed_at(rows: list[dict[str, Any]], schedule: str, answer: str, rtt_ms: float) -> dict[str, Any] | None:
    return next(
        (r for r in rows if (r["schedule"], r["answer"], r["rtt_ms"]) == (schedule, answer, rtt_ms)),
        None,
    )


def _story_of_speed(rows: list[dict[str, Any]]) -> str:
    far = sorted({row["rtt_ms"] for row in rows})[-1]
    middle = 50.0 if any(row["rtt_ms"] == 50.0 for row in rows) else far
    blocking = _speed_at(rows, "blocking", "correction", middle)
    optimistic = _speed_at(rows, "optimistic", "correction", middle)
    if blocking is None or optimistic is None:
        return "Every schedule gave the same tokens."
    return (
        f"Over an emulated network of {middle:.0f} ms round trip that gave {optimistic['tokens_per_s']:.0f} tokens/s, "
        f"where waiting for every answer gives {blocking['tokens_per_s']:.0f}; the tokens are the same."
    )
