"""A cloud process that hosts a synthetic model: the real service over a real WebSocket, no PyTorch.

    python benchmarks/synthetic_cloud.py '{"vocab_size": 32000}'

Prints one JSON line with its URL, then serves until it is told to stop. The benchmarks start it by themselves.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from synthetic_model import SyntheticBackbone, SyntheticShape

from cotune.cli.demo.processes import started
from cotune.cli.output import print_json
from cotune.cloud.host import HostConfig, host
from cotune.cloud.hosted import HostedModel
from cotune.wire.event_loop import run_coroutine


@contextmanager
def synthetic_cloud(shape: SyntheticShape, log: Path) -> Iterator[str]:
    """The URL of a cloud in a process of its own, which ends with the block."""
    with started("cloud", [str(Path(__file__).resolve()), json.dumps(asdict(shape))], log) as cloud:
        yield str(cloud.first(timeout_s=60)["url"])


def main() -> None:
    """Entry point of the process."""
    model = HostedModel.of(SyntheticBackbone(SyntheticShape(**json.loads(sys.argv[1]))))
    run_coroutine(host(model, HostConfig(port=0), on_ready=lambda url: print_json({"url": url})))


if __name__ == "__main__":
    main()
