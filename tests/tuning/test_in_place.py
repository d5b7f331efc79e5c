from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from cotune.data.batches import EncodedExample
from cotune.errors import InputError, NonFiniteLossError
from cotune.models.backbone import Backbone
from cotune.tuning.answer_loss import TokenBatches
from cotune.tuning.in_place import InPlaceState, Slope, by_step, tune_in_place
from cotune.tuning.loop import LoopConfig
from cotune.tuning.objectives import AnswerNats, ExampleLosses
from cotune.tuning.zeroth_order import ZerothOrderConfig, ZerothOrderTuner


@dataclass(frozen=True, kw_only=True)
class TheModelItself:
    """Its own tensors, not copied: what a step changes is the model, and nothing else remembers it."""

    params: dict[str, torch.Tensor]

    @contextmanager
    def attach(self, model: PreTrainedModel) -> Iterator[PreTrainedModel]:
        yield model


def own(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def run(backbone: Backbone, examples: list[EncodedExample], objective: Any, run_dir: Path | None) -> Any:
    return tune_in_place(
        backbone.model,
        TheModelItself(params=own(backbone.model)),
        lambda model: ZerothOrderTuner(model, ZerothOrderConfig(), objective),
        TokenBatches(examples, 16, pad_token_id=0, seed=0),
        LoopConfig(epochs=3, learning_rate=1e-2),
        fingerprint="",
        run_dir=run_dir,
    )


def test_a_model_that_is_tuned_itself_is_as_before(
    tmp_path: Path, backbone: Backbone, examples: list[EncodedExample]
) -> None:
    before = {name: tensor.clone() for name, tensor in own(backbone.model).items()}
    for run_dir in (None, tmp_path / "new"):
        params, result = run(backbone, examples, AnswerNats(), run_dir)
        assert all(torch.equal(own(backbone.model)[name], before[name]) for name in before)
        assert not all(torch.equal(params[name], before[name]) for name in before)
        assert result.state.num_steps == 3
    assert not list((tmp_path / "new").glob("before-*")), "the copy is thrown away"


def test_also_after_an_error(backbone: Backbone, examples: list[EncodedExample]) -> None:
    class BreaksLate(AnswerNats):
        calls = 0

        def __call__(self, *args: Any) -> ExampleLosses:
            self.calls += 1
            losses = super().__call__(*args)
            factor = torch.nan if self.calls == 6 else 1.0
            return ExampleLosses(sums=losses.sums * factor, counts=losses.counts)

    before = {name: tensor.clone() for name, tensor in own(backbone.model).items()}
    with pytest.raises(NonFiniteLossError):
        run(backbone, examples, BreaksLate(), None)
    assert all(torch.equal(own(backbone.model)[name], before[name]) for name in before)


def test_a_folder_that_cannot_be_written_is_one_clear_error(
    tmp_path: Path, backbone: Backbone, examples: list[EncodedExample]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be kept in"):
        run(backbone, examples, AnswerNats(), tmp_path / "file" / "folder")


def test_a_state_goes_on_from_its_tensors(backbone: Backbone) -> None:
    model = backbone.model
    name = next(iter(own(model)))
    before = own(model)[name].clone()
    try:
        state = InPlaceState.start(model, {name: before + 1}, None)
        assert state.params[name].data_ptr() == own(model)[name].data_ptr(), "no copy"
        assert torch.equal(own(model)[name], before + 1)
        state.num_steps, state.slopes = 7, [Slope(5, 2**62 + 1, 0.1), Slope(6, 3, -1e-30)]
        tensors = {key: tensor.clone() for key, tensor in state.to_tensors().items()}
        other = InPlaceState.start(model, {name: before}, None)
        other.load_tensors(tensors)
        assert (other.num_steps, other.slopes) == (7, state.slopes)
        assert torch.equal(own(model)[name], before + 1)
        with pytest.raises(InputError, match="other parameters"):
            other.load_tensors({key: tensor for key, tensor in tensors.items() if key != "slope_seeds"})
        with pytest.raises(InputError, match="in the checkpoint has shape"):
            other.load_params({name: before[:1]})
    finally:
        InPlaceState.start(model, {name: before}, None)


def test_slopes_by_step() -> None:
    slopes = [Slope(1, 10, 0.0), Slope(1, 11, 0.0), Slope(3, 12, 0.0)]
    assert by_step(slopes) == [slopes[:2], slopes[2:]]
