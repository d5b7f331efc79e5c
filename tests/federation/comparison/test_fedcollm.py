"""What FedCoLLM's released code does not do: the divergence has a gradient, and devices get the distilled adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from co_tuning_scene import STEPS, run, scene_on
from torch.nn import functional as F

from cotune.errors import InputError
from cotune.federation.arrays import digest
from cotune.federation.comparison.fedcollm import FedCoLlm
from cotune.federation.comparison.scene import CLOUD
from cotune.federation.open_questions import Answering


def test_the_losses_of_the_server_by_hand_and_their_gradients(models: Path, tmp_path: Path) -> None:
    """One step on all public texts: (1 - a) CE + a T^2 KL of the other one, each way, over whole vocabularies."""
    one_step = replace(STEPS, num_steps=1, batch_size=4)
    scene = replace(scene_on(models, tmp_path), cloud_steps=one_step)
    proxy, cloud = scene.fresh(scene.proxy), scene.start()[CLOUD]
    vocab = len(scene.proxy.reader.table)
    saml = scene.saml(mix=0.3, proxy_mix=0.3, temperature=2.0, top_k=vocab, told_weight=0.0)
    tuned = saml.tune(proxy=proxy.adapter, cloud=cloud.adapter, folds={}, told=[], round_number=1)
    rows, targets = {}, []
    for name, party in (("proxy", proxy), (CLOUD, cloud)):
        with party.loaded() as model:
            found = []
            for text in party.read(scene.public, max_tokens=64):
                ids, places = torch.from_numpy(text.sides[0].input_ids), text.sides[0].is_target.nonzero()[0]
                found.append(model(input_ids=ids[None]).logits[0, places - 1].double())
                targets += ids[places].tolist() if name == CLOUD else []
            rows[name] = torch.cat(found)
    for name, other in (("proxy", CLOUD), (CLOUD, "proxy")):
        p, log_q = (rows[other] / 2).softmax(1), (rows[name] / 2).log_softmax(1)
        divergence = (p * (p.log() - log_q)).sum(1).mean()
        wanted = 0.7 * F.cross_entropy(rows[name], torch.tensor(targets)) + 0.3 * 4 * divergence
        assert tuned.shown[f"{name}_loss"] == pytest.approx(float(wanted), rel=1e-4) and float(divergence) > 1e-3
    # At a = 1 there is nothing but the divergence, and both still move.
    alone = scene.saml(mix=1.0, proxy_mix=1.0, temperature=1.0, top_k=vocab, told_weight=0.0)
    moved = alone.tune(proxy=proxy.adapter, cloud=cloud.adapter, folds={}, told=[], round_number=1)
    assert digest(moved.proxy) != digest(proxy.adapter) and digest(moved.cloud) != digest(cloud.adapter)


def test_devices_answer_with_the_distilled_adapter_and_begin_the_next_round_from_it(
    models: Path, tmp_path: Path
) -> None:
    scene = scene_on(models, tmp_path, ("llama",))
    ran = run(FedCoLlm(), scene)
    plain = run(FedCoLlm(mix=1e-9), scene)
    assert digest(ran.parties[1]["llama"].adapter) != digest(plain.parties[1]["llama"].adapter)
    with pytest.raises(InputError, match="without it, it is FedAvg-LoRA"):
        FedCoLlm(mix=0.0)


def test_the_clouds_model_learns_open_questions_where_it_may(models: Path, tmp_path: Path) -> None:
    scene = replace(scene_on(models, tmp_path, ("llama",)), questions=["the far cat?", "hello world?", "two hats?"])
    asking = FedCoLlm(answering=Answering(sure_above=0.0, max_new_tokens=1))
    plain, asked = (run(method, scene).parties[1] for method in (FedCoLlm(), asking))
    assert digest(plain[CLOUD].adapter) != digest(asked[CLOUD].adapter)
    # Who answers learns nothing by it.
    silent = run(asking, replace(scene, questions=[])).parties[1]
    assert digest(silent[CLOUD].adapter) == digest(plain[CLOUD].adapter)
