"""The chain: the same bytes with and without an interrupt, refusals before anything is done, nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_folders import save_llama
from safetensors.torch import load_file, save_file
from tiny_models import tokenizer_json
from tokenizers import Tokenizer

from cotune.compression.calibration import CalibrationTexts
from cotune.compression.compress import CompressInputs, CompressResult, Step, adapter_of, compress, dtype_of
from cotune.compression.stage_words import parse_stage
from cotune.compression.stages import Recover, Stage, with_recovery
from cotune.data.assistant_text import generate_exchanges
from cotune.data.templates import Example
from cotune.device.offline.folder import OfflineFolder
from cotune.errors import InputError
from cotune.models.weights import load_model
from cotune.tuning.loop import LoopConfig

pytest.importorskip("onnx", reason="onnx is not installed")

EXAMPLES = [Example(each.request[:12], " " + each.answer[:12]) for each in generate_exchanges(16, seed=3)]
CALIBRATION = CalibrationTexts.from_texts(
    [example.prompt + example.target for example in EXAMPLES],
    Tokenizer.from_str(tokenizer_json().decode()),
    num_texts=4,
    length=16,
)
INPUTS = CompressInputs(calibration=CALIBRATION, examples=EXAMPLES, max_length=32)
RECOVER = Recover(rank=2, loop=LoopConfig(epochs=2, learning_rate=0.01, checkpoint_interval_s=0))
CHAIN = with_recovery([parse_stage("prune", "depth:1"), parse_stage("quantise", "gptq:4")], RECOVER)
EXPORTED = [*CHAIN, parse_stage("export", "onnx")]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "source"
    save_llama(folder, num_hidden_layers=3)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


def run(source: Path, place: Path, stages: Sequence[Stage] = CHAIN, **options: Any) -> CompressResult:
    return compress(str(source), stages, place / "out", place / "run", INPUTS, **options)


@pytest.fixture(scope="module")
def straight(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("straight")
    run(source, place, EXPORTED)
    return place


def test_the_result_is_what_the_stages_say(source: Path, straight: Path, tmp_path: Path) -> None:
    steps: list[Step] = []
    made = run(source, tmp_path, EXPORTED, on_step=steps.append)
    assert made.steps == tuple(steps) and [step.stage for step in steps] == EXPORTED
    assert made.adapter == tmp_path / "out.adapter" == adapter_of(made.out, EXPORTED)
    description = OfflineFolder.open(made.out).description
    assert description.num_layers == 2 and description.bits == 4
    assert contents(made.out) == contents(straight / "out")
    # Only what is small stays of the stages.
    assert not list((tmp_path / "run").rglob("model.safetensors"))


def test_an_interrupt_changes_nothing(source: Path, straight: Path, tmp_path: Path) -> None:
    """Killed in the middle of training, then behind each stage; every time resumed."""

    class KilledError(Exception):
        pass

    def while_tuning(stage: Stage, done: int, total: int, note: str) -> None:
        if stage.kind == "recover" and done == 3:
            raise KilledError

    def killed(**options: Any) -> None:
        with pytest.raises(KilledError):
            run(source, tmp_path, EXPORTED, resume=True, **options)
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.adapter").exists()

    killed(progress=while_tuning)
    seen: list[int] = []
    steps: list[int] = []
    for number in range(2, len(EXPORTED) + 1):

        def behind(step: Step, number: int = number) -> None:
            # Its folder is there to be measured, whichever run made it.
            assert step.number < number or (step.folder is not None and step.folder.is_dir())
            if step.number == number:
                seen.append(number)
                raise KilledError

        killed(
            on_step=behind, progress=lambda stage, done, *rest: steps.append(done) if stage.kind == "recover" else None
        )
    # Training went on where it was killed.
    assert steps[0] in (3, 4)
    assert seen == [2, 3, 4, 5]
    trained: list[str] = []
    # Killed between its last two steps, when the adapter has its name and the model has not.
    (tmp_path / "run" / "stages" / "05-export" / "adapter").rename(tmp_path / "out.adapter")
    made = run(source, tmp_path, EXPORTED, resume=True, progress=lambda stage, *rest: trained.append(stage.kind))
    assert trained == []
    assert contents(made.out) == contents(straight / "out")
    assert made.adapter is not None and contents(made.adapter) == contents(straight / "out.adapter")


def test_resume_begins_with_the_first_stage_that_changed(source: Path, tmp_path: Path) -> None:
    def begun(*words: str, **options: Any) -> list[str]:
        seen: list[str] = []
        stages = [parse_stage("prune", words[0]), parse_stage("quantise", words[1])]
        run(source, tmp_path, stages, keeps_stages=True, progress=lambda s, *rest: seen.append(s.kind), **options)
        shutil.rmtree(tmp_path / "out")
        return list(dict.fromkeys(seen))

    assert begun("magnitude:0.25", "rtn:4") == ["prune", "quantise"]
    assert begun("magnitude:0.25", "rtn:8", resume=True) == ["quantise"]
    assert begun("magnitude:0.5", "rtn:8", resume=True) == ["prune", "quantise"]
    # Without it all is done anew.
    assert begun("magnitude:0.5", "rtn:8") == ["prune", "quantise"]


def test_it_reloads_to_the_same_logits(source: Path, tmp_path: Path) -> None:
    """What the stages hold in memory is what the folder gives."""
    made = run(source, tmp_path, [parse_stage("prune", "wanda:0.5"), parse_stage("quantise", "rtn:4")])
    stage = json.loads((tmp_path / "run" / "stages" / "02-quantise" / "stage.json").read_text())
    model = load_model(made.out, dtype="float32", device="cpu")
    again = load_model(made.out, dtype="float32", device="cpu")
    ids = torch.tensor([[0, 5, 17, 230, 9]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    assert {layer["bits"] for layer in stage["report"]["layers"]} == {4, 8}
    assert model.get_parameter("model.layers.0.mlp.up_proj.weight").eq(0).float().mean() >= 0.5
    exported = compress(str(made.out), [parse_stage("export", "onnx")], tmp_path / "exported", tmp_path / "run2")
    assert OfflineFolder.open(exported.out).description.bits == 4


def test_number_types_are_the_model_s_own_or_as_asked(source: Path, tmp_path: Path) -> None:
    assert dtype_of(source) == "float32"
    inputs = CompressInputs(calibration=CALIBRATION, dtype="bfloat16")
    compress(str(source), [parse_stage("prune", "depth:1")], tmp_path / "out", tmp_path / "run", inputs)
    assert dtype_of(tmp_path / "out") == "bfloat16"


@pytest.mark.parametrize(
    ("stages", "inputs", "words"),
    [
        (["prune wanda:0.5"], CompressInputs(), "measures layers on texts and none came"),
        (["distil forward:2"], CompressInputs(), "learns from texts and none came"),
        (["distil forward"], INPUTS, "nothing to learn"),
        (["prune magnitude:0.5"], CompressInputs(dtype="int8"), "dtype is 'int8'"),
        (["prune depth:3"], INPUTS, "prune depth 3 asks for more blocks than are left of the model's 3"),
        (["prune depth:1", "distil forward:3"], INPUTS, "distil forward to 3 layers asks for more"),
        (["quantise rtn:4", "export gguf:Q4_K_M"], INPUTS, "rounds once more"),
    ],
)
def test_refusals(source: Path, tmp_path: Path, stages: list[str], inputs: CompressInputs, words: str) -> None:
    parsed = [parse_stage(*text.split(" ")) for text in stages]
    with pytest.raises(InputError, match=words):
        compress(str(source), parsed, tmp_path / "out", tmp_path / "run", inputs)
    assert not (tmp_path / "out").exists()


def test_a_bad_model_is_refused_before_anything_is_done(source: Path, straight: Path, tmp_path: Path) -> None:
    export, prune = [parse_stage("export", "onnx")], [parse_stage("prune", "magnitude:0.5")]

    def check(model: Path, stages: list[Stage], words: str) -> None:
        with pytest.raises(InputError, match=words):
            run(model, tmp_path / "new", stages)
        assert not (tmp_path / "new").exists()

    check(tmp_path / "nowhere", prune, "no folder")
    save_llama(tmp_path / "qwen3", "qwen3")
    check(tmp_path / "qwen3", [*prune, *export], "Qwen3ForCausalLM")
    shutil.copytree(source, tmp_path / "nan")
    tensors = load_file(tmp_path / "nan" / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    check(tmp_path / "nan", export, "model.norm.weight of .* holds nan")
    shutil.copytree(source, tmp_path / "cut")
    whole = (source / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(whole[:-100])
    check(tmp_path / "cut", prune, "is no safetensors file")
    shutil.copytree(source, tmp_path / "fallback")
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["model"]["byte_fallback"] = True
    (tmp_path / "fallback" / "tokenizer.json").write_text(json.dumps(tokenizer))
    pytest.importorskip("gguf", reason="gguf is not installed")
    check(tmp_path / "fallback", [*prune, parse_stage("export", "gguf:F16")], "BPE model with byte fallback")
    run(source, tmp_path / "packed", [parse_stage("quantise", "rtn:4")])
    check(tmp_path / "packed" / "out", prune, "has quantised weights")
    with pytest.raises(InputError, match="out is there already"):
        run(source, straight)
    (tmp_path / "old" / "out.adapter").mkdir(parents=True)
    for resume in (False, True):
        with pytest.raises(InputError, match=r"out\.adapter is there already"):
            run(source, tmp_path / "old", resume=resume)


def test_too_little_room_is_said_first(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    with pytest.raises(InputError, match=r"needs up to .* MiB for two stages at a time and 1 MiB are free"):
        run(source, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_full_disk_leaves_nothing_at_the_result(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cotune.compression.compress.replacing", full)
    with pytest.raises(InputError, match="No space left"):
        run(source, tmp_path, [parse_stage("prune", "magnitude:0.5")])
    assert not (tmp_path / "out").exists()
