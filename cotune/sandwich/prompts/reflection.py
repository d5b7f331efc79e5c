"""Who reads failures and writes prompts: the cloud that answers, another model behind the same door, or the edge.

A cloud of any kind reads what went through the redactor, and every request to it is set aside in the run's budget, kept
in its cache, written into its ledger (as `reflection`) and into the log of what was sent, at a price of its own. The
edge reads the same redacted text, since what it writes will be sent as a prompt; nothing is sent for that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cotune.data.templates import format_request
from cotune.errors import InputError
from cotune.sandwich.account import Account
from cotune.sandwich.bilevel.problem import Vector
from cotune.sandwich.chat import ChatRequest, CloudModel
from cotune.sandwich.cost import Price
from cotune.sandwich.pipeline import Pipeline
from cotune.sandwich.redact import RedactedJson

KIND = "reflection"
"""In the egress ledger and in the account."""

Reflect = Callable[[RedactedJson], str]
"""From a task and what failed, as a conversation, to what the model writes."""


class Reflection(Protocol):
    """A model that can be asked for prompts."""

    @property
    def name(self) -> str:
        """Tells it from others where a run goes on."""
        ...

    def begin(self, pipeline: Pipeline, *, max_tokens: int) -> Reflect:
        """For one run.

        Args:
            pipeline: with the run's gate, whose budget and books hold.
            max_tokens: of what is written.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class CloudReflection:
    """A model behind an API.

    Attributes:
        model: its name; None: the pipeline's own model, at its price.
        cloud: where it is; None: where the pipeline's is.
        price: of its tokens, where it is another model; None where it is not known.

    Raises:
        InputError: a cloud or a price without a model.

    Example:
        >>> CloudReflection(model="m", price=Price(usd_per_million_in=1.0)).name
        'm'
    """

    model: str | None = None
    cloud: CloudModel | None = field(default=None, repr=False)
    price: Price | None = None

    def __post_init__(self) -> None:
        if self.model is None and (self.cloud is not None or self.price is not None):
            raise InputError("a cloud or a price for reflection is given without a model, expected its name there")

    @property
    def name(self) -> str:
        return self.model or ""

    def begin(self, pipeline: Pipeline, *, max_tokens: int) -> Reflect:
        """Ask through a door beside the pipeline's.

        Raises:
            InputError: the budget is in dollars and the model has no price.
        """
        gate, sampling = pipeline.gate, pipeline.config
        price = gate.known_price if self.model is None else self.price
        beside = gate.beside(self.cloud, price=price, kind=KIND)

        def reflect(messages: RedactedJson) -> str:
            request = ChatRequest(
                model=self.model or sampling.model,
                messages=messages,
                max_tokens=max_tokens,
                temperature=sampling.temperature,
                seed=sampling.seed,
            )
            return beside.ask(request).answer.text

        return reflect


class WritingEdge(Protocol):
    """An edge model that writes texts: `EdgeAdapter`."""

    def count_in(self, account: Account) -> None:
        """From now on, count tokens there."""
        ...

    def start(self) -> Vector:
        """The untrained adapter."""
        ...

    def write_after(self, x: Vector, prompts_as_text: Sequence[str]) -> list[str]:
        """What it writes after each text, greedily."""
        ...


@dataclass(frozen=True)
class EdgeReflection:
    """The edge model with its untrained adapter, since the trained one has learnt another task. Sends nothing.

    It writes as much as it writes elsewhere (`EdgeConfig.max_new_tokens`); of a text that is too long it reads the end.
    """

    edge: WritingEdge

    @property
    def name(self) -> str:
        return "the edge"

    def begin(self, pipeline: Pipeline, *, max_tokens: int) -> Reflect:
        """Write on the edge; operations are in the run's account."""
        self.edge.count_in(pipeline.gate.account)

        def reflect(messages: RedactedJson) -> str:
            task, failures = (each["content"] for each in messages.value)
            # The task is last, where it is read in any case.
            (written,) = self.edge.write_after(self.edge.start(), [format_request(f"{failures}\n\n{task}")])
            return written

        return reflect
