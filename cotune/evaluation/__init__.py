"""How good, how fast, and what it cost: metrics, intervals, and the report of a run. No torch."""

from cotune.evaluation.generation_metrics import AggregateMetrics, GenerationMetrics, aggregate_generations
from cotune.evaluation.intervals import bootstrap_interval
from cotune.evaluation.likelihood_metrics import bits_per_byte, nats_per_token, perplexity
from cotune.evaluation.report import render_report, write_report
from cotune.evaluation.report_schema import ReportMetrics
from cotune.evaluation.text_metrics import (
    CorpusScore,
    accuracy,
    exact_match,
    normalize_answer,
    rouge_l,
    score_corpus,
    token_f1,
)

__all__ = [
    "AggregateMetrics",
    "CorpusScore",
    "GenerationMetrics",
    "ReportMetrics",
    "accuracy",
    "aggregate_generations",
    "bits_per_byte",
    "bootstrap_interval",
    "exact_match",
    "nats_per_token",
    "normalize_answer",
    "perplexity",
    "render_report",
    "rouge_l",
    "score_corpus",
    "token_f1",
    "write_report",
]
