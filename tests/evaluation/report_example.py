"""A small report with every section, for the tests of the report; `hostile` puts markup into every text."""

from __future__ import annotations

from typing import Any

from cotune.evaluation.generation_metrics import GenerationMetrics

HOSTILE = "</p><script>alert('x')</script><img src=http://evil.example/x onerror=alert(1)> \"' & $x$ url(#a) 漢字"


def generation(text: str = "") -> GenerationMetrics:
    """Three tokens, one of each class."""
    return GenerationMetrics.from_counts(
        mode="spa",
        schedule="optimistic",
        answer="correction",
        seed=0,
        token_ids=[5, 6, 7],
        text=f"Ring Mirko{text}",
        tokens=["Ring", f" Mirko{text}", ""],
        sources=["cloud", "device", "cloud"],
        consulted=[False, True, True],
        blocking_trips=1,
        bytes_down=1200,
        bytes_up=300,
        wasted_cloud_steps=1,
        cloud_s=0.006,
        device_s=0.001,
        stall_s=0.03,
        wall_s=0.06,
        certificate_misses=0,
    )


def report_metrics(text: str = "") -> dict[str, Any]:
    """Metrics for every section; `text` is appended to every free text."""
    return {
        "title": f"It writes like you{text}",
        "summary": [f"Both sides wrote together.{text}", f"The device trained.{text}"],
        "processes": {"cloud": [f"pid 1{text}"], "device": [f"pid 2{text}"]},
        "model": f"starter{text}",
        "persona": f"Mara{text}",
        "quality": [
            {"name": "base", "rouge_l": 0.2, "rouge_l_interval": [0.15, 0.25], "perplexity": 40.0},
            {"name": "lora", "rouge_l": 0.55, "perplexity": 4.8, "trainable_parameters": 1000},
            {"name": "plugin", "mode": f"spa{text}", "rouge_l": 0.5, "perplexity": 5.0, "M": 0.5},
            {"name": f"other{text}", "rouge_l": None, "perplexity": 6.0},
        ],
        "examples": [
            {
                "prompt": f"Who do I call?{text}",
                "reference": f"Mirko.{text}",
                "base_text": f"The office.{text}",
                "generation": generation(text).to_dict(),
            }
        ],
        "speed": [
            {"schedule": "blocking", "answer": "token", "rtt_ms": 50, "tokens_per_s": 10.0, "M": 1.0},
            {
                "schedule": f"optimistic{text}",
                "answer": f"correction{text}",
                "rtt_ms": 50,
                "tokens_per_s": 25.0,
                "predicted_tokens_per_s": 26.0,
                "bytes_down_per_token": 400.0,
                "bytes_up_per_token": 100.0,
            },
        ],
        "gate_curve": [
            {"threshold": 1.0, "M": 0.2, "rouge_l": 0.4},
            {"threshold": 0.0, "M": 0.5, "rouge_l": 0.5, "chosen": True},
        ],
        "egress": {f"prompt{text}": {"count": 2, "bytes": 100, "why": f"to continue{text}"}},
        "cloud_sees": [f"the prompt{text}"],
        "cloud_does_not_see": [f"the weights{text}"],
        "training": [
            {"name": f"plugin{text}", "points": [[0, 3.0], [10, 2.0]], "held_out": [[10, 2.2]]},
            {"name": f"LoRA{text}", "points": [[1, 2.5]], "unit": f"epoch{text}"},
        ],
        "config": {"side": {"width": 32, f"note{text}": f"x{text}"}},
        "versions": {"cotune": f"0.1.0{text}"},
        "seeds": {"sampling": 7},
        "repeat": [f"cotune demo --seed 0{text}"],
        "notes": {"quality": [f"LoRA is a little better.{text}"]},
    }
