"""Who writes the prompts of a pool that grows, by the options of `cotune sandwich fit`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cotune.cli.sandwich_edge import open_cloud, price_of
from cotune.errors import InputError

if TYPE_CHECKING:
    from cotune.sandwich.cost import Price
    from cotune.sandwich.prompts.reflection import Reflection

KEY_VARIABLE = "COTUNE_REFLECT_KEY"
"""Of another cloud, which never gets the key of the one that answers."""


@dataclass(frozen=True, kw_only=True)
class ReflectionOptions:
    """What the options say.

    Attributes:
        model: --reflect-model.
        cloud: --reflect-cloud, a base URL.
        key_variable: --reflect-key-env.
        prices: --reflect-prices.
        other_prices: --prices, where there are no others.
        is_here: --reflect-edge.
    """

    model: str | None
    cloud: str | None
    key_variable: str | None
    prices: Path | None
    other_prices: Path | None
    is_here: bool

    def check(self, *, is_growing: bool, has_edge: bool) -> None:
        """Refuse what does not go together, and a model that a price table lacks.

        Raises:
            InputError: as said.
        """
        given = {
            "--reflect-model": self.model,
            "--reflect-cloud": self.cloud,
            "--reflect-key-env": self.key_variable,
            "--reflect-prices": self.prices,
            "--reflect-edge": self.is_here or None,
        }
        named = [name for name, value in given.items() if value is not None]
        if named and not is_growing:
            raise InputError(f"{named[0]} is given without --grow-every, expected it too; add it")
        if self.is_here and len(named) > 1:
            raise InputError(f"--reflect-edge and {named[0]} are both given, expected one model that reflects")
        if self.is_here and not has_edge:
            raise InputError("--reflect-edge is given without --edge, expected the model that reflects; add it")
        for name in ("--reflect-cloud", "--reflect-prices"):
            if given[name] is not None and self.model is None:
                raise InputError(f"{name} is given without --reflect-model, expected the model's name; add it")
        if self.key_variable is not None and self.cloud is None:
            raise InputError("--reflect-key-env is given without --reflect-cloud, expected its base URL; add it")
        self.price()

    def price(self) -> Price | None:
        """Of the model's tokens; None where there is no table.

        Raises:
            InputError: the table lacks it.
        """
        return None if self.model is None else price_of(self.model, self.prices or self.other_prices)


@contextmanager
def open_reflection(options: ReflectionOptions) -> Iterator[Reflection | None]:
    """The model behind an API that reflects; None for the one that answers, at its own price.

    Raises:
        InputError: a variable is not set, or the URL cannot be used.
    """
    from cotune.sandwich.prompts.reflection import CloudReflection

    if options.model is None:
        yield None
        return
    if options.cloud is None:
        yield CloudReflection(model=options.model, price=options.price())
        return
    opened = open_cloud(options.cloud, options.key_variable, default_variable=KEY_VARIABLE, option="--reflect-key-env")
    with opened as cloud:
        yield CloudReflection(model=options.model, cloud=cloud, price=options.price())
