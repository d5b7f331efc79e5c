"""A device process that does what it is told: one JSON object a line in, one JSON object a line out.

    python benchmarks/device_process.py PLUGIN URL

    {"do": "generate", "prompts": [...], "options": {"answer": "token"}}    timed generations
    {"do": "echo", "url": ..., "num": 100, "num_bytes": 82}                 round trips of bare messages
    {"do": "modules"}                                                       is PyTorch loaded?

It imports what a device needs and nothing more, so that its times and its memory are a device's. The benchmarks
start it by themselves.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

from timed_generation import generate_timed

from cotune.device.client import CloudClient
from cotune.device.runtime import Device, GenerationOptions
from cotune.plugin import Plugin
from cotune.wire.event_loop import run_coroutine
from cotune.wire.websocket import connect


async def generate(device: Device, client: CloudClient, command: dict[str, Any]) -> dict[str, Any]:
    """One generation for each prompt."""
    options = GenerationOptions(**command["options"])
    made = [await generate_timed(client, device, prompt, options) for prompt in command["prompts"]]
    return {"generations": [one.to_dict() for one in made]}


async def echo(command: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of each round trip."""
    connection = await connect(command["url"])
    round_trips_ms = []
    for _ in range(command["num"]):
        started_s = time.perf_counter()
        await connection.send(bytes(command["num_bytes"]))
        await connection.receive(10.0)
        round_trips_ms.append(1e3 * (time.perf_counter() - started_s))
    await connection.close()
    return {"round_trips_ms": round_trips_ms}


async def serve(plugin: str, url: str) -> None:
    """Do one command after the other."""
    device = Device(Plugin.load(plugin), lambda: connect(url))
    loop = asyncio.get_running_loop()
    async with CloudClient(lambda: connect(url)) as client:
        # In a thread, so that pings are answered while nothing is asked.
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            command = json.loads(line)
            if command["do"] == "generate":
                answer = await generate(device, client, command)
            elif command["do"] == "echo":
                answer = await echo(command)
            else:
                answer = {"torch": "torch" in sys.modules}
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    run_coroutine(serve(sys.argv[1], sys.argv[2]))
