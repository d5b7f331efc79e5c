"""Both sides of a beam search: in virtual time over a network that delays, repeats and cuts, or frame by frame."""

from __future__ import annotations

import heapq
import itertools
import random
from typing import Any

from toy import STOP, TAP_DIM, TAPS, ToyBackbone, toy_basis, toy_personal
from virtual_network import Weather, toy_prompt

from cotune.cloud.beam_stream import BeamPlan, BeamStream
from cotune.cloud.stream import StreamConfig
from cotune.device.beam_stream import BeamDeviceStream
from cotune.generation.beam_cursors import BeamCursors
from cotune.generation.beams import BeamOptions
from cotune.generation.gate import Gate
from cotune.generation.protocols import StepFeatures
from cotune.generation.reference import Personal
from cotune.generation.request import GenerationRequest
from cotune.generation.sampling import Sampling
from cotune.wire.frames import BeamCorrect, BeamStep, Frame, Open, Opened, decode, encode


def toy_cloud(frame: Open) -> BeamStream:
    """What a service makes of an `Open`."""
    config = StreamConfig(
        mode=frame.mode.name.lower(),
        schedule=frame.schedule.name.lower(),
        answer=frame.answer.name.lower(),
        top_k=1,
        window=1,
        max_new_tokens=frame.max_new_tokens,
        sampling=Sampling(),
        stop_token_ids=(STOP,),
        gate=Gate.of_frame(frame),
    )
    options = BeamOptions(num_beams=frame.num_beams, length_penalty=frame.length_penalty)
    return BeamStream(7, frame.prompt_ids, config, options, toy_basis())


class VirtualBeams:
    """One search in virtual time; the sibling of `virtual_network.VirtualRun`.

    Args:
        device: the device's side.
        weather: how bad the network is.
        evicts: how likely the cloud puts the cache out when the device comes back.
    """

    def __init__(self, device: BeamDeviceStream, weather: Weather, *, seed: int = 0, evicts: float = 0.0) -> None:
        self.device = device
        self.weather = weather
        self.evicts = evicts
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self.cloud: BeamStream | None = None
        self.places: BeamCursors | None = None
        self.is_stepping = False
        self.num_cuts = self.num_forgotten = self.num_evicted = 0
        self.num_asking_frames = 0
        self._events: list[tuple[float, int, str, Any]] = []
        self._order = itertools.count()
        self._arrival = {"to_cloud": 0.0, "to_device": 0.0}
        self._line = self._cloud_line = 0

    def run(self) -> VirtualBeams:
        self._send("to_cloud", self.device.open_frame())
        for _ in range(100_000):
            if self.device.is_done:
                return self
            assert self._events, "nothing is under way and the search is not over"
            self.now_s, _, kind, what = heapq.heappop(self._events)
            getattr(self, "_" + kind)(what)
        raise AssertionError("no end after many events")

    def _at(self, time_s: float, kind: str, what: Any) -> None:
        heapq.heappush(self._events, (time_s, next(self._order), kind, what))

    def _send(self, way: str, *frames: Frame) -> None:
        for frame in frames:
            self.num_asking_frames += isinstance(frame, BeamStep) and any(frame.consult)
            is_repeated = self.rng.random() < self.weather.duplicate and not isinstance(frame, Open)
            for _ in range(1 + is_repeated):
                delay_s = self.weather.delay_s + self.rng.random() * self.weather.jitter_s
                self._arrival[way] = max(self._arrival[way], self.now_s + delay_s)
                line = self._line if way == "to_cloud" else self._cloud_line
                self._at(self._arrival[way], way, (line, encode(frame)))
        if frames and self.rng.random() < self.weather.cut:
            self._line += 1
            self.num_cuts += 1
            self._at(self.now_s + 0.1, "reconnect", self._line)

    def _reconnect(self, line: int) -> None:
        if line != self._line or self.device.is_done:
            return
        if self.cloud is not None and self.rng.random() < self.weather.forgets:
            self.num_forgotten += 1
            self.cloud, self.places = None, None
        elif self.cloud is not None and self.rng.random() < self.evicts:
            self.num_evicted += 1
            self.cloud.forget_cache()
            self.places = None
        self._send("to_cloud", self.device.open_frame())

    def _to_cloud(self, letter: tuple[int, bytes]) -> None:
        line, data = letter
        if line != self._line:
            return
        frame = decode(data)
        if isinstance(frame, Open):
            self._cloud_line = line
            replies: list[Frame] = []
            if self.cloud is None or not frame.resume:
                self.cloud, self.places = toy_cloud(frame), None
            else:
                replies = self.cloud.resume(frame.generated_ids.tolist(), 0, self.now_s)
            opened = Opened(session=7, epoch=self.cloud.epoch, pos=self.cloud.num_confirmed, ticket=bytes(16))
            self._send("to_device", opened, *replies)
        elif self.cloud is not None:
            self._send("to_device", *self.cloud.on_frame(frame, self.now_s))
        self._go_on()

    def _go_on(self) -> None:
        cloud = self.cloud
        if cloud is None or self.is_stepping:
            return
        if not cloud.wants_step():
            cloud.note_stall(self.now_s)
            return
        plan = cloud.plan(ToyBackbone.prompt_chunk)
        if self.places is None:
            self.places = plan.begin(ToyBackbone(), cloud.num_prompt)
        features = [one for row in ToyBackbone().extend(plan.prepare(self.places)) for one in row]
        self.is_stepping = True
        self._at(self.now_s + self.weather.step_s, "stepped", (cloud, plan, features))

    def _stepped(self, outcome: tuple[BeamStream, BeamPlan, list[StepFeatures]]) -> None:
        cloud, plan, features = outcome
        self.is_stepping = False
        if cloud is self.cloud and self.places is not None:
            self._send("to_device", *cloud.on_step(plan, features, self.weather.step_s, self.now_s))
        self._go_on()

    def _to_device(self, letter: tuple[int, bytes]) -> None:
        line, data = letter
        if line == self._line:
            self._send("to_cloud", *self.device.on_frame(decode(data)))


def request_of(seed: int, mode: str = "integration", **changes: Any) -> GenerationRequest:
    return GenerationRequest(
        prompt_ids=toy_prompt(seed), mode=mode, stop_token_ids=(STOP,), **{"max_new_tokens": 10, **changes}
    )


def device_of(request: GenerationRequest, personal: Personal, options: BeamOptions, **more: Any) -> BeamDeviceStream:
    return BeamDeviceStream(request, personal, options, tap_shape=(TAPS, TAP_DIM), **more)


class Pair:
    """Both sides, frame by frame, without a network."""

    def __init__(self, num_beams: int = 3) -> None:
        self.device = device_of(request_of(2), toy_personal(), BeamOptions(num_beams=num_beams))
        self.cloud = toy_cloud(self.device.open_frame())
        self.places: BeamCursors | None = None
        start = len(self.device.request.prompt_ids)
        self.device.on_frame(Opened(session=7, pos=start, ticket=bytes(16)))

    def step(self) -> BeamStep:
        """Passes until the cloud asks."""
        while True:
            plan = self.cloud.plan(ToyBackbone.prompt_chunk)
            self.places = self.places or plan.begin(ToyBackbone(), self.cloud.num_prompt)
            features = [one for row in ToyBackbone().extend(plan.prepare(self.places)) for one in row]
            for frame in self.cloud.on_step(plan, features, 0.01, 0.0):
                assert isinstance(frame, BeamStep)
                return frame

    def answer(self, step: BeamStep) -> BeamCorrect:
        (correct,) = self.device.on_frame(step)
        assert isinstance(correct, BeamCorrect)
        return correct
