"""Where the time of a token goes on loopback, part by part, each measured by itself in the cloud's process.

The parts are timed without any concurrency. What a service's token takes beyond their sum is what threads, event
loops and processes cost each other.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from measurement import Spread
from transformers import DynamicCache, PreTrainedModel

from cotune.cloud.stream import CloudStream, StreamConfig
from cotune.device.side_network import open_side_network
from cotune.device.stream import DeviceStream
from cotune.generation.output_basis import OutputBasis
from cotune.generation.protocols import RowWork
from cotune.generation.reference import Personal
from cotune.generation.request import ANSWERS, GenerationRequest
from cotune.generation.sampling import Sampling
from cotune.models.backbone import Backbone
from cotune.plugin import Plugin
from cotune.wire.frames import Frame, Opened, decode, encode

T = TypeVar("T")
Text = tuple[list[int], list[int]]


class Stopwatch:
    """Adds up time by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def time(self, name: str, work: Callable[[], T]) -> T:
        """Do `work` and count its time."""
        started_s = time.perf_counter()
        result = work()
        self.seconds[name] += time.perf_counter() - started_s
        return result


async def measure_parts(backbone: Backbone, plugin: Plugin, texts: Sequence[Text], *, runs: int) -> dict[str, Any]:
    """Milliseconds per kept token of each part, and under `message_bytes` the sizes (up, down) by answer form."""
    personal = Personal(corrector=open_side_network(plugin), output_basis=OutputBasis.from_bytes(plugin.output_basis))
    plain = _without_hooks(backbone.model)
    found: dict[str, list[float]] = defaultdict(list)
    sizes: dict[str, tuple[int, int]] = {}
    for run in range(-1, runs):  # the first warms up
        turn = {
            "step alone, a copy of the model without hooks": _time_steps(_plain_step(plain), texts),
            "step alone, the hooked model with its hooks idle": _time_steps(_plain_step(backbone.model), texts),
            "step with taps": _time_steps(_tapped_step(backbone), texts),
            "engine: hand work to the thread and come back": await _time_hops(),
        }
        for answer in ANSWERS:
            seconds, sizes[answer] = _generate_in_place(backbone, personal, texts, answer)
            turn |= {f"{answer} form: {name}": ms for name, ms in seconds.items()}
        if run >= 0:
            for name, ms in turn.items():
                found[name].append(ms)
    return {**{name: Spread.of(values) for name, values in found.items()}, "message_bytes": sizes}


def _without_hooks(model: PreTrainedModel) -> PreTrainedModel:
    plain = copy.deepcopy(model)
    for module in plain.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return plain


# Starts a sequence; gives a function that reads tokens.
Reader = Callable[[], Callable[[list[int]], object]]


def _plain_step(model: PreTrainedModel) -> Reader:
    def start() -> Callable[[list[int]], object]:
        cache = DynamicCache()

        def read(token_ids: list[int]) -> int:
            with torch.inference_mode():
                logits = model(
                    input_ids=torch.tensor([token_ids]), past_key_values=cache, use_cache=True, logits_to_keep=1
                ).logits
                return int(logits[0, -1].argmax())

        return read

    return start


def _tapped_step(backbone: Backbone) -> Reader:
    def start() -> Callable[[list[int]], object]:
        cursor = backbone.cursor()
        return lambda token_ids: cursor.extend(np.array(token_ids, np.int64)).logits.argmax()

    return start


def _time_steps(reader: Reader, texts: Sequence[Text]) -> float:
    """Milliseconds of a one-token step; prompts are read but not counted."""
    seconds, num_steps = 0.0, 0
    for prompt_ids, generated_ids in texts:
        read = reader()
        read(prompt_ids)
        started_s = time.perf_counter()
        for token in generated_ids[:-1]:
            read([token])
        seconds += time.perf_counter() - started_s
        num_steps += len(generated_ids) - 1
    return 1e3 * seconds / num_steps


async def _time_hops(num: int = 500) -> float:
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(max_workers=1) as thread:
        await loop.run_in_executor(thread, int)
        started_s = time.perf_counter()
        for _ in range(num):
            await loop.run_in_executor(thread, int)
    return 1e3 * (time.perf_counter() - started_s) / num


def _generate_in_place(
    backbone: Backbone, personal: Personal, texts: Sequence[Text], answer: str
) -> tuple[dict[str, float], tuple[int, int]]:
    """Generate with both state machines in turns, blocking, without network or threads.

    Returns:
        Milliseconds per token of each part, and the bytes of the last (answer, step) messages.
    """
    watch = Stopwatch()
    sizes = (0, 0)
    for prompt_ids, generated_ids in texts:
        prompt, longest = np.array(prompt_ids, np.int64), len(generated_ids)
        config = StreamConfig(
            mode="integration",
            schedule="blocking",
            answer=answer,
            top_k=32,
            window=64,
            max_new_tokens=longest,
            sampling=Sampling(),
            stop_token_ids=(),
            gate=None,
        )
        cloud = CloudStream(1, prompt, [], config, personal.output_basis)
        device = DeviceStream(
            GenerationRequest(prompt_ids=prompt, max_new_tokens=longest),
            personal,
            tap_shape=(backbone.description.num_taps, backbone.description.tap_dim),
            schedule="blocking",
            answer=answer,
        )
        device.open_frame()
        device.on_frame(Opened(session=1, pos=len(prompt), ticket=bytes(16)))
        cursor = backbone.cursor(len(prompt))
        while cloud.ended is None:
            plan = cloud.plan(backbone.prompt_chunk)
            work = RowWork(cursor=cursor, token_ids=plan.token_ids, num_outputs=plan.num_outputs)
            (features,) = backbone.extend([work])
            down = watch.time("cloud chooses, quantises taps", partial(cloud.on_step, plan, features, 0.0, 0.0))
            sizes = (sizes[0], len(encode(down[0])))
            while down:
                up = _to_device(watch, device, down)
                sizes = (len(encode(up[0])) if up else sizes[0], sizes[1])
                down = _to_cloud(watch, cloud, up)
    num_tokens = sum(len(generated_ids) for _, generated_ids in texts)
    return {name: 1e3 * seconds / num_tokens for name, seconds in watch.seconds.items()}, sizes


def _to_device(watch: Stopwatch, device: DeviceStream, frames: list[Frame]) -> list[Frame]:
    replies: list[Frame] = []
    for frame in frames:
        data = watch.time("cloud encodes frames", partial(encode, frame))
        arrived = watch.time("device decodes frames", partial(decode, data))
        replies += watch.time("device computes", partial(device.on_frame, arrived))
    return replies


def _to_cloud(watch: Stopwatch, cloud: CloudStream, frames: list[Frame]) -> list[Frame]:
    replies: list[Frame] = []
    for frame in frames:
        data = watch.time("device encodes frames", partial(encode, frame))
        arrived = watch.time("cloud decodes frames", partial(decode, data))
        replies += watch.time("cloud takes the answer", partial(cloud.on_frame, arrived, 0.0))
    return replies
