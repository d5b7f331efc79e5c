from __future__ import annotations

from pathlib import Path

from cotune.evaluation.memorisation import (
    Audit,
    AuditConfig,
    CanaryExposure,
    Extraction,
    Limits,
    Membership,
    ModelAudit,
)
from cotune.evaluation.memorisation_report import write_audit_report


def model(name: str, bits: float, *, heldout: bool = True) -> ModelAudit:
    return ModelAudit(
        name=name,
        extraction=Extraction(num_texts=40, num_too_short=3, num_extracted=7),
        heldout_extraction=Extraction(num_texts=11, num_too_short=0, num_extracted=1) if heldout else None,
        membership=Membership(train_nats=1.25, heldout_nats=2.0, auc=0.875) if heldout else None,
        exposures=tuple(
            CanaryExposure(prompt=f"<b>code {times}</b>", times=times, bits=bits, max_bits=10.0) for times in (0, 16)
        ),
    )


def page(tmp_path: Path, found: Audit, verdict: str = "All limits are kept.") -> str:
    limits = Limits(max_exposure=8.0)
    settings = {"model": "starter", "lora": None}
    path = write_audit_report(tmp_path, found, title="Memory", limits=limits, verdict=verdict, settings=settings)
    return path.read_text(encoding="utf-8")


def test_all_that_was_measured_is_shown(tmp_path: Path) -> None:
    found = Audit(config=AuditConfig(), models=(model("lora", 9.87), model("base", 0.31)))
    text = page(tmp_path, found, "a canary stands out")
    assert text.count("<svg") == 2
    for words in ("9.87", "0.310", "Allowed are 8 bits", "18 %", "7 of 40", "0.875", "0.750", "a canary stands out"):
        assert words in text, words
    assert "<b>code" not in text and "&lt;b&gt;code 16" in text
    assert "None" not in text


def test_what_was_not_measured_has_no_section(tmp_path: Path) -> None:
    bare = model("model", 1.0, heldout=False)
    bare = ModelAudit(name="model", extraction=bare.extraction, heldout_extraction=None, membership=None, exposures=())
    text = page(tmp_path, Audit(config=AuditConfig(), models=(bare,)))
    assert text.count("<svg") == 1
    assert 'id="exposure"' not in text and 'id="membership"' not in text and 'id="extraction"' in text
