"""The shared frozen projections."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file
from transformers import PreTrainedModel

from cotune.errors import InputError
from cotune.models import Backbone, Projections
from cotune.models.projections import spread_taps
from cotune.wire.codec import CODECS, dequantise


def gram(columns: NDArray[np.float32]) -> NDArray[np.float32]:
    product: NDArray[np.float32] = columns.T @ columns
    return product


def small(seed: int = 0) -> Projections:
    return Projections.random(tap_layers=(0, 2), hidden_size=20, tap_dim=6, basis_dim=5, seed=seed)


def test_random_projections_are_orthonormal() -> None:
    projections = Projections.random(tap_layers=range(3), hidden_size=100)
    assert (projections.num_taps, projections.tap_dim, projections.basis_dim) == (3, 32, 96)
    np.testing.assert_allclose(gram(projections.basis), np.eye(96), atol=2e-3)
    for matrix in projections.taps:
        np.testing.assert_allclose(gram(matrix.T), np.eye(32), atol=2e-3)


def test_random_projections_are_the_same_on_every_machine() -> None:
    # Pinned: a cloud that moves must find its users' plugins still fitting.
    assert small().digest == "95a2a7286ca3040c96d7f34e1f484bf536b0b69c426d8c881c9e445ca3bf04d4"
    assert small(seed=1).digest != small().digest
    np.testing.assert_array_equal(small().basis, small().basis.astype(np.float16))


def test_dims_are_at_most_the_hidden_size() -> None:
    narrow = Projections.random(tap_layers=(0,), hidden_size=10)
    assert (narrow.tap_dim, narrow.basis_dim) == (10, 10)
    with pytest.raises(InputError, match="tap_dim is 11, expected 1 to the hidden size, 10"):
        Projections.random(tap_layers=(0,), hidden_size=10, tap_dim=11)
    with pytest.raises(InputError, match="basis_dim is 0"):
        Projections.random(tap_layers=(0,), hidden_size=10, basis_dim=0)


class Plane:
    """States that lie in two known directions of R^6, the first with more energy, and final states in a third."""

    tap_layers = (0, 1)

    def __init__(self) -> None:
        axes = np.linalg.qr(np.random.default_rng(3).standard_normal((6, 6)))[0]
        self.first, self.second, self.third = axes[:, 0], axes[:, 1], axes[:, 2]

    def read_states(self, input_ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        generator = np.random.default_rng(int(input_ids[0]))
        weights = generator.standard_normal((len(input_ids), 2, 2)) * [3.0, 1.0]
        states = weights @ np.stack([self.first, self.second])
        final = generator.standard_normal((len(input_ids), 1)) * self.third
        return states.astype(np.float32), final.astype(np.float32)


def test_fit_finds_the_principal_directions() -> None:
    plane = Plane()
    sequences = [np.full(200, seed) for seed in range(3)]
    fitted = Projections.fit(plane, sequences, tap_dim=2, basis_dim=1)
    assert (fitted.kind, fitted.tap_layers) == ("pca", (0, 1))
    for matrix in fitted.taps:
        directions = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
        assert abs(directions[0] @ plane.first) > 0.99
        assert abs(directions[1] @ plane.second) > 0.99
        assert directions[0][np.abs(directions[0]).argmax()] > 0
    assert abs(fitted.basis[:, 0] @ plane.third) > 0.9999
    np.testing.assert_allclose(gram(fitted.basis), np.eye(1), atol=1e-6)
    # Entries of a tap have mean square 1.
    states = np.concatenate([plane.read_states(ids)[0] for ids in sequences])[:, 0]
    normalised = states / np.sqrt((states**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(np.mean((normalised @ fitted.taps[0].T) ** 2), 1.0, rtol=1e-4)


def test_fit_keeps_more_of_a_backbone_than_random(llama: Backbone) -> None:
    generator = np.random.default_rng(0)
    sequences = [generator.integers(3, 61, 40) for _ in range(30)]
    fitted = Projections.fit(llama, sequences, tap_dim=8, basis_dim=8)
    random = Projections.random(tap_layers=range(4), hidden_size=24, tap_dim=8, basis_dim=8)
    held_out, final = llama.read_states(generator.integers(3, 61, 40))
    assert fitted.tap_layers == (0, 1, 2, 3)

    def kept(basis: NDArray[np.float32], values: NDArray[np.float32]) -> float:
        columns = np.linalg.qr(basis)[0]
        return float(((values @ columns) ** 2).sum() / (values**2).sum())

    assert kept(fitted.basis, final) > kept(random.basis, final) + 0.1
    for i in range(4):
        assert kept(fitted.taps[i].T, held_out[:, i]) > kept(random.taps[i].T, held_out[:, i]) + 0.1


def test_fit_without_text_is_an_input_error(llama: Backbone) -> None:
    with pytest.raises(InputError, match="no sequences"):
        Projections.fit(llama, [])


@pytest.mark.parametrize(
    "projections",
    [
        small(),
        Projections.identity(tap_layers=(0, 3), hidden_size=7),
        Projections.fit(Plane(), [np.full(50, 1)]),
        Projections.whole_states(tap_layers=(0, 2), basis=small().basis),
    ],
    ids=["random", "identity", "pca", "whole"],
)
def test_saved_projections_load_as_they_were(projections: Projections, tmp_path: Path) -> None:
    projections.save(tmp_path / "p.safetensors")
    loaded = Projections.load(tmp_path / "p.safetensors")
    assert loaded.digest == projections.digest
    assert (loaded.kind, loaded.seed, loaded.normalise) == (projections.kind, projections.seed, projections.normalise)
    assert loaded.tap_layers == projections.tap_layers
    np.testing.assert_array_equal(loaded.taps, projections.taps)
    np.testing.assert_array_equal(loaded.basis, projections.basis)


def test_identity_projections_take_no_room(tmp_path: Path) -> None:
    Projections.identity(tap_layers=range(33), hidden_size=512).save(tmp_path / "p.safetensors")
    assert (tmp_path / "p.safetensors").stat().st_size < 2000


def test_whole_states_are_normalised_and_differ_from_shared_taps_in_c_alone(
    make_model: Callable[..., PreTrainedModel], tokenizer_json: bytes
) -> None:
    shared = Projections.random(tap_layers=range(4), hidden_size=24, tap_dim=24)
    whole = Projections.whole_states(tap_layers=range(4), basis=shared.basis)
    ids = np.arange(3, 15)
    taps = {}
    for projections in (shared, whole):
        backbone = Backbone.from_model(make_model("llama"), tokenizer_json, projections=projections)
        features = backbone.features(ids, 1, 4)
        taps[projections.kind] = dequantise(features.tap_codes, features.tap_scales)
        cursor = backbone.cursor()
        np.testing.assert_allclose(cursor.extend(ids[:-1]).taps, taps[projections.kind][-1], atol=0.05)
        basis = backbone.output_basis
    states = backbone.read_states(ids)[0][:-1].astype(np.float64)
    normalised = states / np.sqrt((states**2).mean(axis=2, keepdims=True) + 1e-6)
    # To half an int8 step of the largest entry.
    assert (np.abs(taps["whole"] - normalised) <= 0.51 / 127 * np.abs(normalised).max(axis=2, keepdims=True)).all()
    turned = np.einsum("ptd,tkd->ptk", taps["whole"], shared.taps)
    np.testing.assert_allclose(turned, taps["random"], atol=0.1)
    assert basis.digest == shared.output_basis(backbone.model.lm_head.weight.numpy()).digest
    assert whole.digest != shared.digest
    assert whole.digest != Projections.identity(tap_layers=range(4), hidden_size=24).digest
    assert whole.digest != Projections.whole_states(tap_layers=range(4), basis=-shared.basis).digest


@pytest.mark.parametrize("kind", ["random", "identity", "whole"])
def test_kept_taps_are_those_of_the_whole_and_cost_fewer_bytes(
    make_model: Callable[..., PreTrainedModel], tokenizer_json: bytes, kind: str
) -> None:
    random = Projections.random(tap_layers=range(4), hidden_size=24, tap_dim=8, basis_dim=8)
    everything = {
        "random": random,
        "identity": Projections.identity(tap_layers=range(4), hidden_size=24),
        "whole": Projections.whole_states(tap_layers=range(4), basis=random.basis),
    }[kind]
    fewer = everything.keep_taps((1, 3))
    assert (fewer.tap_layers, fewer.num_taps, fewer.kind) == ((1, 3), 2, kind)
    assert fewer.digest != everything.digest
    ids = np.arange(3, 15)
    model = make_model("llama")
    all_features, few_features = (
        Backbone.from_model(model, tokenizer_json, projections=p).features(ids, 1, 4) for p in (everything, fewer)
    )
    np.testing.assert_array_equal(few_features.tap_scales, all_features.tap_scales[:, [1, 3]])
    np.testing.assert_array_equal(few_features.tap_codes, all_features.tap_codes[:, [1, 3]])
    sizes = [CODECS["int8"].num_bytes(p.num_taps, p.tap_dim) for p in (everything, fewer)]
    assert sizes[0] == 2 * sizes[1] and few_features.tap_codes.nbytes * 2 == all_features.tap_codes.nbytes


def test_taps_are_spread_evenly_with_the_last() -> None:
    assert spread_taps(33, 33) == tuple(range(33))
    assert spread_taps(33, 8) == (3, 7, 11, 15, 19, 23, 27, 32)
    assert spread_taps(33, 1) == (32,)
    with pytest.raises(InputError, match="count is 8, expected 1 to 7"):
        spread_taps(7, 8)


@pytest.mark.parametrize("indices", [(), (1, 0), (-1, 0), (0, 2), (0, 0)])
def test_taps_that_are_not_there_are_refused(indices: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="tap indices are"):
        small().keep_taps(indices)


def test_the_digest_covers_what_changes_a_tap() -> None:
    base = small()
    other_layers = Projections(tap_layers=(0, 1), taps=base.taps, basis=base.basis, kind="random")
    raw = Projections(tap_layers=(0, 2), taps=base.taps, basis=base.basis, kind="random", normalise=False)
    nudged = Projections(tap_layers=(0, 2), taps=base.taps, basis=base.basis * np.float32(1.01), kind="random")
    assert len({p.digest for p in (base, other_layers, raw, nudged)}) == 4


def test_output_basis_is_the_head_times_the_basis() -> None:
    head = np.random.default_rng(0).standard_normal((5000, 20)).astype(np.float32)
    exact = head.astype(np.float64) @ small().basis
    basis = small().output_basis(head)
    assert basis.codes.shape == (5000, 5)
    assert (np.abs(basis.matrix() - exact) <= 0.5001 * np.abs(exact).max(1, keepdims=True) / 127 + 1e-6).all()
    with pytest.raises(InputError, match=r"expected \(vocab, 20\)"):
        small().output_basis(head[:, :19])


def test_output_basis_of_identity_is_the_head_itself() -> None:
    head = np.random.default_rng(0).standard_normal((30, 7)).astype(np.float32)
    basis = Projections.identity(tap_layers=(0,), hidden_size=7).output_basis(head)
    np.testing.assert_allclose(basis.matrix(), head, atol=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "best"}, "kind is 'best'"),
        ({"tap_layers": ()}, "tap_layers"),
        ({"tap_layers": (2, 0)}, "tap_layers"),
        ({"tap_layers": (0, 1, 2)}, "tap projections"),
        ({"taps": np.zeros((2, 6, 20))}, "tap projections are float64"),
        ({"basis": np.zeros((19, 5), np.float32)}, "output basis"),
    ],
)
def test_impossible_projections_are_refused(changes: dict[str, object], message: str) -> None:
    fields = {"tap_layers": (0, 2), "taps": small().taps, "basis": small().basis, "kind": "random"}
    with pytest.raises(InputError, match=message):
        Projections(**{**fields, **changes})  # type: ignore[arg-type]


def test_files_that_hold_no_projections_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    with pytest.raises(InputError, match="is no file"):
        Projections.load(path)
    path.write_bytes(b"junk")
    with pytest.raises(InputError, match="holds no projections"):
        Projections.load(path)
    save_file({"taps": np.zeros((1, 2, 3), np.float32)}, path)
    with pytest.raises(InputError, match="format_version is None"):
        Projections.load(path)
    save_file({"taps": np.zeros((1, 2, 3), np.float32)}, path, metadata={"format_version": "1"})
    with pytest.raises(InputError, match="holds no projections"):
        Projections.load(path)
