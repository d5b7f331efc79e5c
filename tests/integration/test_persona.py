"""One persona, end to end on the built-in model: learning helps, stays at home, and survives int8.

The plugins are tuned over a real WebSocket from the cloud's features. All that the device ever sends is recorded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from clouds import in_a_thread, restartable
from leak_search import SentBytes, forms
from tiny_models import device_for, random_plugin, tiny_backbone

from cotune.cloud.hosted import HostedModel
from cotune.data import DEMO_PERSONA, persona_split
from cotune.data.assistant_text import Exchange
from cotune.data.templates import TEMPLATES, Example, common_prompt_format
from cotune.device.features import RemoteFeatureSource
from cotune.device.likelihood import base_nats, token_nats
from cotune.device.runtime import Device, DeviceGeneration, GenerationOptions
from cotune.device.side_network import SideNetwork
from cotune.errors import MismatchError
from cotune.generation.output_basis import OutputBasis
from cotune.generation.protocols import Correction
from cotune.generation.request import ANSWERS, SCHEDULES
from cotune.generation.sampling import choose
from cotune.models.backbone import Backbone
from cotune.plugin import Plugin
from cotune.tuning import FeatureCache, GateConfig, LoopConfig, SideConfig
from cotune.tuning.personal import PersonalConfig, PublicParts, encode_examples, tune_plugin
from cotune.wire.codec import quantise
from cotune.wire.frames import AssetKind, Hello, decode
from cotune.wire.recorder import RecordingConnection
from cotune.wire.transport import Connection
from cotune.wire.websocket import connect

pytestmark = pytest.mark.integration

NUM_TRAIN, NUM_HELDOUT, EPOCHS = 72, 12, 6
MODES_OF_FAMILY = {"parallel": ("integration", "spa"), "serial": ("ladder", "separation")}


def as_examples(exchanges: list[Exchange]) -> list[Example]:
    rows = [{"request": exchange.request, "answer": exchange.answer} for exchange in exchanges]
    return [example for row in rows for example in TEMPLATES["request"].render(row)]


@dataclass
class Persona:
    """Two plugins, the way to their cloud, and what the device sent."""

    url: str
    plugins: dict[str, Plugin]
    heldout: list[Example]
    tuning: list[RecordingConnection]
    generation: list[RecordingConnection] = field(default_factory=list)

    async def connect(self) -> Connection:
        self.generation.append(RecordingConnection(await connect(self.url)))
        return self.generation[-1]

    def generate(self, family: str, options: GenerationOptions, prompt: str) -> tuple[DeviceGeneration, list[bytes]]:
        """A text, and the frames that the device sent for it."""
        before = len(self.generation)
        made = asyncio.run(Device(self.plugins[family], self.connect).generate(prompt, options))
        return made, [frame for connection in self.generation[before:] for frame in connection.sent]


@pytest.fixture(scope="module")
def persona(starter: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Persona]:
    train, heldout = (as_examples(part) for part in persona_split(DEMO_PERSONA, 0, NUM_TRAIN, NUM_HELDOUT))
    recorded: list[RecordingConnection] = []
    with in_a_thread(HostedModel.of(starter)) as url:

        async def recording() -> Connection:
            recorded.append(RecordingConnection(await connect(url)))
            return recorded[-1]

        with RemoteFeatureSource(recording) as source:
            public = PublicParts(
                tokenizer_json=source.fetch(AssetKind.TOKENIZER),
                output_basis=OutputBasis.from_bytes(source.fetch(AssetKind.OUTPUT_BASIS)),
            )
            cache = FeatureCache(
                tmp_path_factory.mktemp("features"),
                backbone_digest=source.description.backbone_digest,
                projections_digest=source.description.projections_digest,
            )
            plugins = {
                family: tune_plugin(
                    source,
                    public,
                    train,
                    PersonalConfig(
                        side=SideConfig(loop=LoopConfig(epochs=EPOCHS, learning_rate=3e-3), family=family),
                        gate=GateConfig(loop=LoopConfig(epochs=5, learning_rate=0.01)),
                        prompt_format=common_prompt_format(train),
                    ),
                    cache=cache,
                ).plugin
                for family in MODES_OF_FAMILY
            }
        yield Persona(url, plugins, heldout, recorded)


def test_the_plugin_beats_the_base_model_on_held_out_texts(persona: Persona, starter: Backbone) -> None:
    """Exact nats per token, through the code that generates, from features that came over the socket."""
    device = device_for(persona.plugins["parallel"])
    encoded = encode_examples(persona.plugins["parallel"].tokenizer_json, persona.heldout, starter.description)
    base, personal = [], []
    with RemoteFeatureSource(lambda: connect(persona.url)) as source:
        for example in encoded:
            features = source.features(example.input_ids, example.first_target, starter.spec.vocab_size)
            base.append(base_nats(features))
            personal.append(token_nats(features, device.personal, "integration"))
    before, after = float(np.concatenate(base).mean()), float(np.concatenate(personal).mean())
    print(f"held-out nats per token: {before:.3f} (base), {after:.3f} (plugin)")
    assert after < 0.9 * before


def test_the_device_has_its_say_in_what_is_written(persona: Persona) -> None:
    options = GenerationOptions(max_new_tokens=40)
    made = [persona.generate("parallel", options, example.prompt)[0] for example in persona.heldout[:6]]
    decisions = [decision for each in made for decision in each.decisions]
    share = sum(decision.source == "device" for decision in decisions) / len(decisions)
    print(f"the device changed {share:.1%} of {len(decisions)} tokens")
    assert share > 0


@pytest.mark.parametrize("family", MODES_OF_FAMILY)
def test_no_personal_tensor_is_in_anything_that_was_sent(persona: Persona, family: str) -> None:
    """No 16 bytes of any tensor, in rows or columns, float32, float16 or int8: in tuning, and in every way to generate.

    The gate does travel where the cloud has to apply it, and only there.
    """
    plugin = persona.plugins[family]
    assert plugin.gate is not None and plugin.gate.layer is not None
    gate = plugin.gate.tensors()
    tuning = SentBytes([frame for connection in persona.tuning for frame in connection.sent])
    assert len(tuning) > 10_000
    assert tuning.leaks({**plugin.tensors, **gate}) == []

    prompt = persona.heldout[0].prompt
    for mode in MODES_OF_FAMILY[family]:
        for schedule in SCHEDULES:
            for answer in ANSWERS:
                options = GenerationOptions(mode=mode, schedule=schedule, answer=answer, max_new_tokens=12)
                made, frames = persona.generate(family, options, prompt)
                sent = SentBytes(frames)
                assert len(sent) >= made.bytes_up > 0
                assert sent.leaks(plugin.tensors) == []
                is_sent = mode in ("spa", "separation") or schedule == "gated"
                assert sent.holds_part_of(plugin.gate.weight.tobytes()) == is_sent
                assert sent.holds_part_of(plugin.gate.layer.astype("<f2").tobytes()) == is_sent
                assert bool(sent.leaks(gate)) == is_sent


def test_the_search_finds_what_leaks() -> None:
    """One row or one column of one matrix in any form, amid other bytes, is enough."""
    rng = np.random.default_rng(0)
    tensor = rng.standard_normal((3, 20, 24)).astype(np.float32)
    noise = rng.bytes(3000)
    assert SentBytes([noise]).leaks({"t": tensor}) == []
    for matrix in (tensor[1], tensor[1].T):
        for data in (matrix[4].tobytes(), matrix[4].astype("<f2").tobytes(), quantise(matrix)[0][4].tobytes()):
            sent = SentBytes([noise[:1001], b"head" + data + b"tail", noise[1001:]])
            assert sent.leaks({"t": tensor}), len(data)
    assert SentBytes([noise + tensor[2, 3, :4].tobytes()]).leaks({"t": tensor}) == ["t: rows as float32"]
    # Constant bytes are everywhere and say nothing.
    assert SentBytes([bytes(100)]).leaks({"zero": np.zeros((4, 8), np.float32)}) == []
    assert len(list(forms(tensor))) == 8


def test_int8_taps_change_hardly_any_greedy_token(persona: Persona, starter: Backbone) -> None:
    """On the held-out prompts, at every position of the personal text: the same choice from float32 taps?"""
    plugin = persona.plugins["parallel"]
    network = SideNetwork.from_plugin(plugin)
    device = device_for(plugin)
    basis = device.personal.output_basis
    num_tokens = num_changed = 0
    for example in persona.heldout:
        request = device.request_for(example.prompt, GenerationOptions(), starter.spec.eos_token_ids)
        cursor, tokens = starter.cursor(), request.prompt_ids
        for _ in range(48):
            features = cursor.extend(tokens)
            coarse = network.correct(*quantise(features.taps))
            codes, scale = quantise(network.correct_exactly(features.taps))
            fine = Correction(codes=codes, scale=np.float16(scale))
            token, other = (
                choose(features.logits + basis.delta(correction), request.sampling, cursor.length)
                for correction in (coarse, fine)
            )
            num_tokens += 1
            num_changed += token != other
            if token in starter.spec.eos_token_ids:
                break
            tokens = np.array([token])
    print(f"int8 taps changed {num_changed} of {num_tokens} greedy tokens")
    assert num_tokens > 200
    assert num_changed <= 0.02 * num_tokens


async def test_a_plugin_of_another_backbone_is_refused_before_anything_is_asked(starter: Backbone) -> None:
    """Also where all shapes fit: two models of one architecture with other weights."""
    mine, other = tiny_backbone("llama", seed=0), tiny_backbone("llama", seed=1)
    for tuned_on, hosts in ((mine, other), (starter, mine), (mine, starter)):
        recorded: list[RecordingConnection] = []
        async with restartable(HostedModel.of(hosts)) as cloud:

            async def recording(cloud=cloud, recorded=recorded) -> Connection:  # type: ignore[no-untyped-def]
                recorded.append(RecordingConnection(await cloud.connect()))
                return recorded[-1]

            with pytest.raises(MismatchError, match=r"the plugin was tuned on backbone [0-9a-f]{12} but") as caught:
                await Device(random_plugin(tuned_on, 0.5), recording).generate("Hello")
        assert "\n" not in str(caught.value) and str(caught.value).count("; ") == 1
        # The greeting is all that left: no prompt, no gate.
        assert [type(decode(frame)) for connection in recorded for frame in connection.sent] == [Hello]


def test_a_saved_plugin_is_the_same_plugin(persona: Persona, tmp_path: Path) -> None:
    persona.plugins["parallel"].save(tmp_path / "plugin")
    prompt, options = persona.heldout[1].prompt, GenerationOptions(mode="spa", max_new_tokens=24)
    before, _ = persona.generate("parallel", options, prompt)
    again = asyncio.run(Device(Plugin.load(tmp_path / "plugin"), persona.connect).generate(prompt, options))
    assert again.decisions == before.decisions and again.text == before.text
