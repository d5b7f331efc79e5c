"""One generation with its times: the whole text, and from the first decided token to the last."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from cotune.device.client import CloudClient
from cotune.device.runtime import Device, GenerationOptions
from cotune.device.stream import DeviceStream


@dataclass(frozen=True, kw_only=True)
class TimedGeneration:
    """A generation on the network.

    Attributes:
        token_ids: what came out.
        num_changed: tokens that the device decided otherwise, the last one left out: a roll-back delays the token after
            the one that it changed, so that of the first token lies within `decoding_s` and that of the last does not.
        wall_s: from the first frame sent to the last received.
        decoding_s: from the first decided token to the last: what schedules differ in. The rest of `wall_s` is the
            way there and back of the first and the last frame.
        device_s: computing on the device.
        bytes_down, bytes_up: messages received and sent, without WebSocket framing.
        num_certificate_misses: positions whose top-k logits did not prove the token.
        cloud: the cloud's counters; see `cotune.device.runtime.DeviceGeneration`.
    """

    token_ids: list[int]
    num_changed: int
    wall_s: float
    decoding_s: float
    device_s: float
    bytes_down: int
    bytes_up: int
    num_certificate_misses: int
    cloud: dict[str, float]

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read what `to_dict` gave."""
        return cls(**values)


async def generate_timed(
    client: CloudClient, device: Device, prompt: str, options: GenerationOptions
) -> TimedGeneration:
    """Generate on a connected client, with the calls that `Device.generate_with` makes."""
    description = client.description
    device.check(options)
    device.check_cloud(description)
    stream = DeviceStream(
        device.request_for(prompt, options, description.stop_token_ids),
        device.personal,
        tap_shape=(description.num_taps, description.tap_dim),
        schedule=options.schedule,
        answer=options.answer,
        top_k=options.top_k,
        window=options.window,
    )
    bytes_before = client.bytes_received, client.bytes_sent
    decided_s: list[float] = []
    started_s = time.perf_counter()
    await client.generate(stream, lambda decision: decided_s.append(time.perf_counter()))
    wall_s = time.perf_counter() - started_s
    assert stream.cloud_counters is not None
    return TimedGeneration(
        token_ids=stream.token_ids,
        num_changed=sum(decision.changed for decision in stream.decisions[:-1]),
        wall_s=wall_s,
        decoding_s=decided_s[-1] - decided_s[0],
        device_s=stream.device_s,
        bytes_down=client.bytes_received - bytes_before[0],
        bytes_up=client.bytes_sent - bytes_before[1],
        num_certificate_misses=stream.num_certificate_misses,
        cloud={name: float(str(value)) for name, value in stream.cloud_counters.items()},
    )


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Several generations of one kind together; rates are per kept token, times in milliseconds.

    Attributes:
        tokens_per_s: decided tokens after the first of each text, per second of `decoding_s`.
        text_tokens_per_s: all tokens, per second of `wall_s`.
        step_ms: c, the time of one forward pass on the cloud, the prompt's included. A pass is given up in the middle
            where the device has meanwhile disagreed: at most one for each roll-back, and it counts as half a pass.
        passes_ms: all forward passes, those of rolled back tokens too, per kept token.
        delayed_rate: M, round trips that delayed the text, per token.
        changed_rate: q, tokens that the device changed, per later token, the last of each text left out.
        wasted_rate: cloud steps that were rolled back, per token.
        device_ms: computing on the device, per token.
        stall_ms: the cloud waiting for the device, per token.
    """

    num_tokens: int
    tokens_per_s: float
    text_tokens_per_s: float
    step_ms: float
    passes_ms: float
    delayed_rate: float
    changed_rate: float
    wasted_rate: float
    device_ms: float
    stall_ms: float
    certificate_miss_rate: float
    bytes_down_per_token: float
    bytes_up_per_token: float

    @classmethod
    def of(cls, made: Sequence[TimedGeneration]) -> Totals:
        num_tokens = sum(one.num_tokens for one in made)
        num_later = num_tokens - len(made)

        def counted(name: str) -> float:
            return sum(one.cloud[name] for one in made)

        num_given_up = sum(min(one.cloud["num_rollbacks"], one.cloud["num_wasted_steps"]) for one in made)
        return cls(
            num_tokens=num_tokens,
            tokens_per_s=num_later / sum(one.decoding_s for one in made),
            text_tokens_per_s=num_tokens / sum(one.wall_s for one in made),
            step_ms=counted("cloud_ms") / (counted("num_steps") - num_given_up / 2),
            passes_ms=counted("cloud_ms") / num_tokens,
            delayed_rate=(counted("num_delayed") + counted("num_more_trips")) / num_tokens,
            changed_rate=sum(one.num_changed for one in made) / num_later,
            wasted_rate=counted("num_wasted_steps") / num_tokens,
            device_ms=1e3 * sum(one.device_s for one in made) / num_tokens,
            stall_ms=counted("stall_ms") / num_tokens,
            certificate_miss_rate=sum(one.num_certificate_misses for one in made) / num_tokens,
            bytes_down_per_token=sum(one.bytes_down for one in made) / num_tokens,
            bytes_up_per_token=sum(one.bytes_up for one in made) / num_tokens,
        )
