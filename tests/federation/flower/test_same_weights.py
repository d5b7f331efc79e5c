"""Every algorithm gives the same bits over Flower's transport as in one process, also with devices that miss rounds.

Co-tuned devices, which have models of their own, do so with real models, and what they keep for themselves is the same.

Between the coordinator and a device's agent is all that a deployment has but Flower's own programs: the transport and
its records, the client app, the resident trainer's socket, introductions and signatures.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="flwr is not installed; pip install 'cotune[flower]'")

from algorithm_cases import made, start_of
from co_tuning import KINDS as TOKENIZERS
from co_tuning import domain_texts, model_folder
from federated import BASE, RUN, SECRET, ToyFederation, same_arrays
from flower_grid import FakeGrid, Node, identify
from flwr.app import Context, Message, RecordDict
from toy_federation import ToyModel, ToyPrefixModel

from cotune.federation.algorithm import Done, Job, Work
from cotune.federation.algorithms import ALGORITHMS, KINDS
from cotune.federation.arrays import digest
from cotune.federation.backbone_model import to_arrays
from cotune.federation.causal_model import CausalModel
from cotune.federation.cloud_saml import CloudSaml
from cotune.federation.co_tuning_device import CoTuningDevice
from cotune.federation.coordinator import Coordinator, Progress, RoundRules
from cotune.federation.coplms import CloudSettings, CoPlms
from cotune.federation.device_agent import DeviceAgent
from cotune.federation.flower.client_app import app
from cotune.federation.flower.flower_transport import FlowerTransport, Patience
from cotune.federation.in_process import InProcess, SimulatedDevice
from cotune.federation.local_model import LocalSteps
from cotune.federation.resident_trainer import ResidentTrainer
from cotune.federation.robust.mean import Mean
from cotune.federation.signing import DeviceKey, Registry
from cotune.federation.transport import Transport
from cotune.models.adapters import LoraAdapter, LoraShape

# Devices of `coplms` have models of their own: a test of their own has them.
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
def over_flower(agents: Mapping[str, DeviceAgent], registry: Registry) -> Iterator[FlowerTransport]:
    """The devices of a federation behind a grid, each with a number and a folder."""
    identify()
    # Paths of sockets are short.
    with tempfile.TemporaryDirectory(prefix="ct-") as root, ExitStack() as stack:
        nodes = {
            10 + place: stack.enter_context(node(agent, 10 + place, Path(root) / name))
            for place, (name, agent) in enumerate(agents.items())
        }
        transport = FlowerTransport(
            FakeGrid(nodes),  # type: ignore[arg-type]
            registry,
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
    with over_flower(deployed.agents, deployed.registry) as transport:
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


class CoTuned:
    """Two devices of different architectures and tokenizers, and a cloud's model, with what they learn in a folder."""

    def __init__(self, models: Path, folder: Path) -> None:
        self.lock = threading.Lock()
        steps = LocalSteps(num_steps=1, batch_size=2, learning_rate=5e-3)
        proxy, cloud = (CausalModel(str(models / name)) for name in ("proxy", "cloud"))
        with proxy.loaded() as model:
            self.start = to_arrays(LoraAdapter.fresh(model, LoraShape(rank=2)).params)
        settings = CloudSettings(model="cloud", public="public", rank=2, steps=steps)
        public = domain_texts("public", 2)
        half = CloudSaml(settings, cloud=cloud, proxy=proxy, examples=public, proxy_scale=8.0, max_tokens=64)
        self.algorithm = CoPlms(steps=steps, private_rank=1, fold_above=0.0, cloud=settings, cloud_half=half)
        self.devices = {
            name: CoTuningDevice(
                domain_texts(domain, 2),
                small=CausalModel(str(models / name)),
                proxy=proxy,
                folder=folder / name,
                scale=8.0,
                max_tokens=64,
            )
            for name, domain in (("llama", "law"), ("gpt2", "med"))
        }
        keys = {name: DeviceKey.generate() for name in self.devices}
        self.registry = Registry({name: key.public_key for name, key in keys.items()})
        self.agents = {
            name: DeviceAgent(
                name,
                own,
                base_digest=BASE,
                secret=SECRET,
                key=keys[name],
                works={work: self.one_at_a_time(do) for work, do in own.works.items()},
            )
            for name, own in self.devices.items()
        }

    def one_at_a_time(self, do: Work) -> Work:
        """Real devices are processes, and loading a model in transformers is not for two threads."""

        def work(job: Job) -> Done:
            with self.lock:
                return do(job)

        return work

    def run(self, transport: Transport) -> Progress:
        rules = RoundRules(num_rounds=2, deadline_s=WAIT_S, gather_s=WAIT_S, min_devices=2)
        coordinator = Coordinator(
            self.algorithm, Mean(), transport, rules, registry=self.registry, run_id=RUN, base_digest=BASE
        )
        *_, end = coordinator.run(coordinator.begin(self.start))
        return end

    def kept(self) -> dict[str, str]:
        """Digests of each device's private adapter and small model."""
        found = {}
        for name, own in self.devices.items():
            tensors = own.store.last(RUN)
            assert tensors is not None
            found[name] = digest({key: one.numpy() for key, one in tensors.items()})
        return found


def test_co_tuned_models_have_the_same_weights_over_flower_as_in_one_process(tmp_path: Path) -> None:
    for family in ("llama", "gpt2"):
        model_folder(tmp_path / "models" / family, family, TOKENIZERS[family], seed=3)
    for name, seed in (("proxy", 1), ("cloud", 5)):
        model_folder(tmp_path / "models" / name, "llama", "byte_level", seed=seed)
    simulated, deployed = (CoTuned(tmp_path / "models", tmp_path / name) for name in ("simulated", "deployed"))
    expected = simulated.run(InProcess([SimulatedDevice(agent=agent) for agent in simulated.agents.values()]))
    with over_flower(deployed.agents, deployed.registry) as transport:
        found = deployed.run(transport)
    assert [one.refused for one in found.records] == [{}, {}]
    assert same_arrays(found.state, expected.state) and deployed.kept() == simulated.kept()
    for mine, theirs in zip(found.records, expected.records, strict=True):
        assert (mine.verdict, mine.counted) == ("accepted", ["gpt2", "llama"])
        assert (mine.loss, mine.shown, without_framing(mine.bytes_up)) == (
            theirs.loss,
            theirs.shown,
            without_framing(theirs.bytes_up),
        )
    # Both the adapter of the cloud's model and what was folded came a long way.
    assert {"cloud", "fold"} <= {name.partition("/")[0] for name in found.state}
    assert not same_arrays(deployed.algorithm.shared(found.state), deployed.start)


def without_framing(num_bytes: dict[str, int]) -> dict[str, int]:
    return {kind: num for kind, num in num_bytes.items() if kind != "framing"}
