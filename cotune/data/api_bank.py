"""API-Bank (Li et al., 2023): calls as text, and which of their arguments tell about a person.

Its requests are made up, names and numbers too, so that leaks are counted in them to nobody's harm.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

GOLD_ARGUMENTS = {
    "name": ("name", "patient_name", "user_name", "username", "doctor_name", "new_appointment_doctor", "member_name"),
    "address": ("address",),
    "mail": ("email", "recipient", "receiver"),
    "secret": ("password", "new_password", "old_password", "token", "verification_code"),
    "id": ("user_id", "appointment_id", "account", "device_id"),
    "url": ("url",),
}
"""Arguments that tell about a person, by what they hold."""
OWN_WORDS = ("name", "address")
"""What a user would have in a dictionary."""
_CALL = re.compile(r"(\w+)\s*\((.*)\)", re.DOTALL)
_ARGUMENT = re.compile(r"(\w+)\s*=\s*(?:'([^']*)'|\"([^\"]*)\"|([^\s,'\")]+))")


def parse_call(text: str) -> tuple[str, dict[str, str]]:
    """Name and arguments of the first call in a text; no name where there is none.

    Example:
        >>> parse_call("API-Request: [Find(name='Ann Lee', age=7)]")
        ('Find', {'name': 'Ann Lee', 'age': '7'})
    """
    call = _CALL.search(text)
    if call is None:
        return "", {}
    return call[1], {name: a or b or c for name, a, b, c in _ARGUMENT.findall(call[2])}


def gold_units(row: Mapping[str, Any]) -> dict[str, str]:
    """The private values of a row that stand in its request, folded, with what they are.

    Example:
        >>> gold_units({"instruction": "I am Ann  LEE.", "calls": ["[Find(name='Ann Lee')]"]})
        {'ann lee': 'name'}
    """
    kinds = {argument: kind for kind, arguments in GOLD_ARGUMENTS.items() for argument in arguments}
    request = fold(row["instruction"])
    units = {}
    for call in row["calls"]:
        for argument, value in parse_call(call)[1].items():
            if argument in kinds and len(value) > 1 and stands_in(fold(value), request):
                units[fold(value)] = kinds[argument]
    return units


def fold(text: str) -> str:
    """Without case and doubled spaces.

    Example:
        >>> fold(" Ann  LEE ")
        'ann lee'
    """
    return re.sub(r"\s+", " ", text.casefold()).strip()


def stands_in(unit: str, text: str) -> bool:
    """Whether a folded unit stands in a folded text as whole words.

    Example:
        >>> stands_in("ann", "dear ann"), stands_in("ann", "annual")
        (True, False)
    """
    return re.search(rf"(?<!\w){re.escape(unit)}(?!\w)", text) is not None
