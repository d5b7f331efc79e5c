"""A folder with quantised weights loads like any other, and a damaged one is refused in one sentence."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from safetensors.torch import save
from transformers import PreTrainedModel

from cotune.errors import InputError
from cotune.models import Backbone
from cotune.models.low_bit import original_weights
from cotune.models.packed_folder import packed_files, read_contents, read_packed
from cotune.models.packed_weights import PackedWeight
from cotune.models.weights import digest_folder

MakeModel = Callable[..., PreTrainedModel]
UP = "model.layers.1.mlp.up_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


def random_weight(shape: tuple[int, ...], bits: int, group_size: int, symmetric: bool, seed: int) -> PackedWeight:
    rng = np.random.default_rng(seed)
    groups = (shape[0], -(-shape[1] // group_size))
    middle = np.full(groups, 2 ** (bits - 1), np.uint8)
    return PackedWeight(
        codes=rng.integers(0, 2**bits, shape, np.uint8),
        scales=(rng.random(groups) / 2**bits).astype(np.float16).astype(np.float32),
        zeros=middle if symmetric else rng.integers(0, 2**bits, groups, np.uint8),
        bits=bits,
        group_size=group_size,
    )


def random_weights(model: PreTrainedModel) -> dict[str, PackedWeight]:
    """Three of the model's weights in random codes, of all bits, group sizes and symmetries."""
    kinds = {UP: (3, 24, True), DOWN: (4, 32, False), EMBEDDING: (8, 24, False)}
    return {
        name: random_weight(model.get_parameter(name).shape, *kind, seed=i)
        for i, (name, kind) in enumerate(kinds.items())
    }


def quantised(model: PreTrainedModel, weights: dict[str, PackedWeight]) -> PreTrainedModel:
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_parameter(name).copy_(torch.from_numpy(weight.dequantised()))
    return model


@pytest.fixture(scope="module")
def written(
    make_model: MakeModel, tokenizer_json: bytes, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, PackedWeight]]:
    model = make_model("llama")
    weights = random_weights(model)
    folder = tmp_path_factory.mktemp("written") / "model"
    model.config.save_pretrained(folder)
    whole = {name: tensor for name, tensor in model.state_dict().items() if name not in weights}
    for name, data in packed_files(weights, method="rtn", whole=save(whole)).items():
        (folder / name).write_bytes(data)
    (folder / "tokenizer.json").write_bytes(tokenizer_json)
    return folder, weights


@pytest.fixture
def folder(written: tuple[Path, dict[str, PackedWeight]], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(written[0], tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_it_loads_to_the_same_features_bit_for_bit(
    written: tuple[Path, dict[str, PackedWeight]],
    make_model: MakeModel,
    tokenizer_json: bytes,
    token_ids: NDArray[np.int64],
    tmp_path: Path,
    dtype: str,
) -> None:
    """As a folder that holds the same numbers whole."""
    folder, weights = written
    quantised(make_model("llama"), weights).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json)
    expected = Backbone.from_pretrained(str(tmp_path), dtype=dtype).cursor().extend(token_ids)
    loaded = Backbone.from_pretrained(str(folder), dtype=dtype)
    assert loaded.model.dtype == getattr(torch, dtype)
    found = loaded.cursor().extend(token_ids)
    np.testing.assert_array_equal(found.logits, expected.logits)
    np.testing.assert_array_equal(found.hidden, expected.hidden)


def test_a_tied_embedding_is_the_head_too(make_model: MakeModel, tokenizer_json: bytes, tmp_path: Path) -> None:
    model = make_model("llama", tie_word_embeddings=True)
    weights = {EMBEDDING: random_weight(model.get_parameter(EMBEDDING).shape, 4, 24, False, 0)}
    model.config.save_pretrained(tmp_path)
    left_out = (EMBEDDING, "lm_head.weight")
    whole = {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}
    for name, data in packed_files(weights, method="rtn", whole=save(whole)).items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json)
    loaded = Backbone.from_pretrained(str(tmp_path)).model
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    np.testing.assert_array_equal(loaded.get_input_embeddings().weight.numpy(), weights[EMBEDDING].dequantised())


def test_the_weights_are_read_as_they_were(written: tuple[Path, dict[str, PackedWeight]]) -> None:
    folder, weights = written
    found = dict(read_packed(folder))
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        for field in ("codes", "scales", "zeros"):
            np.testing.assert_array_equal(getattr(found[name], field), getattr(weight, field))
        assert (found[name].bits, found[name].group_size) == (weight.bits, weight.group_size)
    assert f"{UP}.zeros" not in load_file(folder / "packed.safetensors")
    stored = sum(array.nbytes for array in load_file(folder / "packed.safetensors").values())
    assert stored == sum(weight.size_bytes for weight in weights.values())
    whole = dict(original_weights(str(folder), [DOWN, "model.norm.weight"]))
    np.testing.assert_array_equal(whole[DOWN].numpy(), weights[DOWN].dequantised())
    assert whole["model.norm.weight"].shape == (24,)


def test_end_tokens_come_from_the_generation_config(folder: Path) -> None:
    assert Backbone.from_pretrained(str(folder)).spec.eos_token_ids == (2,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert Backbone.from_pretrained(str(folder)).spec.eos_token_ids == (2, 7)


def test_loading_draws_no_random_numbers_and_is_silent(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = torch.random.get_rng_state()
    Backbone.from_pretrained(str(folder))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")


def test_the_digest_is_of_what_the_codes_stand_for(folder: Path) -> None:
    digest = digest_folder(folder)
    for dtype in ("float32", "bfloat16"):
        assert Backbone.from_pretrained(str(folder), dtype=dtype).spec.backbone_digest == digest
    contents = json.loads((folder / "packed.json").read_text())
    # How they were found does not matter.
    (folder / "packed.json").write_text(json.dumps({**contents, "method": "awq"}))
    assert digest_folder(folder) == digest
    # The same bytes, read in another way.
    contents["weights"][UP]["shape"][1] -= 1
    contents["weights"][UP]["group_size"] -= 1
    (folder / "packed.json").write_text(json.dumps(contents))
    others = {digest, digest_folder(folder)}
    for name in ("packed.safetensors", "model.safetensors"):
        data = bytearray((folder / name).read_bytes())
        data[-1] ^= 1
        (folder / name).write_bytes(data)
        others.add(digest_folder(folder))
    assert len(others) == 4


def change_json(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        contents = json.loads((folder / "packed.json").read_text())
        change(contents)
        (folder / "packed.json").write_text(json.dumps(contents))

    return damage


def change_tensors(change: Callable[[dict[str, Any]], object], *, file: str = "packed.safetensors") -> Any:
    """With a digest that fits."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file)
        digest = hashlib.sha256((folder / file).read_bytes()).hexdigest()
        change_json(lambda contents: contents["files"].update({file: digest}))(folder)

    return damage


def foreign(name: str) -> Callable[[Path], None]:
    """Besides its own weights it holds one that the model does not have."""

    def damage(folder: Path) -> None:
        def add(tensors: dict[str, Any]) -> None:
            for part in ("codes", "scales"):
                tensors[f"{name}.{part}"] = tensors[f"{UP}.{part}"]

        change_json(lambda contents: contents["weights"].update({name: contents["weights"][UP]}))(folder)
        change_tensors(add)(folder)

    return damage


def cut(file: str, num_bytes: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[:num_bytes])

    return damage


def flip(file: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = bytearray((folder / file).read_bytes())
        data[-1] ^= 1
        (folder / file).write_bytes(data)

    return damage


def lengthen(file: str, size: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        with (folder / file).open("r+b") as opened:
            opened.truncate(size)

    return damage


def overwrite(file: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(data) and None


def entry(**changed: Any) -> Callable[[Path], None]:
    return change_json(lambda contents: contents["weights"][UP].update(changed))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no json": (lambda folder: (folder / "packed.json").unlink(), "packed.json cannot be read"),
    "no codes": (lambda folder: (folder / "packed.safetensors").unlink(), "packed.safetensors.*(cannot|no safetens)"),
    "neither": (
        lambda folder: [(folder / name).unlink() for name in ("packed.json", "packed.safetensors")] and None,
        "do not fit its config.json: 3 tensors are missing",
    ),
    "broken json": (overwrite("packed.json", b"{"), "packed.json is no JSON"),
    "deep json": (overwrite("packed.json", b"[" * 200_000), "packed.json is no JSON"),
    "another json": (overwrite("packed.json", b"[]"), "packed.json is damaged or foreign, expected the keys files"),
    "long json": (lengthen("packed.json", 17 * 2**20), "has 17825792 bytes, expected at most"),
    "later format": (change_json(lambda c: c.update(format=2)), "has format 2, this cotune reads 1"),
    "unknown key": (change_json(lambda c: c.update(extra=1)), "expected the keys files, format, method, weights"),
    "lacking key": (change_json(lambda c: c.pop("method")), "expected the keys"),
    "method": (change_json(lambda c: c.update(method=3)), "at 'method', expected a word"),
    "files": (change_json(lambda c: c["files"].pop("model.safetensors")), "at 'files', expected a SHA-256"),
    "other file": (change_json(lambda c: c["files"].update({"../x": "0"})), "at 'files', expected a SHA-256"),
    "no weights": (change_json(lambda c: c.update(weights={})), "at 'weights', expected an object"),
    "weight's key": (entry(extra=1), f"at '{UP}', expected the keys bits, group_size, shape, symmetric"),
    "bits": (entry(bits=5), "bits are 5, expected one of 8, 4, 3"),
    "bits are words": (entry(bits="3"), "whole numbers as bits"),
    "group size": (entry(group_size=16), "group_size is 16, expected"),
    "symmetric": (entry(symmetric=1), "true or false as symmetric"),
    "endless": (entry(shape=[2**60, 24]), "expected a shape"),
    "true": (entry(shape=[True, 24]), "expected a shape"),
    "huge": (entry(shape=[2**28, 2**28], group_size=128), "does not fit packed.json: .*up_proj.weight.codes is U8"),
    "wider": (entry(bits=4), "does not fit packed.json"),
    "asymmetric": (entry(symmetric=False), "up_proj.weight.zeros is missing"),
    "forgotten": (change_json(lambda c: c["weights"].pop(UP)), r"up_proj.weight.codes is U8 .* expected missing"),
    "another type": (
        change_tensors(lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"].astype(np.float32)})),
        "up_proj.weight.scales is F32 .*expected F16",
    ),
    "shortened": (cut("packed.safetensors", -10), "it was cut or added to"),
    "header cut": (cut("packed.safetensors", 40), "packed.safetensors is no safetensors file"),
    "empty": (cut("packed.safetensors", 0), "packed.safetensors is no safetensors file"),
    "noise": (overwrite("packed.safetensors", b"\xff" * 99), "packed.safetensors is no safetensors file"),
    "a bit in the codes": (flip("packed.safetensors"), "packed.safetensors has SHA-256"),
    "a bit in the rest": (flip("model.safetensors"), "model.safetensors has SHA-256"),
    "infinite scale": (
        change_tensors(lambda t: t[f"{UP}.scales"].__setitem__((0, 0), np.inf)),
        f"packed weight {UP} is damaged: scales hold",
    ),
    "foreign weight": (foreign("model.layers.9.mlp.up_proj.weight"), "layers.9.* does not have"),
    "twice": (
        change_tensors(lambda t: t.update({UP: np.zeros((40, 24), np.float32)}), file="model.safetensors"),
        f"holds {UP} quantised and whole",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_or_foreign_folder_is_refused_in_one_sentence(folder: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        Backbone.from_pretrained(str(folder))
    assert "\n" not in str(caught.value)


def test_weights_of_another_shape_than_the_config_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 41}))
    with pytest.raises(InputError, match=r"cannot be loaded|do not fit its config"):
        Backbone.from_pretrained(str(folder))


def test_no_packed_weights_make_no_folder() -> None:
    with pytest.raises(InputError, match="there are no packed weights"):
        packed_files({}, method="rtn", whole=b"")


def test_contents_say_how_it_was_made(folder: Path) -> None:
    contents = read_contents(folder)
    assert contents.method == "rtn"
    assert contents.weights[UP].bits == 3 and contents.weights[UP].is_symmetric
    assert contents.weights[DOWN].shape == (24, 40) and contents.weights[DOWN].group_size == 32
