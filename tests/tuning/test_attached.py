"""Training in the model's own tensors gives what training a copy gave, and leaves the model as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cotune.data.batches import EncodedExample
from cotune.models.backbone import Backbone
from cotune.tuning.adaptations import AdaptationOptions, adaptation_named
from cotune.tuning.attached import AttachedTuner, tune_attached
from cotune.tuning.gradient import GradientState
from cotune.tuning.loop import EpochRecord, LoopConfig
from cotune.tuning.tune import TuneConfig
from cotune.tuning.tuner import Params

OPTIONS: dict[str, dict[str, Any]] = {"blocks": {"memory_budget_bytes": 200_000}, "lora": {"rank": 2}}


class OnACopy(AttachedTuner):
    """The way it was: the trained tensors stand beside the model's, which `functional_call` leaves out."""

    def init(self, params: Params) -> GradientState:
        return GradientState.start(params, weight_decay=self._config.weight_decay)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("name", ["full", "bias", "blocks", "lora", "p_tuning"])
def test_the_same_weights_bit_for_bit_as_on_a_copy(
    tmp_path: Path, backbone: Backbone, examples: list[EncodedExample], name: str, checkpointing: bool
) -> None:
    what = adaptation_named(name, AdaptationOptions(**OPTIONS.get(name, {})))
    config = TuneConfig(
        what=what,
        # So fast that it gets worse again: an earlier epoch is the best.
        loop=LoopConfig(epochs=3, learning_rate=0.3, checkpoint_interval_s=0.0),
        num_batch_sequences=3,
        weight_decay=0.1,
        gradient_checkpointing=checkpointing,
    )
    fresh = what.fresh(backbone, examples, seed=0)
    before = {each: p.detach().clone() for each, p in backbone.model.named_parameters()}

    def run(
        tuner: type[AttachedTuner], heldout: list[EncodedExample], run_dir: Path | None
    ) -> tuple[dict[str, torch.Tensor], list[EpochRecord], int]:
        params, result = tune_attached(
            backbone, fresh, tuner, examples[:6], config, heldout=heldout, run_dir=run_dir, resume=False, progress=None
        )
        now = dict(backbone.model.named_parameters())
        assert now.keys() == before.keys() and all(torch.equal(now[each], before[each]) for each in before)
        return params, result.curve, result.best_epoch

    # Whatever keeps the best epoch: nothing, the memory, or the run folder.
    for heldout, run_dirs in (([], [None]), (examples[:3], [None, tmp_path / name])):
        copied, expected, best = run(OnACopy, heldout, None)
        for run_dir in run_dirs:
            params, curve, best_epoch = run(AttachedTuner, heldout, run_dir)
            assert params.keys() == copied.keys()
            assert all(torch.equal(params[each], copied[each]) for each in copied)
            assert best_epoch == best
            assert [(r.train_loss, r.heldout_loss) for r in curve] == [(r.train_loss, r.heldout_loss) for r in expected]
    assert not any(torch.equal(params[each], fresh.params[each]) for each in params) or best == 0
    assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["checkpoint.safetensors", "metrics.jsonl"]
