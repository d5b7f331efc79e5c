"""Calibration: texts of one length, what layers read, and layers compressed one block after another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressible import VOCAB, tiny_model
from numpy.typing import NDArray
from tiny_models import tokenizer_json
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedModel

from cotune.compression.calibration import (
    CalibrationTexts,
    LayerProgress,
    LayerStatistics,
    compress_linears,
    head_statistics,
    reconstruction_error,
    walk_blocks,
    walk_bytes,
)
from cotune.errors import DataError, InputError

Ids = NDArray[np.int64]
LENGTH = 9


@pytest.fixture
def input_ids() -> Ids:
    """Five texts: with two in a batch the last batch is smaller."""
    return np.random.default_rng(0).integers(0, VOCAB, (5, LENGTH))


def seen_by_hooks(model: PreTrainedModel, input_ids: Ids) -> dict[str, Tensor]:
    """Inputs (rows, in) of all linear layers of the blocks, one text after another through the whole model."""
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":

            def keep(_: nn.Module, arguments: tuple[Tensor, ...], name: str = name) -> None:
                seen.setdefault(name, []).append(arguments[0][0])

            handles.append(module.register_forward_pre_hook(keep))
    with torch.no_grad():
        for ids in torch.from_numpy(input_ids):
            model(ids[None])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(inputs) for name, inputs in seen.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral"])
def test_statistics_are_those_of_hooks_on_the_whole_model(
    architecture: str, dtype: torch.dtype, input_ids: Ids
) -> None:
    model = tiny_model(architecture, dtype)
    expected = seen_by_hooks(model, input_ids)
    walked: list[str] = []
    for block in walk_blocks(model, input_ids, batch_size=2):
        for name, statistics in block.statistics().items():
            inputs = expected[name].double()
            # bfloat16 products of other batch sizes may round another way.
            tolerance = 1e-5 if dtype == torch.float32 else 0.02
            scale = float(statistics.squared_norms.max())
            torch.testing.assert_close(statistics.gram, inputs.T @ inputs, rtol=tolerance, atol=tolerance * scale)
            assert statistics.gram.dtype == torch.float64
            assert statistics.num_rows == input_ids.size
            assert torch.equal(statistics.squared_norms, statistics.gram.diagonal())
            walked.append(name)
    assert walked == list(expected)


def test_the_model_is_as_before_and_layers_with_the_same_input_share_its_statistics(input_ids: Ids) -> None:
    model = tiny_model()
    before = model(torch.from_numpy(input_ids)).logits
    block = next(iter(walk_blocks(model, input_ids)))
    statistics = block.statistics()
    own = {name.rsplit(".", 1)[1]: one for name, one in statistics.items()}
    assert own["q_proj"] is own["k_proj"] is own["v_proj"]
    assert own["gate_proj"] is own["up_proj"]
    assert len({id(one) for one in own.values()}) == 4
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert torch.equal(model(torch.from_numpy(input_ids)).logits, before)


@pytest.mark.parametrize("needs_gram", [True, False])
def test_what_a_walk_keeps_is_bounded(input_ids: Ids, needs_gram: bool) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    block = next(iter(walk_blocks(model, input_ids)))
    kept = set(block.statistics(needs_gram=needs_gram).values())
    used = block.states.nbytes + sum((one.gram if needs_gram else one.squared_norms).nbytes for one in kept)
    bound = walk_bytes(model, num_texts=5, length=LENGTH, needs_gram=needs_gram)
    # Query, key and value share one matrix, gate and up another.
    assert bound == used + 3 * 8 * (32 * 32 if needs_gram else 32)


def test_a_head_s_statistics_are_those_of_a_hook_on_it(input_ids: Ids) -> None:
    model = tiny_model()
    seen: list[Tensor] = []
    handle = model.lm_head.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0][0]))
    with torch.no_grad():
        for ids in torch.from_numpy(input_ids):
            model(ids[None])
    handle.remove()
    expected = LayerStatistics.of_inputs(torch.cat(seen))
    found = head_statistics(model, input_ids, batch_size=2)
    assert found.num_rows == expected.num_rows == input_ids.size
    torch.testing.assert_close(found.gram, expected.gram, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model.model.norm.weight[0] = float("inf")
    with pytest.raises(InputError, match="the head reads numbers that are not finite"):
        head_statistics(model, input_ids)


def test_squared_norms_can_be_had_without_gram_matrices(input_ids: Ids) -> None:
    block = next(iter(walk_blocks(tiny_model(), input_ids)))
    name = "model.layers.0.mlp.down_proj"
    alone = block.statistics([name], needs_gram=False)
    torch.testing.assert_close(alone[name].squared_norms, block.statistics()[name].squared_norms)
    assert list(alone) == [name] and not alone[name].has_gram
    with pytest.raises(InputError, match="needs_gram=True"):
        _ = alone[name].gram


def test_later_blocks_read_what_compressed_blocks_put_out(input_ids: Ids) -> None:
    """A block whose two output layers are zero passes its input on: the next block's inputs are known by hand."""
    model, reference = tiny_model(), tiny_model()
    read: dict[str, LayerStatistics] = {}
    order = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]

    def compress(weight: Tensor, statistics: LayerStatistics) -> Tensor:
        name = order[len(read)]
        read[name] = statistics
        silences = name.startswith("model.layers.0.") and name.endswith(("o_proj", "down_proj"))
        return torch.zeros_like(weight) if silences else weight

    compress_linears(model, input_ids, compress, batch_size=2)
    embedded = reference.model.embed_tokens(torch.from_numpy(input_ids)).double()  # (texts, length, hidden)
    normed = embedded / (embedded.square().mean(-1, keepdim=True) + reference.config.rms_norm_eps).sqrt()
    by_hand = normed.reshape(-1, 32).T @ normed.reshape(-1, 32)
    for index in (0, 1):
        torch.testing.assert_close(
            read[f"model.layers.{index}.self_attn.q_proj"].gram, by_hand.detach(), rtol=1e-4, atol=1e-3
        )
    # Within a block nothing is compressed yet when it is measured.
    dense = seen_by_hooks(reference, input_ids)["model.layers.0.mlp.gate_proj"].double()
    torch.testing.assert_close(read["model.layers.0.mlp.gate_proj"].gram, dense.T @ dense, rtol=1e-4, atol=1e-3)
    # The last block, with all before it as they are at the end.
    last = seen_by_hooks(model, input_ids)["model.layers.2.mlp.down_proj"].double()
    torch.testing.assert_close(
        read["model.layers.2.mlp.down_proj"].gram, last.T @ last, rtol=1e-4, atol=1e-4 * float(last.square().sum())
    )


class Packed:
    """A weight in whole numbers of a half."""

    def __init__(self, weight: Tensor) -> None:
        self.codes = (weight * 2).round()

    def dequantised(self) -> NDArray[np.float32]:
        values: NDArray[np.float32] = (self.codes / 2).numpy()
        return values


def test_packed_weights_come_back_by_name_and_their_values_are_in_the_model(input_ids: Ids) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    head = model.lm_head.weight.clone()
    seen: list[LayerProgress] = []
    packed = compress_linears(
        model, input_ids, lambda weight, _: Packed(weight), skip=["mlp.up_proj"], on_layer=seen.append
    )
    names = [f"model.layers.{i}.self_attn.{part}_proj" for i in range(3) for part in "qkvo"]
    names += [f"model.layers.{i}.mlp.{part}_proj" for i in range(3) for part in ("gate", "down")]
    assert sorted(packed) == sorted(names) and len(seen) == len(names)
    assert [progress.index for progress in seen] == list(range(18)) and {p.num_layers for p in seen} == {18}
    assert all(progress.error is not None and 0 < progress.error < 1 for progress in seen)
    for name, one in packed.items():
        weight = model.get_submodule(name).weight
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight.float(), one.codes / 2)
    assert torch.equal(
        model.model.layers[0].mlp.up_proj.weight, tiny_model(dtype=torch.bfloat16).model.layers[0].mlp.up_proj.weight
    )
    assert torch.equal(model.lm_head.weight, head)


def test_the_error_is_that_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, weight, new = (torch.randn(size, generator=generator) for size in ((20, 6), (4, 6), (4, 6)))
    whole, lost = inputs @ weight.T, inputs @ (weight - new).T
    expected = float(lost.square().sum() / whole.square().sum())
    gram = LayerStatistics.of_inputs(inputs).gram
    assert reconstruction_error(weight, new, gram) == pytest.approx(expected, rel=1e-5)
    assert reconstruction_error(weight * 0, weight * 0, gram) == 0


def words() -> Tokenizer:
    """`w3` is token 3; each text begins with none."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(100)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def text(start: int, num: int) -> str:
    return " ".join(f"w{i}" for i in range(start, start + num))


def test_each_text_gives_a_piece_before_any_gives_a_second_one() -> None:
    texts = [text(10, 30), text(50, 2), text(60, 3), text(70, 4)]

    def cut(num_texts: int, seed: int = 0) -> Ids:
        return CalibrationTexts.from_texts(texts, words(), num_texts=num_texts, length=4, seed=seed).input_ids

    first = cut(3).ravel().tolist()
    # All of the short texts' 2, 3 and 4 tokens are there, and one piece of the long one as far as there is room.
    assert sum(10 <= token < 40 for token in first) <= 4 < len(first) - 4
    whole = cut(9)
    assert whole.dtype == np.int64 and len(set(whole.ravel().tolist())) == 36
    assert whole.ravel()[:12].tolist() == first
    assert np.array_equal(cut(9), whole) and not np.array_equal(cut(9, seed=1), whole)
    fewer = CalibrationTexts.from_texts(
        [text(number, 3) for number in range(13)], words(), num_texts=10, length=4, takes_fewer=True
    )
    assert fewer.input_ids.shape == (9, 4)
    with pytest.raises(InputError, match=r"39 tokens, expected num_texts \* length = 10 \* 4 = 40"):
        cut(10)


def test_texts_and_their_pieces_come_in_an_order_drawn_by_the_seed() -> None:
    def cut(texts: list[str], seed: int) -> list[int]:
        return CalibrationTexts.from_texts(texts, words(), num_texts=5, length=2, seed=seed).input_ids[:, 0].tolist()

    short, long = [text(start, 2) for start in range(10, 20, 2)], [text(10, 10)]
    for texts in (short, long):
        orders = [cut(texts, seed) for seed in range(4)]
        assert len({tuple(order) for order in orders}) == 4
        assert all(sorted(order) == list(range(10, 20, 2)) for order in orders)


def test_the_end_of_a_text_can_be_marked() -> None:
    texts = CalibrationTexts.from_texts([text(10, 3)] * 2, words(), num_texts=1, length=8, eos_token_id=99)
    assert texts.input_ids.tolist() == [[10, 11, 12, 99, 10, 11, 12, 99]]


def test_texts_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    rows = [{"prompt": "What is it? ", "target": "It is a list of five words."}, {"prompt": "Why? ", "target": "So."}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = Tokenizer.from_str(tokenizer_json().decode())
    both = [tokenizer.encode(row["prompt"] + row["target"]).ids for row in rows]
    read = CalibrationTexts.read(path, tokenizer_json(), num_texts=1, length=sum(map(len, both)))
    assert read.input_ids[0].tolist() in (both[0] + both[1], both[1] + both[0])
    with pytest.raises(DataError, match="missing"):
        CalibrationTexts.read(tmp_path / "missing.jsonl", tokenizer_json())


def run(model: PreTrainedModel, ids: Ids, compress: Callable[..., Tensor] = lambda w, _: w, **options: Any) -> None:
    compress_linears(model, ids, compress, **options)


def test_bad_input_is_one_clear_sentence(input_ids: Ids) -> None:
    with pytest.raises(InputError, match="num_texts is 0, expected at least 1"):
        CalibrationTexts.from_texts(["w1"], words(), num_texts=0)
    with pytest.raises(InputError, match="neither gram nor squared_norms"):
        LayerStatistics(None, 3)
    model = tiny_model()
    cases: list[tuple[str, dict[str, Any]]] = [
        (r"input_ids are int64 \(45,\)", {"ids": input_ids.ravel()}),
        (r"input_ids are int32", {"ids": input_ids.astype(np.int32)}),
        (r"from 0 to 50, expected 0 to 49", {"ids": np.array([[0, 50]])}),
        (r"17 tokens, expected at most 16", {"ids": np.zeros((1, 17), np.int64)}),
        (r"batch_size is 0", {"ids": input_ids, "batch_size": 0}),
        (r"skip names 'mlp.gate'", {"ids": input_ids, "skip": ["mlp.gate"]}),
        (r"shape \(32, 31\), expected finite numbers of shape", {"ids": input_ids, "compress": lambda w, _: w[:, 1:]}),
        (r"q_proj came with numbers that are not finite", {"ids": input_ids, "compress": lambda w, _: w / 0}),
    ]
    for match, options in cases:
        with pytest.raises(InputError, match=match):
            run(model, **options)
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    with pytest.raises(InputError, match="no linear layer to compress"):
        run(model, input_ids, skip=[*parts, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"])
    with pytest.raises(InputError, match="training mode"):
        run(model.train(), input_ids)
    broken = tiny_model()
    with torch.no_grad():
        broken.model.embed_tokens.weight.fill_(float("inf"))
    with pytest.raises(InputError, match="reads numbers that are not finite"):
        run(broken, input_ids)


class OtherLinear(nn.Linear):
    """As an adapter or a low-bit layer would be."""


def test_layers_that_are_not_plain_are_refused(input_ids: Ids) -> None:
    model = tiny_model()
    model.model.layers[1].mlp.up_proj = OtherLinear(32, 48, bias=False)
    with pytest.raises(InputError, match=r"such as model.layers.1.mlp.up_proj, .*merge the adapter first"):
        run(model, input_ids)
