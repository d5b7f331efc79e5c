"""The server's half: means of products in any mix of ranks, what is folded, what travels, and what each device does."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from cotune.distillation.chunk_gate import ChunkGate
from cotune.distillation.mutual_loss import MutualLossConfig
from cotune.errors import InputError
from cotune.federation.algorithm import Plan, Update, shown_in
from cotune.federation.annealed import CosineRates
from cotune.federation.arrays import Arrays, shapes_of
from cotune.federation.co_tuning_device import CoTuningSteps
from cotune.federation.coordinator import Coordinator, RoundRules
from cotune.federation.coplms import CloudSettings, CloudTuned, CoPlms
from cotune.federation.folds import fold_arrays
from cotune.federation.in_process import InProcess
from cotune.federation.local_model import LocalSteps
from cotune.federation.lora_factors import LoraFactors, split_layers
from cotune.federation.messages import Reply, decode, encode
from cotune.federation.open_questions import Answering
from cotune.federation.open_questions import from_arrays as questions_from_arrays
from cotune.federation.public_chunks import PublicText
from cotune.federation.public_chunks import to_codes as to_likelihood_codes
from cotune.federation.robust.mean import Mean
from cotune.federation.row_codes import dither_seed
from cotune.federation.signing import DeviceKey, Registry, sign

LAYERS = {"m.q": (9, 11), "m.v": (7, 11)}
A, B = "{}.lora_A.default.weight", "{}.lora_B.default.weight"


def adapter(rank: int, seed: int) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    found = {}
    for layer, (num_out, num_in) in LAYERS.items():
        found[A.format(layer)] = rng.standard_normal((rank, num_in)).astype(np.float32)
        found[B.format(layer)] = rng.standard_normal((num_out, rank)).astype(np.float32)
    return found


def dense(arrays: Arrays) -> dict[str, NDArray[np.float32]]:
    return {layer: own.product() for layer, own in split_layers(arrays, 1.0).items()}


def update(device: str, plan: Plan, trained: Arrays, weight: float = 1.0) -> Update:
    """What a coordinator makes of the reply of a device that has `trained` at the end."""
    had = {name: array for name, array in plan.arrays.items() if name in plan.reply}
    return Update(device=device, arrays={name: trained[name] - had[name] for name in had}, weight=weight)


def test_the_merge_is_the_mean_of_the_products_for_mixed_ranks() -> None:
    """Of rank 9 at most, so that an adapter of rank 9 loses nothing; mean(B) mean(A) is something else."""
    algorithm = CoPlms(bits=32, ranks={"phone": 2}, fold_above=1.0)
    state = algorithm.start(adapter(7, 0) | {})
    plans = {name: algorithm.plan(state, 1, name, None) for name in ("desk", "phone")}
    assert plans["phone"].reply[A.format("m.q")] == (2, 11) and plans["desk"].reply[A.format("m.q")] == (7, 11)
    trained = {"desk": adapter(7, 1), "phone": adapter(2, 2)}
    merged = algorithm.merge(
        state,
        1,
        [update("desk", plans["desk"], trained["desk"], 3.0), update("phone", plans["phone"], trained["phone"])],
        Mean(),
    )
    start, desk, phone = dense(adapter(7, 0)), dense(trained["desk"]), dense(trained["phone"])
    sent = dense({name: one for name, one in plans["phone"].arrays.items() if name in plans["phone"].reply})
    for layer, found in dense(algorithm.adapter(merged)).items():
        # The phone says nothing of the directions that it did not get.
        wanted = 0.75 * desk[layer] + 0.25 * (start[layer] + phone[layer] - sent[layer])
        if layer == "m.v":  # rank 7 is all of it
            assert np.allclose(found, wanted, atol=1e-4)
        u, s, vt = np.linalg.svd(wanted)
        assert np.allclose(found, (u[:, :7] * s[:7]) @ vt[:7], atol=1e-4)
    naive = {n: 0.75 * trained["desk"][n] for n in trained["desk"]}
    assert not np.allclose(dense(naive)["m.v"], dense(algorithm.adapter(merged))["m.v"], atol=0.1)


def test_what_a_merge_leaves_out_is_folded_and_nothing_is_lost() -> None:
    algorithm = CoPlms(bits=32, fold_above=0.0, fold_rank=9)
    state = algorithm.start(adapter(2, 0))
    plan = algorithm.plan(state, 1, "a", None)
    trained = [adapter(2, seed) for seed in (1, 2, 3)]
    merged = algorithm.merge(state, 1, [update(str(i), plan, one) for i, one in enumerate(trained)], Mean())
    mean = {layer: np.mean([dense(one)[layer] for one in trained], axis=0) for layer in LAYERS}
    for layer, found in dense(algorithm.adapter(merged)).items():
        assert np.allclose(found, mean[layer], atol=1e-4)
    numbers = shown_in(merged)
    assert 0 < numbers["discarded_energy"] < 1
    assert numbers["folded_energy"] == pytest.approx(numbers["discarded_energy"], rel=1e-4)
    assert algorithm.shared(merged).keys() == adapter(2, 0).keys()
    # Who did round 1 lacks what was folded in it; who did round 2 has it.
    names = [name for name in merged if name.startswith("fold/000001/")]
    assert len(names) == 5, "four factors and their ranks"
    assert set(names) <= algorithm.plan(merged, 2, "a", 1).arrays.keys()
    assert set(names) <= algorithm.plan(merged, 2, "new", None).arrays.keys()
    assert not set(names) & algorithm.plan(merged, 3, "a", 2).arrays.keys()
    # A second fold comes beside the first one.
    again = algorithm.merge(merged, 2, [update("a", algorithm.plan(merged, 2, "a", 1), adapter(2, 9))], Mean())
    expected = {
        layer: dense(adapter(2, 9))[layer] + mean[layer] - dense(algorithm.shared(merged))[layer] for layer in LAYERS
    }
    for layer, found in dense(algorithm.adapter(again)).items():
        assert np.allclose(found, expected[layer], atol=1e-4)


@pytest.mark.parametrize(("above", "rank"), [(1.0, 8), (0.0, 0)])
def test_nothing_is_folded_where_it_is_not_asked_for(above: float, rank: int) -> None:
    algorithm = CoPlms(bits=32, fold_above=above, fold_rank=rank)
    state = algorithm.start(adapter(1, 0))
    plan = algorithm.plan(state, 1, "a", None)
    merged = algorithm.merge(state, 1, [update(d, plan, adapter(1, i)) for i, d in enumerate("abc")], Mean())
    assert shown_in(merged)["discarded_energy"] > 0 and shown_in(merged)["folded_energy"] == 0
    assert not any(name.startswith("fold/") for name in merged)


def test_rounding_loses_nothing_of_what_the_server_has() -> None:
    algorithm = CoPlms(fold_above=1.0)
    state = algorithm.start(adapter(3, 0))
    plan = algorithm.plan(state, 1, "a", None)
    assert plan.codes == {"codes"} and plan.reply.keys() == {"codes", "scales"}
    nothing = {name: np.zeros_like(array) for name, array in adapter(3, 0).items()}
    decoded = plan.decode(algorithm.codes.encode(nothing, dither_seed(1, "up a")))
    merged = algorithm.merge(state, 1, [Update(device="a", arrays=decoded)], Mean())
    for layer, found in dense(algorithm.adapter(merged)).items():
        assert np.allclose(found, dense(adapter(3, 0))[layer], atol=1e-4)


def test_the_merge_is_exact_for_what_was_received() -> None:
    """In 5 bits the mean of B_c A_c - B A is taken with the B A that devices got, to the last digit of float32."""
    algorithm = CoPlms(fold_above=1.0)
    state = algorithm.start(adapter(7, 0))
    had = algorithm.codes.rounded(adapter(7, 0), dither_seed(4, "down"))
    updates, wanted = [], dense(adapter(7, 0))["m.v"]
    for name, seed in (("a", 1), ("b", 2)):
        plan = algorithm.plan(state, 4, name, 3)
        change = {n: array - had[n] for n, array in adapter(7, seed).items()}
        received = plan.decode(algorithm.codes.encode(change, dither_seed(4, f"up {name}")))
        updates.append(Update(device=name, arrays=received))
        after = dense({n: had[n] + received[n] for n in had})["m.v"]
        wanted = wanted + (after - dense(had)["m.v"]) / 2
    merged = algorithm.merge(state, 4, updates, Mean())
    assert np.allclose(dense(algorithm.adapter(merged))["m.v"], wanted, atol=1e-4)


@pytest.mark.parametrize("is_first", [True, False])
def test_a_half_billion_proxys_adapter_takes_at_most_1_5_megabytes_both_ways(is_first: bool) -> None:
    """Rank 8 on q, k, v and o of 24 layers of width 896, keys and values of width 128: 1.08 million numbers.

    Whole messages with names, settings and signature; in the first round the layout travels, later ones follow on one
    that folded.
    """
    shapes = {"q": (896, 896), "k": (128, 896), "v": (128, 896), "o": (896, 896)}
    layer = "base_model.model.model.layers.{}.self_attn.{}_proj"
    rng, big, rest = np.random.default_rng(0), {}, {}
    for index, (name, (num_out, num_in)) in itertools.product(range(24), shapes.items()):
        own = layer.format(index, name)
        for into, rank in ((big, 8), (rest, CoPlms().fold_rank)):
            into[A.format(own)] = rng.standard_normal((rank, num_in)).astype(np.float32)
            into[B.format(own)] = rng.standard_normal((num_out, rank)).astype(np.float32)
    assert sum(array.size for array in big.values()) == 1_081_344
    algorithm, number, since = CoPlms(), 1 if is_first else 2, None if is_first else 1
    state = algorithm.start(big)
    folds = {} if is_first else fold_arrays(1, rest, shapes_of(big), algorithm.codes)
    key = DeviceKey.generate()
    coordinator = Coordinator(
        algorithm,
        Mean(),
        InProcess([]),
        RoundRules(),
        registry=Registry({"kitchen": key.public_key}),
        run_id="0123456789abcdef0123",
        base_digest="b" * 64,
    )
    plan, down = coordinator.task({**state, **folds}, number, "kitchen", since)
    assert set(folds) < plan.arrays.keys() and ("layout" in plan.arrays) == is_first
    change = algorithm.codes.encode(big, dither_seed(number, "up kitchen"))
    told = ("loss", "seconds", "peak_bytes", "held_bytes", "dst_loss", "small_loss", "proxy_loss")
    reply = Reply(
        run_id="0123456789abcdef0123",
        round_number=number,
        device="kitchen",
        arrays=change,
        num_examples=123_456,
        metrics=dict.fromkeys(told, 1.23456e-9),
        base_digest="b" * 64,
    )
    up = encode(sign(reply, key))
    read = coordinator.check(decode(up, Reply), plan).arrays
    assert len(down) + len(up) <= 1_500_000
    for name, array in big.items():
        # Of numbers like these: a tenth, of which nothing stays in the mean over rounds.
        assert np.square(read[name] - array).mean() < 0.01 * np.square(array).mean()


class Half:
    """A cloud that adds one to everything and remembers what it was told."""

    def __init__(self, questions: Sequence[str] = ()) -> None:
        self.questions = questions
        self.told: list[list[NDArray[np.float32]]] = []
        self.folds: list[set[str]] = []
        self.rate_shares: list[float] = []

    @property
    def public(self) -> Sequence[PublicText]:
        return [PublicText("a b c", 1, np.array([2, 2]), True)]

    def start(self) -> dict[str, NDArray[np.float32]]:
        return {"x": np.zeros(2, np.float32)}

    def tune(
        self,
        *,
        proxy: Arrays,
        cloud: Arrays,
        folds: Arrays,
        told: Sequence[NDArray[np.float32]],
        round_number: int,
        rate_share: float = 1.0,
    ) -> CloudTuned:
        self.told.append(list(told))
        self.rate_shares.append(rate_share)
        self.folds.append(set(folds))
        return CloudTuned(
            proxy={n: a + 1 for n, a in proxy.items()}, cloud={n: a + 1 for n, a in cloud.items()}, shown={"loss": 3.0}
        )


def test_likelihoods_go_to_the_clouds_half_and_adapters_into_the_merge() -> None:
    half = Half()
    cloud = CloudSettings(model="big", public="p.jsonl")
    algorithm = CoPlms(bits=32, channels={"watch": "likelihoods"}, cloud=cloud, cloud_half=half, fold_above=1.0)
    state = algorithm.start(adapter(2, 0))
    watch, desk = algorithm.plan(state, 1, "watch", None), algorithm.plan(state, 1, "desk", None)
    assert watch.work == "tell_likelihoods" and desk.work == "co_tune" and watch.reply == {"likelihoods": (3,)}
    assert set(watch.arrays) == {"public/texts", "public/sizes", "public/heads"}
    assert algorithm.plan(state, 2, "watch", 1).arrays == {}
    # Devices with the proxy learn from public texts too, which they get once.
    assert set(watch.arrays) < set(desk.arrays)
    assert not set(watch.arrays) & set(algorithm.plan(state, 2, "desk", 1).arrays)
    assert not set(watch.arrays) & set(replace(algorithm, public_share=0.0).plan(state, 1, "desk", None).arrays)
    codes = to_likelihood_codes(np.array([-1.0, -2.0, -0.5], np.float32))
    told = Update(device="watch", arrays=watch.decode({"likelihoods": codes}))
    merged = algorithm.merge(state, 1, [update("desk", desk, adapter(2, 1)), told], Mean())
    (values,) = half.told[0]
    assert np.allclose(values, [-1.0, -2.0, -0.5], atol=0.03)
    assert np.array_equal(merged["cloud/x"], [1, 1]) and shown_in(merged)["loss"] == 3.0
    alone = algorithm.merge(merged, 2, [told], Mean())
    for name, array in algorithm.shared(merged).items():
        assert np.array_equal(alone[name], array + 1)
    assert algorithm.cloud_adapter(alone)["x"].tolist() == [2, 2]
    assert set(algorithm.adapter(alone)) == set(adapter(2, 0))


def test_all_learning_rates_fall_on_devices_and_on_the_server() -> None:
    half, own = Half(), LocalSteps(learning_rate=0.4)
    cloud = CloudSettings(model="big", public="p.jsonl")
    falling = CoPlms(steps=own, bits=32, cloud=cloud, cloud_half=half, rates=CosineRates(num_rounds=2, least=0.5))
    state = falling.start(adapter(2, 0))
    for number, share in ((1, 1.0), (2, 0.75), (3, 0.5), (9, 0.5)):
        plan = falling.plan(state, number, "desk", None)
        rates = {name: plan.settings[f"{name}.learning_rate"] for name in ("dst", "proxy", "small")}
        assert rates == pytest.approx(dict.fromkeys(rates, 0.4 * share))
        # Nothing else does.
        assert plan.settings["loss.tau"] == falling.loss.tau
        state = falling.merge(state, number, [update("desk", plan, adapter(2, number))], Mean())
    assert half.rate_shares == pytest.approx([1.0, 0.75, 0.5, 0.5])
    constant = replace(falling, rates=None).plan(state, 9, "desk", None)
    assert constant.settings["proxy.learning_rate"] == 0.4


def test_open_questions_go_once_to_devices_with_the_proxy() -> None:
    cloud = CloudSettings(model="big", public="p.jsonl", questions="q.jsonl")
    half = Half(["What is a lamp?", "日本?"])
    algorithm = CoPlms(channels={"watch": "likelihoods"}, cloud=cloud, cloud_half=half)
    state = algorithm.start(adapter(2, 0))
    first = algorithm.plan(state, 1, "desk", None)
    assert questions_from_arrays(first.arrays) == ["What is a lamp?", "日本?"]
    assert questions_from_arrays(algorithm.plan(state, 2, "desk", 1).arrays) == []
    assert questions_from_arrays(algorithm.plan(state, 1, "watch", None).arrays) == []
    assert questions_from_arrays(replace(algorithm, public_share=0.0).plan(state, 1, "desk", None).arrays) == []
    with pytest.raises(InputError, match=r"there is no cloud\.model"):
        CloudSettings(questions="q.jsonl")


def test_a_step_without_room_for_an_answer_is_refused() -> None:
    cloud = CloudSettings(model="big", public="p.jsonl", questions="q.jsonl")
    with pytest.raises(InputError, match=r"answering\.share is 0\.5.* of a device, whose public texts are 1;"):
        CoPlms(cloud=cloud, steps=LocalSteps(batch_size=2))
    one = replace(cloud, steps=LocalSteps(batch_size=1))
    with pytest.raises(InputError, match="of the cloud, whose public texts are 1;"):
        CoPlms(cloud=one)
    for changes in (
        {"answering": Answering(share=0.0)},
        {"small_steps": LocalSteps(batch_size=4)},
        {"public_share": 0.0},
    ):
        CoPlms(**({"cloud": cloud, "steps": LocalSteps(batch_size=2)} | changes))  # type: ignore[arg-type]
    CoPlms(cloud=replace(one, questions=""), steps=LocalSteps(batch_size=1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 9}, "bits is 9"),
        ({"proxy_mix": 2.0}, "proxy_mix is 2.0"),
        ({"public_share": -0.1}, "public_share is -0.1"),
        ({"fold_above": -1.0}, "fold_above is -1.0"),
        ({"private_rank": -1}, "private_rank is -1"),
        ({"channels": {"a": "radio"}}, "channels.a is 'radio'"),
        ({"channels": {"a": "likelihoods"}}, "name the cloud's model"),
        ({"devices": {"a": 3}}, "devices.a is 3"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        CoPlms(**options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected both or none"):
        CloudSettings(model="big")


def test_the_first_directions_of_a_device_are_the_strongest() -> None:
    algorithm = CoPlms(bits=32, ranks={"phone": 1}, fold_above=1.0)
    state = algorithm.start(adapter(3, 0))
    plan = algorithm.plan(state, 1, "desk", None)
    merged = algorithm.merge(state, 1, [update("desk", plan, adapter(3, 5))], Mean())
    sent = split_layers(dict(algorithm.plan(merged, 2, "phone", 1).arrays), 1.0)
    for layer, own in sent.items():
        u, s, vt = np.linalg.svd(dense(adapter(3, 5))[layer])
        assert isinstance(own, LoraFactors) and np.allclose(own.product(), s[0] * np.outer(u[:, 0], vt[0]), atol=1e-4)


def test_every_setting_reaches_the_devices() -> None:
    shared, small, private = (LocalSteps(num_steps=number) for number in (1, 2, 3))
    loss = MutualLossConfig(mix=0.25, tau=3.0, gate=ChunkGate(margin=0.1))
    algorithm = CoPlms(
        steps=shared,
        small_steps=small,
        dst_steps=private,
        private_rank=5,
        loss=loss,
        proxy_mix=0.75,
        public_share=0.5,
        answering=Answering(max_new_tokens=3, sure_above=0.25, share=0.75, per_round=9),
        bits=32,
    )
    told = CoTuningSteps.of_settings(algorithm.plan(algorithm.start(adapter(2, 0)), 1, "d", None).settings)
    assert (told.proxy, told.small, told.dst) == (shared, small, private)
    assert (told.private_rank, told.loss, told.proxy_mix, told.public_share, told.bits) == (5, loss, 0.75, 0.5, 32)
    assert told.answering == algorithm.answering
    assert replace(algorithm, gated=False).device_steps.loss == replace(loss, gate=None)
    plain = CoPlms(steps=shared).device_steps
    assert plain.small == plain.dst == shared
    with pytest.raises(InputError, match="says nothing of 'dst"):
        CoTuningSteps.of_settings({name: one for name, one in plain.as_settings().items() if "dst" not in name})
