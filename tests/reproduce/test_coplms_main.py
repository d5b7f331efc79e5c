"""The study of co-tuning: what cells say, worked by hand, and one whole run on tiny models."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from co_tuning import model_folder
from co_tuning_scene import make_models
from coplms_contest import (
    ABLATIONS,
    BESIDE,
    BOTH,
    BY_DOMAIN,
    EQUAL,
    METHODS,
    MOST_RATES,
    REHEARSING,
    REHEARSING_BY_DOMAIN,
    CoPlmsStudy,
    answer_nats,
    answers_of,
    num_answer_bytes,
    respondents,
    solved,
)
from coplms_main import (
    bits_within,
    cost_grid,
    margins,
    mean_of,
    over_sets,
    parser,
    published,
    relative,
    score,
    total_bytes,
    worded,
)
from coplms_texts import FIRST_SEEDS, SEARCH_WORLD, Domain, Questions, texts_of, texts_of_search, texts_of_test
from study_command import Command

from cotune.data.templates import Example
from cotune.federation.causal_model import CausalModel
from cotune.federation.comparison.party import Party
from cotune.federation.open_questions import Answering


def value(devices: list[float], cloud: float, *, up: float = 1.0) -> dict[str, Any]:
    """A run with these exact matches; bits fall by 1 in each of two rounds."""
    parties = {f"device-{place}": {"own": _told(one), "skills": _told(one / 2)} for place, one in enumerate(devices)}
    bits = dict.fromkeys([*parties, "cloud"], 3.0)
    return {
        "parties": parties | {"cloud": {"crossed": _told(cloud)}},
        "curve": [
            {"bits": {name: own - number for name, own in bits.items()}, "up": number * up, "down": 0, "download": 10}
            for number in range(3)
        ],
    }


def _told(share: float) -> dict[str, float]:
    return {"em": share, "rouge_l": share + 0.1, "bits": 1.0}


def test_scores_are_means_over_devices_and_then_over_sets() -> None:
    one = value([0.2, 0.6], 0.5)
    assert score(one, "devices", "own", "em") == pytest.approx(0.4) and score(one, "cloud", "own", "em") is None
    assert over_sets(one, "devices", "em") == pytest.approx((0.4 + 0.2) / 2) and over_sets(one, "cloud", "em") == 0.5
    assert worded(mean_of([one, value([0.2, 0.2], 0)], lambda v: score(v, "devices", "own", "em")), 1, 100) != "-"
    assert worded(mean_of([one], lambda v: score(v, "devices", "mixed", "em"))) == "-"


def test_within_a_budget_counts_the_last_round_that_it_pays_for_and_the_download() -> None:
    one = value([0.2], 0.5, up=5.0)
    assert [total_bytes(point) for point in one["curve"]] == [10, 15, 20]
    assert [bits_within(one, budget, "devices") for budget in (14, 15, 19, 20)] == [None, 2.0, 2.0, 1.0]
    assert bits_within(one, 100, "cloud") == 1.0


def said_of(rows: dict[str, list[dict[str, Any]]], start: str) -> str:
    """The one sentence that starts so."""
    (found,) = (one.sentence for one in margins(rows) if one.sentence.startswith(start))
    return found


def test_the_best_other_method_at_equal_compute_is_what_counts() -> None:
    rows = {
        "ours": [value([0.44], 0.5), value([0.45], 0.5)],
        "standalone": [value([0.35], 0.4)] * 2,
        "centralised": [value([0.9], 0.9)] * 2,
        "standalone, equal compute": [value([0.40], 0.5), value([0.41], 0.5)],
        "seqkd": [value([0.3], 0.6)] * 2,
    }
    assert len(margins(rows)) == 6
    # (0.33 + 0.3375) / 2 against (0.3 + 0.3075) / 2, told apart as the gain is the same with both seeds.
    devices = said_of(rows, "On devices, EM")
    assert "(standalone, equal compute) 30.4" in devices and "+9.9 % relative, told apart" in devices
    assert devices.endswith("the margin of 4.88 % is reached.")
    cloud = said_of(rows, "In the cloud, EM")
    assert "seqkd" in cloud and cloud.endswith("is not reached.")
    bits = said_of(rows, "On devices, bits per byte: ours 1.000")
    assert "not told apart with 2 seeds" in bits and bits.endswith("seeds; is not reached.")
    assert margins({"ours": rows["ours"], "centralised": rows["centralised"]}) == []
    assert relative(0.5, 0.0) is None


def test_fewer_bits_are_better() -> None:
    told = {"ours": 0.5, "standalone": 0.7, "seqkd": 0.6}
    rows = {name: [value([0.4], 0.4)] * 2 for name in told}
    for name, values in rows.items():
        rows[name] = [
            {**one, "curve": [{**point, "bits": dict.fromkeys(point["bits"], told[name])} for point in one["curve"]]}
            for one in values
        ]
    (bits,) = (one for one in margins(rows) if one.row.startswith("On devices, bits"))
    assert bits.other == "seqkd" and bits.gain.mean == pytest.approx(-0.1) and bits.is_reached


def test_with_several_devices_each_has_its_own_verdict() -> None:
    rows = {"ours": [value([0.6, 0.2], 0.5)] * 2, "standalone": [value([0.4, 0.4], 0.4)] * 2}
    # A device's EM is the mean of its questions' and the skills': (0.6 + 0.3) / 2 against (0.4 + 0.2) / 2.
    first, second = (said_of(rows, f"On device-{place} (") for place in (0, 1))
    assert "(llama), EM: ours 45.0" in first and "+50.0 % relative" in first and first.endswith("is reached.")
    assert "(gpt2), EM: ours 15.0" in second and "-50.0 % relative" in second and second.endswith("not reached.")


def test_what_nobody_published_is_told_beside_the_best_published_method() -> None:
    told = {"ours": [0.40] * 2, BOTH: [0.44] * 2, "fedavg-lora": [0.40] * 2, BESIDE: [0.43] * 2}
    rows = {name: [value([one], 0.5) for one in own] for name, own in told.items()}
    known, made = (one for one in margins(rows) if one.row == f"On devices, EM: {BOTH}")
    assert known.other == "fedavg-lora" and known.is_best_published and known.is_reached
    assert made.other == BESIDE and not made.is_best_published and not made.is_reached
    assert "the best of what was made for this study" in made.sentence and "+2.3 % relative" in made.sentence
    # The cloud's model is the same, whoever answers on devices.
    assert len([one for one in margins(rows) if one.where == "In the cloud"]) == 3
    # Unless it learns in another way.
    rows |= {name: [value([one], 0.6) for one in (0.5, 0.5)] for name in (REHEARSING, REHEARSING_BY_DOMAIN)}
    assert [one.own for one in margins(rows) if one.where == "In the cloud"] == ["ours"] * 3 + [REHEARSING] * 3
    assert published("fedcollm, 1 round") and not any(map(published, (BESIDE, "fedcollm, asking, 1 round")))


def test_of_two_models_that_answer_the_probabilities_are_averaged(tmp_path: Path) -> None:
    models = make_models(tmp_path)
    parties = {
        name: Party(CausalModel(str(models / folder)))
        for name, folder in (("device-0", "gpt2"), ("device-1", "llama"), ("cloud", "cloud"), ("proxy", "proxy"))
    }
    questions = questions_of(["the far cat?", "the cat?"])
    alone, both, weighed = (respondents(parties, questions, name) for name in ("ours", BOTH, BY_DOMAIN))
    assert [len(one.parties) for one in both.values()] == [len(one.parties) for one in weighed.values()] == [2, 2, 1, 1]
    assert {len(one.parties) for one in alone.values()} == {1}
    asked = [Example("the far cat?", " the hat."), Example("two?", " no")]
    first, second, mean, by_domain = (
        np.exp(-np.array(answer_nats(who, asked, max_tokens=32)))
        for who in (alone["device-0"], alone["proxy"], both["device-0"], weighed["device-0"])
    )
    assert mean == pytest.approx((first + second) / 2)
    (ours, _), (theirs, _) = shares = weighed["device-0"].weights(asked)
    assert ours > 0.5 > theirs and all(sum(one) == pytest.approx(1) for one in shares)
    assert by_domain == pytest.approx(np.array([ours, theirs]) * first + (1 - np.array([ours, theirs])) * second)
    assert num_answer_bytes(both["device-0"], asked, max_tokens=32) == len(" the hat. no")
    written = [answers_of(alone[name], asked, max_tokens=32) for name in ("device-0", "proxy")]
    for who in (both, weighed):
        answers = answers_of(who["device-0"], asked, max_tokens=32)
        assert all(one in own for one, *own in zip(answers, *written, strict=True))


def questions_of(own: list[str]) -> Questions:
    """Of two devices, the second of which has sums, as the server has."""
    sums = ["2 + 2 =", "3 + 4 ="]
    domains = [
        Domain(train=[Example(one, " x") for one in train], asked=[], skills=[], mixed=[], open=[])
        for train in (own, sums)
    ]
    return Questions(domains=domains, public=[Example("two?", " no"), *(Example(one, " 4") for one in sums)])


def test_a_measured_peak_stands_beside_what_is_held() -> None:
    costs = ("up", "down", "download", "gflop", "cloud_gflop", "held_mb", "device_s", "cloud_s")
    rows = {name: [dict.fromkeys(costs, 1.0)] for name in ("ours", "zero-shot")}
    told = str(cost_grid(rows, "method", {"ours": 12.34}))
    assert "peak, MB" in told and "12.3" in told
    assert "peak" not in str(cost_grid(rows, "method")) + str(cost_grid(rows, "method", {}))


def test_steps_are_solved_from_two_counts() -> None:
    # 10 operations beside the steps, 20 for the steps of the options.
    assert solved(50.0, 30.0, 50.0) == 2.0 and solved(20.0, 30.0, 50.0) == 0.5 and solved(5.0, 30.0, 50.0) == 0.0


def test_every_name_makes_a_method() -> None:
    args = parser().parse_args([])
    assert all(hasattr(make(args), "rounds") for make in METHODS.values())
    made = {name: one.method(args) for name, one in ABLATIONS.items()}
    ours = METHODS["ours"](args)
    for name, method in made.items():
        own = ABLATIONS[name]
        changed = method != ours or own.proxy != "proxy" or own.rank(8) != 8 or own.share != 1
        assert changed, f"{name} is ours"
    names = ("L_byte alone", "L_chunk alone", "L_tok alone", "no gate", "DST", "no open questions")
    assert len({repr(made[name]) for name in names}) == len(names)


def test_no_question_of_a_test_is_asked_where_rates_are_searched() -> None:
    args = parser().parse_args(["--devices", "3"])
    whole, searched = texts_of(args, 3, SEARCH_WORLD), texts_of_search(args, 3)
    assert searched.tested() < whole.tested(), "sums of small numbers are few"
    assert [one.train for one in searched.domains] == [one.train for one in whole.domains]
    for seed in range(args.seeds):
        tested = texts_of_test(args, 3, seed)
        assert not tested.tested() & searched.tested()
        # The first seeds ask all that they have, and the others nearly.
        assert len(tested.tested()) == len(texts_of(args, 3, seed).tested()) or seed >= FIRST_SEEDS
        assert len(tested.domains[0].skills) >= 35
    assert any(texts_of(args, 3, seed).tested() & searched.tested() for seed in range(FIRST_SEEDS, args.seeds))
    things = [{name for one in own.domains for name in one.names} for own in (searched, texts_of(args, 3, 0))]
    assert len(searched.domains[0].skills) >= 10 and len(things[0] & things[1]) <= 1


def test_wrong_answers_of_a_search_are_the_mean_of_devices_and_cloud(monkeypatch: pytest.MonkeyPatch) -> None:
    study = object.__new__(CoPlmsStudy)
    study.args = parser().parse_args(["--seeds", "1", "--devices", "2"])
    monkeypatch.setattr(CoPlmsStudy, "scene", lambda self, questions, folder, **changes: changes["rate_factor"])
    monkeypatch.setattr("coplms_contest.right_of", lambda who, asked, max_tokens: sum(who.parties))

    class Method:
        def rounds(self, scene: float, account: object) -> Any:
            yield {"device-0": 0.9, "device-1": 0.9, "cloud": 0.9}
            yield {"device-0": 0.0, "device-1": 0.5, "cloud": scene, "proxy": 0.25}

    monkeypatch.setitem(METHODS, "ours", lambda args: Method())  # type: ignore[arg-type, return-value]
    monkeypatch.setitem(METHODS, BOTH, lambda args: Method())  # type: ignore[arg-type, return-value]
    assert study._searched("ours", 2, rate_factor=0.75) == {"wrong": 0.5}
    # Where both answer, the proxy of each device does, too.
    assert study._searched(BOTH, 2, rate_factor=0.75) == {"wrong": 0.375}


def test_every_ablation_ends_elsewhere_than_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = make_models(tmp_path / "models")
    model_folder(models / "proxy-smaller", "llama", "byte_level", seed=2)
    sizes = "--devices 3 2 --rounds 1 --local-steps 1 --cloud-steps 1 --num-things 2 --num-skills 2 --num-test 1"
    options = [*sizes.split(), "--num-public", "4", "--batch-size", "4", "--rank", "4", "--top-k", "4"]
    args = parser().parse_args(["--models", str(models), "--cells", str(tmp_path / "cells"), *options])
    monkeypatch.setattr(CoPlmsStudy, "rate_factor", lambda self, name, num_rounds=None: 1.0)
    # Random models are sure of nothing, and write few answers that are text, so that none would be learnt.
    monkeypatch.setattr("coplms_contest.Answering", partial(Answering, sure_above=0.0))
    monkeypatch.setattr("coplms_contest.MAX_NEW_TOKENS", 1)
    study = CoPlmsStudy("toy", args)

    def end(run: dict[str, Any]) -> dict[str, float]:
        # Not its bytes: replies tell seconds, of more or fewer digits.
        return run["curve"][-1]["bits"]

    ours = end(study.run("ours", 2, 0))
    same = [name for name in ABLATIONS if end(study.ablate(name, 2, 0)) == ours]
    assert same == ["usual rule"], "of two replies it is the mean"
    assert end(study.ablate("usual rule", 3, 0)) != end(study.run("ours", 3, 0))


@pytest.mark.integration
def test_the_command_writes_its_folder_and_never_repeats_a_cell(tmp_path: Path, command: Command) -> None:
    models = make_models(tmp_path / "models")
    model_folder(models / "proxy-smaller", "llama", "byte_level", seed=2)
    options: list[object] = ["--models", models, "--devices", 2, "--seeds", 2, "--side-seeds", 1, "--rounds", 1]
    options += [
        "--local-steps",
        2,
        "--cloud-steps",
        1,
        "--num-things",
        2,
        "--num-skills",
        2,
        "--num-test",
        1,
        "--num-public",
        2,
    ]
    options += ["--rate-factors", 4, 0.5]
    options += ["--batch-size", 2, "--rank", 4, "--top-k", 4, "--ablations", "naive merge", "--methods"]
    options += ["standalone, equal compute", "ours"]
    options += ["--cells", tmp_path / "cells", "--out", tmp_path / "out"]
    status, printed = command("coplms_main", options)
    assert status == 0, printed
    measured = json.loads((tmp_path / "out" / "measured.json").read_text())
    (equal, _), (ours, _) = measured["runs"]["2"].values()
    assert {name: len(values) for name, values in measured["ablations"].items()} == {"naive merge": 1}
    assert not measured["refused"]
    assert set(ours["parties"]) == {"device-0", "device-1", "cloud", "proxy"} and "proxy" not in equal["parties"]
    assert ours["parties"]["device-0"].keys() == {"own", "crossed", "skills", "mixed"}
    assert ours["parties"]["cloud"].keys() == {"crossed", "skills", "mixed"}
    # Both rates are searched, and perhaps others; the one with the fewest wrong answers is taken.
    for name in (EQUAL, "ours"):
        searched = {float(factor): wrong for factor, wrong in measured["search"][name].items()}
        assert {0.5, 4.0} <= set(searched) and len(searched) <= MOST_RATES
        assert measured["rates"][name] == min(searched, key=searched.get)
    # The same compute but for a part of a step, and more steps for that than the two of the options.
    assert equal["gflop"] == pytest.approx(ours["gflop"], rel=0.3) and measured["factors"][EQUAL][0] > 1.2
    assert equal["up"] == equal["down"] == equal["download"] == 0 < ours["up"] < ours["download"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "2 devices" in page and "naive merge" in page and "Within the bytes of ours" in page
    assert "Learning rates and steps" in page and "peak, MB" not in page
    again, told = command("coplms_main", options)
    assert again == 0 and "coplms_main:" in printed and "coplms_main:" not in told
