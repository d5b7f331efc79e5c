"""What every method has in common: who learns, what is sent, what is counted, and that it repeats itself to the bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from co_tuning_scene import has_learnt, run, scene_on

from cotune.federation.arrays import digest
from cotune.federation.comparison.beside import Beside
from cotune.federation.comparison.centralised import Centralised
from cotune.federation.comparison.co_tuned import CoTuned
from cotune.federation.comparison.coplms_reconstruction import CoPlmsReconstruction
from cotune.federation.comparison.fedcollm import FedCoLlm
from cotune.federation.comparison.federated_lora import FederatedLora
from cotune.federation.comparison.fedmkt import FedMkt
from cotune.federation.comparison.party import Party
from cotune.federation.comparison.scene import CLOUD, PROXY, Contestant
from cotune.federation.comparison.seqkd import SeqKd
from cotune.federation.comparison.standalone import Standalone
from cotune.federation.comparison.zero_shot import ZeroShot
from cotune.federation.coplms import CoPlms
from cotune.federation.flexlora import FlexLora
from cotune.federation.open_questions import Answering

# The method; whether devices, and the cloud, learn; whether anything goes up, and down; whether the proxy is needed.
CASES: dict[str, tuple[Contestant, bool, bool, bool, bool, bool]] = {
    "zero-shot": (ZeroShot(), False, False, False, False, False),
    "standalone": (Standalone(), True, True, False, False, False),
    "centralised": (Centralised(), True, True, False, False, False),
    "fedavg-lora": (FederatedLora(), True, False, True, True, True),
    "fedavg-lora, coded": (FederatedLora(bits=5), True, False, True, True, True),
    "flexlora": (FederatedLora(algorithm=FlexLora(ranks={"gpt2": 1})), True, False, True, True, True),
    "seqkd": (SeqKd(max_new_tokens=3), True, False, False, True, False),
    "fedmkt": (FedMkt(top_k=4), True, True, True, True, False),
    "fedcollm": (FedCoLlm(), True, True, True, True, True),
    "fedcollm, asking": (FedCoLlm(answering=Answering(sure_above=0.0, max_new_tokens=2)), True, True, True, True, True),
    "fedavg-lora beside standalone": (Beside(), True, True, True, True, True),
    "co-plms": (CoPlmsReconstruction(private_rank=1), True, True, True, True, True),
    "ours": (CoTuned(options=CoPlms(private_rank=1)), True, True, True, True, True),
}


@pytest.mark.parametrize("name", CASES)
def test_a_method_teaches_whom_it_says_and_accounts_for_what_it_sends(name: str, models: Path, tmp_path: Path) -> None:
    method, devices, cloud, up, down, has_proxy = CASES[name]
    scene = scene_on(models, tmp_path / "first")
    ran = run(method, scene)
    before, after = ran.parties
    travels = {PROXY} if name in ("co-plms", "ours", "fedavg-lora beside standalone") else set()
    assert before.keys() == after.keys() == {*scene.sites, CLOUD} | travels
    assert all(has_learnt(before[one], after[one]) for one in travels)
    assert [has_learnt(before[one], after[one]) for one in scene.sites] == [devices] * 2
    assert has_learnt(before[CLOUD], after[CLOUD]) == cloud
    for counted, is_sent in ((ran.account.up, up), (ran.account.down, down), (ran.account.downloads, has_proxy)):
        assert set(counted) == (set(scene.sites) if is_sent else set()) and all(counted.values())
    assert (ran.account.held_bytes > 0) == devices
    assert {one for one, flops in ran.account.flops.items() if flops > 0} == {
        *(scene.sites if devices else ()),
        *((CLOUD,) if cloud or name == "seqkd" else ()),
    }
    # Every model still loads, and the same seed gives the same bits.
    again = run(method, replace(scene, folder=tmp_path / "second")).parties[-1]
    for one, party in after.items():
        assert digest(party.adapter) == digest(again[one].adapter)
        assert all(np.array_equal(party.weights[key], again[one].weights[key]) for key in party.weights)
        with party.loaded() as model:
            assert model.get_output_embeddings().weight.shape[0] == len(party.model.reader.table)


@pytest.mark.parametrize("name", [name for name, (_, devices, *_) in CASES.items() if devices])
def test_learning_rates_fall_in_every_method(name: str, models: Path, tmp_path: Path) -> None:
    method, _, cloud, *_ = CASES[name]
    constant = scene_on(models, tmp_path / "constant", num_rounds=2)
    falling = replace(constant, folder=tmp_path / "falling", least_rate=0.1)
    rounds = [run(method, scene).parties[1:] for scene in (constant, falling)]
    for one in (*constant.sites, *([CLOUD] if cloud else [])):
        first, last = ((rounds[0][number][one], rounds[1][number][one]) for number in (0, 1))
        assert not differ(*first) and differ(*last)


def differ(mine: Party, theirs: Party) -> bool:
    """Whether two parties do, to the bit."""
    return digest(mine.adapter) != digest(theirs.adapter) or any(
        not mine.weights[name].equal(one) for name, one in theirs.weights.items()
    )
