"""What `FlowerTransport` uses of Flower's grid, in this process: nodes are functions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

Node = Callable[[Message], Message | None]


@dataclass
class FakeGrid:
    """It does what Flower's was seen to do, half-sent replies included."""

    nodes: dict[int, Node]
    pushed: list[Message] = field(default_factory=list)
    refuses: set[int] = field(default_factory=set)
    """Nodes whose messages the SuperLink does not take."""

    def __post_init__(self) -> None:
        self.replies: dict[str, Message | None] = {}
        self.lock = threading.Lock()

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str | None]:
        ids: list[str | None] = []
        for message in messages:
            if message.metadata.dst_node_id in self.refuses:
                ids.append(None)
                continue
            with self.lock:
                self.pushed.append(message)
                message_id = f"m{len(self.pushed)}"
            message.metadata.__dict__["_message_id"] = message_id
            self.replies[message_id] = self.nodes[message.metadata.dst_node_id](message)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        (message_id,) = message_ids
        reply = self.replies.get(message_id)
        if isinstance(reply, HalfSent):
            reply.until.wait(30)
            return []
        return [] if reply is None else [reply]


class HalfSent(Message):
    """A reply whose header is there and whose content is not: whoever pulls it waits."""

    until: threading.Event

    def __init__(self, until: threading.Event) -> None:
        self.__dict__["until"] = until


def identify() -> None:
    """Flower's process of an app sets these before it calls the app."""
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
