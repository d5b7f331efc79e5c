"""Tuning: one method per file, one loop, and the feature cache that spares the cloud.

`METHODS` lists the tuners; a new one is a file with a `Tuner`, a line here and a problem in the contract test.
`ADAPTATIONS` lists what can be tuned in a model on one device; a new one is a file and an entry in that table.
"""

from __future__ import annotations

from cotune.tuning.adaptations import ADAPTATIONS, AdaptationOptions, adaptation_named
from cotune.tuning.adapter import AdapterConfig, AdapterResult, AdapterTuner, tune_adapter
from cotune.tuning.estimators import ESTIMATORS, PrivateDescent, estimator_named
from cotune.tuning.feature_cache import CollectProgress, FeatureCache, collect_features
from cotune.tuning.feature_set import FeatureSet
from cotune.tuning.gate import (
    GateConfig,
    GateData,
    GateResult,
    GateTuner,
    QualityPoint,
    choose_threshold,
    decision_table,
    quality_curve,
    tune_gate,
)
from cotune.tuning.loop import EpochRecord, LoopConfig, LoopProgress, LoopResult, run_loop
from cotune.tuning.lora import LoraConfig, LoraResult, LoraTuner, target_nats, tune_lora
from cotune.tuning.plugin_folder import build_plugin
from cotune.tuning.side import SideConfig, SideResult, SideTuner, tune_side
from cotune.tuning.side_evaluation import SideEvaluation, evaluate_side, nats_per_token
from cotune.tuning.tune import TuneConfig, TuneResult, tune

METHODS: dict[str, type[SideTuner] | type[GateTuner] | type[LoraTuner] | type[AdapterTuner]] = {
    "side": SideTuner,
    "gate": GateTuner,
    "lora": LoraTuner,
    "adapter": AdapterTuner,
}

__all__ = [
    "ADAPTATIONS",
    "ESTIMATORS",
    "METHODS",
    "AdaptationOptions",
    "AdapterConfig",
    "AdapterResult",
    "AdapterTuner",
    "CollectProgress",
    "EpochRecord",
    "FeatureCache",
    "FeatureSet",
    "GateConfig",
    "GateData",
    "GateResult",
    "GateTuner",
    "LoopConfig",
    "LoopProgress",
    "LoopResult",
    "LoraConfig",
    "LoraResult",
    "LoraTuner",
    "PrivateDescent",
    "QualityPoint",
    "SideConfig",
    "SideEvaluation",
    "SideResult",
    "SideTuner",
    "TuneConfig",
    "TuneResult",
    "adaptation_named",
    "build_plugin",
    "choose_threshold",
    "collect_features",
    "decision_table",
    "estimator_named",
    "evaluate_side",
    "nats_per_token",
    "quality_curve",
    "run_loop",
    "target_nats",
    "tune",
    "tune_adapter",
    "tune_gate",
    "tune_lora",
    "tune_side",
]
