"""Low-rank modules on the device: the same text as in one process, and the bytes of the paper."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from split_layers import (
    DELTAS,
    STATES,
    DeviceAdapter,
    DeviceLora,
    DeviceModules,
    LayerShape,
    RowCollector,
    SplitCloud,
    SplitGeneration,
    decode_split,
    generate_split,
    local_ask,
    pack_begin,
    pack_rows,
    parse_begin,
    ping,
)
from tiny_models import probe_ids, tiny_backbone

from cotune.errors import FrameError
from cotune.generation.reference import generate
from cotune.generation.request import GenerationRequest
from cotune.models.adapters import LoraAdapter, LoraShape
from cotune.models.anatomy import decoder_layers
from cotune.models.backbone import Backbone
from cotune.wire.emulator import EmulatedConnection, NetworkProfile
from cotune.wire.inprocess import connection_pair

NUM_TOKENS = 12


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone("llama")


def modules_for(backbone: Backbone, method: str, strength: float = 0.5) -> DeviceModules:
    shape = LayerShape.of(backbone.model)
    if method == "lora":
        return DeviceLora.random(shape, rank=4, strength=strength)
    return DeviceAdapter.random(shape, bottleneck=5, strength=strength)


async def over_network(backbone: Backbone, modules: DeviceModules, item_bytes: int) -> SplitGeneration:
    device_end, cloud_end = connection_pair()

    async def serve() -> None:
        try:
            await SplitCloud(backbone).handle(cloud_end)
        finally:
            await cloud_end.close()

    serving = asyncio.create_task(serve())
    connection = EmulatedConnection(device_end, NetworkProfile(delay_ms=1, bandwidth_mbps=100))
    shape = LayerShape.of(backbone.model)
    try:
        return await generate_split(connection, modules, shape, probe_ids(backbone), NUM_TOKENS, item_bytes=item_bytes)
    finally:
        await connection.close()
        await serving


async def test_ping_takes_the_round_trip(backbone: Backbone) -> None:
    device_end, cloud_end = connection_pair()
    serving = asyncio.create_task(SplitCloud(backbone).handle(cloud_end))
    connection = EmulatedConnection(device_end, NetworkProfile(delay_ms=5))
    try:
        seconds = await ping(connection, 2)
    finally:
        await connection.close()
        await serving
    assert len(seconds) == 2
    assert 0.010 <= min(seconds) < 1


def in_one_process(backbone: Backbone, modules: DeviceModules, item_bytes: int) -> list[int]:
    token_ids: list[int] = []
    ask = local_ask(modules, item_bytes)
    stops = backbone.spec.eos_token_ids
    decode_split(backbone, modules.method, ask, probe_ids(backbone), NUM_TOKENS, token_ids.append, stops)
    return token_ids


def base_tokens(backbone: Backbone) -> list[int]:
    request = GenerationRequest(
        prompt_ids=probe_ids(backbone), max_new_tokens=NUM_TOKENS, stop_token_ids=backbone.spec.eos_token_ids
    )
    return generate(backbone, None, request).token_ids


@pytest.mark.parametrize("method", ["lora", "adapter"])
@pytest.mark.parametrize("item_bytes", [2, 4])
async def test_network_gives_the_tokens_of_one_process(backbone: Backbone, method: str, item_bytes: int) -> None:
    modules = modules_for(backbone, method)
    made = await over_network(backbone, modules, item_bytes)
    assert made.token_ids == in_one_process(backbone, modules, item_bytes)
    assert made.token_ids != base_tokens(backbone)
    places = LayerShape.of(backbone.model).num_places(method)
    assert made.counters.num_steps == len(made.token_ids)
    assert made.counters.num_trips == places * len(made.token_ids)
    assert made.counters.stall_ms > 2 * made.counters.num_trips


def test_lora_on_the_device_is_peft_in_the_cloud(backbone: Backbone) -> None:
    shape = LoraShape(rank=4, alpha=8.0, targets=("q_proj", "k_proj", "v_proj"))
    adapter = LoraAdapter.fresh(backbone.model, shape)
    generator = torch.Generator().manual_seed(3)
    for name, tensor in adapter.params.items():
        if ".lora_B." in name:
            tensor.normal_(std=0.3, generator=generator)
    request = GenerationRequest(
        prompt_ids=probe_ids(backbone), max_new_tokens=NUM_TOKENS, stop_token_ids=backbone.spec.eos_token_ids
    )
    with adapter.attach(backbone.model):
        expected = generate(backbone, None, request).token_ids
    params = {name: tensor.numpy() for name, tensor in adapter.params.items()}
    modules = DeviceLora.from_peft(params, backbone.spec.num_layers, scale=2.0)
    assert in_one_process(backbone, modules, 4) == expected
    assert expected != base_tokens(backbone)


def test_adapter_on_the_device_is_houlsbys(backbone: Backbone) -> None:
    modules = modules_for(backbone, "adapter")
    assert isinstance(modules, DeviceAdapter)

    def hook(place: int) -> object:
        a, a_bias, b, b_bias = (torch.from_numpy(part) for part in modules.places[place])
        return lambda module, args, y: y + torch.relu(y @ a.T + a_bias) @ b.T + b_bias

    model = backbone.model
    handles = []
    for i, layer in enumerate(decoder_layers(model)):
        handles.append(layer.self_attn.o_proj.register_forward_hook(hook(2 * i)))
        handles.append(layer.mlp.down_proj.register_forward_hook(hook(2 * i + 1)))
    try:
        ids = torch.from_numpy(probe_ids(backbone))[None]
        expected: list[int] = []
        with torch.inference_mode():
            while len(expected) < NUM_TOKENS and not set(expected) & set(backbone.spec.eos_token_ids):
                expected.append(int(model(input_ids=ids).logits[0, -1].argmax()))
                ids = torch.cat([ids, torch.tensor([[expected[-1]]])], dim=1)
    finally:
        for handle in handles:
            handle.remove()
    assert in_one_process(backbone, modules, 4) == expected


def test_model_is_as_before_afterwards(backbone: Backbone) -> None:
    before = base_tokens(backbone)
    in_one_process(backbone, modules_for(backbone, "lora"), 4)
    in_one_process(backbone, modules_for(backbone, "adapter"), 4)
    assert base_tokens(backbone) == before


@pytest.mark.parametrize("method", ["lora", "adapter"])
async def test_bytes_of_a_token(backbone: Backbone, method: str) -> None:
    made = await over_network(backbone, modules_for(backbone, method), 2)
    down, up = LayerShape.of(backbone.model).bytes_per_token(method)
    gaps = len(made.token_ids) - 1
    assert gaps >= 3
    assert made.bytes_at[-1][0] - made.bytes_at[0][0] == gaps * (down + 16)  # a frame announces each token
    assert made.bytes_at[-1][1] - made.bytes_at[0][1] == gaps * up


def test_bytes_of_llama_7b_are_those_of_the_paper() -> None:
    shape = LayerShape(num_layers=32, hidden_size=4096, q_width=4096, kv_width=4096)
    headers = 32 * 16
    assert shape.bytes_per_token("lora") == (32 * 8192 + headers, 32 * 24576 + headers)
    assert shape.bytes_per_token("adapter") == (64 * 8192 + 2 * headers, 64 * 8192 + 2 * headers)


def test_rows_travel_in_parts_and_come_back_whole() -> None:
    rows = np.random.default_rng(0).standard_normal((300, 3000)).astype(np.float32)
    parts = pack_rows(DELTAS, 5, rows, 4)
    assert len(parts) == 4
    collector = RowCollector(DELTAS, 3000, 300)
    assert [collector.add(part) for part in parts[:-1]] == [None, None, None]
    whole = collector.add(parts[-1])
    assert whole is not None
    assert whole[0] == 5
    assert np.array_equal(whole[1], rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:10], "expected at least 16"),
        (lambda data: bytes([STATES]) + data[1:], "expected 3"),
        (lambda data: data[:-1], "whole rows"),
        (lambda data: data[:8] + b"\x07" + data[9:], "expected row 0"),
        (lambda data: data[:12] + b"\xff\xff\xff\xff" + data[16:], "rows came"),
        (lambda data: data + data[16:], "expected 2"),
    ],
)
def test_damaged_rows_are_refused(change: object, message: str) -> None:
    (data,) = pack_rows(DELTAS, 0, np.ones((2, 4), np.float32), 2)
    with pytest.raises(FrameError, match=message):
        RowCollector(DELTAS, 4, 2).add(change(data))  # type: ignore[operator]


def test_numbers_too_large_for_float16_are_refused() -> None:
    with pytest.raises(FrameError, match="float32"):
        pack_rows(DELTAS, 0, np.full((1, 4), 1e6, np.float32), 2)


def test_begin_comes_back() -> None:
    prompt_ids = np.array([3, 1, 4], np.int64)
    method, item_bytes, num, ids = parse_begin(pack_begin("adapter", 2, 9, prompt_ids))
    assert (method, item_bytes, num, ids.tolist()) == ("adapter", 2, 9, [3, 1, 4])
    with pytest.raises(FrameError, match="for the prompt"):
        parse_begin(pack_begin("lora", 2, 9, prompt_ids)[:-4])
