"""Rounds over toy devices: what is lost, late, forged, foreign, replayed or wrong changes nothing and is reported."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from federated import BASE, SECRET, STEPS, ToyFederation, same_arrays
from toy_federation import A, B, ToyModel, toy_adapter

from cotune.errors import InputError, NonFiniteLossError
from cotune.federation.algorithm import Algorithm, Done, Plan
from cotune.federation.arrays import AnyArrays, Arrays, num_bytes
from cotune.federation.coordinator import FederationError, RoundRules
from cotune.federation.device_agent import DeviceAgent
from cotune.federation.fedit import FedIT
from cotune.federation.ffa_lora import FfaLora
from cotune.federation.messages import Reply, decode, encode
from cotune.federation.robust.median import Median
from cotune.federation.robust.multi_krum import MultiKrum
from cotune.federation.rolora import RoLora
from cotune.federation.run_secret import direction_seed
from cotune.federation.seed import SeedMode
from cotune.federation.signing import DeviceKey, sign

ALGORITHMS: dict[str, Callable[[], Algorithm]] = {
    "fedit": lambda: FedIT(steps=STEPS),
    "ffa_lora": lambda: FfaLora(steps=STEPS),
    "rolora": lambda: RoLora(steps=STEPS),
    "seed": lambda: SeedMode(
        seeds=lambda r, k: direction_seed(SECRET, r, k), num_directions=16, learning_rate=0.03, batch_size=8
    ),
}


def test_what_is_recorded_does_not_depend_on_who_answers_first() -> None:
    first, *others = (
        ToyFederation(num_devices=7, rules=RoundRules(num_rounds=3), devices={slow: {"latency_s": 0.5}}).run()
        for slow in ("d6", "d3", "d0")
    )
    for other in others:
        assert [one.loss for one in first.records] == [one.loss for one in other.records]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_devices_learn_together_and_every_byte_is_counted(name: str) -> None:
    federation = ToyFederation(algorithm=ALGORITHMS[name](), rules=RoundRules(num_rounds=6))
    start = federation.coordinator.begin(toy_adapter(3, 3, 2))
    end = federation.run()
    assert end.best_loss is not None and start.best_loss is not None and end.best_loss < 0.5 * start.best_loss
    assert [one.verdict for one in end.records] == ["accepted"] * 6
    assert [one.heldout_loss for one in end.records][-1] == end.best_loss
    for one in end.records:
        assert one.counted == one.asked == federation.names and not one.refused and not one.lost
    last = end.records[-1]
    if name == "seed":
        assert last.bytes_up["slopes"] == last.bytes_down["step"] == 4 * 16 * 4
    else:
        plan = federation.algorithm.plan(end.state, 6, "d0", 5)
        sent = sum(size for kind, size in last.bytes_down.items() if kind != "framing")
        assert sent == 4 * num_bytes(plan.arrays)
    assert last.bytes_up["framing"] > 4 * 64, "signatures and names are counted too"
    assert last.loss is not None and last.device_seconds is not None and last.device_peak_bytes is not None


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_run_that_was_interrupted_goes_on_along_the_same_curve(name: str) -> None:
    whole = ToyFederation(
        algorithm=ALGORITHMS[name](), rules=RoundRules(num_rounds=6, num_devices_per_round=2, quorum=1)
    )
    end = whole.run()
    for stopped_after in (1, 4):
        again = ToyFederation(algorithm=ALGORITHMS[name](), rules=whole.rules)
        run = again.coordinator.run(again.coordinator.begin(toy_adapter(3, 3, 2)))
        progress = [next(run) for _ in range(stopped_after)][-1]
        # The coordinator was killed in the middle of the next round, after the devices had worked.
        asked = whole.saved[stopped_after].records[-1].asked
        for device in asked:
            task = again.coordinator.task(progress.state, stopped_after + 1, device, progress.since.get(device))[1]
            again.agents[device].handle(task)
        resumed = again.run(progress)
        assert same_arrays(resumed.state, end.state)
        for one, other in zip(resumed.records, end.records, strict=True):
            assert (one.asked, one.heldout_loss, one.loss) == (other.asked, other.heldout_loss, other.loss)
            for ours, theirs in ((one.bytes_up, other.bytes_up), (one.bytes_down, other.bytes_down)):
                # Times are written with more or fewer digits.
                assert {**ours, "framing": 0} == {**theirs, "framing": 0}


def test_a_device_that_lost_its_memory_is_sent_everything_again() -> None:
    federation = ToyFederation(algorithm=ALGORITHMS["seed"](), rules=RoundRules(num_rounds=6))
    run = federation.coordinator.run(federation.coordinator.begin(toy_adapter(3, 3, 2)))
    for progress in run:
        if progress.round_number == 3:
            federation.restart("d1")
    never_lost = ToyFederation(algorithm=ALGORITHMS["seed"](), rules=RoundRules(num_rounds=6)).run()
    assert same_arrays(progress.state, never_lost.state)
    assert progress.records[3].counted == federation.names
    assert progress.records[3].bytes_down["start"] > 0 and "start" not in progress.records[4].bytes_down


@pytest.mark.parametrize("name", ALGORITHMS)
def test_stragglers_and_lost_devices_cost_a_deadline_and_no_more(name: str) -> None:
    federation = ToyFederation(
        algorithm=ALGORITHMS[name](),
        rules=RoundRules(num_rounds=6, deadline_s=10, quorum=0.5),
        devices={"d0": {"work_s": 15.0}, "d3": {"is_up": lambda now_s: now_s < 10.5}},
    )
    end = federation.run()
    # d0 is always late; d3 dies in round 2 and is then not asked any more.
    assert [one.lost for one in end.records] == [["d0"], ["d0", "d3"], *[["d0"]] * 4]
    assert [one.counted for one in end.records] == [["d1", "d2", "d3"], *[["d1", "d2"]] * 5]
    assert [one.seconds for one in end.records] == [10.0] * 6
    assert all(one.verdict == "accepted" for one in end.records)
    # What comes late is a reply to another round.
    assert any("round" in one.refused.get("d0", "") for one in end.records[1:])
    assert end.offences == {}


def test_a_device_whose_reply_was_lost_does_the_next_round_as_it_is_asked() -> None:
    """It has taken over the settings of a round that nobody knows it did, and rolora's alternate."""
    num_replies = 0

    def lose(device: str, data: bytes) -> bytes:
        nonlocal num_replies
        num_replies += device == "d1"
        return b"" if (device, num_replies) == ("d1", 2) else data

    federation = ToyFederation(algorithm=ALGORITHMS["rolora"](), rules=RoundRules(num_rounds=4), tamper=lose)
    end = federation.run()
    assert [sorted(one.refused) for one in end.records] == [[], ["d1"], [], []]
    assert [one.counted for one in end.records[2:]] == [federation.names] * 2
    assert end.offences == {}
    # Known again, they are not sent again.
    framing = [one.bytes_down["framing"] for one in end.records]
    assert framing[3] < framing[2]


def test_too_few_replies_leave_the_state_as_it_is() -> None:
    federation = ToyFederation(
        rules=RoundRules(num_rounds=8, deadline_s=5, quorum=0.75, max_void_rounds=3),
        devices={name: {"work_s": 9.0} for name in ("d1", "d2")},
    )
    progress = start = federation.coordinator.begin(toy_adapter(3, 3, 2))
    with pytest.raises(FederationError, match="3 rounds were void: 2 replies count, expected at least 3"):
        for progress in federation.coordinator.run(start):
            assert same_arrays(progress.state, start.state)
    assert [one.verdict for one in progress.records] == ["void"] * 3
    assert federation.saved[-1] is progress


def test_a_rule_that_needs_more_devices_voids_the_round() -> None:
    federation = ToyFederation(combine=MultiKrum(num_byzantine=2), rules=RoundRules(num_rounds=1))
    end = federation.run()
    assert end.records[0].verdict == "void" and "4" in end.records[0].remark


def test_the_run_waits_for_devices_but_not_for_ever() -> None:
    late = {f"d{index}": {"is_up": lambda now_s: now_s >= 30} for index in range(4)}
    rules = RoundRules(num_rounds=1, min_devices=3, gather_s=60)
    assert ToyFederation(rules=rules, devices=late).run().records[0].verdict == "accepted"
    with pytest.raises(FederationError, match="fewer than 3 devices could be reached in 20 s"):
        ToyFederation(rules=replace(rules, gather_s=20, max_void_rounds=1), devices=late).run()


Forge = Callable[[ToyFederation, Reply], Reply | bytes]


def resigned(federation: ToyFederation, reply: Reply) -> Reply:
    return sign(reply, federation.keys[reply.device])


ATTACKS: dict[str, tuple[Forge, str]] = {
    "nan": (
        lambda f, r: resigned(f, replace(r, arrays={**r.arrays, B: np.full_like(r.arrays[B], np.nan)})),
        "holds nan or inf",
    ),
    "shape": (lambda f, r: resigned(f, replace(r, arrays={**r.arrays, B: np.zeros((1, 1), np.float32)})), "(1, 1)"),
    "extra array": (lambda f, r: resigned(f, replace(r, arrays={**r.arrays, "x": r.arrays[B]})), "unknown 'x'"),
    "too long": (
        lambda f, r: resigned(f, replace(r, arrays={n: a * np.float32(1e9) for n, a in r.arrays.items()})),
        "norm is",
    ),
    "forged": (lambda f, r: replace(r, signature=DeviceKey.generate().sign_bytes(b"x")), "signature"),
    "altered": (lambda f, r: replace(r, arrays={n: -a for n, a in r.arrays.items()}), "signature"),
    "replayed": (lambda f, r: resigned(f, replace(r, round_number=r.round_number - 1)), "round"),
    "foreign run": (lambda f, r: resigned(f, replace(r, run_id="run-0")), "run-0"),
    "foreign base": (lambda f, r: resigned(f, replace(r, base_digest="c" * 64)), "cccc"),
    "other device": (lambda f, r: resigned(f, replace(r, device="d1")), "d1"),
    "garbage": (lambda f, r: b"\0" * 100, ""),
    "cut": (lambda f, r: encode(r)[:-3], ""),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_bad_reply_changes_nothing_and_is_reported(attack: str) -> None:
    forge, words = ATTACKS[attack]

    def tamper(device: str, data: bytes) -> bytes:
        if device != "d0":
            return data
        made = forge(federation, decode(data, Reply))
        return made if isinstance(made, bytes) else encode(made)

    rules = RoundRules(num_rounds=3, deadline_s=5, max_update_norm=1e4, exclude_after=2)
    federation = ToyFederation(tamper=tamper, rules=rules)
    end = federation.run()
    honest = ToyFederation(
        models=[ToyModel.draw(seed) for seed in range(4)], rules=rules, devices={"d0": {"is_up": lambda now_s: False}}
    )
    assert same_arrays(end.state, honest.run().state)
    assert words in end.records[0].refused["d0"]
    assert end.records[0].bytes_up["refused"] > 0
    own_fault = attack in ("nan", "shape", "extra array", "too long")
    # Only what a device has signed itself is held against it; else anybody could have it thrown out.
    assert end.offences == ({"d0": 2} if own_fault else {})
    assert end.records[2].asked == (["d1", "d2", "d3"] if own_fault else ["d0", "d1", "d2", "d3"])


def test_a_claim_of_many_examples_buys_no_weight() -> None:
    def tamper(device: str, data: bytes) -> bytes:
        reply = decode(data, Reply)
        if device == "d0":
            reply = resigned(federation, replace(reply, num_examples=10**9))
        return encode(reply)

    federation = ToyFederation(tamper=tamper, rules=RoundRules(num_rounds=1))
    assert same_arrays(federation.run().state, ToyFederation(rules=RoundRules(num_rounds=1)).run().state)
    federation = ToyFederation(tamper=tamper, rules=RoundRules(num_rounds=1, weights="examples"))
    start, capped = federation.coordinator.begin(toy_adapter(3, 3, 2)), federation.run()
    updates = []
    for name, model in zip(federation.names, federation.models, strict=True):
        seed = int.from_bytes(hashlib.sha256(f"0\0{name}\0001".encode()).digest()[:4], "little")
        updates.append(model.descend(start.state, [A, B], STEPS, seed=seed).arrays)
    # Twelve examples each, and one claims a thousand million: it counts as four times twelve.
    weights = np.array([4, 1, 1, 1]) / 7
    for name in (A, B):
        expected = sum(w * (one[name] - start.state[name]) for w, one in zip(weights, updates, strict=True))
        assert np.allclose(capped.state[name] - start.state[name], expected, atol=1e-5)


def test_a_round_that_makes_the_model_worse_is_taken_back() -> None:
    def tamper(device: str, data: bytes) -> bytes:
        reply = decode(data, Reply)
        if reply.round_number != 3:
            return data
        return encode(resigned(federation, replace(reply, arrays={n: -50 * a for n, a in reply.arrays.items()})))

    federation = ToyFederation(tamper=tamper, rules=RoundRules(num_rounds=5))
    end = federation.run()
    assert [one.verdict for one in end.records] == ["accepted", "accepted", "rejected", "accepted", "accepted"]
    assert "rose from" in end.records[2].remark and same_arrays(federation.saved[2].state, federation.saved[1].state)
    assert end.best_loss == min(one.heldout_loss for one in end.records if one.heldout_loss is not None)
    federation = ToyFederation(tamper=tamper, rules=RoundRules(num_rounds=3), judges=False)
    assert [one.verdict for one in federation.run().records] == ["accepted"] * 3


def test_a_robust_rule_stands_in_the_way_of_bad_devices() -> None:
    def tamper(device: str, data: bytes) -> bytes:
        if device != "d0":
            return data
        reply = decode(data, Reply)
        return encode(resigned(federation, replace(reply, arrays={n: -100 * a for n, a in reply.arrays.items()})))

    losses = {}
    for name, rule in {"median": Median(), "mean": None}.items():
        federation = ToyFederation(
            num_devices=5,
            tamper=tamper,
            algorithm=ALGORITHMS["seed"](),
            rules=RoundRules(num_rounds=4),
            judges=False,
            **({} if rule is None else {"combine": rule}),
        )
        losses[name] = federation.judge(federation.algorithm.adapter(federation.run().state))
    assert losses["median"] < 5 < losses["mean"]


def test_a_device_whose_loss_is_no_number_is_left_out_and_named() -> None:
    class Broken(ToyModel):
        def descend(self, *args: object, **options: object) -> object:  # type: ignore[override]
            raise NonFiniteLossError(3, float("nan"))

    models = [ToyModel.draw(seed) for seed in range(3)]
    broken = Broken(models[0].x, models[0].y)
    end = ToyFederation(models=[broken, *models[1:]], rules=RoundRules(num_rounds=2, quorum=0.5)).run()  # type: ignore[list-item]
    assert all("the loss at step 3 is nan" in one.refused["d0"] for one in end.records)
    assert end.records[1].counted == ["d1", "d2"] and end.offences == {}


def test_unregistered_devices_do_not_exist() -> None:
    federation = ToyFederation(rules=RoundRules(num_rounds=2))
    federation.registry = federation.registry.remove("d2")
    assert all(one.asked == ["d0", "d1", "d3"] for one in federation.run().records)


def test_other_backbones_and_unknown_work_are_refused_by_the_device() -> None:
    federation = ToyFederation(rules=RoundRules(num_rounds=1, quorum=0.5))
    other = DeviceAgent("d0", ToyModel.draw(0), base_digest="e" * 64, secret=SECRET, key=federation.keys["d0"])
    federation.replace_agent(other)
    idle = DeviceAgent("d1", ToyModel.draw(1), base_digest=BASE, secret=SECRET, key=federation.keys["d1"], works={})
    federation.replace_agent(idle)
    record = federation.run().records[0]
    assert "backbone" in record.refused["d0"] and "asks for descend" in record.refused["d1"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_rounds": 0}, "num_rounds"),
        ({"quorum": 0.0}, "quorum"),
        ({"weights": "claimed"}, "weights"),
        ({"deadline_s": float("inf")}, "deadline_s"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"num_devices_per_round": 0}, "num_devices_per_round"),
        ({"max_update_norm": 0.0}, "max_update_norm"),
    ],
)
def test_rules_that_make_no_sense_are_refused(change: dict[str, float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        RoundRules(**change)


def test_what_a_coded_reply_stands_for_is_what_is_checked_and_merged() -> None:
    class Coded(FedIT):
        """Devices send halves as bytes."""

        def plan(self, state: Arrays, round_number: int, device: str, since: int | None) -> Plan:
            own = super().plan(state, round_number, device, since)
            return replace(
                own, work="halves", reply={"h": (4,)}, codes=frozenset(["h"]), decode=lambda a: decoded(a, state)
            )

    def decoded(arrays: AnyArrays, state: Arrays) -> Arrays:
        return {name: np.full_like(state[name], arrays["h"][0] / 2) for name in (A, B)}

    for limit, verdict in ((None, "accepted"), (5.0, "void")):
        federation = ToyFederation(
            algorithm=Coded(steps=STEPS), rules=RoundRules(num_rounds=1, max_update_norm=limit), judges=False
        )
        for name in federation.names:
            works = {
                "halves": lambda job: Done(arrays={"h": np.full(4, 3, np.uint8)}, loss=1.0, metrics={"held_bytes": 7.0})
            }
            federation.replace_agent(
                DeviceAgent(
                    name,
                    federation.models[0],
                    base_digest=BASE,
                    secret=SECRET,
                    key=federation.keys[name],
                    works=works,
                )
            )
        end = federation.run()
        (record,) = end.records
        assert record.verdict == verdict
        if limit is None:
            assert np.allclose(end.state[B], 1.5) and record.bytes_up["h"] == 4 * 4
            assert record.device_held_bytes == 7
        else:
            # 15 numbers of 1.5.
            assert "the reply's norm is 5.81" in record.refused["d0"]
