"""A device with its plugin: from a prompt to a personal text, with one call.

Example:
    >>> device = Device(Plugin.load("my-plugin"), lambda: connect("ws://127.0.0.1:7070"))  # doctest: +SKIP
    >>> result = asyncio.run(device.generate("What is my dog called?"))                    # doctest: +SKIP
    >>> result.text                                                                        # doctest: +SKIP
"""

from __future__ import annotations

import copy
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial

from cotune.device.attention_network import MAX_ROLLBACK
from cotune.device.beam_stream import BeamDeviceStream
from cotune.device.client import ClientConfig, CloudClient, Connector
from cotune.device.drafter import Drafter, LookupDrafter, TextIndex
from cotune.device.fallback import Fallback
from cotune.device.offline.drafter import OfflineDrafter, check_same_tokenizer
from cotune.device.offline.writer import OfflineWriter
from cotune.device.reach import CloudReach, ReachConfig
from cotune.device.side_network import gate_of, open_side_network
from cotune.device.stream import DeviceStream
from cotune.errors import InputError, MismatchError
from cotune.generation.beams import BeamCounters, BeamOptions, FinishedBeam, check_beams, check_memory
from cotune.generation.gate import Gate
from cotune.generation.modes import mode_named
from cotune.generation.output_basis import OutputBasis
from cotune.generation.reference import Personal
from cotune.generation.request import ANSWERS, SCHEDULES, Decision, GenerationRequest
from cotune.generation.sampling import Sampling
from cotune.generation.stopping import Ending
from cotune.generation.text import TextCodec
from cotune.plugin import Plugin
from cotune.wire.description import CloudDescription
from cotune.wire.transport import Connection

PROMPT_SLOT = "{prompt}"
# Of a text that ended without the cloud.
_NOTHING_COUNTED: dict[str, object] = dict.fromkeys(
    (
        "num_steps",
        "num_wasted_steps",
        "num_rollbacks",
        "num_more_trips",
        "num_delayed",
        "num_late",
        "num_drafted",
        "num_drafts_kept",
        "cloud_ms",
        "stall_ms",
    ),
    0,
)


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How a device wants its text.

    Attributes:
        mode: what the output is.
        schedule: who waits for whom.
        answer: `correction` (the cloud adds the device's correction) or `token` (the device decides).
        max_new_tokens: stop after this many.
        sampling: greedy or sampled.
        stop_strings: the text ends before the first of these.
        top_k: base logits that each step brings in the token form.
        window: how many tokens the cloud may run ahead.
        deadline_ms: where the device's answer is later than this the cloud goes on with its own token, and marks it;
            0 waits for ever. In the correction form only, where the cloud decides.
        num_beams: search among so many texts for the likeliest, 2 to 8; 1 for no beam search. With schedule blocking or
            gated, where a step waits if any of its beams consults the device.
        length_penalty: of the beam search; above 0 favours long texts.
    """

    mode: str = "integration"
    schedule: str = "optimistic"
    answer: str = "correction"
    max_new_tokens: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    stop_strings: tuple[str, ...] = ()
    top_k: int = 32
    window: int = 64
    deadline_ms: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        mode_named(self.mode)
        if self.schedule not in SCHEDULES:
            raise InputError(f"schedule is {self.schedule!r}, expected one of {', '.join(SCHEDULES)}")
        if self.answer not in ANSWERS:
            raise InputError(f"answer is {self.answer!r}, expected one of {', '.join(ANSWERS)}")
        for name, most in (("top_k", 2**16 - 1), ("window", 2**16 - 1), ("max_new_tokens", 2**32 - 1)):
            if not 1 <= getattr(self, name) <= most:
                raise InputError(f"{name} is {getattr(self, name)}, expected 1 to {most}")
        if not 0 <= self.deadline_ms <= 2**32 - 1:
            raise InputError(f"deadline_ms is {self.deadline_ms}, expected 0 (wait for ever) to {2**32 - 1}")
        if self.deadline_ms and self.answer != "correction":
            raise InputError(
                f"deadline_ms is {self.deadline_ms} with answer {self.answer}, where only the device can decide; "
                "expected 0, or answer correction"
            )
        self._check_beams()

    def _check_beams(self) -> None:
        if self.beams is None:
            return
        check_beams(mode=self.mode, schedule=self.schedule, answer=self.answer, sampling=self.sampling)
        if self.deadline_ms:
            raise InputError(
                f"deadline_ms is {self.deadline_ms} with beams, expected 0: beams wait for their device; leave it out"
            )

    @property
    def beams(self) -> BeamOptions | None:
        """How wide to search; None for no beam search."""
        if self.num_beams == 1:
            return None
        return BeamOptions(num_beams=self.num_beams, length_penalty=self.length_penalty)


@dataclass(frozen=True, kw_only=True)
class DeviceGeneration:
    """A generated text and what it cost.

    Attributes:
        options: as asked for.
        prompt: the text that the backbone saw.
        decisions: each token and who decided it.
        ending: how it ended.
        text: the generated text, up to a stop string.
        pieces: the text of each token.
        wall_s: from the first frame sent to the last received.
        device_s: of these, computing on the device.
        bytes_down, bytes_up: frames received and sent.
        num_certificate_misses: positions whose top-k logits did not prove the token.
        num_reconnects: how often the connection broke and was made anew.
        cloud: what the cloud counted: num_steps, num_wasted_steps, num_rollbacks, num_more_trips, num_delayed,
            num_late, num_drafted, num_drafts_kept, cloud_ms, stall_ms.
        beams: all finished texts of a beam search, the best first.
        beam_counters: how often the device was asked in it; None without beams.
    """

    options: GenerationOptions
    prompt: str
    decisions: list[Decision]
    ending: Ending
    text: str
    pieces: list[str]
    wall_s: float
    device_s: float
    bytes_down: int
    bytes_up: int
    num_certificate_misses: int
    num_reconnects: int
    cloud: dict[str, float]
    beams: tuple[FinishedBeam, ...] = ()
    beam_counters: BeamCounters | None = None

    @property
    def token_ids(self) -> list[int]:
        return [decision.token_id for decision in self.decisions]


class Device:
    """A plugin and the way to its cloud.

    Args:
        plugin: the personal part.
        connector: makes a connection to the cloud.
        config: patience.
    """

    def __init__(self, plugin: Plugin, connector: Connector, config: ClientConfig | None = None) -> None:
        self.plugin = plugin
        self.personal = Personal(
            corrector=open_side_network(plugin),
            output_basis=OutputBasis.from_bytes(plugin.output_basis),
            gate=gate_of(plugin),
        )
        self.text = TextCodec(plugin.tokenizer_json)
        self.make_stream: Callable[..., DeviceStream] = DeviceStream
        self.make_drafter: Callable[[], Drafter] = LookupDrafter
        self._connector = connector
        self._config = config or ClientConfig()

    def with_gate(self, gate: Gate) -> Device:
        """The same device with another gate, such as one that is always shut."""
        other = copy.copy(self)
        other.personal = replace(self.personal, gate=gate)
        return other

    def draft_from(self, texts: Iterable[str]) -> None:
        """Draft from these texts, in the schedules `drafted` and `auto`.

        They stay on this device, but the pieces of them that are drafted go to the cloud.
        """
        index = TextIndex([self.text.encode_text(text) for text in texts])
        self.make_drafter = lambda: LookupDrafter(index)

    def draft_with(self, writer: OfflineWriter) -> None:
        """Draft by an offline model, in the schedules `drafted` and `auto`; what it drafts goes to the cloud.

        Raises:
            MismatchError: it has another tokenizer than the cloud.
        """
        check_same_tokenizer(writer.model, self.plugin.tokenizer_json)
        self.make_drafter = lambda: OfflineDrafter(writer.model, writer.adapter)

    def format_prompt(self, prompt: str) -> str:
        """Put a request into the form that the plugin's training prompts had."""
        template = self.plugin.training.get("prompt_format", PROMPT_SLOT)
        return str(template).replace(PROMPT_SLOT, prompt)

    def request_for(
        self, prompt: str, options: GenerationOptions, stop_token_ids: tuple[int, ...]
    ) -> GenerationRequest:
        """The request that `generate` runs, for the reference engine too."""
        return GenerationRequest(
            prompt_ids=self.text.encode_prompt(prompt),
            mode=options.mode,
            max_new_tokens=options.max_new_tokens,
            sampling=options.sampling,
            stop_token_ids=stop_token_ids,
            stop_strings=options.stop_strings,
        )

    async def generate(
        self,
        prompt: str,
        options: GenerationOptions | None = None,
        on_text: Callable[[str, Decision], None] | None = None,
    ) -> DeviceGeneration:
        """Generate with the cloud.

        Args:
            prompt: the text that the backbone continues; see `format_prompt`.
            options: how.
            on_text: called with each new piece of text and its decision, as they are confirmed.

        Raises:
            MismatchError: the cloud hosts another model than the plugin's.
            InputError: the mode does not fit the plugin.
            WireError: the cloud is not there, refuses or fails.
        """
        options = options or GenerationOptions()
        self.check(options)
        async with CloudClient(self._connector, self._config) as client:
            return await self.generate_with(client, prompt, options, on_text)

    async def generate_with(
        self,
        client: CloudClient,
        prompt: str,
        options: GenerationOptions,
        on_text: Callable[[str, Decision], None] | None = None,
    ) -> DeviceGeneration:
        """As `generate`, on a client that is connected already."""
        self.check(options)
        description = client.description
        self.check_cloud(description)
        stream = self._stream_for(self.request_for(prompt, options, description.stop_token_ids), options)
        return await self._made(client, stream, prompt, options, on_text, partial(client.generate, stream))

    async def generate_anyway(
        self,
        client: CloudClient,
        fallback: Fallback,
        prompt: str,
        options: GenerationOptions,
        on_text: Callable[[str, Decision], None] | None = None,
    ) -> DeviceGeneration:
        """As `generate`, and by an offline model while the cloud is out of reach.

        Args:
            client: need not be connected; see `hasty_client`.
            fallback: the offline model, and what is known of the cloud.
            prompt, options, on_text: as for `generate`.

        Raises:
            InputError: the mode does not fit the plugin, or beams, which need the cloud.
            RefusedError: the cloud is there and cannot serve this text.
            WireError: it is away, and the text has no room in the offline model.
        """
        self.check(options)
        if options.beams is not None:
            raise InputError("num_beams is given with an offline model, expected 1: beams need the cloud throughout")
        stream = self._stream_for(self.request_for(prompt, options, fallback.end_ids), options)
        assert isinstance(stream, DeviceStream)
        return await self._made(client, stream, prompt, options, on_text, partial(fallback.run, client, stream, prompt))

    async def generate_with_fallback(
        self,
        writer: OfflineWriter,
        prompt: str,
        options: GenerationOptions,
        on_text: Callable[[str, Decision], None] | None = None,
        config: ReachConfig | None = None,
    ) -> DeviceGeneration:
        """As `generate`, and by an offline model while the cloud is out of reach, from the first token to the last.

        Args:
            writer: the offline model.
            prompt, options, on_text: as for `generate`.
            config: when the cloud counts as away.

        Raises:
            MismatchError, RefusedError, InputError: as for `generate` and `generate_anyway`.
        """
        fallback = self.fallback_to(writer, config)
        try:
            await fallback.start()
            return await self.generate_anyway(self.hasty_client(), fallback, prompt, options, on_text)
        finally:
            await fallback.reach.close()

    def fallback_to(self, writer: OfflineWriter, config: ReachConfig | None = None) -> Fallback:
        """What goes on where this device's cloud is out of reach; to be started in an event loop, and its reach closed.

        Args:
            writer: the offline model.
            config: when the cloud counts as away.
        """
        return Fallback(
            writer=writer,
            reach=CloudReach(self.greet, config),
            cloud_text=self.text,
            cloud_tokenizer_json=self.plugin.tokenizer_json,
        )

    def hasty_client(self, connector: Connector | None = None) -> CloudClient:
        """A client that gives up at once, for those who know what to do without it."""
        return CloudClient(connector or self._connector, replace(self._config, max_attempts=1, busy_patience_s=0.0))

    async def greet(self) -> tuple[CloudDescription, Connection | None]:
        """Connect to the cloud and hold what it hosts against the plugin; the connection is the caller's to close.

        Raises:
            MismatchError: it hosts another model.
            WireError: it is not there, or refuses.
        """
        client = self.hasty_client()
        description = await client.connect()
        try:
            self.check_cloud(description)
        except MismatchError:
            await client.close()
            raise
        return description, client.let_go()

    async def _made(
        self,
        client: CloudClient,
        stream: DeviceStream | BeamDeviceStream,
        prompt: str,
        options: GenerationOptions,
        on_text: Callable[[str, Decision], None] | None,
        run: Callable[[Callable[[Decision], None] | None], Awaitable[None]],
    ) -> DeviceGeneration:
        """Run the stream and say what came of it."""
        show = None if on_text is None else _Shower(self.text, on_text)
        bytes_before = client.bytes_received, client.bytes_sent
        reconnects_before = client.num_reconnects
        started_s = time.perf_counter()
        await run(show)
        wall_s = time.perf_counter() - started_s
        assert stream.ending is not None
        text = self.text.decode(stream.token_ids)
        return DeviceGeneration(
            options=options,
            prompt=prompt,
            decisions=stream.decisions,
            ending=stream.ending,
            text=text if stream.ending.num_characters is None else text[: stream.ending.num_characters],
            pieces=self.text.pieces(stream.token_ids),
            wall_s=wall_s,
            device_s=stream.device_s,
            bytes_down=client.bytes_received - bytes_before[0],
            bytes_up=client.bytes_sent - bytes_before[1],
            num_certificate_misses=stream.num_certificate_misses,
            num_reconnects=client.num_reconnects - reconnects_before,
            cloud={name: float(str(value)) for name, value in (stream.cloud_counters or _NOTHING_COUNTED).items()},
            beams=stream.beams if isinstance(stream, BeamDeviceStream) else (),
            beam_counters=stream.counters if isinstance(stream, BeamDeviceStream) else None,
        )

    def _stream_for(self, request: GenerationRequest, options: GenerationOptions) -> DeviceStream | BeamDeviceStream:
        # The cloud's, whose projections are the plugin's.
        tap_shape = int(self.plugin.config["num_taps"]), int(self.plugin.config["tap_dim"])
        if options.beams is not None:
            return BeamDeviceStream(
                request,
                self.personal,
                options.beams,
                tap_shape=tap_shape,
                schedule=options.schedule,
                detokenize=self.text.decode,
            )
        return self.make_stream(
            request,
            self.personal,
            tap_shape=tap_shape,
            schedule=options.schedule,
            answer=options.answer,
            top_k=options.top_k,
            window=options.window,
            deadline_ms=options.deadline_ms,
            drafter=self.make_drafter(),
            detokenize=self.text.decode,
        )

    @property
    def default_mode(self) -> str:
        """The mode that always consults this plugin."""
        return "integration" if self.plugin.family == "parallel" else "ladder"

    def check_cloud(self, description: CloudDescription) -> None:
        """Refuse a cloud that hosts another model than the one this plugin was tuned on.

        Raises:
            MismatchError: a digest differs.
        """
        description.check_digests(
            backbone=self.plugin.backbone_digest,
            tokenizer=self.plugin.tokenizer_digest,
            projections=self.plugin.projections_digest,
            basis=self.personal.output_basis.digest,
        )

    def _check_memory(self, options: GenerationOptions) -> None:
        corrector = self.personal.corrector
        if options.beams is not None:
            check_memory(corrector)
        if corrector.reads_every_position and options.window > MAX_ROLLBACK:
            raise InputError(
                f"window is {options.window}, expected at most {MAX_ROLLBACK} with a side network that remembers "
                "earlier positions"
            )

    def check(self, options: GenerationOptions) -> None:
        """Refuse what this plugin cannot do, before anything is sent.

        Raises:
            InputError: the mode belongs to another family, needs a gate that is not there, or more memory than the side
                network has.
        """
        self._check_memory(options)
        mode = mode_named(options.mode)
        if mode.family != self.plugin.family:
            fitting = "ladder or separation" if self.plugin.family == "serial" else "integration or spa"
            raise InputError(
                f"mode {mode.name} needs a plugin of family {mode.family}, and this one is {self.plugin.family}; "
                f"use mode {fitting}, or tune with --family {mode.family}"
            )
        if (mode.is_gated or options.schedule == "gated") and self.personal.gate is None:
            raise InputError(
                f"mode {mode.name} with schedule {options.schedule} needs a gate, and the plugin has none; "
                "tune it again with a gate, or use mode integration with schedule optimistic"
            )


class _Shower:
    """Turns decisions into pieces of text as they come."""

    def __init__(self, text: TextCodec, on_text: Callable[[str, Decision], None]) -> None:
        self._text = text
        self._on_text = on_text
        self._ids: list[int] = []
        self._shown = ""

    def __call__(self, decision: Decision) -> None:
        self._ids.append(decision.token_id)
        text = self._text.decode(self._ids).rstrip("\ufffd")
        piece = text[len(self._shown) :] if text.startswith(self._shown) else ""
        self._shown += piece
        self._on_text(piece, decision)
