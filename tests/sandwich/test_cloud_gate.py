"""The door: cached, reserved, written down, sent, tried again, paid; in this order and never more."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from scripted_clouds import MemoryCloud

from cotune.errors import BudgetError, ConnectionLostError, InputError, RefusedError, WireError, WireTimeoutError
from cotune.ledger import EgressLedger
from cotune.sandwich.budget import Budget, Purse
from cotune.sandwich.chat import ChatAnswer, ChatRequest
from cotune.sandwich.cloud_gate import AnswerCache, CloudGate, RetryRules
from cotune.sandwich.cost import Cost, Price
from cotune.sandwich.redact import RedactedJson
from cotune.sandwich.sent_log import SentLog


def chat(text: str = "hello", max_tokens: int = 20) -> ChatRequest:
    return ChatRequest(model="m", messages=RedactedJson([{"role": "user", "content": text}], {}), max_tokens=max_tokens)


def test_an_answer_is_paid_written_down_and_cached(tmp_path: Path) -> None:
    cloud, ledger, price = MemoryCloud(), EgressLedger(None), Price(usd_per_million_in=100, usd_per_million_out=1000)
    gate = CloudGate(cloud, price=price, cache=AnswerCache(tmp_path), ledger=ledger)
    first, second = gate.ask(chat()), gate.ask(chat())
    assert first.answer == second.answer and first.answer.text == "echo hello"
    # 10 tokens in and 2 out: 0.001 and 0.002 dollars.
    assert first.cost == Cost(calls=1, tokens_in=10, tokens_out=2, usd=0.003) == gate.purse.spent
    assert second.cost == Cost() and len(cloud.requests) == 1
    assert ledger.totals() == {"chat": {"count": 1, "bytes": len(chat().payload)}}
    assert gate.sent.payloads == [chat().payload.decode()]
    taken = gate.account.taken()
    assert (taken.cloud, taken.cached, taken.bytes_out) == (first.cost, 1, len(chat().payload))
    assert gate.is_there(chat()) and not gate.is_there(chat("other"))


def test_another_process_finds_the_answer(tmp_path: Path) -> None:
    CloudGate(MemoryCloud(), cache=AnswerCache(tmp_path)).ask(chat())
    other = MemoryCloud()
    assert CloudGate(other, cache=AnswerCache(tmp_path)).ask(chat()).answer.text == "echo hello"
    assert other.requests == []


def test_no_room_in_the_budget_means_that_nothing_leaves() -> None:
    cloud, ledger = MemoryCloud(), EgressLedger(None)
    # A request of 80 bytes and more may have 100 tokens and more.
    gate = CloudGate(cloud, purse=Purse(Budget(tokens=100)), ledger=ledger)
    with pytest.raises(BudgetError, match="tokens would be"):
        gate.ask(chat())
    assert cloud.requests == [] and ledger.totals() == {} and gate.sent.payloads == []


def test_the_same_request_from_many_threads_is_sent_once(tmp_path: Path) -> None:
    release, cloud = threading.Event(), MemoryCloud()

    def slow(text: str) -> str:
        release.wait(20)
        return "once"

    cloud.answer = slow
    gate, got = CloudGate(cloud, cache=AnswerCache(tmp_path)), []
    threads = [threading.Thread(target=lambda: got.append(gate.ask(chat()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    while not cloud.requests:
        pass
    release.set()
    for thread in threads:
        thread.join(20)
    assert [each.answer.text for each in got] == ["once"] * 4
    assert sorted(each.cost.calls for each in got) == [0, 0, 0, 1] and len(cloud.requests) == 1


def test_failures_that_may_pass_are_tried_again_with_growing_pauses() -> None:
    cloud, slept = MemoryCloud(), list[float]()
    cloud.failures = [RefusedError(503, "busy"), ConnectionLostError("gone"), WireTimeoutError("late")]
    gate = CloudGate(cloud, retry=RetryRules(first_wait_s=1), sleep=slept.append)
    assert gate.ask(chat()).answer.text == "echo hello"
    assert [int(each / grown) for each, grown in zip(slept, (1, 2, 4), strict=True)] == [1, 1, 1]
    most = gate.most(chat())
    # A status costs a call; what got lost on the way may have been answered and counts in full.
    assert gate.purse.spent == Cost(calls=1) + most + most + Cost(calls=1, tokens_in=10, tokens_out=2)
    assert gate.account.taken().retries == 3 and gate.account.taken().cloud == gate.purse.spent


def test_the_pause_that_the_cloud_asks_for_is_kept() -> None:
    cloud, slept = MemoryCloud(), list[float]()
    cloud.failures = [RefusedError(429, "slow down", retry_after_s=7.5)]
    CloudGate(cloud, sleep=slept.append).ask(chat())
    assert slept == [7.5]


@pytest.mark.parametrize(
    "failure",
    [RefusedError(401, "who?"), RefusedError(402, "no money"), RefusedError(429, "later", retry_after_s=3600)],
)
def test_what_will_not_pass_is_not_tried_again(failure: RefusedError) -> None:
    cloud = MemoryCloud()
    cloud.failures = [failure]
    with pytest.raises(RefusedError, match=str(failure)):
        CloudGate(cloud, sleep=lambda _: None).ask(chat())
    assert len(cloud.requests) == 1


def test_it_gives_up_after_the_last_attempt_and_retries_count_for_the_budget() -> None:
    cloud = MemoryCloud()
    cloud.failures = [RefusedError(500, "oops") for _ in range(9)]
    gate = CloudGate(cloud, retry=RetryRules(max_attempts=3), sleep=lambda _: None)
    with pytest.raises(RefusedError):
        gate.ask(chat())
    assert len(cloud.requests) == 3
    capped = CloudGate(cloud, purse=Purse(Budget(calls=2)), sleep=lambda _: None)
    with pytest.raises(BudgetError):
        capped.ask(chat())
    assert len(cloud.requests) == 5


def test_an_answer_that_is_none_is_not_asked_for_again() -> None:
    cloud = MemoryCloud()
    cloud.failures = [WireError("no completion")]
    gate = CloudGate(cloud)
    with pytest.raises(WireError):
        gate.ask(chat())
    assert len(cloud.requests) == 1 and gate.purse.spent == gate.most(chat())


def test_no_wait_goes_beyond_the_budget_of_time() -> None:
    cloud, now = MemoryCloud(), [0.0]
    cloud.failures = [RefusedError(503, "busy", retry_after_s=20)]
    gate = CloudGate(cloud, purse=Purse(Budget(seconds=10), clock=lambda: now[0]))
    now[0] = 4.0
    with pytest.raises(BudgetError, match="time ends"):
        gate.ask(chat())
    assert cloud.timeouts == [6.0]


def test_dollars_need_a_price() -> None:
    with pytest.raises(InputError, match="price table"):
        CloudGate(MemoryCloud(), purse=Purse(Budget(usd=1)))


def test_counts_that_the_cloud_does_not_give_are_taken_in_full() -> None:
    gate = CloudGate(MemoryCloud(lambda text: ChatAnswer(text="x")))
    assert gate.ask(chat()).cost == gate.most(chat())


def test_a_cache_that_does_not_evict_refuses_before_anything_is_sent(tmp_path: Path) -> None:
    cloud = MemoryCloud()
    gate = CloudGate(cloud, cache=AnswerCache(tmp_path, max_bytes=1200, evicts=False))
    gate.ask(chat("a"))
    with pytest.raises(InputError, match="answer cache"):
        gate.ask(chat("b"))
    assert len(cloud.requests) == 1
    evicting = CloudGate(cloud, cache=AnswerCache(tmp_path, max_bytes=130))
    for text in "bcde":
        evicting.ask(chat(text))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 130


def test_the_log_of_what_was_sent_lasts_and_holds_each_text_once(tmp_path: Path) -> None:
    path = tmp_path / "sent.jsonl"
    with SentLog(path) as log:
        log.add("d", b"one")
        log.add("d", b"one")
    path.write_bytes(path.read_bytes() + b'{"digest": "e", "pay')
    with SentLog(path) as log:
        log.add("f", "zwö".encode())
        assert log.payloads == ["one", "zwö"]
    with SentLog(path) as log:
        assert log.payloads == ["one", "zwö"]
    assert path.stat().st_mode & 0o777 == 0o600


class StreamingMemory(MemoryCloud):
    """Tells the words of its answer; breaks off after the first where it is told to."""

    breaks_off = False

    def stream(self, request: ChatRequest, *, timeout_s: float, on_text: Callable[[str], None]) -> ChatAnswer:
        answer = self.send(request, timeout_s=timeout_s)
        for word in answer.text.split():
            on_text(word)
            if self.breaks_off:
                raise ConnectionLostError("gone")
        return answer


def test_a_streamed_answer_is_told_paid_and_cached_as_any_other(tmp_path: Path) -> None:
    cloud, told, again = StreamingMemory(), list[str](), list[str]()
    cloud.failures = [RefusedError(503, "busy")]
    gate = CloudGate(cloud, cache=AnswerCache(tmp_path), sleep=lambda _: None)
    asked = gate.ask_streamed(chat(), told.append)
    assert told == ["echo", "hello"] and asked.cost.tokens_out == 2 and gate.purse.spent.calls == 2
    assert '"stream":true' in gate.sent.payloads[0]
    assert gate.ask(chat()).cost == Cost() and gate.ask_streamed(chat(), again.append).answer == asked.answer
    assert again == ["echo hello"] and len(cloud.requests) == 2


def test_after_a_piece_nothing_is_tried_again() -> None:
    cloud, told = StreamingMemory(), list[str]()
    cloud.breaks_off = True
    gate = CloudGate(cloud, sleep=lambda _: None)
    with pytest.raises(ConnectionLostError):
        gate.ask_streamed(chat(), told.append)
    assert told == ["echo"] and len(cloud.requests) == 1
    assert gate.purse.spent == gate.most(replace(chat(), is_streamed=True))


def test_tools_are_not_streamed() -> None:
    with pytest.raises(InputError, match="has tools"):
        CloudGate(StreamingMemory()).ask_streamed(replace(chat(), tools=({"type": "function"},)), lambda _: None)
