"""Each stage by itself: what it writes loads to what it made, and what recovery may not touch stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from llama_folders import save_llama
from tiny_models import tokenizer_json
from tokenizers import Tokenizer

from cotune.compression.calibration import CalibrationTexts
from cotune.compression.magnitude import Magnitude
from cotune.compression.stage_words import parse_stage
from cotune.compression.stages import (
    Distil,
    Export,
    Prune,
    Quantise,
    Recover,
    StageWork,
    check_stages,
    with_recovery,
)
from cotune.compression.stored_layers import stored_layers
from cotune.data.assistant_text import generate_exchanges
from cotune.data.templates import Example
from cotune.errors import InputError
from cotune.models.adapter_folder import load_adapter
from cotune.models.packed_folder import is_packed
from cotune.models.weights import load_model
from cotune.tuning.loop import LoopConfig

EXAMPLES = tuple(Example(each.request[:12], " " + each.answer[:12]) for each in generate_exchanges(24, seed=3))
FAST = Recover(rank=2, loop=LoopConfig(epochs=2, learning_rate=0.02))


@pytest.fixture
def work(tmp_path: Path) -> StageWork:
    save_llama(tmp_path / "source", num_hidden_layers=3)
    texts = [example.prompt + example.target for example in EXAMPLES]
    tokenizer = Tokenizer.from_str(tokenizer_json().decode())
    return StageWork(
        original=str(tmp_path / "source"),
        source=tmp_path / "source",
        adapter=None,
        out=tmp_path / "stage" / "model",
        scratch=tmp_path / "stage" / "scratch",
        calibration=CalibrationTexts.from_texts(texts, tokenizer, num_texts=4, length=16),
        examples=EXAMPLES,
        max_length=32,
        teacher=None,
        dtype="float32",
        seed=0,
        resume=False,
        tell=lambda done, total, note: None,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor.detach() for name, tensor in load_model(folder, dtype="float32", device="cpu").named_parameters()
    }


def test_pruning_writes_a_plain_model(work: StageWork) -> None:
    made = parse_stage("prune", "channels:0.34,multiple=16").run(work)
    assert made.folder == work.out and made.report["facts"] == {"intermediate_size": 32}
    assert weights(work.out)["model.layers.2.mlp.down_proj.weight"].shape == (32, 32)


def test_zeros_survive_recovery(work: StageWork, tmp_path: Path) -> None:
    """Layer by layer as many as were asked for, in the same places, and other weights learn."""
    Prune(how=Magnitude(), amount="2:4").run(work)
    after = replace(work, source=work.out, out=tmp_path / "recovered" / "model", scratch=tmp_path / "scratch")
    report = FAST.run(after).report
    before, found = weights(work.out), weights(after.out)
    linears = [layer.name for layer in stored_layers(work.out) if "proj" in layer.name]
    assert len(linears) == 3 * 7
    for name in linears:
        assert float((found[name] == 0).float().mean()) == 0.5
        assert torch.equal(found[name] == 0, before[name] == 0)
    assert report["is_merged"] and report["is_taken_back"] is False and report["nats_after"] < report["nats_before"]
    assert any(not torch.equal(found[name], before[name]) for name in linears)


def test_recovery_of_zeros_that_helps_nothing_is_taken_back(
    work: StageWork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Prune(how=Magnitude(), amount=0.5).run(work)
    after = replace(work, source=work.out, out=tmp_path / "recovered" / "model", scratch=tmp_path / "scratch")
    measured = iter([1.0, 1.5])
    monkeypatch.setattr("cotune.compression.stages._nats", lambda backbone, heldout: next(measured))
    report = FAST.run(after).report
    assert report["is_taken_back"] and report["nats_before"] == report["nats_after"] == 1.0
    before, found = weights(work.out), weights(after.out)
    assert all(torch.equal(found[name], before[name]) for name in before)


def test_recovery_of_quantised_weights_stays_beside_them(work: StageWork, tmp_path: Path) -> None:
    Quantise(bits=4).run(work)
    after = replace(work, source=work.out, out=tmp_path / "recovered" / "model", scratch=tmp_path / "scratch")
    made = FAST.run(after)
    assert made.folder == work.out and is_packed(work.out) and not after.out.exists()
    assert made.adapter == after.adapter_out and made.report["nats_after"] < made.report["nats_before"]
    model = load_model(work.out, dtype="float32", device="cpu")
    assert load_adapter(made.adapter, model).params


def test_whole_weights_are_rounded_to_the_number_type_first(work: StageWork) -> None:
    """What a later stage sees is what a 16-bit folder holds."""
    loaded = replace(work, dtype="bfloat16").load().model
    assert all(torch.equal(p, p.bfloat16().float()) for p in loaded.parameters())
    assert any(not torch.equal(p, p.bfloat16().float()) for p in work.load().model.parameters())


def test_distilling_to_fewer_layers(work: StageWork) -> None:
    stage = parse_stage("distil", "forward:2,epochs=1,learning_rate=0.01,top_k=16")
    assert isinstance(stage, Distil)
    report = stage.run(work).report
    assert report["nats_after"] < report["nats_before"]
    assert load_model(work.out, dtype="float32", device="cpu").config.num_hidden_layers == 2
    # Every text was asked about once, training and held-out.
    assert len(list((work.scratch / "teacher").glob("*.teacher"))) == len({*EXAMPLES})


def test_order_and_what_goes_together() -> None:
    prune, quantise = Prune(how=Magnitude(), amount=0.5), Quantise()
    stages = with_recovery([prune, Distil(), quantise, Export()], FAST)
    assert [stage.kind for stage in stages] == [
        *("prune", "recover", "distil", "recover", "quantise", "recover", "export")
    ]
    check_stages(stages)
    check_stages([prune, prune, Export()])
    for wrong, words in (
        ([], "no stage"),
        ([FAST], "recover stands alone"),
        ([quantise, prune], "in the order prune, distil, quantise, export"),
        ([quantise, quantise], "quantise 2 times"),
        ([quantise, Export(), FAST], "behind export"),
    ):
        with pytest.raises(InputError, match=words):
            check_stages(wrong)
