"""The device process that tunes: from the cloud's features to two plugins.

Run as `python -m cotune.cli.demo.tuning FOLDER URL`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from cotune.cli.connection import connector
from cotune.cli.demo.plan import DemoFolder, DemoPlan
from cotune.cli.demo.processes import say
from cotune.cli.run_folder import write_json


def tune(folder: DemoFolder, plan: DemoPlan, url: str) -> dict[str, Any]:
    """Tune the parallel plugin (integration, spa) and the serial one (ladder, separation) on the same features."""
    import torch

    from cotune.data.records import read_examples
    from cotune.data.templates import common_prompt_format
    from cotune.device.features import RemoteFeatureSource
    from cotune.generation.output_basis import OutputBasis
    from cotune.ledger import EgressLedger
    from cotune.tuning.feature_cache import FeatureCache
    from cotune.tuning.gate import GateConfig
    from cotune.tuning.loop import LoopConfig
    from cotune.tuning.personal import PersonalConfig, PublicParts, tune_plugin
    from cotune.tuning.side import SideConfig
    from cotune.wire.frames import AssetKind

    torch.set_num_threads(1)
    examples = read_examples(folder.train)
    found: dict[str, Any] = {"training": [], "gate_curve": []}
    with EgressLedger(folder.ledger) as ledger, RemoteFeatureSource(connector(url, ledger=ledger, way="tune")) as cloud:
        public = PublicParts(
            tokenizer_json=cloud.fetch(AssetKind.TOKENIZER),
            output_basis=OutputBasis.from_bytes(cloud.fetch(AssetKind.OUTPUT_BASIS)),
        )
        cache = FeatureCache(
            folder.features,
            backbone_digest=cloud.description.backbone_digest,
            projections_digest=cloud.description.projections_digest,
        )
        for family, out in (("parallel", folder.plugin), ("serial", folder.serial_plugin)):
            before, started_s = cloud.bytes_received, time.perf_counter()
            result = tune_plugin(
                cloud,
                public,
                examples,
                PersonalConfig(
                    side=SideConfig(
                        loop=LoopConfig(epochs=plan.epochs, learning_rate=plan.learning_rate),
                        family=family,
                        seed=plan.seed,
                    ),
                    gate=GateConfig.for_family(family, seed=plan.seed),
                    max_consult_rate=plan.max_consult_rate,
                    prompt_format=common_prompt_format(examples),
                    seed=plan.seed,
                ),
                cache=cache,
                progress=lambda stage, done, total, note, family=family: say(  # type: ignore[misc]
                    f"{family} plugin: {stage}", done, total, note
                ),
            )
            result.plugin.save(out)
            found[family] = {
                "num_parameters": result.plugin.num_parameters,
                "seconds": time.perf_counter() - started_s,
                "bytes_down": cloud.bytes_received - before,
                "summary": result.summary,
            }
            curve = result.side_curve
            found["training"].append(
                {
                    "name": f"plugin, {family}",
                    "points": [(r.epoch, r.train_loss) for r in curve if r.train_loss is not None],
                    "held_out": [(r.epoch, r.heldout_loss) for r in curve if r.heldout_loss is not None],
                    "unit": "epoch",
                }
            )
            if family == "parallel":
                gate = result.plugin.gate
                found["gate_curve"] = [
                    {
                        "threshold": p.threshold,
                        "M": p.consult_rate,
                        "nats_per_token": p.nats_per_token,
                        "chosen": gate is not None and p.threshold == gate.threshold,
                    }
                    for p in result.gate_curve
                ]
    return found


def main() -> None:
    """Entry point of the process."""
    folder = DemoFolder(Path(sys.argv[1]))
    write_json(folder.result("tuning"), tune(folder, DemoPlan.load(folder.plan), sys.argv[2]))


if __name__ == "__main__":
    main()
