"""The report card of `cotune compress`: measures the model and what each stage left, once each."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from cotune.cli.backbone_judging import judge_model
from cotune.cli.decode_cost import DecodeSettings, measure_decode
from cotune.cli.offline_judging import judge_offline
from cotune.cli.output import Advance
from cotune.compression.compress import Step
from cotune.compression.stored_layers import folder_bytes, stored_layers
from cotune.compression.token_agreement import TokenAgreement, compare_tokens
from cotune.data.templates import Example
from cotune.device.offline.folder import DESCRIPTION_FILE
from cotune.durable import replacing
from cotune.errors import CotuneError, InputError
from cotune.evaluation.compression_report import SOURCE, CompressionRow
from cotune.evaluation.judgement import Judgement
from cotune.models.backbone import Backbone
from cotune.models.weights import read_tokenizer

METRICS_FILE = "metrics.jsonl"
_COSTS = ("runtime", "dtype", "num_threads", "prefill", "decode", "peak_bytes")
_AGREEMENT_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class CardSettings:
    """What is measured of each model."""

    examples: Sequence[Example] = ()
    """Held-out texts for the scores; none for no scores."""
    max_new_tokens: int = 64
    """Of each text that is written for the scores."""
    labels: tuple[str, ...] = ()
    """Label words, for accuracy."""
    decode: DecodeSettings | None = None
    """How speed and memory are measured; None for neither."""
    agreement_prompts: tuple[str, ...] = ()
    """Texts to go on from, to hold an exported model against its source; none for no comparison."""
    seed: int = 0
    """Of the bootstrap."""


class ReportCard:
    """Rows, kept in `metrics.jsonl` of the run folder, so that an interrupted run measures nothing twice.

    Args:
        run: the run folder.
        settings: what to measure; rows that were measured with others are measured again.
        resume: whether rows of an earlier run may be taken.

    Attributes:
        rows: the source's and those of the stages so far.
    """

    def __init__(self, run: Path, settings: CardSettings, *, resume: bool) -> None:
        self._path, self._settings = run / METRICS_FILE, settings
        described = json.dumps(asdict(settings), default=str)
        self._about = hashlib.sha256(described.encode()).hexdigest()
        self._known = self._read() if resume else {}
        self._kept: list[dict[str, Any]] = []
        self.rows: list[CompressionRow] = []

    def add_source(self, folder: Path, key: str, advance: Advance) -> CompressionRow:
        """Measure the model as it was given."""
        return self._add(key, lambda: self._row("source", SOURCE, folder, None, None, advance))

    def add_step(self, step: Step, advance: Advance) -> CompressionRow:
        """Measure what a stage left.

        Raises:
            InputError: it is gone, and no earlier run measured it.
        """
        return self._add(step.key, lambda: self._step_row(step, advance))

    def _step_row(self, step: Step, advance: Advance) -> CompressionRow:
        if step.folder is None:
            raise InputError(
                f"stage {step.number} ({step.stage.label}) is gone and was measured with other settings; give those of "
                "the interrupted run, or begin anew without --resume"
            )
        row = self._row(step.stage.label, step.stage.kind, step.folder, step.adapter, step.source, advance)
        row["notes"] = [*_notes(step), *row.get("notes", ())]
        if row["kind"] == "export":
            row["num_parameters"] = self.rows[-1]["num_parameters"]
        return row

    def _row(
        self, name: str, kind: str, folder: Path, adapter: Path | None, source: Path | None, advance: Advance
    ) -> CompressionRow:
        settings, is_exported = self._settings, (folder / DESCRIPTION_FILE).is_file()
        missing = missing_runtime(folder) if is_exported else None
        layers = None if is_exported else stored_layers(folder)
        row: CompressionRow = {
            "name": name,
            "kind": kind,
            "size_bytes": folder_bytes(folder) + _adapter_bytes(adapter),
            "num_parameters": sum(layer.num_numbers for layer in layers or ()),
            "layers": None if layers is None else [{**asdict(layer)} for layer in layers],  # type: ignore[typeddict-item]
        }
        if missing is not None:
            row["notes"] = [f"{missing} is not installed here, so neither speed nor scores nor tokens were looked at"]
            return row
        if folder == source:
            # An adapter came beside it, without which speed and memory are measured.
            before: Any = self.rows[-1]
            row.update({name: before[name] for name in _COSTS if name in before})  # type: ignore[typeddict-item]
        elif settings.decode is not None:
            advance(0, 1, "speed and memory")
            cost = asdict(measure_decode(folder, settings.decode))
            row.update(cost)  # type: ignore[typeddict-item]
        if settings.examples:
            judgement = self._judge(folder, adapter, advance, is_exported=is_exported)
            row["judgement"] = judgement.to_dict()
        if is_exported and source is not None and settings.agreement_prompts:
            advance(0, 1, "the same tokens?")
            row["agreement"] = _agreement(source, folder, settings.agreement_prompts)
        return row

    def _judge(self, folder: Path, adapter: Path | None, advance: Advance, *, is_exported: bool) -> Judgement:
        settings = self._settings
        common: dict[str, Any] = {
            "max_new_tokens": settings.max_new_tokens,
            "labels": settings.labels,
            "seed": settings.seed,
            "advance": advance,
        }
        if is_exported:
            threads = None if settings.decode is None else settings.decode.num_threads
            return judge_offline(folder, settings.examples, adapter=adapter, num_threads=threads, **common)
        return judge_model(Backbone.from_pretrained(str(folder)), adapter, settings.examples, **common)

    def _add(self, key: str, measure: Callable[[], CompressionRow]) -> CompressionRow:
        row = self._known.get(key) or measure()
        self.rows.append(row)
        self._kept.append({"key": key, "about": self._about, **row})
        lines = "".join(json.dumps(each, allow_nan=False) + "\n" for each in self._kept)
        with replacing(self._path, mode=0o644) as unfinished:
            unfinished.write_text(lines, encoding="utf-8")
        return row

    def _read(self) -> dict[str, CompressionRow]:
        """Rows of an earlier run that were measured as these are."""
        try:
            rows = [json.loads(line) for line in self._path.read_text(encoding="utf-8").splitlines()]
            return {row.pop("key"): row for row in rows if row.pop("about", None) == self._about}
        except (OSError, ValueError, AttributeError, KeyError):
            return {}


def missing_runtime(folder: Path) -> str | None:
    """The package that runs an exported model, where it is not installed; None where it is."""
    runtime = json.loads((folder / DESCRIPTION_FILE).read_bytes())["runtime"]
    module, package = {"onnx": ("onnxruntime", "onnxruntime"), "gguf": ("llama_cpp", "llama-cpp-python")}[runtime]
    return None if importlib.util.find_spec(module) is not None else package


def agreement_prompts(folder: Path, texts: Sequence[str], *, context: int, num: int = 8) -> tuple[str, ...]:
    """The beginnings of some texts, short enough to go on from within a model's context."""
    tokenizer = Tokenizer.from_str(read_tokenizer(folder).decode())
    room = min(_AGREEMENT_TOKENS, max(1, context - _AGREEMENT_TOKENS - 8))
    found = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids[:room]
        if ids:
            found.append(tokenizer.decode(ids))
        if len(found) == num:
            break
    return tuple(found)


def _agreement(source: Path, exported: Path, prompts: Sequence[str]) -> dict[str, Any]:
    try:
        found: TokenAgreement = compare_tokens(str(source), exported, prompts, max_new_tokens=_AGREEMENT_TOKENS)
    except CotuneError as error:
        return {"error": str(error)}
    return {
        "num_prompts": found.num_prompts,
        "num_texts_same": found.num_prompts - len(found.differences),
        "num_tokens": found.num_tokens,
        "num_same": found.num_same,
        "largest_error": found.largest_error,
        "differences": [str(difference) for difference in found.differences],
    }


def _worded(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_worded, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _notes(step: Step) -> list[str]:
    """Sentences on what a stage's report says."""
    report, notes = step.report, []
    if report.get("note"):
        notes.append(str(report["note"]))
    for name, value in (report.get("facts") or {}).items():
        if not isinstance(value, list) or len(value) <= 8:
            notes.append(f"{name.replace('_', ' ')}: {_worded(value)}")
    if report.get("nats_before") is not None and report.get("nats_after") is not None:
        notes.append(
            f"held-out loss of its own texts {report['nats_before']:.3f} before, {report['nats_after']:.3f} after"
        )
    if report.get("is_taken_back"):
        notes.append("what was learnt made the sparse model worse once its zeros were back, so it was dropped")
    if report.get("is_merged") is False:
        notes.append("its LoRA stays an adapter beside the model, since merging it would lose the bits")
    return notes


def _adapter_bytes(adapter: Path | None) -> int:
    if adapter is None:
        return 0
    return adapter.stat().st_size if adapter.is_file() else folder_bytes(adapter)
