"""The one door to the cloud: nothing is sent but through `CloudGate.ask`.

For each request, in this order: is the answer there already (cache)? is there room in the budget (else nothing is
sent)? then into the egress ledger and the log of what was sent, and out; again after a failure that may pass, with
growing pauses or the one that the cloud asked for. What came is paid for, and kept under the request's digest.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from cotune.errors import (
    BudgetError,
    ConnectionLostError,
    InputError,
    RefusedError,
    WireError,
    WireTimeoutError,
)
from cotune.file_cache import FileCache
from cotune.ledger import EgressLedger
from cotune.sandwich.account import Account
from cotune.sandwich.budget import Purse
from cotune.sandwich.chat import ChatAnswer, ChatRequest, CloudModel, StreamingCloud
from cotune.sandwich.cost import Cost, Price, most_tokens_in
from cotune.sandwich.redact import WAY
from cotune.sandwich.sent_log import SentLog

DEFAULT_CACHE_BYTES = 1 << 30
_MAY_PASS = frozenset({408, 409, 425, 429, *range(500, 600)})


@dataclass(frozen=True, kw_only=True)
class RetryRules:
    """How patient to be.

    Attributes:
        max_attempts: times that one request is sent.
        timeout_s: for each answer, seconds.
        first_wait_s: before the second attempt; doubles each time, with up to a quarter more by chance.
        longest_wait_s: a cloud that asks for a longer pause than this is not asked again.
    """

    max_attempts: int = 4
    timeout_s: float = 120.0
    first_wait_s: float = 0.5
    longest_wait_s: float = 60.0

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise InputError(f"max_attempts is {self.max_attempts}, expected at least 1")
        for name in ("timeout_s", "first_wait_s", "longest_wait_s"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}, expected seconds above 0")


class AnswerCache:
    """Answers on disk by the digest of their request: whole or not at all, bounded, JSON.

    Args:
        folder: made if it is not there.
        max_bytes: of all answers.
        evicts: the least recently used answers make room. False: a full cache refuses, before anything is sent; so that
            no answer is paid for twice.
    """

    def __init__(self, folder: Path, *, max_bytes: int = DEFAULT_CACHE_BYTES, evicts: bool = True) -> None:
        self._files = FileCache(folder, suffix=".answer", what="answer", max_bytes=max_bytes)
        self._evicts = evicts
        self._lock = threading.Lock()

    def get(self, digest: str) -> ChatAnswer | None:
        """The answer to the request of that digest."""
        with self._lock:
            data = self._files.get(digest)
        return None if data is None else ChatAnswer.from_bytes(data)

    def check_room(self, num_bytes: int) -> None:
        """Refuse before paying what could not be kept.

        Raises:
            InputError: an answer of that size might not fit.
        """
        with self._lock:
            if not self._evicts and self._files.size_bytes + num_bytes > self._files.max_bytes:
                raise InputError(
                    f"the answer cache holds {self._files.size_bytes:,} of {self._files.max_bytes:,} bytes, which "
                    "leaves no room for another answer, so nothing is sent; raise the size of the cache"
                )

    def put(self, digest: str, answer: ChatAnswer) -> None:
        """Keep an answer."""
        with self._lock:
            self._files.put(digest, answer.to_bytes())


@dataclass(frozen=True, kw_only=True)
class Asked:
    """An answer, and what it cost now: nothing where it was there already."""

    answer: ChatAnswer
    cost: Cost


class CloudGate:
    """Asks a cloud within a budget; many threads may use it.

    Args:
        cloud: who is asked.
        price: of its tokens; None where it is not known, which a budget in dollars does not accept.
        purse: the budget.
        cache: answers that were paid for.
        ledger: the device's egress ledger.
        sent: the log of what was sent.
        account: what it took.
        retry: how patient to be.
        sleep: for tests.
        kind: of its requests, in ledger and account.

    Raises:
        InputError: the budget is in dollars and there is no price.
    """

    def __init__(
        self,
        cloud: CloudModel,
        *,
        price: Price | None = None,
        purse: Purse | None = None,
        cache: AnswerCache | None = None,
        ledger: EgressLedger | None = None,
        sent: SentLog | None = None,
        account: Account | None = None,
        retry: RetryRules | None = None,
        sleep: Callable[[float], None] = time.sleep,
        kind: str = "chat",
    ) -> None:
        self.purse = purse or Purse()
        if price is None and self.purse.budget.usd is not None:
            raise InputError("the budget is in dollars and the model has no price; give a price table with its name")
        self.known_price, self.price = price, price or Price()
        self.account = account or Account()
        self.sent = sent or SentLog(None)
        self._cloud, self._cache = cloud, cache
        self._ledger = ledger or EgressLedger(None)
        self._retry, self._sleep, self._kind = retry or RetryRules(), sleep, kind
        self._jitter = random.Random(0)
        self._lock = threading.Lock()
        self._pending: dict[str, Future[Asked]] = {}

    def within(self, *, purse: Purse, cache: AnswerCache, sent: SentLog) -> CloudGate:
        """The same cloud, ledger and patience with a budget, a cache and a log of its own, and a fresh account.

        Raises:
            InputError: the budget is in dollars and there is no price.
        """
        return CloudGate(
            self._cloud,
            price=self.known_price,
            purse=purse,
            cache=cache,
            ledger=self._ledger,
            sent=sent,
            account=Account(num_edge_parameters=self.account.num_edge_parameters),
            retry=self._retry,
            sleep=self._sleep,
            kind=self._kind,
        )

    def beside(self, cloud: CloudModel | None, *, price: Price | None, kind: str) -> CloudGate:
        """A door to another model with the same budget, cache, ledger, log, account and patience.

        Args:
            cloud: where the model is; None: where this door leads.
            price: of its tokens.
            kind: of its requests.

        Raises:
            InputError: the budget is in dollars and there is no price.
        """
        made = CloudGate(
            cloud or self._cloud,
            price=price,
            purse=self.purse,
            cache=self._cache,
            ledger=self._ledger,
            sent=self.sent,
            account=self.account,
            retry=self._retry,
            sleep=self._sleep,
            kind=kind,
        )
        made._lock = self._lock  # one ledger, one writer at a time
        return made

    def most(self, request: ChatRequest) -> Cost:
        """What one attempt can cost at most."""
        tokens_in = most_tokens_in(request.payload)
        return Cost(
            calls=1,
            tokens_in=tokens_in,
            tokens_out=request.max_tokens,
            usd=self.price.of(tokens_in, request.max_tokens),
        )

    def cost_of(self, most: Cost, answer: ChatAnswer) -> Cost:
        """What an answer cost; what it does not tell counts as the most.

        Args:
            most: of its request.
        """
        tokens_in = most.tokens_in if answer.tokens_in is None else answer.tokens_in
        tokens_out = most.tokens_out if answer.tokens_out is None else answer.tokens_out
        return Cost(calls=1, tokens_in=tokens_in, tokens_out=tokens_out, usd=self.price.of(tokens_in, tokens_out))

    def is_there(self, request: ChatRequest) -> bool:
        """Whether its answer would cost nothing."""
        return self._cache is not None and self._cache.get(request.digest) is not None

    def ask(self, request: ChatRequest) -> Asked:
        """The answer to a request.

        The same request from two threads at once is sent once.

        Raises:
            BudgetError: there is no room for it; nothing was sent.
            RefusedError, WireTimeoutError, ConnectionLostError, WireError: the cloud failed, the last time too.
        """
        digest = request.digest
        with self._lock:
            pending = self._pending.get(digest)
            if pending is None:
                mine = self._pending[digest] = Future()
        if pending is not None:
            return Asked(answer=pending.result().answer, cost=Cost())
        try:
            asked = self._ask(request, digest)
        except BaseException as error:
            mine.set_exception(error)
            raise
        else:
            mine.set_result(asked)
            return asked
        finally:
            with self._lock:
                del self._pending[digest]

    def ask_streamed(self, request: ChatRequest, on_text: Callable[[str], None]) -> Asked:
        """As `ask`, and the text is told piece by piece as it comes; an answer that is there already in one piece.

        Once a piece was told nothing is tried again. The cloud is a `StreamingCloud`.

        Raises:
            As `ask`; also after pieces were told.
            InputError: the request has tools, whose calls are not streamed.
        """
        if request.tools:
            raise InputError("the request has tools and shall be streamed, expected one of both; ask without streaming")
        pieces = _Pieces(on_text)
        asked = self._ask(replace(request, is_streamed=True), request.digest, pieces)
        if not pieces.num_told:
            on_text(asked.answer.text)
        return asked

    def _ask(self, request: ChatRequest, digest: str, pieces: _Pieces | None = None) -> Asked:
        if self._cache is not None:
            answer = self._cache.get(digest)
            if answer is not None:
                self.account.count(cached=1)
                return Asked(answer=answer, cost=Cost())
            # A token is rarely more than 8 bytes, escaped.
            self._cache.check_room(1024 + 8 * request.max_tokens)
        on_text = pieces.tell if pieces else None
        for attempt in range(1, self._retry.max_attempts + 1):
            try:
                asked = self._send(request, digest, on_text)
            except (WireTimeoutError, ConnectionLostError, RefusedError) as error:
                # Another answer behind the beginning of the first would be neither of the two.
                if attempt == self._retry.max_attempts or not may_pass(error) or (pieces and pieces.num_told):
                    raise
                self._wait(attempt, error)
                self.account.count(retries=1)
                continue
            return asked
        raise AssertionError("the last attempt answers or raises")

    def _send(self, request: ChatRequest, digest: str, on_text: Callable[[str], None] | None) -> Asked:
        """One attempt: reserved, written down, sent, settled."""
        payload, most = request.payload, self.most(request)
        ticket = self.purse.reserve(most)
        with self._lock:
            self._ledger.record(WAY, self._kind, payload)
            self._ledger.flush()
        self.sent.add(digest, payload)
        self.account.count(bytes_out=len(payload))
        timeout_s = max(1e-3, min(self._retry.timeout_s, self.purse.seconds_left))
        try:
            with self.account.stage("one answer"):
                if on_text is None:
                    answer = self._cloud.send(request, timeout_s=timeout_s)
                else:
                    streaming = cast("StreamingCloud", self._cloud)
                    answer = streaming.stream(request, timeout_s=timeout_s, on_text=on_text)
        except RefusedError:
            # A status instead of an answer: nothing was written, and what was read is not charged.
            self._settle(ticket, Cost(calls=1))
            raise
        except WireError:
            self.account.paid(most, kind=self._kind)  # nobody knows; it stays reserved in full
            raise
        paid = self.cost_of(most, answer)
        if self._cache is not None:
            # Before it is settled: a process that is killed here has the answer, and counts it in full.
            self._cache.put(digest, answer)
        self._settle(ticket, paid)
        self.account.count(bytes_in=len(answer.to_bytes()))
        return Asked(answer=answer, cost=paid)

    def _settle(self, ticket: int, paid: Cost) -> None:
        self.purse.settle(ticket, paid)
        self.account.paid(paid, kind=self._kind)

    def _wait(self, attempt: int, error: WireError) -> None:
        asked_s = error.retry_after_s if isinstance(error, RefusedError) else None
        if asked_s is not None and asked_s > self._retry.longest_wait_s:
            raise error
        with self._lock:
            chance = 1 + self._jitter.random() / 4
        grown_s = self._retry.first_wait_s * 2 ** (attempt - 1) * chance
        wait_s = max(asked_s or 0.0, min(grown_s, self._retry.longest_wait_s))
        if wait_s >= self.purse.seconds_left:
            raise BudgetError("the budget's time ends before the cloud may be asked again, so nothing more is sent")
        self._sleep(wait_s)


class _Pieces:
    """Tells pieces of an answer, and how many it told."""

    def __init__(self, on_text: Callable[[str], None]) -> None:
        self._on_text, self.num_told = on_text, 0

    def tell(self, text: str) -> None:
        self.num_told += 1
        self._on_text(text)


def may_pass(error: WireError) -> bool:
    """Whether the same request may be answered later."""
    return not isinstance(error, RefusedError) or error.code in _MAY_PASS
