"""Numbers and names that identify: user, appointment and account ids, references, bare long numbers. Not on by default.

Found are what stands after a word such as `ID`, `account number` or `ref`, and has a digit; digits in a row, 6 or
more; letters and digits mixed, 5 characters or more with 3 digits or more. The last two also take amounts and model
names that the cloud may need, so this detector must be asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from cotune.sandwich.finding import Finding

_NAMED = re.compile(
    r"\b(?:id|identifier|user[ _-]?name|login|account|appointment|booking|reservation|order|invoice|customer|"
    r"member|patient|policy|passport|licen[cs]e|case|ticket|ref(?:erence)?|ssn|social security|tax)"
    r"(?:[ _-]?(?:id|identifier|number|code|no\.?|nr\.?))?[ \t]{0,2}(?:(?:is|was|will be|=|:|#)[ \t]{0,2}|(?=\d))"
    r"[\"'`]?(?P<value>[^\W_][\w.@/-]{1,63})",
    re.IGNORECASE,
)
_BARE = re.compile(r"(?<![\w.,])(?:\d{6,32}|(?=\w{5,64}(?!\w))(?:[^\W\d_]*\d){3}\w*)(?!\w)")


class IdentifierDetector:
    """Finds identifiers; kind ID, identity in lower case.

    Example:
        >>> text = "My user ID is J46801; the appointment 34567890 is for two."
        >>> sorted({f.identity for f in IdentifierDetector().find(text)})
        ['34567890', 'j46801']
    """

    def find(self, text: str) -> Iterator[Finding]:
        """See `Detector`."""
        for named in _NAMED.finditer(text):
            value = named["value"].rstrip(".-/@")
            if any(letter.isdigit() for letter in value):
                start = named.start("value")
                yield Finding(start, start + len(value), "ID", value.lower())
        for bare in _BARE.finditer(text):
            if any(letter.isalpha() for letter in bare[0]) or len(bare[0]) > 5:
                yield Finding(bare.start(), bare.end(), "ID", bare[0].lower())
