"""The resident half of a device: it keeps what came in earlier rounds, does the work of a task, and signs the reply.

The same object answers whatever carries the messages: a call in a simulation, a socket behind Flower's short-lived
process on a real device.
"""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError, MismatchError
from cotune.federation.algorithm import NEW, ROUND, SINCE, Job, Setting, Work
from cotune.federation.introduction import introduce
from cotune.federation.local_model import HasTexts, LocalModel
from cotune.federation.messages import Reply, Task, decode, encode
from cotune.federation.run_secret import RunSecret, direction_seed
from cotune.federation.signing import DeviceKey, sign
from cotune.federation.transport import ForgottenError
from cotune.federation.works import WORKS
from cotune.ledger import EgressLedger


class DeviceAgent:
    """One device.

    Args:
        name: as registered.
        model: its backbone with its texts, a `LocalModel`; works of a special kind may need only the number of texts.
        base_digest: of that backbone; tasks for another one are refused.
        secret: of the run; directions come from it.
        key: signs replies.
        seed: of the order of texts.
        ledger: told of every reply that leaves.
        works: what it can do.
    """

    def __init__(
        self,
        name: str,
        model: HasTexts,
        *,
        base_digest: str,
        secret: RunSecret,
        key: DeviceKey,
        seed: int = 0,
        ledger: EgressLedger | None = None,
        works: Mapping[str, Work] = WORKS,
    ) -> None:
        self.name = name
        self._model, self._base_digest, self._secret, self._key = model, base_digest, secret, key
        self._seed, self._ledger, self._works = seed, ledger, works
        self._run_id = ""
        self._round: int | None = None
        self._held: dict[str, NDArray[np.float32]] = {}
        self._settings: dict[str, Setting] = {}
        self._memory: dict[str, NDArray[Any]] = {}
        self._memory_before: dict[str, NDArray[Any]] = {}

    def handle(self, data: bytes) -> bytes:
        """Do a task.

        Returns:
            The signed reply.

        Raises:
            FrameError: it is no task.
            MismatchError: it is for another device or another backbone.
            ForgottenError: it builds on rounds that this device does not remember.
            InputError: it asks for something that this device does not do.
            NonFiniteLossError: a loss is nan or inf.
        """
        task = decode(data, Task)
        self._check(task)
        started_s = time.perf_counter()
        self._take(task)
        job = Job(
            round_number=int(task.settings.get(ROUND, task.round_number)),
            arrays=self._held,
            settings=self._settings,
            # Whoever gives other works than `WORKS` knows what they ask of it.
            model=cast(LocalModel, self._model),
            seeds=lambda round_number, index: direction_seed(self._secret, round_number, index),
            batch_seed=self._batch_seed(task),
            memory=self._memory,
            run_id=task.run_id,
        )
        done = self._works[task.work](job)
        measured = {
            # Statistics have no loss.
            **({"loss": done.loss} if math.isfinite(done.loss) else {}),
            "seconds": time.perf_counter() - started_s,
            **peak_of_process(),
            **done.metrics,
        }
        # Six digits: more of them cost bytes and tell nothing.
        metrics = {name: float(f"{value:.6g}") for name, value in measured.items()}
        reply = Reply(
            run_id=task.run_id,
            round_number=task.round_number,
            device=self.name,
            arrays=done.arrays,
            num_examples=self._model.num_examples,
            metrics=metrics,
            base_digest=self._base_digest,
        )
        sent = encode(sign(reply, self._key))
        if self._ledger is not None:
            self._ledger.record("federate", task.work, sent)
        return sent

    def introduce(self, question: bytes) -> bytes:
        """The signed answer to `introduction.ask`.

        Raises:
            FrameError: it is no such question.
        """
        sent = introduce(question, self.name, base_digest=self._base_digest, key=self._key)
        if self._ledger is not None:
            self._ledger.record("federate", "introduction", sent)
        return sent

    def _check(self, task: Task) -> None:
        if task.device != self.name:
            raise MismatchError(f"the task is for {task.device}, expected {self.name}; send it there")
        if task.base_digest != self._base_digest:
            raise MismatchError(
                f"the task is for the backbone {task.base_digest[:16]}, expected {self._base_digest[:16]}; "
                "give all devices the same model"
            )
        if task.work not in self._works:
            raise InputError(
                f"the task asks for {task.work}, expected one of {', '.join(self._works)}; use one version"
            )

    def _take(self, task: Task) -> None:
        """Add what came to what is held, and be as before the round if it was done before."""
        since = int(task.settings.get(SINCE, NEW))
        if since == NEW:
            self._held, self._settings, self._memory, self._memory_before = {}, {}, {}, {}
        elif self._round is None or self._run_id != task.run_id or self._round < since:
            raise ForgottenError(
                f"{self.name} has the arrays of round {self._round} of run {self._run_id or 'none'}, the task expects "
                f"round {since} of {task.run_id}; send it everything"
            )
        elif self._round == task.round_number:
            self._memory = dict(self._memory_before)
        self._memory_before = dict(self._memory)
        self._held.update(task.arrays)
        # A plan's settings are sent where they are new, so that a round costs its numbers and little more.
        self._settings.update({name: value for name, value in task.settings.items() if name not in (SINCE, ROUND)})
        self._run_id, self._round = task.run_id, task.round_number

    def _batch_seed(self, task: Task) -> int:
        text = f"{self._seed}\0{self.name}\0{task.round_number}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:4], "little")


def peak_of_process() -> dict[str, float]:
    """`peak_bytes`, the largest resident set of this process so far; nothing where the system does not tell.

    Example:
        >>> peak_of_process().get("peak_bytes", 2.0**30) > 2**20
        True
    """
    try:
        import resource
    except ImportError:  # Windows
        return {}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_bytes": float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit}
