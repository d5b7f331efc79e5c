"""What settings name, and what no round could satisfy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cotune.errors import InputError
from cotune.federation.coordinator import RoundRules
from cotune.federation.robust.mean import Mean
from cotune.federation.robust.median import Median
from cotune.federation.robust.usual_rule import UsualRule, usual_rule
from cotune.federation.run_parts import algorithm_of, combine_of, rule_of, with_num_layers, with_whole_paths
from cotune.federation.run_secret import RunSecret
from cotune.federation.settings import CombineSettings, DataSettings, FederationSettings


@pytest.mark.parametrize(
    ("num_devices", "per_round", "combine", "told"),
    [
        (2, None, CombineSettings(), "Mean()"),
        (3, None, CombineSettings(), "LeaveOutLong(rule=ClipToMedianNorm(rule=Mean()), times=4.0)"),
        (10, 4, CombineSettings(), "LeaveOutLong(rule=ClipToMedianNorm(rule=Mean()), times=4.0)"),
        (10, 5, CombineSettings(), "LeaveOutLong(rule=ClipToMedianNorm(rule=TrimmedMean(share=0.2)), times=4.0)"),
        (3, None, CombineSettings(rule="median"), "Median()"),
    ],
)
def test_the_usual_rule_fits_the_number_of_devices(
    num_devices: int, per_round: int | None, combine: CombineSettings, told: str
) -> None:
    settings = FederationSettings(rounds=RoundRules(num_devices_per_round=per_round), combine=combine)
    assert repr(rule_of(settings, num_devices=num_devices)) == told


@pytest.mark.parametrize("algorithm", ["fedkseed", "fedkseed_pro"])
def test_what_devices_draw_from_a_pool_is_not_trimmed(algorithm: str) -> None:
    assert rule_of(FederationSettings(algorithm=algorithm), num_devices=10) == usual_rule(10, is_pooled=True)


def test_what_one_domain_alone_knows_is_not_trimmed() -> None:
    settings = FederationSettings(algorithm="coplms")
    assert rule_of(settings, num_devices=10) == UsualRule(is_pooled=True)
    # Ten devices, each with a layer of its own that it changed.
    updates = np.eye(10, dtype=np.float32)
    assert np.allclose(rule_of(settings, num_devices=10)(updates, np.ones(10)), 0.1)
    assert not UsualRule()(updates, np.ones(10)).any()


@pytest.mark.parametrize("algorithm", ["mixed", "fwdllm"])
def test_algorithms_that_combine_parts_of_the_replies_have_a_rule_for_parts_of_any_size(algorithm: str) -> None:
    """Ten devices are many, and four of one class among them few: with a rule for ten all rounds would be void."""
    assert rule_of(FederationSettings(algorithm=algorithm), num_devices=10) == UsualRule()
    # Two halves of one reply are enough for a mean, and of four devices not for a median that needs three.
    named = FederationSettings(algorithm=algorithm, combine=CombineSettings(rule="median"))
    if algorithm == "mixed":
        assert rule_of(named, num_devices=4) == Median()
        return
    assert rule_of(named, num_devices=6) == Median()
    with pytest.raises(
        InputError, match="median needs at least 3 replies and 4 devices are asked in a round, of whose"
    ):
        rule_of(named, num_devices=4)
    mean = FederationSettings(algorithm=algorithm, combine=CombineSettings(rule="mean"))
    assert rule_of(mean, num_devices=1) == Mean()


def test_more_devices_than_there_are_cannot_be_waited_for() -> None:
    settings = FederationSettings(rounds=RoundRules(min_devices=4))
    assert combine_of(settings, num_devices=4)
    with pytest.raises(InputError, match=r"rounds\.min_devices is 4, expected at most 3"):
        combine_of(settings, num_devices=3)


def test_the_usual_rule_has_no_options() -> None:
    settings = FederationSettings(combine=CombineSettings(options={"share": 0.3}))
    with pytest.raises(InputError, match="and the rule is auto, which has none; name the rule"):
        rule_of(settings, num_devices=10)


def test_a_rule_that_no_round_could_satisfy_is_refused_at_once() -> None:
    krum = CombineSettings(rule="multi_krum", options={"num_byzantine": 2})
    with pytest.raises(InputError, match=r"multi_krum needs at least \d+ replies and 3 devices"):
        rule_of(FederationSettings(combine=krum), num_devices=3)


def test_the_models_layers_are_told_to_those_who_ask_and_what_is_given_stays() -> None:
    asks = FederationSettings(algorithm="fedpeptao", options={"seed": {}})
    told = with_num_layers(asks, 5)
    assert told.options == {"seed": {}, "fedpeptao": {"num_layers": 5}} and asks.options == {"seed": {}}
    given = FederationSettings(algorithm="fedpeptao", options={"fedpeptao": {"num_layers": 2, "beta": 0.5}})
    assert with_num_layers(given, 5) == given
    # Others do not know the word, and what is wrong is refused where an algorithm is made.
    for other in (FederationSettings(), FederationSettings(algorithm="x"), replace(asks, options={"fedpeptao": 3})):
        assert with_num_layers(other, 5) is other


def test_what_is_there_is_named_from_the_root_and_other_names_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("model", "starter", "persona", "cloud"):
        (tmp_path / name).mkdir()
    (tmp_path / "texts.jsonl").touch()
    cloud = {"model": "cloud", "public": "texts.jsonl", "top_k": 3}
    relative = FederationSettings(
        model="model", data=DataSettings(path="texts.jsonl"), options={"seed": {}, "coplms": {"cloud": cloud}}
    )
    whole = with_whole_paths(relative)
    assert whole.model == str(tmp_path / "model") and whole.data.path == str(tmp_path / "texts.jsonl")
    told = {"model": str(tmp_path / "cloud"), "public": str(tmp_path / "texts.jsonl"), "top_k": 3}
    assert whole.options == {"seed": {}, "coplms": {"cloud": told}}
    assert with_whole_paths(whole) == whole
    # Of cotune itself, of the Hub, and wrong ones, which are refused where an algorithm is made.
    for options in ({}, {"coplms": 3}, {"coplms": {"cloud": 3}}, {"coplms": {"cloud": {"model": 4}}}):
        for other in (FederationSettings(options=options), FederationSettings(model="some/model", options=options)):
            assert with_whole_paths(other) == other


def test_an_algorithm_takes_its_own_table_alone() -> None:
    secret = RunSecret(bytes(32))
    options = {"seed": {"num_directions": 7}, "ferret": {}}
    assert algorithm_of(FederationSettings(algorithm="seed", options=options), secret).num_directions == 7  # type: ignore[attr-defined]
    assert algorithm_of(FederationSettings(options=options), secret).steps == FederationSettings().steps  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"options\.fedit\.num_steps is not known, expected one of steps"):
        algorithm_of(FederationSettings(algorithm="fedit", options={"fedit": {"num_steps": 3}}), secret)
    for bad in ({"seeds": {}}, {"seed": 3}):
        with pytest.raises(InputError, match="expected a table by the name of an algorithm"):
            algorithm_of(FederationSettings(options=bad), secret)
