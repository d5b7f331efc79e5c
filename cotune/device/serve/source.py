"""What the service asks of whatever makes its texts, beside the texts themselves."""

from __future__ import annotations

from typing import Protocol

from cotune.openai_api.source import ModelCard, TextSource


class DeviceSource(TextSource, Protocol):
    """Makes texts on a device, with a cloud or without."""

    @property
    def card(self) -> ModelCard:
        """The one model that it offers."""
        ...

    async def start(self) -> None:
        """Make sure that it can work, before anybody is told that it does.

        Raises:
            CotuneError: it cannot.
        """
        ...

    async def close(self) -> None:
        """End all texts that are being made, and everything that works for them."""
        ...

    def info(self) -> dict[str, object]:
        """What the page needs to know: what can be chosen, and what is chosen where nobody does. JSON values only."""
        ...
