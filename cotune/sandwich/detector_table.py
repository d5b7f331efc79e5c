"""All detectors by name, and what each needs to know."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from cotune.errors import InputError
from cotune.sandwich.detectors.api_key import ApiKeyDetector
from cotune.sandwich.detectors.dictionary import DictionaryDetector, DictionaryEntry
from cotune.sandwich.detectors.email import EmailDetector
from cotune.sandwich.detectors.gliner import LABELS, GlinerDetector
from cotune.sandwich.detectors.iban import IbanDetector
from cotune.sandwich.detectors.identifier import IdentifierDetector
from cotune.sandwich.detectors.ip_address import IpAddressDetector
from cotune.sandwich.detectors.payment_card import PaymentCardDetector
from cotune.sandwich.detectors.phone import PhoneDetector
from cotune.sandwich.detectors.presidio import PresidioDetector
from cotune.sandwich.detectors.quoted import QuotedDetector
from cotune.sandwich.detectors.unlisted import UnlistedDetector
from cotune.sandwich.detectors.url import UrlDetector
from cotune.sandwich.finding import Detector

RULES = ("email", "phone", "iban", "card", "ip", "url", "key")
"""Detectors that need nothing, and look where none are named."""
STRICT = ("id", "quoted", "unlisted")
"""Detectors that look too where there is a list of what may stay."""


@dataclass(frozen=True, kw_only=True)
class DetectorSettings:
    """Which detectors look, and what they need.

    Raises:
        InputError: an unknown detector, or a setting that no chosen detector would read.

    Example:
        >>> DetectorSettings(dictionary=(DictionaryEntry(("Ann Lee",), "PERSON"),)).names
        ('email', 'phone', 'iban', 'card', 'ip', 'url', 'key', 'dictionary')
    """

    detectors: tuple[str, ...] | None = None
    """Names of `DETECTORS`; where left out, all rules, the dictionary if there is one, `STRICT` if there is a list."""
    dictionary: tuple[DictionaryEntry, ...] = field(default=(), repr=False)
    """The user's own words."""
    allow_list: tuple[str, ...] = field(default=(), repr=False)
    """Words that may stay: strict, all others are replaced."""
    endings: tuple[str, ...] = ("s", "es", "n", "en")
    """What may follow a word of the dictionary."""
    presidio_language: str | None = None
    """Of Presidio; en where left out."""
    gliner_model: str | None = None
    """Folder or hub name."""
    gliner_labels: tuple[str, ...] = LABELS
    """What GLiNER looks for."""
    own: tuple[str, ...] = ()
    """Detectors of the caller, as `package.module:name`; called without arguments, in the detectors' process."""

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in DETECTORS and name not in self.own:
                raise InputError(f"there is no detector {name!r}, expected some of {', '.join(DETECTORS)}")
        if not self.names:
            raise InputError("detectors is empty, expected at least one; nothing would be looked for")
        for option, value, detector in (
            ("a dictionary", self.dictionary, "dictionary"),
            ("an allow list", self.allow_list, "unlisted"),
            ("presidio_language", self.presidio_language, "presidio"),
            ("gliner_model", self.gliner_model, "gliner"),
        ):
            if value and detector not in self.names:
                raise InputError(f"{option} is given and the detector {detector} is not among those chosen; add it")
        if "dictionary" in self.names and not self.dictionary:
            raise InputError("the detector dictionary is chosen and there is no dictionary; give its entries")
        if "unlisted" in self.names and not self.allow_list:
            raise InputError("the detector unlisted is chosen and there is no allow list; give its words")

    @property
    def names(self) -> tuple[str, ...]:
        """All that look, in order."""
        chosen = self.detectors
        if chosen is None:
            chosen = (*RULES, *(["dictionary"] if self.dictionary else []), *(STRICT if self.allow_list else []))
        return (*dict.fromkeys(chosen), *self.own)

    def as_json(self) -> dict[str, Any]:
        """For the detectors' process."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> DetectorSettings:
        """What `as_json` gave."""
        plain: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
        }
        plain["dictionary"] = tuple(
            DictionaryEntry(tuple(each["forms"]), each["kind"]) for each in fields["dictionary"]
        )
        return cls(**plain)


DETECTORS: dict[str, Callable[[DetectorSettings], Detector]] = {
    "email": lambda _: EmailDetector(),
    "phone": lambda _: PhoneDetector(),
    "iban": lambda _: IbanDetector(),
    "card": lambda _: PaymentCardDetector(),
    "ip": lambda _: IpAddressDetector(),
    "url": lambda _: UrlDetector(),
    "key": lambda _: ApiKeyDetector(),
    "id": lambda _: IdentifierDetector(),
    "quoted": lambda _: QuotedDetector(),
    "unlisted": lambda settings: UnlistedDetector(settings.allow_list),
    "dictionary": lambda settings: DictionaryDetector(settings.dictionary, endings=settings.endings),
    "presidio": lambda settings: PresidioDetector(language=settings.presidio_language or "en"),
    "gliner": lambda settings: GlinerDetector(settings.gliner_model or "", labels=settings.gliner_labels),
}


def build_detector(name: str, settings: DetectorSettings) -> Detector:
    """One detector of the settings.

    Raises:
        InputError: it cannot be had; says which extra is missing.
    """
    if name in DETECTORS:
        return DETECTORS[name](settings)
    module, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError):
        raise InputError(f"the detector {name!r} cannot be imported, expected package.module:name") from None
    return cast(Detector, factory())
