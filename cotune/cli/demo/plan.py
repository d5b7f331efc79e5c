"""What the demo does, in numbers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from cotune.errors import InputError


@dataclass(frozen=True, kw_only=True)
class DemoPlan:
    """Everything that decides the demo's numbers.

    Attributes:
        seed: of the persona's texts, the split, the weights and the noise.
        num_train, num_heldout: the persona's texts to tune on, and to judge by.
        epochs: of the side networks; features are computed once.
        lora_epochs: of LoRA, whose every epoch costs the backbone a forward and a backward pass.
        learning_rate, lora_learning_rate: the largest ones.
        max_new_tokens: of each text.
        max_consult_rate: the largest share of tokens that the gate may ask for.
        num_speed_prompts: texts generated for each point of the speed study.
        rtt_ms: round-trip times of the speed study.
    """

    seed: int = 0
    num_train: int = 480
    num_heldout: int = 32
    epochs: int = 12
    lora_epochs: int = 5
    learning_rate: float = 1e-2
    lora_learning_rate: float = 3e-3
    max_new_tokens: int = 48
    max_consult_rate: float = 0.4
    num_speed_prompts: int = 1
    rtt_ms: tuple[float, ...] = (0.0, 25.0, 50.0, 100.0)

    def __post_init__(self) -> None:
        for name in ("num_train", "num_heldout", "epochs", "lora_epochs", "max_new_tokens", "num_speed_prompts"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1")

    def save(self, path: Path) -> None:
        """Write it for the other processes."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**values, "rtt_ms": tuple(values["rtt_ms"])})


@dataclass(frozen=True)
class DemoFolder:
    """Where everything lies in the demo's run folder."""

    root: Path

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def train(self) -> Path:
        return self.root / "data" / "train.jsonl"

    @property
    def heldout(self) -> Path:
        return self.root / "data" / "heldout.jsonl"

    @property
    def plugin(self) -> Path:
        return self.root / "plugin"

    @property
    def serial_plugin(self) -> Path:
        return self.root / "plugin-serial"

    @property
    def features(self) -> Path:
        return self.root / "features"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.jsonl"

    def result(self, process: str) -> Path:
        """What the process of that name found."""
        return self.root / f"{process}.json"
