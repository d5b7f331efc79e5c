"""Rounds: ask devices, wait no longer than the deadline, believe nothing, judge the result, and write it down.

    for each round
        choose devices of those that can be reached, and send each what it lacks and what to do
        take replies until all are here or the deadline is over; refuse what is late, forged, foreign, replayed or wrong
        with fewer than the quorum the round is void: the state stays
        merge; where the judge finds the new adapter worse than the last accepted one by more than the tolerance, the
        round is rejected: the state stays
        checkpoint, in one piece

The state after a round depends on the replies alone, so a run that is killed and resumed goes on along the same curve.
Flower's own loop waits for ever for a lost node and begins again at round 1, which is why this one is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import numpy as np
from numpy.typing import NDArray

from cotune.errors import CotuneError, InputError, WireError
from cotune.federation.algorithm import NEW, ROUND, SINCE, Algorithm, Combine, Plan, Setting, Update, shown_in
from cotune.federation.arrays import AnyArrays, Arrays, check_arrays, norm, num_bytes, shapes_of
from cotune.federation.messages import Reply, Task, decode, encode
from cotune.federation.number_ranges import check_at_least, check_positive, check_share
from cotune.federation.signing import Registry, verify
from cotune.federation.transport import Arrival, Transport

ACCEPTED, REJECTED, VOID = "accepted", "rejected", "void"
WEIGHTS = ("equal", "examples")
LARGEST_SHARE = 4.0
"""With weights by examples: the most that one device counts, in medians of what all claim."""


class FederationError(CotuneError):
    """The run cannot go on; what was accepted is in the checkpoint."""


@dataclass(frozen=True, kw_only=True)
class RoundRules:
    """How rounds are run and judged."""

    num_rounds: int = 20
    """In all, accepted or not."""
    num_devices_per_round: int | None = None
    """Drawn from those that can be reached; None: all of them."""
    quorum: float = 0.6
    """Share of the devices with a task whose replies a round needs."""
    deadline_s: float = 60.0
    """Seconds from asking to the end of the round."""
    gather_s: float = 120.0
    """Seconds to wait for enough devices before a round is void."""
    min_devices: int = 1
    """Devices that have to be reachable for a round to begin."""
    max_update_norm: float | None = None
    """Replies whose numbers together are longer are refused; None: any finite ones."""
    weights: str = "equal"
    """`equal`, or `examples`: by what a device claims, at most `LARGEST_SHARE` times the median claim."""
    tolerance: float = 0.02
    """Share by which the judge's loss may lie above the best accepted one."""
    max_void_rounds: int = 5
    """In a row; then the run ends."""
    exclude_after: int = 3
    """Refused replies with its own signature after which a device is asked no more."""
    seed: int = 0
    """Of the draw of devices."""

    def __post_init__(self) -> None:
        check_at_least(
            1,
            num_rounds=self.num_rounds,
            min_devices=self.min_devices,
            max_void_rounds=self.max_void_rounds,
            exclude_after=self.exclude_after,
        )
        if self.num_devices_per_round is not None:
            check_at_least(1, num_devices_per_round=self.num_devices_per_round)
        check_share(quorum=self.quorum)
        check_positive(deadline_s=self.deadline_s, gather_s=self.gather_s)
        if self.max_update_norm is not None and not self.max_update_norm > 0:
            raise InputError(f"max_update_norm is {self.max_update_norm}, expected a positive number or none")
        if self.weights not in WEIGHTS:
            raise InputError(f"weights is {self.weights!r}, expected one of {', '.join(WEIGHTS)}")
        check_at_least(0, tolerance=self.tolerance, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """What happened in a round, as it is printed and stored."""

    round_number: int
    verdict: str
    """`accepted`, `rejected` by the judge, or `void`."""
    remark: str
    """Why it was not accepted."""
    asked: list[str]
    counted: list[str]
    """Devices whose replies were merged, or would have been."""
    refused: dict[str, str]
    """By device why its reply was not counted."""
    lost: list[str]
    """Asked, and nothing came in time."""
    loss: float | None
    """Mean of what the counted devices report, nats per token."""
    heldout_loss: float | None
    """Of the adapter after merging; None without a judge."""
    bytes_down: dict[str, int]
    """By kind of what was sent; `framing` is names, settings and signatures."""
    bytes_up: dict[str, int]
    seconds: float
    """On the transport's clock."""
    device_seconds: float | None
    """Median over the counted devices of the time that their work took."""
    device_peak_bytes: int | None
    """The largest resident set that one of them reports."""
    device_held_bytes: int | None = None
    """The most that one of them held at once in weights, gradients and optimiser state, where its work counts it."""
    shown: dict[str, float] = field(default_factory=dict)
    """What the algorithm says of its state after an accepted round, such as flexlora's `discarded_energy`."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands: all that a checkpoint holds.

    Attributes:
        state: of the algorithm after the last accepted round.
        round_number: of the last round, accepted or not.
        since: by device the round whose arrays it has.
        offences: by device how many replies with its own signature were refused.
        best_loss: the least of the judge that was accepted, so that many small rises are refused too.
        start_loss: the judge's before round 1.
        records: of all rounds.
        released_rounds: merged, accepted or not: what a privacy account counts.
    """

    state: Arrays
    round_number: int = 0
    since: Mapping[str, int] = field(default_factory=dict)
    offences: Mapping[str, int] = field(default_factory=dict)
    best_loss: float | None = None
    start_loss: float | None = None
    records: Sequence[RoundRecord] = ()
    released_rounds: int = 0


# The loss of an adapter on data that the server holds, nats per token.
Judge = Callable[[Arrays], float]


class Coordinator:
    """Runs the rounds of one algorithm.

    Args:
        algorithm: its server half.
        combine: how updates become one.
        transport: the way to the devices.
        rules: of the rounds.
        registry: public keys of the devices; whoever is not in it does not exist.
        run_id: names the run; replies to another are refused.
        base_digest: of the backbone.
        judge: of adapters; None accepts every round.
        save: told of the progress after each round, before the next begins.

    Example:
        >>> for record in Coordinator(...).run(progress):  # doctest: +SKIP
        ...     print(record.round_number, record.verdict, record.heldout_loss)
    """

    def __init__(
        self,
        algorithm: Algorithm,
        combine: Combine,
        transport: Transport,
        rules: RoundRules,
        *,
        registry: Registry,
        run_id: str,
        base_digest: str,
        judge: Judge | None = None,
        save: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        self._algorithm, self._combine, self.transport, self._rules = algorithm, combine, transport, rules
        self._registry, self._run_id, self._base_digest = registry, run_id, base_digest
        self._judge, self._save = judge, save
        self._known: dict[str, Mapping[str, Setting]] = {}

    def begin(self, adapter: Arrays) -> Progress:
        """Before round 1."""
        state = self._algorithm.start(adapter)
        loss = None if self._judge is None else self._judge(self._algorithm.adapter(state))
        return Progress(state=state, best_loss=loss, start_loss=loss)

    def adapter(self, progress: Progress) -> dict[str, NDArray[np.float32]]:
        """The adapter after the last accepted round."""
        return self._algorithm.adapter(progress.state)

    def run(self, progress: Progress) -> Iterator[Progress]:
        """All rounds that are left; each gives where the run stands after it.

        Raises:
            FederationError: too many rounds in a row were void.
        """
        while progress.round_number < self._rules.num_rounds:
            progress = self._round(progress)
            self._save(progress)
            yield progress
            last = progress.records[-self._rules.max_void_rounds :]
            if len(last) == self._rules.max_void_rounds and all(one.verdict == VOID for one in last):
                raise FederationError(
                    f"the last {len(last)} rounds were void: {last[-1].remark}; look after the devices and resume"
                )

    def verify(self, reply: Reply, device: str, round_number: int) -> None:
        """Refuse a reply that is not the device's own answer in this round.

        Raises:
            InputError, RefusedError: it is forged, replayed, or of another run or backbone.
        """
        verify(reply, self._registry, run_id=self._run_id, round_number=round_number, base_digest=self._base_digest)
        if reply.device != device:
            raise InputError(f"the reply is signed by {reply.device}, expected {device}; look at who sent it")

    def check(self, reply: Reply, plan: Plan) -> Reply:
        """Refuse what cannot be merged.

        Returns:
            The reply with the numbers that it stands for.

        Raises:
            InputError: names, shapes or numbers are not as planned, or they are too long together.
        """
        check_arrays(reply.arrays, plan.reply, codes=plan.codes)
        arrays = plan.decode(reply.arrays)
        check_arrays(arrays, shapes_of(arrays))
        length = norm(arrays)
        if self._rules.max_update_norm is not None and length > self._rules.max_update_norm:
            raise InputError(
                f"the reply's norm is {length:.3g}, expected at most {self._rules.max_update_norm:.3g}; "
                "lower the device's learning rate, or raise max_update_norm"
            )
        return replace(reply, arrays=arrays)

    def task(self, state: Arrays, round_number: int, device: str, since: int | None) -> tuple[Plan, bytes]:
        """What a device shall do, and the message that tells it."""
        plan = self._algorithm.plan(state, round_number, device, since)
        task = Task(
            run_id=self._run_id,
            round_number=round_number,
            device=device,
            work=plan.work,
            arrays=plan.arrays,
            settings={SINCE: NEW if since is None else since, **self._news(plan, device, since)},
            base_digest=self._base_digest,
        )
        # Until it answers, nobody knows whether it has taken these settings over: one whose reply is lost has.
        self._known.pop(device, None)
        return plan, encode(task)

    def told(self, device: str, plan: Plan) -> None:
        """The device has done this plan, so it knows its settings."""
        self._known[device] = plan.settings

    def _news(self, plan: Plan, device: str, since: int | None) -> Mapping[str, Setting]:
        """The settings that a device does not know yet."""
        known = self._known.get(device)
        is_new = since is None or plan.settings.get(SINCE) == NEW
        if is_new or known is None or not known.keys() <= plan.settings.keys():
            return plan.settings
        return {
            name: value
            for name, value in plan.settings.items()
            if name not in known or known[name] != value or name in (SINCE, ROUND)
        }

    def _round(self, before: Progress) -> Progress:
        number, started_s = before.round_number + 1, self.transport.now_s()
        asked = self._choose(before, number)
        open_round = _OpenRound(self, before, number, asked)
        if asked:
            open_round.ask(asked)
            open_round.listen(started_s + self._rules.deadline_s)
            verdict, state, loss, remark = self._merged(before, number, open_round.counted, open_round.num_tasks)
        else:
            verdict, state, loss = VOID, before.state, None
            remark = f"fewer than {self._rules.min_devices} devices could be reached in {self._rules.gather_s:g} s"
        best_loss = before.best_loss
        if verdict == ACCEPTED and loss is not None and best_loss is not None:
            best_loss = min(best_loss, loss)
        shown = shown_in(state) if verdict == ACCEPTED else {}
        record = open_round.record(verdict, remark, loss, self.transport.now_s() - started_s, shown)
        offences = dict(before.offences)
        for device in open_round.offenders:
            offences[device] = offences.get(device, 0) + 1
        return Progress(
            state=state,
            round_number=number,
            since=open_round.since,
            offences=offences,
            best_loss=best_loss,
            start_loss=before.start_loss,
            released_rounds=before.released_rounds + (verdict != VOID),
            records=[*before.records, record],
        )

    def _merged(
        self, before: Progress, number: int, counted: Mapping[str, Reply], num_tasks: int
    ) -> tuple[str, Arrays, float | None, str]:
        """Verdict, state after the round, the judge's loss, and why the round was not accepted."""
        quorum = math.ceil(self._rules.quorum * num_tasks)
        if not counted or len(counted) < quorum:
            return VOID, before.state, None, f"{len(counted)} replies count, expected at least {max(1, quorum)}"
        try:
            merged = self._algorithm.merge(before.state, number, self._updates(counted), self._combine)
        except InputError as error:
            # A robust rule that has too few replies says so.
            return VOID, before.state, None, str(error)
        if self._judge is None:
            return ACCEPTED, merged, None, ""
        loss, last = self._judge(self._algorithm.adapter(merged)), before.best_loss
        assert last is not None, "begin() judges the start"
        if loss <= last * (1 + self._rules.tolerance):
            return ACCEPTED, merged, loss, ""
        return REJECTED, before.state, loss, f"the held-out loss rose from {last:.4f} to {loss:.4f} nats per token"

    def _choose(self, before: Progress, number: int) -> list[str]:
        """Devices of this round, sorted; none if too few came in time."""
        ends_s = self.transport.now_s() + self._rules.gather_s
        while True:
            known = [
                name
                for name in self.transport.devices()
                if name in self._registry.devices and before.offences.get(name, 0) < self._rules.exclude_after
            ]
            if len(known) >= self._rules.min_devices:
                break
            if self.transport.now_s() >= ends_s:
                return []
            self.transport.receive(min(1.0, max(0.0, ends_s - self.transport.now_s())))
        wanted = self._rules.num_devices_per_round or len(known)
        if wanted >= len(known):
            return sorted(known)
        drawn = np.random.default_rng((self._rules.seed, number)).choice(sorted(known), wanted, replace=False)
        return sorted(str(name) for name in drawn)

    def _updates(self, counted: Mapping[str, Reply]) -> list[Update]:
        claims = {name: max(1, reply.num_examples) for name, reply in counted.items()}
        most = LARGEST_SHARE * median(claims.values())
        return [
            Update(
                device=name,
                arrays=counted[name].arrays,
                weight=1.0 if self._rules.weights == "equal" else min(claims[name], most),
            )
            for name in sorted(counted)
        ]


class _OpenRound:
    """A round while replies come in."""

    def __init__(self, run: Coordinator, before: Progress, number: int, asked: Sequence[str]) -> None:
        self._run, self._before, self._number, self._asked = run, before, number, asked
        self._plans: dict[str, Plan] = {}
        self._down: dict[str, int] = {}
        self._up: dict[str, int] = {}
        self._ended: set[str] = set()
        self.since = dict(before.since)
        self.counted: dict[str, Reply] = {}
        self.refused: dict[str, str] = {}
        self.offenders: list[str] = []
        self._failed: dict[str, str] = {}

    @property
    def num_tasks(self) -> int:
        """Devices that were given one, of which the quorum is a share."""
        return len(self._plans)

    def ask(self, devices: Sequence[str]) -> None:
        """Send these devices their tasks; one that the algorithm has no task for, such as a small one, has failed.

        Raises:
            InputError: it has one for none of them.
        """
        tasks = {}
        for device in devices:
            try:
                self._plans[device], tasks[device] = self._run.task(
                    self._before.state, self._number, device, self.since.get(device)
                )
            except InputError as error:
                self._failed[device] = str(error)
                self._ended.add(device)
                if self._failed.keys() >= set(self._asked):
                    raise
                continue
            _count(self._down, self._plans[device].arrays, len(tasks[device]))
        self._run.transport.send(tasks)

    def listen(self, ends_s: float) -> None:
        """Take replies until every asked device has ended, or the deadline is over."""
        transport = self._run.transport
        while len(self._ended) < len(self._asked):
            left_s = ends_s - transport.now_s()
            if left_s <= 0:
                break
            for arrival in transport.receive(left_s):
                self._take(arrival)

    def record(
        self, verdict: str, remark: str, heldout_loss: float | None, seconds: float, shown: dict[str, float]
    ) -> RoundRecord:
        """What happened."""
        # In order of names, not of arrival: a mean's last bit would depend on it.
        metrics = [self.counted[name].metrics for name in sorted(self.counted)]
        losses = [one["loss"] for one in metrics if math.isfinite(one.get("loss", math.nan))]
        times = [one["seconds"] for one in metrics if "seconds" in one]
        peaks = [one["peak_bytes"] for one in metrics if "peak_bytes" in one]
        held = [one["held_bytes"] for one in metrics if "held_bytes" in one]
        return RoundRecord(
            round_number=self._number,
            verdict=verdict,
            remark=remark,
            asked=list(self._asked),
            counted=sorted(self.counted),
            refused={**self._failed, **self.refused},
            lost=sorted(set(self._asked) - self._ended),
            loss=float(np.mean(losses)) if losses else None,
            heldout_loss=heldout_loss,
            bytes_down=self._down,
            bytes_up=self._up,
            seconds=seconds,
            device_seconds=median(times) if times else None,
            device_peak_bytes=int(max(peaks)) if peaks else None,
            device_held_bytes=int(max(held)) if held else None,
            shown=shown,
        )

    def _take(self, arrival: Arrival) -> None:
        device = arrival.device
        if device not in self._plans:
            # Nobody asked it: late from an earlier round, or not of this run at all.
            self._refuse(device, "it was not asked in this round", len(arrival.data))
            return
        if arrival.is_forgotten and self.since.get(device) is not None:
            del self.since[device]
            self.ask([device])
            return
        if arrival.error:
            self._failed[device] = arrival.error
            self._ended.add(device)
            return
        try:
            reply = decode(arrival.data, Reply)
            self._run.verify(reply, device, self._number)
        except (InputError, WireError) as error:
            # Anybody may have sent it: the device is not blamed, and its own reply may still come.
            self._refuse(device, str(error), len(arrival.data))
            return
        self._ended.add(device)
        if device in self.counted:
            return
        try:
            checked = self._run.check(reply, self._plans[device])
        except InputError as error:
            self._refuse(device, str(error), len(arrival.data))
            self.offenders.append(device)
            return
        self.refused.pop(device, None)
        self.counted[device] = checked
        self.since[device] = self._number
        self._run.told(device, self._plans[device])
        _count(self._up, reply.arrays, len(arrival.data))

    def _refuse(self, device: str, reason: str, num_bytes: int) -> None:
        self.refused[device] = reason
        self._up["refused"] = self._up.get("refused", 0) + num_bytes


def _count(totals: dict[str, int], arrays: AnyArrays, num_sent: int) -> None:
    """Add a message to the bytes by kind: `slopes`, `step`, `lora_B`, ..., and `framing` for all the rest."""
    for name, array in arrays.items():
        kind = name.partition("/")[0] if "/" in name else next((k for k in ("lora_A", "lora_B") if k in name), name)
        totals[kind] = totals.get(kind, 0) + array.nbytes
    totals["framing"] = totals.get("framing", 0) + num_sent - num_bytes(arrays)
