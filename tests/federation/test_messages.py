"""Tasks and replies as bytes: what comes back, what is refused, and what a digest covers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.errors import FrameError, InputError
from cotune.federation.arrays import digest
from cotune.federation.messages import MAX_ENTRIES, Reply, Task, decode, encode, payload_digest
from cotune.federation.packing import canonical_json, pack, unpack

BASE = "ab" * 32


def some_task(**changes: Any) -> Task:
    given_fields: dict[str, Any] = {
        "run_id": "run-1",
        "round_number": 3,
        "device": "phone.7",
        "work": "train",
        "arrays": {"q.lora_B.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "ids": np.arange(3)},
        "settings": {"lr": 1e-5, "steps": 4, "shuffled": True, "method": "seed", "whole": 1.0},
        "base_digest": BASE,
    }
    return Task(**{**given_fields, **changes})


def some_reply(**changes: Any) -> Reply:
    given_fields: dict[str, Any] = {
        "run_id": "run-1",
        "round_number": 3,
        "device": "phone.7",
        "arrays": {"scalars": np.array([0.5, -1.5, 1e-20], np.float32), "mask": np.array([1, 0], np.uint8)},
        "num_examples": 12,
        "metrics": {"loss": 1e-07, "seconds": 3},
        "base_digest": BASE,
        "signature": bytes(range(64)),
    }
    return Reply(**{**given_fields, **changes})


def test_a_task_comes_back() -> None:
    task = some_task()
    back = decode(encode(task), Task)
    for field in dataclasses.fields(Task):
        if field.name != "arrays":
            assert getattr(back, field.name) == getattr(task, field.name)
    assert digest(back.arrays) == digest(task.arrays)
    assert [type(value) for value in back.settings.values()] == [
        type(task.settings[name]) for name in sorted(task.settings)
    ]
    assert encode(back) == encode(task)


def test_a_reply_comes_back_signed_or_not() -> None:
    for reply in (some_reply(), some_reply(signature=b""), some_reply(arrays={}, metrics={})):
        back = decode(encode(reply), Reply)
        for field in dataclasses.fields(Reply):
            if field.name != "arrays":
                assert getattr(back, field.name) == getattr(reply, field.name)
        assert digest(back.arrays) == digest(reply.arrays)
        assert encode(back) == encode(reply)


def test_the_payload_digest_covers_everything_but_the_signature() -> None:
    reply = some_reply()
    assert payload_digest(some_reply(signature=b"")) == payload_digest(reply)
    assert payload_digest(some_reply(metrics={"seconds": 3.0, "loss": 1e-07})) == payload_digest(reply)
    assert payload_digest(decode(encode(reply), Reply)) == payload_digest(reply)
    changed = [
        some_reply(run_id="run-2"),
        some_reply(round_number=4),
        some_reply(device="phone.8"),
        some_reply(num_examples=13),
        some_reply(metrics={"loss": 2e-07, "seconds": 3}),
        some_reply(base_digest="cd" * 32),
        some_reply(arrays={**reply.arrays, "mask": np.array([1, 1], np.uint8)}),
        some_reply(arrays={}),
    ]
    tasks = [
        some_task(),
        some_task(work="evaluate"),
        some_task(settings={}),
        some_task(settings={"lr": 1}),
        some_task(settings={"lr": 1.0}),
        some_task(settings={"lr": True}),
    ]
    assert len({payload_digest(one) for one in [reply, *changed, *tasks]}) == 1 + len(changed) + len(tasks)


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (some_task, {"run_id": ""}),
        (some_task, {"run_id": "../up"}),
        (some_task, {"device": "a" * 65}),
        (some_task, {"device": "a\n"}),
        (some_task, {"device": 3}),
        (some_task, {"work": ".hidden"}),
        (some_task, {"round_number": -1}),
        (some_task, {"round_number": 2**32}),
        (some_task, {"round_number": True}),
        (some_task, {"round_number": 1.0}),
        (some_task, {"base_digest": BASE.upper()}),
        (some_task, {"base_digest": BASE[:-1]}),
        (some_task, {"settings": {"lr": float("nan")}}),
        (some_task, {"settings": {"lr": 2**63}}),
        (some_task, {"settings": {"lr": None}}),
        (some_task, {"settings": {"lr": b"x"}}),
        (some_task, {"settings": {"a b": 1}}),
        (some_task, {"settings": {"a": "x" * 4097}}),
        (some_task, {"settings": {"a": "\ud800"}}),
        (some_task, {"settings": []}),
        (some_task, {"settings": {f"a{i}": i for i in range(MAX_ENTRIES + 1)}}),
        (some_reply, {"metrics": {"loss": float("inf")}}),
        (some_reply, {"metrics": {"loss": "low"}}),
        (some_reply, {"metrics": {"loss": True}}),
        (some_reply, {"num_examples": -1}),
        (some_reply, {"num_examples": 1.5}),
        (some_reply, {"num_examples": 2**63}),
        (some_reply, {"signature": bytes(63)}),
        (some_reply, {"signature": "x" * 64}),
    ],
)
def test_fields_that_are_no_message_are_refused(make: Callable[..., Any], change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(InputError, match=name):
        make(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "cotune reply 2"}, "'cotune reply 1' was expected"),
        ({"format": None}, "the format None came"),
        ({"format": "cotune task 1"}, "'cotune task 1' came where 'cotune reply 1'"),
        ({"base_digest": "0" * 64}, "base_digest is 'd34d.*, expected 64 hex"),
        ({"base_digest": "?"}, r"base_digest '\?', expected base64"),
        ({"more": 1}, r"differs in its fields .*\['more'\]"),
        ({"device": None}, "device is None"),
        ({"metrics": [1.0]}, "metrics is a list"),
        ({"metrics": {"loss": "0"}}, "metrics has loss"),
        ({"num_examples": "12"}, "num_examples is '12'"),
        ({"signature": "x=z"}, "expected base64"),
        ({"signature": "AB" * 42 + "A/"}, "expected base64"),
        ({"signature": None}, "expected base64"),
        ({"signature": "QUI"}, "expected no byte or 64"),
        ({"check": None}, "altered on the way"),
        ({"check": "0" * 64}, "altered on the way"),
        ({"num_examples": 13}, "altered on the way"),
    ],
)
def test_a_reply_with_another_note_is_refused(change: dict[str, Any], message: str) -> None:
    arrays, note = unpack(encode(some_reply()), "test")
    assert decode(pack(arrays, note, "test"), Reply).num_examples == 12
    with pytest.raises(FrameError, match=message):
        decode(pack(arrays, {**note, **change}, "test"), Reply)


def test_a_missing_field_and_the_other_kind_are_refused() -> None:
    arrays, note = unpack(encode(some_task()), "test")
    del note["work"]
    with pytest.raises(FrameError, match="'work'"):
        decode(pack(arrays, note, "test"), Task)
    with pytest.raises(FrameError, match="'cotune task 1' came where 'cotune reply 1' was"):
        decode(encode(some_task()), Reply)


def test_nan_in_the_note_is_refused() -> None:
    block = encode(some_reply(metrics={"loss": 1.5}, signature=b""))
    assert block.count(b"1.5") == 1
    with pytest.raises(FrameError, match="NaN is not allowed"):
        decode(block.replace(b"1.5", b"NaN"), Reply)


SAMPLE = encode(some_reply())


@settings(max_examples=300, deadline=None)
@given(place=st.integers(0, 8 * len(SAMPLE) - 1))
def test_one_flipped_bit_is_refused(place: int) -> None:
    altered = bytearray(SAMPLE)
    altered[place // 8] ^= 1 << place % 8
    with pytest.raises(FrameError):
        decode(bytes(altered), Reply)


@pytest.mark.parametrize("space", [b"\t", b"\n", b"\r"])
def test_what_json_takes_for_a_space_cannot_stand_for_one(space: bytes) -> None:
    header_end = 8 + int.from_bytes(SAMPLE[:8], "little")
    assert SAMPLE[header_end - 1 : header_end] == b" "
    with pytest.raises(FrameError, match="tabs or ends of lines"):
        decode(SAMPLE[: header_end - 1] + space + SAMPLE[header_end:], Reply)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_truncated_doubled_and_overwritten_bytes_are_refused(data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(SAMPLE) - 1))
    junk = data.draw(st.binary(min_size=1, max_size=16))
    overwritten = SAMPLE[:cut] + junk + SAMPLE[cut + len(junk) :]
    for altered in (SAMPLE[:cut], SAMPLE + junk, SAMPLE[:cut] + junk + SAMPLE[cut:], SAMPLE[cut:] or b"", overwritten):
        if altered != SAMPLE:
            with pytest.raises(FrameError):
                decode(altered, Reply)


@settings(max_examples=60, deadline=None)
@given(
    junk=st.binary(max_size=200),
    header=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["__metadata__", "cotune", "a", "dtype", "shape", "data_offsets"]), inner, max_size=3
            )
        ),
        max_leaves=8,
    ),
)
def test_bytes_from_anywhere_are_refused(junk: bytes, header: object) -> None:
    text = json.dumps(header).encode()
    for block in (junk, len(text).to_bytes(8, "little") + text + junk):
        for kind in (Task, Reply):
            with pytest.raises(FrameError):
                decode(block, kind)


@settings(max_examples=60, deadline=None)
@given(
    note=st.dictionaries(
        st.sampled_from(["format", "base_digest", "run_id", "device", "metrics", "signature", "check", "x"]),
        st.none()
        | st.integers()
        | st.text(max_size=5)
        | st.lists(st.integers(), max_size=2)
        | st.dictionaries(st.text(max_size=3), st.none() | st.integers(), max_size=2),
        max_size=4,
    )
)
def test_any_change_of_the_note_is_refused(note: dict[str, Any]) -> None:
    arrays, own = unpack(SAMPLE, "test")
    changed = {**own, **note}
    if canonical_json(changed) != canonical_json(own):
        with pytest.raises(FrameError):
            decode(pack(arrays, changed, "test"), Reply)


def test_overhead_on_the_wire_is_small() -> None:
    scalars = np.ones(512, np.float32)
    reply = some_reply(arrays={"scalars": scalars}, metrics={"loss": 1.234567890123})
    assert len(encode(reply)) < scalars.nbytes + 800
