"""Stages as words: what each means, and one sentence for each that means nothing."""

from __future__ import annotations

import pytest

from cotune.compression.awq import Awq
from cotune.compression.depth import Depth
from cotune.compression.distil import DistilSettings
from cotune.compression.gguf_export import GgufExportConfig
from cotune.compression.onnx_export import OnnxExportConfig
from cotune.compression.prune import PRUNERS
from cotune.compression.quantise import QUANTISERS
from cotune.compression.sparse_gpt import SparseGpt
from cotune.compression.stage_words import Words, parse_stage
from cotune.compression.stages import Distil, Export, Prune, Quantise, Stage
from cotune.compression.wanda import Wanda
from cotune.compression.written_weights import Rounding
from cotune.distillation.divergences import JensenShannon
from cotune.errors import InputError
from cotune.tuning.loop import LoopConfig


@pytest.mark.parametrize(
    ("kind", "text", "stage"),
    [
        ("prune", "depth:2", Prune(how=Depth(), amount="2")),
        ("prune", "wanda:2:4", Prune(how=Wanda(), amount="2:4")),
        ("prune", "sparse_gpt:0.5, damping=0.1", Prune(how=SparseGpt(damping=0.1), amount="0.5")),
        (
            "distil",
            "js:4,beta=0.1,epochs=5,learning_rate=1,top_k=8",
            Distil(
                settings=DistilSettings(
                    divergence=JensenShannon(0.1), top_k=8, loop=LoopConfig(epochs=5, learning_rate=1)
                ),
                num_layers=4,
            ),
        ),
        (
            "quantise",
            "awq:3,max_clip=0,group_size=none,embedding_bits=4",
            Quantise(how=Awq(max_clip=0), bits=3, group_size=None, embedding_bits=4),
        ),
        ("quantise", "gptq", Quantise()),
        (
            "export",
            "onnx:8,embedding_bits=4,context=32",
            Export(config=OnnxExportConfig(rounding=Rounding(bits=8, embedding_bits=4), context=32)),
        ),
        ("export", "gguf:Q8_0,context=32", Export(config=GgufExportConfig(kind="Q8_0", context=32))),
    ],
)
def test_words_mean_stages(kind: str, text: str, stage: Stage) -> None:
    assert parse_stage(kind, text) == stage


@pytest.mark.parametrize("name", PRUNERS)
def test_every_pruner_has_words(name: str) -> None:
    amount = "1" if name == "depth" else "0.5"
    stage = parse_stage("prune", f"{name}:{amount}")
    assert isinstance(stage, Prune) and type(stage.how) is PRUNERS[name] and stage.label == f"prune {name} {amount}"


@pytest.mark.parametrize("name", QUANTISERS)
def test_every_quantiser_has_words(name: str) -> None:
    stage = parse_stage("quantise", f"{name}:8")
    assert isinstance(stage, Quantise) and type(stage.how) is QUANTISERS[name] and stage.bits == 8


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("shrink", "depth:2", "expected one of prune, distil, quantise, export"),
        ("prune", "dpth:2", "expected one of magnitude, wanda, sparse_gpt, depth, channels"),
        ("prune", "depth", "no amount"),
        ("prune", "depth:0.5", "a whole number of blocks"),
        ("prune", "channels:1.5", "above 0 and below 1"),
        ("prune", "wanda:4:2", "fewer kept"),
        ("prune", "width:0.5,channels=3", "expected none"),
        ("quantise", "best:4", "expected one of rtn, gptq, awq"),
        ("quantise", "gptq:5", "bits are 5"),
        ("quantise", "gptq:four", "expected a whole number"),
        ("quantise", "gptq:4,speed=1", "expected damping or orders_by_activation or group_size"),
        ("quantise", "gptq:4,damping=-1", "damping is -1"),
        ("quantise", "gptq:4,damping=true", "expected float"),
        ("quantise", "gptq:4,fast", "KEY=VALUE"),
        ("quantise", "gptq:4,bits=4", "the setting 'bits'"),
        ("distil", "kl", "expected one of forward, reverse, js"),
        ("distil", "forward:0", "num_layers is 0"),
        ("distil", "forward,epochs=x", "epochs='x', expected int"),
        ("export", "tflite", "expected onnx or gguf"),
        ("export", "onnx:3", "bits is 3"),
        ("export", "gguf:Q9", "expected one of F32"),
    ],
)
def test_what_means_nothing_is_one_sentence(kind: str, text: str, words: str) -> None:
    with pytest.raises(InputError, match=words.replace("(", r"\(")) as caught:
        parse_stage(kind, text)
    assert "\n" not in str(caught.value)


def test_a_setting_is_given_once() -> None:
    with pytest.raises(InputError, match="each once"):
        Words.read("prune", "wanda:0.5,a=1,a=2")
