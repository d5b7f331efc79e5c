"""The study of attacks: liars sign their own lies, what a ratio means, and one whole run on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federated_attacks import (
    ATTACKS,
    NONE,
    RULES,
    USUAL,
    cells_of,
    eavesdropper_words,
    holds,
    liars_of,
    ratios,
    says_little,
    tampering,
    verdict,
)
from mean import Mean
from study_command import Command

from cotune.errors import RefusedError
from cotune.federation.messages import Reply, decode, encode
from cotune.federation.robust.usual_rule import usual_rule
from cotune.federation.signing import DeviceKey, Registry, sign, verify

BASE = "0" * 64


def reply_of(device: str, key: DeviceKey) -> bytes:
    made = Reply(
        run_id="r",
        round_number=1,
        device=device,
        arrays={"x": np.array([1.0, -2.0], np.float32)},
        num_examples=3,
        metrics={"loss": 1.0},
        base_digest=BASE,
    )
    return encode(sign(made, key))


@pytest.mark.parametrize("attack", [name for name in ATTACKS if name != NONE])
def test_a_liar_signs_what_it_says_and_honest_replies_stay(attack: str) -> None:
    keys = {name: DeviceKey.generate() for name in ("a", "b")}
    lie = ATTACKS[attack].lie
    assert lie is not None
    tamper = tampering(lie, {"a": keys["a"]}, 0)
    honest, lied = reply_of("b", keys["b"]), decode(tamper("a", reply_of("a", keys["a"])), Reply)
    assert tamper("b", honest) == honest
    verify(lied, Registry({n: k.public_key for n, k in keys.items()}), run_id="r", round_number=1, base_digest=BASE)
    with pytest.raises(RefusedError):
        verify(lied, Registry({"a": keys["b"].public_key}), run_id="r", round_number=1, base_digest=BASE)
    x = lied.arrays["x"]
    expected = {
        "-10 g": x.tolist() == [-10.0, 20.0],
        "-3 g": x.tolist() == [-3.0, 6.0],
        "1e6 noise": np.abs(x).max() > 1e4,
        "NaN": np.isnan(x).all(),
        "1e9 examples": lied.num_examples == 10**9 and x.tolist() == [-10.0, 20.0],
    }
    assert expected[attack]
    assert (lied.num_examples == 3) == (attack != "1e9 examples")


def value(loss: float | None) -> dict[str, Any]:
    return {"diverged": False, "start": 3.0, "loss": loss, "num_refused": 1, "num_void": 0}


def test_ratios_are_of_the_same_seeds_and_a_lost_run_is_lost() -> None:
    table = {
        "mean": {NONE: [value(1.0), value(2.0)], "-10 g": [value(None), value(2.0)]},
        "median": {NONE: [value(1.1), value(2.2)], "-10 g": [value(1.0), value(2.3)]},
    }
    found = cells_of(table)
    assert found["median"][NONE]["ratio"].mean == pytest.approx(1.1) and found["median"][NONE]["num_refused"] == 2
    # (1.0 / 1.0 + 2.3 / 2.0) / 2
    assert found["median"]["-10 g"]["ratio"].mean == pytest.approx(1.075) and found["median"]["-10 g"]["holds"]
    assert found["mean"]["-10 g"]["loss"] is None and not found["mean"]["-10 g"]["holds"]
    # (3.0 - 1.0) / (3.0 - 1.0) and (3.0 - 2.3) / (3.0 - 2.0)
    assert found["median"]["-10 g"]["kept"].mean == pytest.approx((1.0 + 0.7) / 2)
    assert found["mean"]["-10 g"]["kept"] is None
    assert says_little("seed", [1.0], [1.2]) == [] and "look at the share" in says_little("seed", [1.0], [1.05])[0]
    assert ratios([None], [1.0]) is None and not holds(Mean.of([1.11])) and holds(Mean.of([1.09]))


def test_the_verdict_names_what_holds_under_all_attacks() -> None:
    yes, no = {"holds": True}, {"holds": False}
    found = {"mean": {NONE: yes, "NaN": no}, "median": {NONE: yes, "NaN": yes}, "clip": {NONE: no, "NaN": yes}}
    (said,) = verdict("seed", found)
    assert "worse than honest under NaN" in said and said.endswith("under all attacks: median.")
    (fine,) = verdict("seed", {"mean": {NONE: yes}})
    assert "under no attack" in fine


def test_rules_of_the_table_bear_two_liars_of_ten() -> None:
    updates = np.ones((10, 3), np.float32)
    for rule in RULES.values():
        assert np.allclose(rule.combine()(updates, np.ones(10)), 1.0)
    assert len(set(liars_of([f"d{k}" for k in range(10)], 2, 0))) == 2


def test_the_product_s_own_rule_is_in_the_table() -> None:
    assert RULES[USUAL].combine() == usual_rule(10)


def test_an_eavesdropper_is_told_of_by_what_it_has() -> None:
    one = {"start": 4.0, "tuned": 2.0, "stolen": 3.0, "cosine": 0.5, "is_identical": False}
    said = eavesdropper_words("seed", [one, {**one, "stolen": 2.0, "cosine": 1.0, "is_identical": True}])
    # Half of the gain in one run and all of it in the other one.
    assert "in 1 of 2 runs" in said and "0.750" in said and "it has 75.0" in said
    assert "tuning gained nothing to steal" in eavesdropper_words("seed", [{**one, "tuned": 5.0}])


@pytest.mark.integration
def test_the_command_shows_the_poisoner_and_the_eavesdropper(
    tmp_path: Path, tiny_model: Path, command: Command
) -> None:
    options: list[object] = ["--model", tiny_model, "--num-train", 8, "--num-server", 4, "--num-test", 4, "--seeds", 1]
    options += ["--devices", 4, "--rounds", 2, "--local-steps", 1, "--directions", 3, "--pool", 64, "--batch-size", 2]
    options += ["--max-length", 48, "--rank", 2, "--rate-factors", 1, "--liars", 1, "--algorithms", "seed", "fedkseed"]
    options += ["--rules", "mean", "--attacks", "1e6 noise"]
    options += ["--cells", tmp_path / "cells", "--out", tmp_path / "out"]
    status, printed = command("federated_attacks", options)
    assert status == 0, printed
    measured = json.loads((tmp_path / "out" / "measured.json").read_text())
    for name in ("seed", "fedkseed"):
        columns = measured["algorithms"][name]["mean"]
        assert columns[NONE]["ratio"]["mean"] == 1.0 and columns[NONE]["holds"]
        # Norms keep the loss of a random model where it is; that the noise got in is enough here.
        assert columns["1e6 noise"]["ratio"] is None or columns["1e6 noise"]["ratio"]["mean"] != 1.0
    heard = measured["eavesdropper"]
    assert heard["fedkseed"][0]["is_identical"] and heard["fedkseed"][0]["cosine"] == 1.0
    assert not heard["seed"][0]["is_identical"] and abs(heard["seed"][0]["cosine"]) < 0.5
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Rules and attacks: seed" in page and "bit for bit in 1 of 1 runs" in page
