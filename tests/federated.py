"""Toy federations: devices of a few numbers, with keys, a secret, and the coordinator over the in-process transport."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from toy_federation import ToyModel, toy_adapter

from cotune.federation.algorithm import Algorithm, Combine, Job
from cotune.federation.array_layout import LAYOUT
from cotune.federation.arrays import Arrays
from cotune.federation.coordinator import Coordinator, Progress, RoundRules
from cotune.federation.descend import descend
from cotune.federation.device_agent import DeviceAgent
from cotune.federation.fedit import FedIT
from cotune.federation.in_process import InProcess, SimulatedDevice
from cotune.federation.local_model import LocalModel, LocalSteps
from cotune.federation.robust.mean import Mean
from cotune.federation.run_secret import RunSecret
from cotune.federation.signing import DeviceKey, Registry
from cotune.federation.works import WORKS

BASE = "b" * 64
RUN = "0123456789abcdef0123"
SECRET = RunSecret(bytes(range(32)))
# A toy has no model of its own beside the shared one: it learns that one alone.
TOY_WORKS = {**WORKS, "co_tune": lambda job: descend(_with_steps(job))}
STEPS = LocalSteps(num_steps=4, batch_size=4, learning_rate=0.1, optimizer="sgd")


def _with_steps(job: Job) -> Job:
    own = {name.removeprefix("proxy."): one for name, one in job.settings.items() if name.startswith("proxy.")}
    arrays = {name: array for name, array in job.arrays.items() if name != LAYOUT}
    return replace(job, arrays=arrays, settings=own | {"trained": "*"})


@dataclass
class ToyFederation:
    """Devices `d0`, `d1`, ... and all that a coordinator needs."""

    num_devices: int = 4
    algorithm: Algorithm = field(default_factory=lambda: FedIT(steps=STEPS))
    rules: RoundRules = field(default_factory=lambda: RoundRules(num_rounds=5))
    combine: Combine = field(default_factory=Mean)
    devices: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By name what is special about a simulated device."""
    tamper: Callable[[str, bytes], bytes] | None = None
    models: Sequence[LocalModel] = ()
    judges: bool = True
    start: Arrays = field(default_factory=lambda: toy_adapter(3, 3, 2))
    judge_model: LocalModel = field(default_factory=lambda: ToyModel.draw(77))
    saved: list[Progress] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.models = self.models or [ToyModel.draw(seed) for seed in range(self.num_devices)]
        self.names = [f"d{index}" for index in range(len(self.models))]
        self.keys = {name: DeviceKey.generate() for name in self.names}
        self.registry = Registry({name: key.public_key for name, key in self.keys.items()})
        self.agents = {name: self._agent(name) for name in self.names}
        simulated = [SimulatedDevice(agent=self.agents[n], **self.devices.get(n, {})) for n in self.names]
        self.transport = InProcess(simulated, tamper=self.tamper)

    def _agent(self, name: str) -> DeviceAgent:
        model = self.models[self.names.index(name)]
        return DeviceAgent(name, model, base_digest=BASE, secret=SECRET, key=self.keys[name], works=TOY_WORKS)

    def restart(self, name: str) -> None:
        """The device forgets what came in earlier rounds."""
        self.replace_agent(self._agent(name))

    def replace_agent(self, agent: DeviceAgent) -> None:
        """Another agent under the same name."""
        self.agents[agent.name] = agent
        self.transport.replace_agent(agent)

    def judge(self, adapter: Arrays) -> float:
        return self.judge_model.evaluate(adapter)[0] / 12

    @property
    def coordinator(self) -> Coordinator:
        return Coordinator(
            self.algorithm,
            self.combine,
            self.transport,
            self.rules,
            registry=self.registry,
            run_id=RUN,
            base_digest=BASE,
            judge=self.judge if self.judges else None,
            save=self.saved.append,
        )

    def run(self, progress: Progress | None = None) -> Progress:
        """All rounds; where the run stands at the end."""
        coordinator = self.coordinator
        start = progress or coordinator.begin(self.start)
        return [start, *coordinator.run(start)][-1]


def same_arrays(one: Arrays, other: Arrays) -> bool:
    """The same bits under the same names."""
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
