"""Selective layers under each device's budget: "FedSelFT" of the survey, as Sun et al., arXiv 2408.15600.

    device, now and then:   v_cl = ||g_cl||^2, the squared norm of its mean gradient in layer l
    server:                 masks m_c from all known v, by `cotune.federation.layer_choice`, under the budgets
    device, else:           trains the layers of its mask, and sends what has changed in them
    server:                 each layer moves by the combination over those devices that trained it

Symbols: a layer is a block of the model, all adapted matrices with the same number in their names together.

What a device's layers may cost is in the table `budgets`, in bytes, by its name or by a pattern of names; all others
may train everything. A layer costs what its training takes beside the frozen weights: 4 bytes for each number of its
factors, of its gradient and, with AdamW, of both moments. A device sends norms instead of training when it is asked for
the first time, every `refresh_rounds` rounds, and always where its budget holds no layer. Norms count in proportion to
the device's own sum, so nobody has more say by larger gradients; negative ones, which only a liar sends, count as zero.

Robust rules work layer by layer, on the devices that trained it. A layer that too few of them trained for the rule
stays as it is in that round; `min_cover` asks for more of them. Where no layer has enough the round is void. A round is
one call of the rule for each layer, so a bound on one vector of each device, as device-level privacy has it, holds for
each layer and not for all together.

Wire: 4 L bytes up in a round of norms, L layers; else the numbers of the device's layers up. Down, those of the layers
that anybody trained in the last round; all of them to a device that missed one. Memory on the device: its budget,
beside the frozen weights and the adapter; in a round of norms the gradient of all layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.federation.algorithm import Combine, Done, Job, Plan, Setting, Update, mean_of
from cotune.federation.arrays import Arrays
from cotune.federation.descend import shapes_like, steps_as_settings
from cotune.federation.device_table import check_table, of_device
from cotune.federation.layer_choice import choose_layers, shares_of_devices
from cotune.federation.local_model import LocalSteps
from cotune.federation.lora_factors import layer_names
from cotune.federation.number_ranges import check_at_least

# Beside the adapter, the state holds norms (L,), the round that they are of (1,) and the mask (L,) of each device, and
# which layers the last round has changed (L,). No name in an adapter has a slash.
NORMS, MEASURED, MASK = "norms/", "measured/", "mask/"
CHANGED = "layers/changed"


@dataclass(frozen=True, kw_only=True)
class FedSelFT:
    """The server half; `cotune.federation.descend` and `send_layer_norms` are the device's."""

    steps: LocalSteps = field(default_factory=LocalSteps)
    """Of each device in each round."""
    budgets: Mapping[str, int] = field(default_factory=dict)
    """Bytes by device name or pattern, such as `phone-*`; all others train every layer."""
    refresh_rounds: int = 20
    """Rounds after which a device measures its norms anew."""
    num_batches: int = 4
    """Of `steps.batch_size` texts, for the norms."""
    agreement: float = 0.0
    """Lambda: what it costs when two devices differ in a layer, in shares of a device's norms."""
    min_cover: int = 1
    """Devices that each layer should have, where budgets allow."""

    def __post_init__(self) -> None:
        check_table(self.budgets, "budgets", at_least=0)
        check_at_least(1, refresh_rounds=self.refresh_rounds, num_batches=self.num_batches)
        if not 0 <= self.agreement < float("inf"):
            raise InputError(f"agreement is {self.agreement}, expected a finite number of at least 0")
        check_at_least(0, min_cover=self.min_cover)

    def start(self, adapter: Arrays) -> Arrays:
        layer_names(sorted(adapter))
        return dict(adapter) | {CHANGED: np.zeros(len(blocks_of(adapter)), np.float32)}

    def plan(self, state: Arrays, round_number: int, device: str, since: int | None) -> Plan:
        adapter = self.adapter(state)
        blocks = blocks_of(adapter)
        lacks = adapter
        if since is not None and since >= round_number - 1:
            changed = [
                name for is_new, names in zip(state[CHANGED], blocks.values(), strict=True) if is_new for name in names
            ]
            lacks = {name: adapter[name] for name in changed}
        mask = state.get(MASK + device)
        is_old = mask is not None and round_number - int(state[MEASURED + device][0]) >= self.refresh_rounds
        if mask is None or is_old or not mask.any():
            settings: dict[str, Setting] = {"num_batches": self.num_batches, "batch_size": self.steps.batch_size}
            return Plan(work="layer_norms", arrays=lacks, settings=settings, reply={NORMS: (len(blocks),)})
        trained = ",".join(f"{block}.*" for block, is_own in zip(blocks, mask, strict=True) if is_own)
        settings = steps_as_settings(self.steps) | {"trained": trained}
        return Plan(work="descend", arrays=lacks, settings=settings, reply=shapes_like(adapter, trained))

    def merge(self, state: Arrays, round_number: int, updates: Sequence[Update], combine: Combine) -> Arrays:
        blocks = blocks_of(self.adapter(state))
        found = dict(state) | {CHANGED: np.zeros(len(blocks), np.float32)}
        told = [one for one in updates if NORMS in one.arrays]
        for one in told:
            found[NORMS + one.device] = np.maximum(one.arrays[NORMS], 0)
            found[MEASURED + one.device] = np.array([round_number], np.float32)
        if told:
            found |= self._masks(found, blocks)
        refusal, num_moved = None, 0
        for index, names in enumerate(blocks.values()):
            trainers = [one for one in updates if names[0] in one.arrays]
            if not trainers:
                continue
            try:
                change = mean_of(trainers, combine, names)
            except InputError as error:
                # Too few of them for the rule.
                refusal = error
                continue
            found |= {name: state[name] + change[name] for name in names}
            found[CHANGED][index] = 1
            num_moved += 1
        if refusal is not None and not num_moved and not told:
            raise refusal
        return found

    def adapter(self, state: Arrays) -> dict[str, NDArray[np.float32]]:
        return {name: array for name, array in state.items() if "/" not in name}

    def _masks(self, state: Arrays, blocks: Mapping[str, Sequence[str]]) -> dict[str, NDArray[np.float32]]:
        """The masks of all devices whose norms are known."""
        devices = sorted(name.removeprefix(NORMS) for name in state if name.startswith(NORMS))
        values = shares_of_devices(np.stack([state[NORMS + device] for device in devices]))
        num_copies = 4 if self.steps.optimizer == "adamw" else 2
        costs = [4 * num_copies * sum(state[name].size for name in names) for names in blocks.values()]
        limits = [of_device(self.budgets, device) for device in devices]
        budgets = [sum(costs) if limit is None else limit for limit in limits]
        cover = min(self.min_cover, len(devices))
        masks = choose_layers(values, costs, budgets, agreement=self.agreement, min_cover=cover).masks
        return {MASK + device: mask.astype(np.float32) for device, mask in zip(devices, masks, strict=True)}


def blocks_of(names: Iterable[str]) -> dict[str, list[str]]:
    """The names of each layer's arrays, by what stands up to the first number; all sorted, layers by that number.

    Example:
        >>> blocks_of(["h.10.q.lora_A.weight", "h.2.v.lora_A.weight", "h.2.q.lora_A.weight"])
        {'h.2': ['h.2.q.lora_A.weight', 'h.2.v.lora_A.weight'], 'h.10': ['h.10.q.lora_A.weight']}
    """
    found: dict[tuple[str, int], list[str]] = {}
    for name in sorted(names):
        parts = name.split(".")
        at = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
        if at is None:
            # A matrix outside all blocks is a layer of its own.
            found.setdefault((name.partition(".lora_")[0], -1), []).append(name)
        else:
            found.setdefault((".".join(parts[:at]), int(parts[at])), []).append(name)
    return {
        stem if number < 0 else f"{stem}.{number}".lstrip("."): found[stem, number] for stem, number in sorted(found)
    }


def send_layer_norms(job: Job) -> Done:
    """The device's half in a round of norms: v (L,)."""
    gradients = job.model.gradient(
        job.arrays,
        sorted(job.arrays),
        num_batches=int(job.settings["num_batches"]),
        batch_size=int(job.settings["batch_size"]),
        seed=job.batch_seed,
    )
    norms = [
        sum(float(np.square(gradients[n], dtype=np.float64).sum()) for n in own)
        for own in blocks_of(gradients).values()
    ]
    total, num_tokens = job.model.evaluate(job.arrays)
    return Done(arrays={NORMS: np.array(norms, np.float32)}, loss=total / num_tokens)
