"""A federation over a real SuperLink with TLS and node authentication, three SuperNodes and three resident trainers.

One run of four rounds tells the whole story, since Flower takes about 6 seconds for a round: the coordinator is killed
in round 2 and goes on, and a SuperNode is killed in round 3. The same run in one process gives the same bits, and so
do a second one, of another algorithm, and a round of devices with models of their own, on what is left of the
deployment. `test_same_weights.py` has all others.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="flwr is not installed; pip install 'cotune[flower]'")

from co_tuning import domain_texts, model_folder, write_texts
from co_tuning_trainers import agent_of, device_at
from federated import BASE, SECRET, STEPS, ToyFederation, same_arrays
from flower_deployment import FlowerDeployment, as_toml, deployment
from toy_federation import toy_adapter

from cotune.federation.arrays import Arrays, digest
from cotune.federation.backbone_model import to_arrays
from cotune.federation.causal_model import CausalModel
from cotune.federation.checkpoint import load_last
from cotune.federation.co_tuning_parts import with_cloud
from cotune.federation.coordinator import Coordinator, Progress, RoundRules
from cotune.federation.device_store import DeviceStore
from cotune.federation.flower.app_folder import AppConfig, write_app
from cotune.federation.flower.server_folder import CHECKPOINTS, ServerFolder
from cotune.federation.in_process import InProcess, SimulatedDevice
from cotune.federation.local_model import LocalSteps
from cotune.federation.progress_checkpoint import load_progress
from cotune.federation.robust.mean import Mean
from cotune.federation.rolora import RoLora
from cotune.federation.run_parts import algorithm_of
from cotune.federation.run_secret import direction_seed
from cotune.federation.seed import SeedMode
from cotune.models.adapters import LoraAdapter, LoraShape

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(sys.platform == "win32", reason="process groups and fork"),
]

NAMES = ["d0", "d1", "d2"]
NUM_ROUNDS = 4
KILL_COORDINATOR, KILL_NODE = 2, 3
SEED_MODE = {"num_directions": 16, "learning_rate": 0.03, "batch_size": 8}


@dataclass(frozen=True)
class Story:
    """What the run left."""

    flower: FlowerDeployment
    simulated: Progress
    """The same rounds in one process, with the same node lost."""
    deployed: Progress
    rounds_at_kill: int
    """Finished rounds when the coordinator was killed."""
    status: str
    """Flower's own verdict on the run that went on."""
    printed: str
    """By its coordinator."""
    second: tuple[Progress, Progress]
    """A run of rolora afterwards: in one process, and deployed."""
    co_tuned: tuple[Progress, Progress]
    """A round of coplms at the end: in one process, and deployed."""
    kept: tuple[list[str], list[str]]
    """Digests of what its devices keep for themselves."""


@pytest.fixture(scope="module")
def story() -> Iterator[Story]:
    with tempfile.TemporaryDirectory(prefix="ct-") as name, deployment(Path(name), NAMES) as flower:
        yield tell(Path(name), flower)


def tell(root: Path, flower: FlowerDeployment) -> Story:
    simulated = simulation()
    for name in NAMES:
        simulated.keys[name].save(root / f"{name}.key")
    flower.start("trainers", "python", str(Path(__file__).parents[1] / "toy_trainers.py"), *trainer_arguments(root))
    flower.start_link()
    flower.make_stranger("stranger")
    for name in [*NAMES, "stranger"]:
        flower.start_node(name)
    # A round ends with its last reply, so a long deadline costs nothing until a node is lost.
    deadline_s = max(30.0, 12 * flower.command_s)
    tables = {
        "data": {"num_judge": 0},
        "options.seed": SEED_MODE,
        "rounds": {"num_rounds": NUM_ROUNDS, "deadline_s": deadline_s, "min_devices": 2},
        "combine": {"rule": "mean"},
    }
    folder = prepare(root / "run", simulated, as_toml(tables, algorithm="seed"))
    write_app(root / "app", AppConfig(folder=str(folder.path)))
    for name in NAMES:
        flower.came_up(name)
        flower.expect(lambda name=name: (root / name / "trainer.sock").exists(), "the trainer listens", "trainers")
    holds = {
        round_number: root / f"hold-d{place}-{round_number}"
        for place, round_number in ((0, KILL_COORDINATOR), (2, KILL_NODE))
    }
    for hold in holds.values():
        hold.touch()
    logs = ("link", *NAMES, "trainers")

    flower.run(root / "app")
    flower.expect((root / f"working-d0-{KILL_COORDINATOR}").exists, "the round begins", *logs)
    flower.kill_server_app()
    rounds_at_kill = last_round(folder)
    holds[KILL_COORDINATOR].unlink()

    second = flower.run(root / "app")
    flower.expect((root / f"working-d2-{KILL_NODE}").exists, "the round begins", *logs)
    flower.kill("d2")
    holds[KILL_NODE].unlink()
    flower.expect(lambda: last_round(folder) == NUM_ROUNDS, "all rounds end", *logs)
    flower.expect(lambda: flower.status(second).startswith("finished"), "the run ends", *logs)
    deployed = load_progress(folder.path / CHECKPOINTS, run_id=folder.run_id, base_digest=BASE)
    status, printed = flower.status(second), flower.printed(second)
    again = run_again(root, flower, simulated, deadline_s)
    flower.kill("trainers")
    co_tuned, kept = co_tune(root, flower, simulated, deadline_s)
    return Story(flower, simulated.run(), deployed, rounds_at_kill, status, printed, again, co_tuned, kept)


def run_again(
    root: Path, flower: FlowerDeployment, first: ToyFederation, deadline_s: float
) -> tuple[Progress, Progress]:
    """Two rounds of rolora, one for each factor, with the two nodes that are left and their trainers, as they are."""
    simulated = ToyFederation(
        num_devices=2, algorithm=RoLora(steps=STEPS), rules=RoundRules(num_rounds=2), judges=False
    )
    tables = {
        "data": {"num_judge": 0},
        "steps": asdict(STEPS),
        "rounds": {"num_rounds": 2, "deadline_s": deadline_s, "min_devices": 2},
        "combine": {"rule": "mean"},
    }
    folder = prepare(root / "run-rolora", first, as_toml(tables, algorithm="rolora"))
    write_app(root / "app-rolora", AppConfig(folder=str(folder.path)))
    started = flower.run(root / "app-rolora")
    flower.expect(lambda: last_round(folder) == 2, "all rounds of rolora end", "link", *NAMES, "trainers")
    flower.expect(lambda: flower.status(started).startswith("finished"), "rolora's run ends", "link")
    return simulated.run(), load_progress(folder.path / CHECKPOINTS, run_id=folder.run_id, base_digest=BASE)


def co_tune(
    root: Path, flower: FlowerDeployment, first: ToyFederation, deadline_s: float
) -> tuple[tuple[Progress, Progress], tuple[list[str], list[str]]]:
    """A round of co-tuned devices, of which d1 tells likelihoods alone, and of a cloud's model; their trainers take the
    places of those that were killed."""
    names, models = NAMES[:2], root / "models"
    for name, family, kind in (("d0", "llama", "nfkc"), ("d1", "gpt2", "byte_level"), ("proxy", "llama", "byte_level")):
        model_folder(models / name, family, kind, seed=len(name))
    cloud_model = model_folder(models / "cloud", "llama", "byte_level", seed=9)
    public = write_texts(root / "public.jsonl", domain_texts("public", 3))
    for name in names:
        (root / name / "trainer.sock").unlink()
    script = str(Path(__file__).parents[1] / "co_tuning_trainers.py")
    flower.start("co-tuned", "python", script, str(root), SECRET.value.hex(), BASE, *names)
    proxy = CausalModel(str(models / "proxy"))
    with proxy.loaded() as model:
        start = to_arrays(LoraAdapter.fresh(model, LoraShape(rank=2)).params)
    steps = LocalSteps(num_steps=1, batch_size=2, learning_rate=5e-3)
    tables = {
        "data": {"num_judge": 0},
        "steps": asdict(steps),
        "adapter": {"rank": 2, "alpha": 16.0},
        "options.coplms": {"private_rank": 1},
        "options.coplms.channels": {"d1": "likelihoods"},
        "options.coplms.cloud": {"model": str(cloud_model), "public": str(public)},
        "options.coplms.cloud.steps": asdict(steps),
        "rounds": {"num_rounds": 1, "deadline_s": deadline_s, "min_devices": 2},
        "combine": {"rule": "mean"},
    }
    toml = as_toml(tables, algorithm="coplms", model=proxy.name)
    folder = prepare(root / "run-coplms", first, toml, start=start)
    write_app(root / "app-coplms", AppConfig(folder=str(folder.path)))
    for name in names:
        flower.expect(lambda name=name: (root / name / "trainer.sock").exists(), "the trainer listens", "co-tuned")
    flower.run(root / "app-coplms")
    devices = {name: device_at(root, name, root / "simulated" / name) for name in names}
    agents = [agent_of(own, root, name, secret=SECRET, base=BASE) for name, own in devices.items()]
    coordinator = Coordinator(
        with_cloud(algorithm_of(folder.settings, SECRET), folder.settings, proxy),
        Mean(),
        InProcess([SimulatedDevice(agent=agent) for agent in agents]),
        RoundRules(num_rounds=1),
        registry=first.registry,
        run_id=folder.run_id,
        base_digest=BASE,
    )
    (simulated,) = coordinator.run(coordinator.begin(start))
    flower.expect(lambda: last_round(folder) == 1, "the round of coplms ends", "link", *names, "co-tuned")
    deployed = load_progress(folder.path / CHECKPOINTS, run_id=folder.run_id, base_digest=BASE)
    kept = tuple(
        [digest_of(DeviceStore(root / place / name / "rounds"), folder.run_id) for name in names]
        for place in ("simulated", "kept")
    )
    return (simulated, deployed), (kept[0], kept[1])


def digest_of(store: DeviceStore, run_id: str) -> str:
    """Of a device's private adapter and small model."""
    found = store.last(run_id)
    assert found is not None
    return digest({name: one.numpy() for name, one in found.items()})


def simulation() -> ToyFederation:
    algorithm = SeedMode(
        seeds=lambda r, k: direction_seed(SECRET, r, k), num_directions=16, learning_rate=0.03, batch_size=8
    )
    # A round takes a simulated second; d2 is gone from the middle of its last round on.
    return ToyFederation(
        num_devices=3,
        algorithm=algorithm,
        rules=RoundRules(num_rounds=NUM_ROUNDS),
        devices={"d2": {"is_up": lambda now_s: now_s < KILL_NODE - 0.5}},
        judges=False,
    )


def prepare(path: Path, simulated: ToyFederation, settings: str, *, start: Arrays | None = None) -> ServerFolder:
    file = path.with_suffix(".toml")
    file.write_text(settings + "options = {}\n")
    return ServerFolder.prepare(
        path,
        file,
        registry=simulated.registry,
        secret=SECRET,
        start=start or toy_adapter(3, 3, 2),
        base_digest=BASE,
    )


def trainer_arguments(root: Path) -> list[str]:
    return [str(root), SECRET.value.hex(), BASE, *NAMES]


def last_round(folder: ServerFolder) -> int:
    last = load_last(folder.path / CHECKPOINTS)
    return -1 if last is None else last.checkpoint.round_number


def test_over_flower_the_arrays_are_those_of_one_process_bit_for_bit(story: Story) -> None:
    assert same_arrays(story.deployed.state, story.simulated.state)
    assert [one.loss for one in story.deployed.records] == [one.loss for one in story.simulated.records]
    assert [one.verdict for one in story.deployed.records] == ["accepted"] * NUM_ROUNDS


def test_another_algorithm_on_the_same_nodes_gives_the_bits_of_one_process_too(story: Story) -> None:
    simulated, deployed = story.second
    assert same_arrays(deployed.state, simulated.state)
    assert [(one.verdict, one.counted) for one in deployed.records] == [("accepted", ["d0", "d1"])] * 2
    assert [one.loss for one in deployed.records] == [one.loss for one in simulated.records]


def test_devices_with_models_of_their_own_learn_the_bits_of_one_process(story: Story) -> None:
    simulated, deployed = story.co_tuned
    (record,) = deployed.records
    assert (record.verdict, record.counted, record.loss) == ("accepted", ["d0", "d1"], simulated.records[0].loss)
    assert same_arrays(deployed.state, simulated.state) and story.kept[0] == story.kept[1]
    # One sent an adapter, the other one what it told of public texts, and the cloud's model learnt from both.
    assert {"codes", "likelihoods"} <= record.bytes_up.keys() and "cloud_loss" in record.shown
    assert any(name.startswith("cloud/") for name in deployed.state)


def test_a_coordinator_that_was_killed_goes_on_along_the_same_curve(story: Story) -> None:
    assert story.rounds_at_kill == KILL_COORDINATOR - 1
    assert [one.counted for one in story.deployed.records[: KILL_NODE - 1]] == [NAMES] * (KILL_NODE - 1)
    assert story.status == "finished:completed"
    assert f"going on after round {KILL_COORDINATOR - 1}" in story.printed


def test_a_node_that_is_killed_in_a_round_costs_that_round_its_reply_and_no_more(story: Story) -> None:
    during, after = story.deployed.records[KILL_NODE - 1 :]
    assert during.asked == NAMES and during.counted == ["d0", "d1"]
    # Lost, or Flower noticed first and said so.
    assert during.lost == ["d2"] or "Flower reports" in during.refused["d2"]
    assert after.counted == ["d0", "d1"]


def test_a_node_that_nobody_registered_is_refused(story: Story) -> None:
    stranger = story.flower.started["stranger"]
    assert stranger.wait(60) != 0
    assert "SuperNode ID" not in story.flower.log("stranger")
