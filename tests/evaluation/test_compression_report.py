"""The report card: every number that was measured, and none that was not."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest

from cotune.evaluation.compression_report import CompressionRow, bits_per_weight, write_compression_report

SOURCE: CompressionRow = {
    "name": "source",
    "kind": "source",
    "size_bytes": 2_000_000,
    "num_parameters": 1_000_000,
    "runtime": "torch",
    "dtype": "bfloat16",
    "num_threads": 1,
    "prefill": {"median": 800.0, "low": 700.0, "high": 900.0},
    "decode": {"median": 20.0, "low": 18.0, "high": 22.0},
    "peak_bytes": 5_000_000,
    "judgement": {"perplexity": 12.5, "rouge_l": 0.41, "token_f1": 0.5, "exact_match": 0.25, "label_accuracy": None},
    "layers": [
        {"name": "a.weight", "shape": [100, 100], "bits": 16.0, "code_bits": 16, "sparsity": 0.0},
        {"name": "b.weight", "shape": [100, 300], "bits": 16.0, "code_bits": 16, "sparsity": 0.0},
        {"name": "norm.weight", "shape": [100], "bits": 16.0, "code_bits": 16, "sparsity": 1.0},
    ],
}
PRUNED: CompressionRow = {
    **SOURCE,
    "name": "prune <wanda> 0.5",
    "kind": "prune",
    "judgement": {"perplexity": 13.75, "rouge_l": 0.39},
    "layers": [
        {"name": "a.weight", "shape": [100, 100], "bits": 16.0, "code_bits": 16, "sparsity": 0.5},
        {"name": "b.weight", "shape": [100, 300], "bits": 4.75, "code_bits": 4, "sparsity": 0.1},
    ],
    "notes": ["Zeros are for study."],
}
EXPORTED: CompressionRow = {
    "name": "export onnx",
    "kind": "export",
    "size_bytes": 500_000,
    "num_parameters": 1_000_000,
    "runtime": "onnxruntime",
    "num_threads": 2,
    "prefill": {"median": 1600.0, "low": 1500.0, "high": 1700.0},
    "decode": {"median": 444.0, "low": 440.0, "high": 450.0},
    "peak_bytes": 1_500_000,
    "judgement": {"perplexity": 14.25, "rouge_l": 0.38},
    "agreement": {
        "num_prompts": 8,
        "num_texts_same": 7,
        "num_tokens": 256,
        "num_same": 250,
        "largest_error": 0.125,
        "differences": ["prompt 3, token 4: 17 became 9: int8 activations"],
    },
}


def page(folder: Path, rows: list[CompressionRow]) -> str:
    path = write_compression_report(
        folder,
        rows,
        title="starter, made smaller",
        repeat="cotune compress starter --out small",
        settings={"seed": 3, "dtype": None},
        versions={"torch": "2.13.0"},
    )
    return path.read_text(encoding="utf-8")


def text_of(markup: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", markup)).split())


def test_the_whole_card(tmp_path: Path) -> None:
    markup = page(tmp_path, [SOURCE, PRUNED, EXPORTED])
    shown = text_of(markup)
    for words in (
        "prune <wanda> 0.5, export onnx: 25 % of the size on disk; perplexity 12.5 before, 14.2 after.",
        "4.00 bits for each of 1,000,000 parameters",
        "2 export onnx 500 kB 25 % 1,000,000 4.00",
        "1 prune <wanda> 0.5 2.00 MB 100 % 1,000,000 16.0 20 % 13.8 0.390",
        "onnxruntime 2 threads 1,600 [1,500, 1,700] 444 [440, 450] 1.50 MB",
        "of 8 greedy texts 7 are the source's token by token; 250 of 256 choices",
        "int8 activations",
        "b.weight 100 x 300 4 4.75 10 %",
        "Zeros are for study.",
        "cotune compress starter --out small",
    ):
        assert words in shown, words
    assert "<wanda>" not in markup and "norm.weight 100" not in shown
    assert not re.search(r"(?:src|href)=[\"'](?!#)", markup)
    numbers = json.loads(html.unescape(re.findall(r'<pre class="code">(\{.*?)</pre>', markup, re.DOTALL)[-1]))
    assert numbers["rows"][2]["decode"]["median"] == 444.0


def test_without_scores_speed_and_export_nothing_is_said_of_them(tmp_path: Path) -> None:
    plain: CompressionRow = {"name": "source", "kind": "source", "size_bytes": 2_000, "num_parameters": 1_000}
    shown = text_of(page(tmp_path, [plain, {**plain, "name": "quantise rtn 8 bits", "size_bytes": 1_125}]))
    assert "Size on disk after each stage" in shown and "56 % of the size on disk." in shown
    for words in ("Perplexity", "How fast", "write the same", "None"):
        assert words not in shown
    assert bits_per_weight(plain) == 16


def test_why_an_export_was_not_compared(tmp_path: Path) -> None:
    row: CompressionRow = {**EXPORTED, "agreement": {"error": "llama-cpp-python is not installed"}}
    assert "export onnx was not compared: llama-cpp-python is not installed." in text_of(page(tmp_path, [SOURCE, row]))


def test_the_same_numbers_give_the_same_page(tmp_path: Path) -> None:
    assert page(tmp_path / "a", [SOURCE, EXPORTED]) == page(tmp_path / "b", [SOURCE, EXPORTED])


@pytest.mark.parametrize("names", [["perplexity"], ["rouge_l"]])
def test_a_plot_says_its_points(tmp_path: Path, names: list[str]) -> None:
    rows = [SOURCE, EXPORTED]
    markup = page(tmp_path, rows)
    labels = re.findall(r'aria-label="([^"]*against size on disk[^"]*)"', markup)
    assert len(labels) == 2
    value = {"perplexity": "12.5 at 2.00 MB", "rouge_l": "0.410 at 2.00 MB"}[names[0]]
    assert any(value in label for label in labels)


def test_perplexities_far_apart_stand_on_a_log_axis(tmp_path: Path) -> None:
    far: CompressionRow = {**SOURCE, "judgement": {"perplexity": 1_250.0, "rouge_l": 0.41}}
    assert "log scale" in page(tmp_path / "far", [far, EXPORTED])
    assert "log scale" not in page(tmp_path / "near", [SOURCE, EXPORTED])
