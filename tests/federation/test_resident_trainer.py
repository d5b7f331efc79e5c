"""A device's resident process over real sockets: one request at a time, and nothing that a caller does ends it."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from federated import BASE, SECRET, STEPS, ToyFederation
from processes import python, wait_until
from toy_federation import ToyModel, toy_adapter

from cotune.errors import ConnectionLostError, FrameError, InputError, NonFiniteLossError, WireTimeoutError
from cotune.federation import resident_wire
from cotune.federation.device_agent import DeviceAgent
from cotune.federation.fedit import FedIT
from cotune.federation.introduction import ask, introduced, new_nonce
from cotune.federation.messages import Reply, decode
from cotune.federation.resident_client import Answer, ResidentClient
from cotune.federation.resident_trainer import ResidentTrainer
from cotune.federation.resident_wire import HEAD, SOCKET, TOKEN, AnswerKind, RequestKind, connect
from cotune.federation.signing import DeviceKey, Registry
from cotune.federation.transport import ForgottenError

KEY = DeviceKey.generate()


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short, because sockets need it; pytest's own folders are long."""
    with tempfile.TemporaryDirectory(prefix="ct-") as name:
        yield Path(name)


class Echo:
    """An agent that says what it got, backwards."""

    def __init__(self, work: Callable[[bytes], bytes] = lambda data: data[::-1]) -> None:
        self.work, self.active, self.most_active = work, 0, 0

    def handle(self, data: bytes) -> bytes:
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        try:
            return self.work(data)
        finally:
            self.active -= 1

    def introduce(self, question: bytes) -> bytes:
        return b"echo " + question


@contextmanager
def serving(agent: Echo | DeviceAgent, folder: Path, **options: float) -> Iterator[ResidentClient]:
    trainer = ResidentTrainer(agent, folder, **options)  # type: ignore[arg-type]
    thread = threading.Thread(target=trainer.serve)
    thread.start()
    try:
        yield ResidentClient(folder)
    finally:
        trainer.stop()
        thread.join(30)
        trainer.close()
        assert not thread.is_alive()


def test_an_agent_works_behind_the_socket_as_it_does_in_a_call(folder: Path) -> None:
    federation = ToyFederation(num_devices=1, algorithm=FedIT(steps=STEPS))
    start = federation.coordinator.begin(toy_adapter(3, 3, 2))
    _, task = federation.coordinator.task(start.state, 1, "d0", None)
    _, builds_on = federation.coordinator.task(start.state, 3, "d0", 2)
    expected = decode(federation.agents["d0"].handle(task), Reply)
    federation.restart("d0")
    with serving(federation.agents["d0"], folder) as client:
        reply = decode(client.handle(task, 10).data, Reply)
        assert {name: array.tobytes() for name, array in reply.arrays.items()} == {
            name: array.tobytes() for name, array in expected.arrays.items()
        }
        forgotten = client.handle(builds_on, 10)
        assert (forgotten.kind, forgotten.data) == (AnswerKind.FORGOTTEN, b"") and "round 2" in forgotten.error
        refused = client.handle(b"no task", 10)
        assert refused.kind == AnswerKind.REFUSED and "task" in refused.error


def test_a_device_introduces_itself(folder: Path) -> None:
    agent = DeviceAgent("phone", ToyModel.draw(0), base_digest=BASE, secret=SECRET, key=KEY)
    nonce = new_nonce()
    with serving(agent, folder) as client:
        answer = client.handle(ask("run-1", nonce), 10, kind=RequestKind.INTRODUCTION)
    registry = Registry().add("phone", KEY.public_key)
    assert introduced(answer.data, nonce, registry, run_id="run-1", base_digest=BASE) == "phone"


@pytest.mark.parametrize(
    ("raised", "kind", "text"),
    [
        (ForgottenError("send all"), AnswerKind.FORGOTTEN, "send all"),
        (InputError("rank is 0"), AnswerKind.REFUSED, "rank is 0"),
        (FrameError("no frame"), AnswerKind.REFUSED, "no frame"),
        (NonFiniteLossError(3, float("nan")), AnswerKind.FAILED, "loss at step 3"),
        (RuntimeError("the diary says"), AnswerKind.FAILED, "RuntimeError; see the trainer's log"),
    ],
)
def test_errors_travel_as_kind_and_sentence(folder: Path, raised: Exception, kind: AnswerKind, text: str) -> None:
    def work(data: bytes) -> bytes:
        raise raised

    agent = Echo(work)
    with serving(agent, folder) as client:
        answer = client.handle(b"x", 10)
        assert answer.kind == kind and text in answer.error and "diary" not in answer.error
        agent.work = lambda data: data
        assert client.handle(b"still there", 10) == Answer(kind=AnswerKind.DONE, data=b"still there")


def test_large_messages_come_through_and_too_large_ones_are_not_taken(folder: Path) -> None:
    data = os.urandom(5_000_003)
    with serving(Echo(), folder, max_bytes=5_000_003) as client:
        assert client.handle(data, 30).data == data[::-1]
        with pytest.raises(ConnectionLostError):
            client.handle(data + b"x", 30)
        assert client.handle(b"ab", 10).data == b"ba"


def test_an_announced_size_costs_no_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = socket.socket.recv

    def recv(self: socket.socket, size: int, *rest: int) -> bytes:
        asked.append(size)
        return real(self, size, *rest)

    monkeypatch.setattr(socket.socket, "recv", recv)
    with serving(Echo(), folder, transfer_s=1.0) as client:
        connection, token = connect(folder, time.monotonic() + 5)
        with connection:
            connection.sendall(token + HEAD.pack(RequestKind.TASK, 2**29) + b"only this")
        assert client.handle(b"ab", 10).data == b"ba"
    assert max(asked) == resident_wire.PIECE_BYTES


def test_one_request_at_a_time(folder: Path) -> None:
    agent = Echo(lambda data: (time.sleep(0.05), data)[1])
    answers: list[bytes] = []
    with serving(agent, folder) as client:
        threads = [
            threading.Thread(target=lambda n=number: answers.append(client.handle(bytes([n]), 20).data))
            for number in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(answers) == [bytes([number]) for number in range(6)] and agent.most_active == 1


def test_a_half_sent_request_or_a_wrong_token_does_not_stop_the_next_one(folder: Path) -> None:
    agent = Echo()
    with serving(agent, folder, transfer_s=0.3) as client:
        for piece in (b"", b"\1" * 7, (folder / TOKEN).read_bytes(), (folder / TOKEN).read_bytes() + HEAD.pack(1, 99)):
            # Once by a caller that dies, once by one that says no more.
            for dies in (True, False):
                connection, _ = connect(folder, time.monotonic() + 5)
                connection.sendall(piece)
                if dies:
                    connection.close()
                assert client.handle(b"ab", 10).data == b"ba"
                connection.close()
        (folder / TOKEN).write_bytes(bytes(32))
        # It refuses before it takes the rest, of which there is more than a socket holds.
        for request in (b"ab", b"ab" * 2**22):
            answer = client.handle(request, 10)
            assert answer.kind == AnswerKind.REFUSED and "token" in answer.error
    assert agent.most_active == 1


def test_a_caller_that_does_not_wait_for_its_answer_does_no_harm(folder: Path) -> None:
    goes_on = threading.Event()

    def work(data: bytes) -> bytes:
        goes_on.wait(10)
        return data * 1000

    with serving(Echo(work), folder) as client:
        with pytest.raises(WireTimeoutError):
            client.handle(b"x" * 10_000, 0.2)
        goes_on.set()
        assert client.handle(b"y", 10).data == b"y" * 1000


def test_files_are_for_their_owner_alone_and_go_at_the_end(folder: Path) -> None:
    inner = folder / "made"
    with serving(Echo(), inner):
        assert [stat.S_IMODE((inner / name).stat().st_mode) for name in (SOCKET, TOKEN)] == [0o600, 0o600]
        assert stat.S_IMODE(inner.stat().st_mode) == 0o700 and len((inner / TOKEN).read_bytes()) == 32
        with pytest.raises(InputError, match="another trainer listens"):
            ResidentTrainer(Echo(), inner)
    assert list(inner.iterdir()) == []
    with pytest.raises(ConnectionLostError, match="no trainer listens"):
        ResidentClient(inner).handle(b"x", 5)
    inner.chmod(0o755)
    with pytest.raises(InputError, match="chmod 700"):
        ResidentTrainer(Echo(), inner)
    with pytest.raises(InputError, match="shorter path"):
        ResidentTrainer(Echo(), folder / ("x" * 120))


def test_without_unix_sockets_it_is_loopback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident_wire, "HAS_UNIX_SOCKETS", False)
    with serving(Echo(), folder) as client:
        assert not (folder / SOCKET).exists() and client.handle(b"ab", 10).data == b"ba"
        with pytest.raises(InputError, match="another trainer listens"):
            ResidentTrainer(Echo(), folder)
    with pytest.raises(ConnectionLostError):
        client.handle(b"ab", 10)


PROGRAM = """
import json, os, sys, time
from cotune.federation.resident_trainer import ResidentTrainer

class Agent:
    def handle(self, data):
        if data == b"slow":
            print("working", flush=True)
            time.sleep(1.0)
        return data
    def introduce(self, question):
        return question

with ResidentTrainer(Agent(), sys.argv[1]) as trainer:
    print(json.dumps({"pid": os.getpid()}), flush=True)
    trainer.serve_until_signalled()
print("left", flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_signals_and_restarts_of_a_real_process(folder: Path) -> None:
    client = ResidentClient(folder / "t")
    slow: list[Answer | Exception] = []

    def call_slow() -> None:
        try:
            slow.append(client.handle(b"slow", 20))
        except ConnectionLostError as error:
            slow.append(error)

    for number in (signal.SIGKILL, signal.SIGTERM, None):
        with python("-c", PROGRAM, str(folder / "t"), log=folder / "log") as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, (folder / "log").read_text()
            pid = json.loads(line)["pid"]
            assert client.handle(b"ab", 10).data == b"ab"
            if number is None:
                process.send_signal(signal.SIGINT)
            else:
                caller = threading.Thread(target=call_slow)
                caller.start()
                assert process.stdout.readline() == "working\n"
                os.kill(pid, number)
                caller.join(20)
            code = process.wait(20)
            if number == signal.SIGKILL:
                # Who waited knows at once, and what is left of the killed one does not stop the next start.
                assert isinstance(slow.pop(), ConnectionLostError) and (folder / "t" / SOCKET).exists()
            else:
                assert code == 0 and process.stdout.readline() == "left\n", (folder / "log").read_text()
                assert list((folder / "t").iterdir()) == []
            if number == signal.SIGTERM:
                assert slow.pop() == Answer(kind=AnswerKind.DONE, data=b"slow")
    assert wait_until(lambda: not (folder / "t" / SOCKET).exists(), 1)
