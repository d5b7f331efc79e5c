"""A cloud and a device in one script, over an emulated network: tune a plugin on a few texts, then generate with it.

The connection is in this process here; with `cotune.wire.websocket.connect` it is the same code over a network.
"""

import asyncio
import tempfile
import threading
from pathlib import Path

from cotune.cloud.host import HostConfig, host
from cotune.cloud.hosted import HostedModel
from cotune.data import DEMO_PERSONA, persona_split
from cotune.data.templates import Example, common_prompt_format, format_answer, format_request
from cotune.device.features import RemoteFeatureSource
from cotune.device.runtime import Device, GenerationOptions
from cotune.generation.output_basis import OutputBasis
from cotune.models.backbone import Backbone
from cotune.tuning.feature_cache import FeatureCache
from cotune.tuning.loop import LoopConfig
from cotune.tuning.personal import PersonalConfig, PublicParts, tune_plugin
from cotune.tuning.side import SideConfig
from cotune.wire.emulator import EmulatedConnection, NetworkProfile
from cotune.wire.frames import AssetKind
from cotune.wire.websocket import connect


def run_cloud(ready: threading.Event, done: threading.Event, address: list[str]) -> None:
    """Host the built-in model in a thread of its own."""

    def on_ready(url: str) -> None:
        address.append(url)
        ready.set()

    async def run() -> None:
        stop = asyncio.Event()
        model = HostedModel.of(Backbone.from_pretrained("starter"))
        cloud = asyncio.create_task(host(model, HostConfig(port=0), on_ready=on_ready, stop=stop))
        await asyncio.to_thread(done.wait)
        stop.set()
        await cloud

    asyncio.run(run())


ready, done, address = threading.Event(), threading.Event(), []
cloud = threading.Thread(target=run_cloud, args=(ready, done, address))
cloud.start()
try:
    assert ready.wait(60)
    train, heldout = persona_split(DEMO_PERSONA, 0, num_train=60, num_heldout=1)
    examples = [Example(format_request(each.request), format_answer(each.answer)) for each in train]
    with RemoteFeatureSource(lambda: connect(address[0])) as source, tempfile.TemporaryDirectory() as folder:
        public = PublicParts(
            tokenizer_json=source.fetch(AssetKind.TOKENIZER),
            output_basis=OutputBasis.from_bytes(source.fetch(AssetKind.OUTPUT_BASIS)),
        )
        cache = FeatureCache(
            Path(folder),
            backbone_digest=source.description.backbone_digest,
            projections_digest=source.description.projections_digest,
        )
        config = PersonalConfig(
            side=SideConfig(loop=LoopConfig(epochs=4)), prompt_format=common_prompt_format(examples)
        )
        result = tune_plugin(source, public, examples, config, cache=cache)
    print({name: round(value, 3) for name, value in result.summary.items()})

    async def far_away():
        return EmulatedConnection(await connect(address[0]), NetworkProfile(delay_ms=10))

    device = Device(result.plugin, far_away)
    for schedule in ("blocking", "optimistic"):
        options = GenerationOptions(schedule=schedule, max_new_tokens=40)
        made = asyncio.run(device.generate(device.format_prompt(heldout[0].request), options))
        print(f"{schedule:10} {len(made.token_ids) / made.wall_s:6.1f} tokens/s:{made.text}")
finally:
    done.set()
    cloud.join()
