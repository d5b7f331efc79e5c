"""Every algorithm gives the same bits over Flower's transport as in one process, also with devices that miss rounds.

Between the coordinator and a device's agent is all that a deployment has but Flower's own programs: the transport and
its records, the client app, the resident trainer's socket, introductions and signatures.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="flwr is not installed; pip install 'cotune[flower]'")

from algorithm_cases import made, start_of
from federated import BASE, RUN, ToyFederation, same_arrays
from flower_grid import FakeGrid, Node, identify
from flwr.app import Context, Message, RecordDict
from toy_federation import ToyModel, ToyPrefixModel

from cotune.federation.algorithms import ALGORITHMS, KINDS
from cotune.federation.coordinator import Progress, RoundRules
from cotune.federation.device_agent import DeviceAgent
from cotune.federation.flower.client_app import app
from cotune.federation.flower.flower_transport import FlowerTransport, Patience
from cotune.federation.resident_trainer import ResidentTrainer

# Devices of `coplms` are models of their own: `test_co_tuning_folder.py` has them.
NAMES = sorted(ALGORITHMS.keys() - {"coplms"})
NUM_DEVICES, NUM_ROUNDS = 5, 3
WAIT_S = 60.0


def federation_of(name: str) -> ToyFederation:
    model = ToyPrefixModel if KINDS.get(name) == "prefix" else ToyModel
    return ToyFederation(
        algorithm=made(name),
        # With this seed a device is away in round 2 and back in round 3, and one comes anew; see below.
        rules=RoundRules(
            num_rounds=NUM_ROUNDS,
            num_devices_per_round=3,
            min_devices=NUM_DEVICES,
            deadline_s=WAIT_S,
            gather_s=WAIT_S,
            seed=43,
        ),
        models=[model.draw(seed) for seed in range(NUM_DEVICES)],
        judges=False,
        start=start_of(name),
    )


def history(federation: ToyFederation) -> list[Progress]:
    coordinator = federation.coordinator
    return [*coordinator.run(coordinator.begin(federation.start))]


@contextmanager
def node(agent: DeviceAgent, number: int, folder: Path) -> Iterator[Node]:
    """A device as Flower sees it: its client app, behind which its trainer listens."""
    context = Context(
        run_id=1, node_id=number, node_config={"trainer": str(folder)}, state=RecordDict(), run_config={}, series_id=1
    )

    def answer(message: Message) -> Message:
        return app(message, context)

    with ResidentTrainer(agent, folder) as trainer:
        thread = threading.Thread(target=trainer.serve)
        thread.start()
        yield answer
        trainer.stop()
        thread.join(WAIT_S)


@contextmanager
def over_flower(federation: ToyFederation) -> Iterator[FlowerTransport]:
    """The devices of the federation behind a grid, each with a number and a folder."""
    identify()
    # Paths of sockets are short.
    with tempfile.TemporaryDirectory(prefix="ct-") as root, ExitStack() as stack:
        nodes = {
            10 + place: stack.enter_context(node(federation.agents[name], 10 + place, Path(root) / name))
            for place, name in enumerate(federation.names)
        }
        transport = FlowerTransport(
            FakeGrid(nodes),  # type: ignore[arg-type]
            federation.registry,
            run_id=RUN,
            base_digest=BASE,
            ttl_s=WAIT_S,
            patience=Patience(look_s=0.01, introduction_s=WAIT_S, settle_s=WAIT_S),
        )
        stack.callback(transport.close)
        yield transport


@pytest.mark.parametrize("name", NAMES)
def test_rounds_over_flower_give_the_bits_of_rounds_in_one_process(name: str) -> None:
    simulated, deployed = federation_of(name), federation_of(name)
    expected = history(simulated)
    with over_flower(deployed) as transport:
        deployed.transport = transport  # type: ignore[assignment]
        found = history(deployed)
    assert len(found) == NUM_ROUNDS
    for one, other in zip(found, expected, strict=True):
        mine, theirs = one.records[-1], other.records[-1]
        assert same_arrays(one.state, other.state)
        assert (mine.verdict, mine.asked, mine.counted) == ("accepted", theirs.asked, theirs.counted)
        assert mine.counted == mine.asked and (mine.loss, mine.shown) == (theirs.loss, theirs.shown)
        # What is measured differs by a digit; what is learnt is as many bytes.
        assert without_framing(mine.bytes_up) == without_framing(theirs.bytes_up)
        assert without_framing(mine.bytes_down) == without_framing(theirs.bytes_down)
    assert not same_arrays(found[-1].state, simulated.algorithm.start(simulated.start)), "something was learnt"


def test_devices_miss_rounds_and_come_back() -> None:
    first, second, third = (set(one.records[-1].asked) for one in history(federation_of("rolora")))
    assert (first & third) - second and third - first - second
    # Both classes of `mixed` are asked.
    assert "d0" in first and first - {"d0"}


def without_framing(num_bytes: dict[str, int]) -> dict[str, int]:
    return {kind: num for kind, num in num_bytes.items() if kind != "framing"}
