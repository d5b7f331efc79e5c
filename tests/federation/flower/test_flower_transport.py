"""Tasks and replies through a grid that does what Flower's was seen to do, half-sent replies included."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

pytest.importorskip("flwr", reason="flwr is not installed; pip install 'cotune[flower]'")

from federated import BASE, RUN, SECRET, STEPS, ToyFederation, same_arrays
from flower_grid import FakeGrid, HalfSent, Node, identify
from flwr.app import Error, Message
from toy_federation import ToyModel, toy_adapter

from cotune.federation.coordinator import Coordinator, Progress, RoundRules
from cotune.federation.device_agent import DeviceAgent
from cotune.federation.fedit import FedIT
from cotune.federation.flower.flower_transport import FlowerTransport, Patience
from cotune.federation.flower.payload import from_records, to_records
from cotune.federation.resident_wire import AnswerKind, RequestKind
from cotune.federation.robust.mean import Mean
from cotune.federation.signing import DeviceKey
from cotune.federation.transport import Arrival, ForgottenError

FAST = Patience(look_s=0.01, introduction_s=5.0, again_s=0.05, settle_s=5.0)
SHORT_S = 1.5


def node_of(agent: DeviceAgent) -> Node:
    """What a node, a client app and a trainer do together."""

    def answer(message: Message) -> Message:
        kind, data = from_records(message.content)
        work = agent.introduce if kind == RequestKind.INTRODUCTION else agent.handle
        try:
            records = to_records(AnswerKind.DONE, work(data))
        except ForgottenError as error:
            records = to_records(AnswerKind.FORGOTTEN, str(error).encode())
        return Message(content=records, reply_to=message)

    return answer


@pytest.fixture(autouse=True)
def identity() -> None:
    identify()


@pytest.fixture
def federation() -> ToyFederation:
    return ToyFederation(num_devices=3, algorithm=FedIT(steps=STEPS), rules=RoundRules(num_rounds=4), judges=False)


def grid_of(federation: ToyFederation) -> FakeGrid:
    return FakeGrid({10 + place: node_of(federation.agents[name]) for place, name in enumerate(federation.names)})


def over(grid: FakeGrid, federation: ToyFederation, *, ttl_s: float = 20.0) -> FlowerTransport:
    return FlowerTransport(
        grid,  # type: ignore[arg-type]
        federation.registry,
        run_id=RUN,
        base_digest=BASE,
        ttl_s=ttl_s,
        patience=FAST,
    )


def rounds(transport: FlowerTransport, federation: ToyFederation, **rules: object) -> Iterator[Progress]:
    coordinator = Coordinator(
        federation.algorithm,
        Mean(),
        transport,
        RoundRules(**{"num_rounds": 4, "deadline_s": 20.0, "gather_s": 20.0, **rules}),  # type: ignore[arg-type]
        registry=federation.registry,
        run_id=RUN,
        base_digest=BASE,
    )
    return coordinator.run(coordinator.begin(toy_adapter(3, 3, 2)))


def arrivals(transport: FlowerTransport, num: int) -> list[Arrival]:
    found: list[Arrival] = []
    ends_s = time.monotonic() + 10
    while len(found) < num and time.monotonic() < ends_s:
        found += transport.receive(0.1)
    return found


def test_rounds_through_a_grid_give_the_bits_of_rounds_in_process(federation: ToyFederation) -> None:
    grid = grid_of(federation)
    transport = over(grid, federation, ttl_s=17.0)
    end = [*rounds(transport, federation, min_devices=3)][-1]
    assert same_arrays(
        end.state,
        ToyFederation(num_devices=3, algorithm=FedIT(steps=STEPS), judges=False, rules=RoundRules(num_rounds=4))
        .run()
        .state,
    )
    assert [one.counted for one in end.records] == [federation.names] * 4
    tasks = [one for one in grid.pushed if one.metadata.message_type == "train"]
    assert len(tasks) == 12 and {one.metadata.ttl for one in tasks} == {17.0}
    introductions = [one for one in grid.pushed if one.metadata.message_type == "query"]
    assert sorted(one.metadata.dst_node_id for one in introductions) == [10, 11, 12], "each is asked once"


def test_half_a_reply_holds_up_its_own_thread_alone(federation: ToyFederation) -> None:
    grid, until = grid_of(federation), threading.Event()
    works = grid.nodes[11]

    def half(message: Message) -> Message | None:
        return works(message) if message.metadata.message_type == "query" else HalfSent(until)

    grid.nodes[11] = half
    transport = over(grid, federation)
    run = rounds(transport, federation, deadline_s=SHORT_S, quorum=0.5, min_devices=3)
    records = [next(run).records[-1] for _ in range(2)]
    until.set()
    for record in records:
        assert (record.verdict, record.counted, record.lost) == ("accepted", ["d0", "d2"], ["d1"])


def test_a_reply_that_never_comes_is_a_loss(federation: ToyFederation) -> None:
    grid = grid_of(federation)
    works = grid.nodes[12]
    grid.nodes[12] = lambda message: works(message) if message.metadata.message_type == "query" else None
    run = rounds(over(grid, federation, ttl_s=SHORT_S), federation, deadline_s=SHORT_S, quorum=0.5, min_devices=3)
    assert next(run).records[-1].lost == ["d2"]


def test_nodes_that_are_no_device_of_the_run_are_left_out(federation: ToyFederation) -> None:
    grid = grid_of(federation)
    impostor = DeviceAgent("d1", ToyModel.draw(0), base_digest=BASE, secret=SECRET, key=DeviceKey.generate())
    stranger = DeviceAgent("d7", ToyModel.draw(0), base_digest=BASE, secret=SECRET, key=DeviceKey.generate())
    foreign = DeviceAgent("d2", ToyModel.draw(0), base_digest="c" * 64, secret=SECRET, key=federation.keys["d2"])
    heard = federation.agents["d1"]
    old = heard.introduce(b'{"run_id": "run-1", "nonce": "' + b"00" * 32 + b'"}')
    grid.nodes = {
        1: grid.nodes[10],
        2: node_of(impostor),
        3: node_of(stranger),
        4: node_of(foreign),
        5: lambda message: Message(content=to_records(AnswerKind.DONE, old), reply_to=message),
        6: lambda message: Message(Error(code=2, reason="it raised"), reply_to=message),
        7: lambda message: Message(content=to_records(AnswerKind.FAILED, b"no trainer"), reply_to=message),
    }
    transport = over(grid, federation)
    assert transport.devices() == ["d0"]
    time.sleep(2 * FAST.again_s)
    # A trainer that was started late is asked again.
    grid.nodes[7] = node_of(federation.agents["d2"])
    transport.devices()
    ends_s = time.monotonic() + 10
    while transport.devices() != ["d0", "d2"] and time.monotonic() < ends_s:
        time.sleep(0.02)
    assert transport.devices() == ["d0", "d2"]


def test_a_node_that_comes_back_under_another_number_takes_its_place(federation: ToyFederation) -> None:
    grid = grid_of(federation)
    transport = over(grid, federation)
    assert transport.devices() == federation.names
    # Flower lists the dead one for a minute more.
    works, grid.nodes[10] = grid.nodes[10], lambda message: None
    grid.nodes[99] = works
    transport.devices()
    ends_s = time.monotonic() + 10
    while transport.nodes["d0"] != 99 and time.monotonic() < ends_s:
        time.sleep(0.02)
    transport.send({"d0": b"no task"})
    while grid.pushed[-1].metadata.message_type != "train" and time.monotonic() < ends_s:
        time.sleep(0.02)
    # It is listed and asked as 99 alone, whether or not the old one is still listed.
    assert transport.devices() == federation.names and grid.pushed[-1].metadata.dst_node_id == 99
    del grid.nodes[10]
    assert transport.devices() == federation.names
    del grid.nodes[99]
    assert transport.devices() == ["d1", "d2"]


def test_what_flower_reports_ends_the_wait(federation: ToyFederation) -> None:
    grid = grid_of(federation)
    transport = over(grid, federation)
    transport.devices()
    grid.nodes[10] = lambda message: Message(Error(code=5, reason="Node Unavailable"), reply_to=message)
    grid.nodes[11] = lambda message: Message(content=to_records(AnswerKind.FORGOTTEN, b"all"), reply_to=message)
    grid.refuses.add(12)
    transport.send({"d0": b"t", "d1": b"t", "d2": b"t", "nobody": b"t"})
    by_device = {one.device: one for one in arrivals(transport, 3)}
    assert "Node Unavailable" in by_device["d0"].error and not by_device["d0"].is_forgotten
    assert by_device["d1"] == Arrival(device="d1", error="all", is_forgotten=True)
    assert "did not take" in by_device["d2"].error
    assert transport.receive(0.05) == []


def test_a_device_that_forgot_is_sent_everything(federation: ToyFederation) -> None:
    grid = grid_of(federation)
    run = rounds(over(grid, federation), federation, min_devices=3)
    next(run)
    federation.restart("d1")
    grid.nodes[11] = node_of(federation.agents["d1"])
    assert next(run).records[-1].counted == federation.names


@pytest.mark.parametrize("num_bytes", [0, 1000, 32 * 1024, 32 * 1024 + 1, 6_000_000])
def test_bytes_of_any_number_come_out_as_they_went_in(num_bytes: int) -> None:
    data = bytes(range(256)) * (num_bytes // 256) + bytes(num_bytes % 256)
    assert from_records(to_records(3, data)) == (3, data)
