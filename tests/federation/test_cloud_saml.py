"""The server's SAML: both models learn from texts, from each other, and from what devices told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from co_tuning import domain_texts, model_folder
from numpy.typing import NDArray

from cotune.distillation.chunk_gate import ChunkGate
from cotune.distillation.paired_texts import pair_texts
from cotune.errors import InputError, MismatchError
from cotune.federation.backbone_model import to_arrays
from cotune.federation.causal_model import CausalModel
from cotune.federation.cloud_saml import CloudSaml
from cotune.federation.co_tuning_device import fold_all, term_of
from cotune.federation.coplms import CloudSettings, CloudTuned
from cotune.federation.local_model import LocalSteps
from cotune.federation.mutual_descent import SideBatch
from cotune.federation.open_questions import Answering
from cotune.federation.public_chunks import NO_BOUNDARY_VALUE
from cotune.models.adapters import LoraAdapter, LoraShape
from cotune.models.low_rank_terms import low_rank_terms

SETTINGS = CloudSettings(
    model="big", public="p", rank=2, steps=LocalSteps(num_steps=5, batch_size=3, learning_rate=2e-2), told_weight=0.0
)
Adapter = dict[str, NDArray[np.float32]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[CausalModel, CausalModel]:
    root = tmp_path_factory.mktemp("models")
    # The same architecture here, as only the tokenizer has to be the same.
    cloud = CausalModel(str(model_folder(root / "cloud", "gpt2", "byte_level", seed=5)))
    return cloud, CausalModel(str(model_folder(root / "proxy", "llama", "byte_level", seed=1)))


@pytest.fixture(scope="module")
def proxy_adapter(models: tuple[CausalModel, CausalModel]) -> Adapter:
    with models[1].loaded() as model:
        return to_arrays(LoraAdapter.fresh(model, LoraShape(rank=2)).params)


def half(models: tuple[CausalModel, CausalModel], settings: CloudSettings = SETTINGS, **options: object) -> CloudSaml:
    return CloudSaml(
        settings,
        cloud=models[0],
        proxy=models[1],
        examples=domain_texts("public"),
        proxy_scale=2.0,
        max_tokens=64,
        **options,  # type: ignore[arg-type]
    )


def distances(own: CloudSaml, models: tuple[CausalModel, CausalModel], proxy: Adapter, cloud: Adapter) -> list[float]:
    """CE of the cloud's model, CE of the proxy, and KL between their answers' tokens."""
    found = []
    for model, adapter, scale in ((models[0], cloud, own._shape.scale), (models[1], proxy, 2.0)):
        term = term_of({name: torch.from_numpy(array) for name, array in adapter.items()})
        with model.loaded() as loaded, torch.no_grad(), low_rank_terms(loaded, [term], scale=scale):
            batch = SideBatch.of(own._texts, 0, loaded.device)
            found.append(batch.logits(loaded))
    log_probs = [one[batch.target_places].log_softmax(-1) for one in found]
    kl = (log_probs[0].exp() * (log_probs[0] - log_probs[1])).sum(-1).mean()
    return [*(float(batch.answer_loss(one)) for one in found), float(kl)]


def test_both_learn_the_texts_and_with_each_other_come_nearer(
    models: tuple[CausalModel, CausalModel], proxy_adapter: Adapter
) -> None:
    alone, mutual = (half(models, replace(SETTINGS, mix=mix, proxy_mix=mix)) for mix in (0.0, 1.0))
    cloud = alone.start()
    before = distances(alone, models, proxy_adapter, cloud)
    tuned = alone.tune(proxy=proxy_adapter, cloud=cloud, folds={}, told=[], round_number=1)
    after = distances(alone, models, tuned.proxy, tuned.cloud)
    assert after[0] < before[0] - 0.1 and after[1] < before[1] - 0.1
    assert tuned.shown.keys() == {"cloud_loss", "proxy_loss"}
    again = alone.tune(proxy=proxy_adapter, cloud=cloud, folds={}, told=[], round_number=1)
    assert all(np.array_equal(again.cloud[name], tuned.cloud[name]) for name in tuned.cloud)
    other = alone.tune(proxy=proxy_adapter, cloud=cloud, folds={}, told=[], round_number=2)
    assert any(not np.array_equal(other.cloud[name], tuned.cloud[name]) for name in tuned.cloud)
    tuned = mutual.tune(proxy=proxy_adapter, cloud=cloud, folds={}, told=[], round_number=1)
    assert distances(mutual, models, tuned.proxy, tuned.cloud)[2] < 0.7 * before[2]


def test_a_share_of_the_learning_rate_is_a_share_of_the_step(
    models: tuple[CausalModel, CausalModel], proxy_adapter: Adapter
) -> None:
    plain = LocalSteps(num_steps=1, batch_size=3, learning_rate=0.5, optimizer="sgd")
    own = half(models, replace(SETTINGS, steps=plain))
    cloud = own.start()
    moved = []
    for share in (1.0, 0.25):
        tuned = own.tune(proxy=proxy_adapter, cloud=cloud, folds={}, told=[], round_number=1, rate_share=share)
        moved.append({name: tuned.proxy[name] - proxy_adapter[name] for name in proxy_adapter})
        moved[-1] |= {f"cloud {name}": tuned.cloud[name] - cloud[name] for name in cloud}
    assert any(np.abs(one).max() > 1e-3 for one in moved[0].values())
    for name, whole in moved[0].items():
        assert np.allclose(moved[1][name], 0.25 * whole, atol=1e-6)


def test_without_mixing_each_learns_alone_and_with_it_from_the_other(
    models: tuple[CausalModel, CausalModel], proxy_adapter: Adapter
) -> None:
    alone, mutual = (half(models, replace(SETTINGS, mix=mix, proxy_mix=mix)) for mix in (0.0, 1.0))
    cloud = alone.start()
    moved = {name: array + np.float32(0.05) for name, array in proxy_adapter.items()}
    one, other = (alone.tune(proxy=p, cloud=cloud, folds={}, told=[], round_number=1) for p in (proxy_adapter, moved))
    assert all(np.array_equal(one.cloud[name], other.cloud[name]) for name in cloud)
    one, other = (mutual.tune(proxy=p, cloud=cloud, folds={}, told=[], round_number=1) for p in (proxy_adapter, moved))
    assert not all(np.array_equal(one.cloud[name], other.cloud[name]) for name in cloud)


def test_gated_both_learn_from_the_other_where_it_is_better(
    models: tuple[CausalModel, CausalModel], proxy_adapter: Adapter
) -> None:
    """One step's losses by hand, token by token: T^2 KL times sigmoid of what the teacher is better by, per byte."""
    steps = LocalSteps(num_steps=1, batch_size=7)
    settings = replace(SETTINGS, steps=steps, mix=0.5, proxy_mix=1.0, gated=True, top_k=1000, temperature=2.0)
    own = half(models, settings, gate=ChunkGate(tau_g=0.05))
    cloud = own.start()
    shown = own.tune(proxy=proxy_adapter, cloud=cloud, folds={}, told=[], round_number=1).shown
    pieces = models[1].reader.table.pieces
    rows = []
    for model in models:  # a fresh adapter changes nothing
        with model.loaded() as loaded, torch.no_grad():
            batch = SideBatch.of(own._texts, 0, loaded.device)
            rows.append(batch.logits(loaded)[batch.target_places].double())
    for which, mix in ((0, 0.5), (1, 1.0)):
        mine, theirs = rows[which], rows[1 - which]
        total, gates = 0.0, []
        for q, p, token in zip(mine, theirs, batch.targets.tolist(), strict=True):
            better_by = (p.log_softmax(0)[token] - q.log_softmax(0)[token]) / max(1, len(pieces[token] or b""))
            gates.append(float(torch.sigmoid(better_by / 0.05)))
            hot, cold = (p / 2).log_softmax(0), (q / 2).log_softmax(0)
            total += gates[-1] * 4 * float((hot.exp() * (hot - cold)).sum())
        ce = float(torch.nn.functional.cross_entropy(mine, batch.targets))
        wanted = (1 - mix) * ce + mix * total / len(gates)
        assert shown[("cloud_loss", "proxy_loss")[which]] == pytest.approx(wanted, rel=1e-4)
        assert 0.05 < np.mean(gates) < 0.95


def test_what_devices_told_counts_where_they_are_better(
    models: tuple[CausalModel, CausalModel], proxy_adapter: Adapter
) -> None:
    """Nothing else says what the answers are here. Who is sure of them is believed; who is not, not with a gate."""
    found = []
    for gate, told in ((None, 0), (None, 1), (ChunkGate(), 2), (ChunkGate(tau_g=0.01), 3)):
        own = half(models, replace(SETTINGS, told_weight=5.0, mix=1.0, proxy_mix=1.0), gate=gate)
        cloud, num = own.start(), sum(one.num_slots for one in own.public)
        values = (
            [[np.full(num, value, np.float32)] for value in (NO_BOUNDARY_VALUE, -0.01, -40.0)][told - 1] if told else []
        )
        tuned = own.tune(proxy=proxy_adapter, cloud=cloud, folds={}, told=values, round_number=1)
        found.append(distances(own, models, tuned.proxy, tuned.cloud))
    nothing, marks, believed, gated = found
    assert marks == nothing
    assert believed[0] < nothing[0] - 0.1 and believed[1] < nothing[1] - 0.1
    assert gated == pytest.approx(nothing, abs=0.02)


@pytest.mark.parametrize("gated", [False, True])
def test_the_clouds_model_learns_what_the_proxy_answers_and_the_proxy_does_not(
    models: tuple[CausalModel, CausalModel], proxy_adapter: Adapter, gated: bool
) -> None:
    """One step's loss by hand; the proxy's steps are those without questions, of as many public texts. What the proxy
    answered has no gate."""
    questions = ["the far cat sat?", "the others cat?", "the away cat?"]
    steps = LocalSteps(num_steps=1, batch_size=6, learning_rate=1e-2)
    settings = replace(SETTINGS, steps=steps, mix=0.25, top_k=1000, temperature=1.0, gated=gated)
    answering = Answering(max_new_tokens=4, sure_above=0.0, share=0.5)
    asking = half(models, settings, questions=questions, answering=answering)
    cloud = asking.start()
    tuned = asking.tune(proxy=proxy_adapter, cloud=cloud, folds={}, told=[], round_number=1)
    alone = half(models, replace(settings, steps=replace(steps, batch_size=3)))
    plain = alone.tune(proxy=proxy_adapter, cloud=cloud, folds={}, told=[], round_number=1)
    assert tuned.shown["answered"] == 3 and "answered" not in plain.shown
    assert all(np.array_equal(tuned.proxy[name], one) for name, one in plain.proxy.items())
    assert any(not np.array_equal(tuned.cloud[name], one) for name, one in plain.cloud.items())
    with models[1].loaded() as proxy:  # a fresh adapter changes nothing
        answered = answering.answered(proxy, models[1].reader, questions, max_tokens=64)
        texts = pair_texts(answered, models[1].reader, models[1].reader, max_tokens=64)
        batch = SideBatch.of(texts, 0, proxy.device)
        with torch.no_grad():
            theirs = batch.logits(proxy)[batch.target_places].log_softmax(-1)
    with models[0].loaded() as large, torch.no_grad():
        mine = batch.logits(large)[batch.target_places].log_softmax(-1)
    ce = float(-mine.gather(1, batch.targets[:, None]).mean())
    kl = float((theirs.exp() * (theirs - mine)).sum(-1).mean())
    wanted = 0.5 * plain.shown["cloud_loss"] + 0.5 * (0.75 * ce + 0.25 * kl)
    assert tuned.shown["cloud_loss"] == pytest.approx(wanted, rel=1e-4)
    # Unsure of all, it is as if there were no questions.
    unsure = half(models, settings, questions=questions, answering=replace(answering, sure_above=1.0))
    found = unsure.tune(proxy=proxy_adapter, cloud=cloud, folds={}, told=[], round_number=1)
    none = half(models, settings).tune(proxy=proxy_adapter, cloud=cloud, folds={}, told=[], round_number=1)
    assert found.shown["answered"] == 0
    assert all(np.array_equal(found.cloud[name], one) for name, one in none.cloud.items())


def test_a_proxy_that_rehearses_learns_its_own_answers_beside_public_texts(
    models: tuple[CausalModel, CausalModel], proxy_adapter: Adapter
) -> None:
    """One step's loss by hand, and after some steps the answers as they were are likelier than without."""
    questions = ["the far cat sat?", "the others cat?", "the away cat?"]
    answering = Answering(max_new_tokens=4, sure_above=0.0, share=0.5)
    steps = LocalSteps(num_steps=1, batch_size=6, learning_rate=1e-2)

    def tuned(num_steps: int, *, rehearses: bool) -> CloudTuned:
        settings = replace(SETTINGS, steps=replace(steps, num_steps=num_steps), rehearses=rehearses)
        own = half(models, settings, questions=questions, answering=answering)
        return own.tune(proxy=proxy_adapter, cloud=own.start(), folds={}, told=[], round_number=1)

    plain, rehearsed = (tuned(1, rehearses=one) for one in (False, True))
    long = [tuned(8, rehearses=one).proxy for one in (False, True)]
    reader = models[1].reader
    with models[1].loaded() as proxy:  # a fresh adapter changes nothing
        texts = pair_texts(answering.answered(proxy, reader, questions, max_tokens=64), reader, reader, max_tokens=64)
        batch = SideBatch.of(texts, 0, proxy.device)

        def loss(adapter: Mapping[str, NDArray[np.float32]]) -> float:
            term = term_of({name: torch.from_numpy(array) for name, array in adapter.items()})
            with torch.no_grad(), low_rank_terms(proxy, [term], scale=2.0):
                return float(batch.answer_loss(batch.logits(proxy)))

        before, (forgot, kept) = loss(proxy_adapter), map(loss, long)
    assert rehearsed.shown["proxy_loss"] == pytest.approx(0.5 * plain.shown["proxy_loss"] + 0.5 * before, rel=1e-4)
    assert rehearsed.shown["cloud_loss"] == pytest.approx(plain.shown["cloud_loss"], rel=1e-6)
    assert kept < before < forgot


def test_the_order_in_which_arrays_come_does_not_matter(
    models: tuple[CausalModel, CausalModel], proxy_adapter: Adapter
) -> None:
    own = half(models, replace(SETTINGS, steps=replace(SETTINGS.steps, num_steps=2)))
    cloud, told = own.start(), []
    for turn in (lambda one: one, lambda one: dict(reversed(one.items()))):
        told.append(own.tune(proxy=turn(proxy_adapter), cloud=turn(cloud), folds={}, told=[], round_number=1))
    for one, other in ((told[0].proxy, told[1].proxy), (told[0].cloud, told[1].cloud)):
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_what_was_folded_is_a_part_of_the_proxy(
    models: tuple[CausalModel, CausalModel], proxy_adapter: Adapter
) -> None:
    own = half(models, replace(SETTINGS, steps=LocalSteps(num_steps=1, batch_size=7, learning_rate=1e-2)))
    cloud = own.start()
    draw = np.random.default_rng(0)
    folded = {n: (0.1 * draw.standard_normal(a.shape)).astype(np.float32) for n, a in proxy_adapter.items()}
    folds = {1: folded}
    losses = [
        own.tune(proxy=proxy_adapter, cloud=cloud, folds=one, told=[], round_number=1).shown["cloud_loss"]
        for one in ({}, folds)
    ]
    assert abs(losses[0] - losses[1]) > 1e-4
    with models[1].loaded() as proxy:
        fold_all(proxy, folds, scale=2.0)


def test_another_tokenizer_is_refused(models: tuple[CausalModel, CausalModel], tmp_path: Path) -> None:
    other = CausalModel(str(model_folder(tmp_path / "other", "llama", "unigram")))
    with pytest.raises(MismatchError, match="expected the same; make the proxy from the cloud's model"):
        half((other, models[1]))
    with pytest.raises(InputError, match="told_weight is -1"):
        replace(SETTINGS, told_weight=-1.0)
