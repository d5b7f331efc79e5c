"""Resident trainers of co-tuned devices, one process each: `python co_tuning_trainers.py ROOT SECRET_HEX BASE NAME...`.

Device `NAME` has the key `ROOT/NAME.key`, listens in `ROOT/NAME`, and keeps what it learns in `ROOT/kept/NAME`. Its own
model is `ROOT/models/NAME`, the proxy `ROOT/models/proxy`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from co_tuning import domain_texts

from cotune.federation.causal_model import CausalModel
from cotune.federation.co_tuning_device import CoTuningDevice
from cotune.federation.device_agent import DeviceAgent
from cotune.federation.resident_trainer import ResidentTrainer
from cotune.federation.run_secret import RunSecret
from cotune.federation.signing import DeviceKey

SCALE = 8.0


def device_at(root: Path, name: str, folder: Path) -> CoTuningDevice:
    """With two texts."""
    small, proxy = (CausalModel(str(root / "models" / one)) for one in (name, "proxy"))
    return CoTuningDevice(domain_texts("law", 2), small=small, proxy=proxy, folder=folder, scale=SCALE, max_tokens=64)


def agent_of(device: CoTuningDevice, root: Path, name: str, *, secret: RunSecret, base: str) -> DeviceAgent:
    key = DeviceKey.load(root / f"{name}.key")
    return DeviceAgent(name, device, base_digest=base, secret=secret, key=key, works=device.works)


def serve(root: Path, secret: RunSecret, base: str, name: str) -> None:
    device = device_at(root, name, root / "kept" / name)
    with ResidentTrainer(agent_of(device, root, name, secret=secret, base=base), root / name) as trainer:
        trainer.serve_until_signalled()


def main() -> None:
    root, secret, base, *names = sys.argv[1:]
    # Forked after the imports; a pool of threads does not survive a fork.
    torch.set_num_threads(1)
    children = []
    for name in names:
        child = os.fork()
        if child == 0:
            serve(Path(root), RunSecret(bytes.fromhex(secret)), base, name)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
