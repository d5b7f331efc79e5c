"""Both state machines of one generation in virtual time, over a network that delays, repeats and cuts."""

from __future__ import annotations

import heapq
import itertools
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
from toy import STOP, TAP_DIM, TAPS, VOCAB, ToyBackbone, toy_basis

from cotune.cloud.branches import BranchingStream, BranchPlan, may_branch
from cotune.cloud.stream import CloudStream, StepPlan, StreamConfig
from cotune.device.drafter import Drafter, LookupDrafter, TextIndex
from cotune.device.stream import DeviceStream
from cotune.generation.gate import Gate
from cotune.generation.protocols import StepFeatures
from cotune.generation.reference import Personal
from cotune.generation.request import GenerationRequest
from cotune.generation.sampling import Sampling
from cotune.wire.frames import Frame, Open, Opened, decode, encode


@dataclass(frozen=True, kw_only=True)
class Weather:
    """How bad the network is. Times in seconds.

    `token_s`: what each token after the first adds to a pass. `device_s`: what the device takes for each frame.
    """

    step_s: float = 0.02
    delay_s: float = 0.025
    jitter_s: float = 0.0
    duplicate: float = 0.0
    cut: float = 0.0
    forgets: float = 0.0
    token_s: float = 0.0
    device_s: float = 0.0


class VirtualRun:
    """Runs one generation to its end; see `run`."""

    def __init__(
        self,
        personal: Personal,
        request: GenerationRequest,
        *,
        schedule: str,
        answer: str,
        top_k: int = 8,
        window: int = 32,
        weather: Weather,
        seed: int = 0,
        detokenize: object = None,
        drafter: Drafter | None = None,
        deadline_ms: int = 0,
        stop_token_ids: tuple[int, ...] = (STOP,),
        max_branches: int = 1,
        free_rows: int = 8,
    ) -> None:
        self.device = DeviceStream(
            request,
            personal,
            tap_shape=(TAPS, TAP_DIM),
            schedule=schedule,
            answer=answer,
            top_k=top_k,
            window=window,
            detokenize=detokenize,  # type: ignore[arg-type]
            drafter=drafter,
            deadline_ms=deadline_ms,
        )
        self.weather = weather
        self.stop_token_ids = stop_token_ids
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self.max_branches = max_branches
        self.free_rows = free_rows
        self.cloud: CloudStream | BranchingStream | None = None
        self.places: Any = None
        self.is_stepping = False
        self.plans: list[StepPlan | BranchPlan] = []
        self.num_cuts = 0
        self._events: list[tuple[float, int, str, object]] = []
        self._order = itertools.count()
        self._arrival = {"to_cloud": 0.0, "to_device": 0.0}
        self._line = 0
        self._cloud_line = 0
        self._device_free_s = 0.0
        self._due_s: float | None = None

    def run(self, max_events: int = 200_000) -> VirtualRun:
        self._send("to_cloud", self.device.open_frame())
        for _ in range(max_events):
            if self.device.is_done:
                return self
            assert self._events, "nothing is under way and the text is not complete"
            self.now_s, _, kind, what = heapq.heappop(self._events)
            getattr(self, "_" + kind)(what)
        raise AssertionError("no end after many events")

    def _at(self, time_s: float, kind: str, what: object) -> None:
        heapq.heappush(self._events, (time_s, next(self._order), kind, what))

    def _send(self, way: str, *frames: Frame) -> None:
        for frame in frames:
            # A transport delivers an Open once: a second one would rightly open a second session.
            is_repeated = self.rng.random() < self.weather.duplicate and not isinstance(frame, Open)
            copies = 2 if is_repeated else 1
            for _ in range(copies):
                delay_s = self.weather.delay_s + self.rng.random() * self.weather.jitter_s
                self._arrival[way] = max(self._arrival[way], self.now_s + delay_s)
                # A cloud that was cut off talks to nobody until its device is back.
                line = self._line if way == "to_cloud" else self._cloud_line
                self._at(self._arrival[way], way, (line, encode(frame)))
        if frames and self.rng.random() < self.weather.cut:
            self._cut()

    def _cut(self) -> None:
        self._line += 1
        self.num_cuts += 1
        self._at(self.now_s + 0.1, "reconnect", self._line)

    def _reconnect(self, line: object) -> None:
        if line == self._line and not self.device.is_done:
            if self.rng.random() < self.weather.forgets:
                self.cloud = None
            self._send("to_cloud", self.device.open_frame())

    def _to_cloud(self, letter: tuple[int, bytes]) -> None:
        line, data = letter
        if line != self._line:
            return
        frame = decode(data)
        if isinstance(frame, Open):
            self._open(frame)
        elif self.cloud is not None:
            self._send("to_device", *self.cloud.on_frame(frame, self.now_s))
        self._go_on()

    def _open(self, frame: Open) -> None:
        generated = frame.generated_ids.tolist()
        self._cloud_line = self._line
        if frame.resume and self.cloud is not None:
            replies = self.cloud.resume(generated, frame.taps_from, self.now_s)
        else:
            config = self._stream_config(frame)
            self.cloud = CloudStream(7, frame.prompt_ids, generated, config, toy_basis())
            if self.max_branches > 1 and may_branch(config):
                self.cloud = BranchingStream(self.cloud, self.max_branches)
            self.places = None
            replies = self.cloud.end_if_finished(self.now_s)
        opened = Opened(session=7, epoch=self.cloud.epoch, pos=self.cloud.num_confirmed, ticket=bytes(16))
        self._send("to_device", opened, *replies)

    def _go_on(self) -> None:
        if self.cloud is None or self.is_stepping:
            return
        if self.cloud.wants_step():
            plan = self.cloud.plan(ToyBackbone.prompt_chunk).within(self.free_rows)
            assert plan is not None
            backbone = ToyBackbone()
            if self.places is None:
                self.places = plan.begin(backbone, self.cloud.num_prompt)
            outputs = backbone.extend(plan.prepare(self.places))
            features = [one for row in outputs for one in row]
            self.is_stepping = True
            self.plans.append(plan)
            step_s = self.weather.step_s + self.weather.token_s * (len(plan.token_ids) - 1)
            self._at(self.now_s + step_s, "stepped", (self.cloud, plan, features, step_s))
        else:
            self.cloud.note_stall(self.now_s)
        if self.cloud.due_s is not None and self.cloud.due_s != self._due_s:
            self._due_s = self.cloud.due_s
            self._at(max(self.now_s, self._due_s), "due", None)

    def _due(self, _: object) -> None:
        self._due_s = None
        if self.cloud is not None:
            self._send("to_device", *self.cloud.on_time(self.now_s))
        self._go_on()

    def _stepped(self, outcome: tuple[Any, Any, list[StepFeatures], float]) -> None:
        cloud, plan, features, step_s = outcome
        self.is_stepping = False
        if cloud is self.cloud:
            self._send("to_device", *cloud.on_step(plan, features, step_s, self.now_s))
        self._go_on()

    def _to_device(self, letter: tuple[int, bytes]) -> None:
        if self.weather.device_s == 0.0:
            self._handled(letter)
            return
        self._device_free_s = max(self._device_free_s, self.now_s) + self.weather.device_s
        self._at(self._device_free_s, "handled", letter)

    def _handled(self, letter: tuple[int, bytes]) -> None:
        line, data = letter
        if line == self._line:
            self._send("to_cloud", *self.device.on_frame(decode(data)))

    def _stream_config(self, frame: Open) -> StreamConfig:
        return _stream_config(frame, self.stop_token_ids)


def _stream_config(frame: Open, stop_token_ids: tuple[int, ...]) -> StreamConfig:
    return StreamConfig(
        mode=frame.mode.name.lower(),
        schedule=frame.schedule.name.lower(),
        answer=frame.answer.name.lower(),
        top_k=frame.top_k,
        window=frame.window,
        max_new_tokens=frame.max_new_tokens,
        sampling=Sampling(temperature=frame.temperature, top_p=frame.top_p, seed=frame.seed),
        stop_token_ids=stop_token_ids,
        gate=Gate.of_frame(frame),
        deadline_s=frame.deadline_ms / 1e3 if frame.deadline_ms else None,
        taps_from=frame.taps_from,
    )


def toy_prompt(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 97, 5)


class KnowingDrafter:
    """Knows the text, and says each token of it with a certain chance, else another one.

    With chance 1 it is perfect, with 0 it is always wrong.
    """

    def __init__(self, text: list[int], chance: float = 1.0, seed: int = 0) -> None:
        self._text = text
        self._chance = chance
        self._rng = random.Random(seed)

    def draft(self, history: list[int], k: int) -> list[int]:
        guesses = self._text[len(history) : len(history) + k]
        return [token if self._rng.random() < self._chance else (token + 1) % VOCAB for token in guesses]


class HostileDrafter:
    """Says anything: too much, too little, tokens that do not exist, ends in the middle, another text each time."""

    def __init__(self, text: list[int], seed: int = 0) -> None:
        self._text = text
        self._rng = random.Random(seed)

    def draft(self, history: list[int], k: int) -> list[int]:
        right = self._text[len(history) : len(history) + self._rng.randrange(k + 1)]
        wrong = self._rng.choices([0, STOP, 5, VOCAB - 1, VOCAB, -1, 2**40], k=self._rng.randrange(4))
        return self._rng.choice([right, wrong, right + wrong, wrong + right, [], (right + wrong) * 50])


def drafter_named(name: str, text: list[int], seed: int = 0) -> Drafter | None:
    """A drafter for a text that is known beforehand; `text` with its prompt."""
    return {
        "own": lambda: None,
        "perfect": lambda: KnowingDrafter(text),
        "half": lambda: KnowingDrafter(text, 0.5, seed),
        "wrong": lambda: KnowingDrafter(text, 0.0),
        "hostile": lambda: HostileDrafter(text, seed),
        "lookup": lambda: LookupDrafter(TextIndex([text[:9], text[5:], text[3:12]]), shortest=1),
    }[name]()
