"""The memory of one device of a federation: predicted from shapes, or measured in a child process.

python reproduce/federated_memory.py --algorithm seed        measures one; other studies start it
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from federated_study import FederatedStudy, make_parser, secret_of

from cotune.data.batches import EncodedExample
from cotune.errors import CotuneError, InputError
from cotune.evaluation.measured_memory import peak_bytes, run_measured
from cotune.evaluation.method_cost import MethodSettings, predict_cost
from cotune.evaluation.model_shape import ModelShape
from cotune.evaluation.workload import Workload
from cotune.federation.algorithms import ALGORITHMS
from cotune.federation.arrays import Arrays
from cotune.federation.backbone_model import BackboneModel, ResidentBackbone
from cotune.federation.coordinator import Coordinator
from cotune.federation.device_agent import DeviceAgent
from cotune.federation.fresh_adapter import fresh_adapter
from cotune.federation.in_process import InProcess, SimulatedDevice
from cotune.federation.run_parts import rule_of
from cotune.federation.signing import DeviceKey, Registry
from cotune.federation.simulation import start_of

NAME = "federated_memory"
TIMEOUT_S = 1800.0
# Of a few MB, what a process touches for the first time by chance can be a third.
NUM_CHILDREN = 3
DEVICE = "device-0"
# Of the child's first work, after which all libraries are loaded.
WARM_TOKENS = 8
_OPTIONS = (
    "model",
    "dtype",
    "device",
    "threads",
    "num_train",
    "num_server",
    "num_test",
    "local_steps",
    "directions",
    "pool",
    "batch_size",
    "max_length",
    "rank",
)


def parser() -> argparse.ArgumentParser:
    """Of this command."""
    made = make_parser(NAME, __doc__ or "", examples=("--algorithm rolora",))
    made.add_argument("--algorithm", choices=ALGORITHMS, required=True)
    return made


def predicted_bytes(study: FederatedStudy, *, first_order: bool) -> float | None:
    """The most above the weights in a step, from shapes; None for a model whose shapes are not known."""
    args = study.args
    try:
        shape = ModelShape.from_config(study.backbone.model.config.to_dict())
    except InputError:
        return None
    length = max(len(one.input_ids) for one in study.encode(study.texts.devices))
    load = Workload(batch=args.batch_size, length=length, dtype=args.dtype, has_mask=True)
    method = "lora" if first_order else "zeroth_order_lora"
    cost = predict_cost(shape, method, load, MethodSettings(rank=args.rank))
    return float(cost.peak - cost.weights)


def measured_memory(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Of the middle one of some children, by their difference: `peak_bytes` of a device's first round, and
    `inference_bytes` of judging the same texts.

    Raises:
        CotuneError: the child failed.
    """
    options = ["--algorithm", name, "--datasets", *args.datasets]
    for word in _OPTIONS:
        options += [f"--{word.replace('_', '-')}", str(getattr(args, word))]
    if args.data_root:
        options += ["--data-root", str(args.data_root)]
    found = [run_measured([str(Path(__file__)), *options], timeout_s=TIMEOUT_S) for _ in range(NUM_CHILDREN)]
    return sorted(found, key=lambda one: one["peak_bytes"] - one["inference_bytes"])[NUM_CHILDREN // 2]


def measure(study: FederatedStudy, name: str) -> dict[str, int]:
    """Bytes above what is held before. In a child only."""
    args = study.args
    texts = sorted(study.encode(study.texts.devices), key=lambda one: -len(one.input_ids))[: args.batch_size]
    settings = study.settings(seed=0, algorithm=name)
    with ResidentBackbone(study.backbone, fresh_adapter(settings.adapter, study.backbone, seed=0)) as resident:
        start = start_of(resident.arrays, settings)
        short = resident.with_texts([shortened(one) for one in texts])
        short.evaluate(start)
        first_round(study, name, short, start)()
        model = resident.with_texts(texts)
        work = first_round(study, name, model, start)
        return {
            "inference_bytes": peak_bytes(lambda: model.evaluate(start)),
            "peak_bytes": peak_bytes(work),
        }


def shortened(one: EncodedExample) -> EncodedExample:
    """The end of a text, with at least one token before its answer.

    Example:
        >>> import numpy as np
        >>> short = shortened(EncodedExample(np.arange(20), 15))
        >>> short.input_ids.tolist(), short.first_target
        ([12, 13, 14, 15, 16, 17, 18, 19], 3)
    """
    cut = max(0, min(len(one.input_ids) - WARM_TOKENS, one.first_target - 1))
    return EncodedExample(input_ids=one.input_ids[cut:], first_target=one.first_target - cut)


def first_round(study: FederatedStudy, name: str, model: BackboneModel, start: Arrays) -> Callable[[], bytes]:
    """A device's first task, ready to be done; the server's half is done before."""
    secret, key = secret_of(0), DeviceKey.generate()
    settings, digest = study.settings(seed=0, algorithm=name), study.backbone.spec.backbone_digest
    agent = DeviceAgent(DEVICE, model, base_digest=digest, secret=secret, key=key)
    coordinator = Coordinator(
        study.algorithm(name, 1.0, secret),
        rule_of(settings, num_devices=settings.data.num_devices),
        InProcess([SimulatedDevice(agent=agent)]),
        settings.rounds,
        registry=Registry({DEVICE: key.public_key}),
        run_id="memory",
        base_digest=digest,
    )
    _, task = coordinator.task(coordinator.begin(start).state, 1, DEVICE, None)
    return lambda: agent.handle(task)


def main() -> None:
    """Entry point."""
    args = parser().parse_args()
    try:
        print(json.dumps(measure(FederatedStudy(NAME, args), args.algorithm)))
    except CotuneError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
