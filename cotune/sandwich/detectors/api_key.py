"""Keys and other secrets: by the prefixes that their makers give them, by names such as `password=`, and by entropy."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

from cotune.sandwich.finding import Finding

# As the makers document them. Upper and lower case count.
_PREFIXED = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"(?:AKIA|ASIA|AROA|AIDA)[A-Z0-9]{16}"  # Amazon Web Services
    r"|gh[pousr]_[A-Za-z0-9]{20,255}|github_pat_\w{20,255}"  # GitHub
    r"|gl(?:pat|dt|rt|ptt|cbt)-[\w-]{16,255}"  # GitLab
    r"|xox[abeoprs]-[A-Za-z0-9-]{10,255}|xapp-[A-Za-z0-9-]{10,255}"  # Slack
    r"|sk-[A-Za-z0-9_-]{16,255}"  # OpenAI, Anthropic, OpenRouter
    r"|[spr]k_(?:live|test)_[A-Za-z0-9]{10,255}|whsec_[A-Za-z0-9]{16,255}"  # Stripe
    r"|AIza[\w-]{35}|ya29\.[\w-]{20,255}|GOCSPX-[\w-]{20,60}"  # Google
    r"|hf_[A-Za-z0-9]{20,255}|gsk_[A-Za-z0-9]{20,255}|r8_[A-Za-z0-9]{20,255}"  # Hugging Face, Groq, Replicate
    r"|npm_[A-Za-z0-9]{30,255}|pypi-[\w-]{16,255}|dop_v1_[a-f0-9]{32,255}"  # npm, PyPI, DigitalOcean
    r"|shp(?:at|ca|pa|ss)_[a-fA-F0-9]{32}|SG\.[\w-]{16,64}\.[\w-]{16,64}"  # Shopify, SendGrid
    r"|\d{8,10}:[A-Za-z0-9_-]{35}|AGE-SECRET-KEY-1[A-Z0-9]{58}"  # Telegram, age
    r"|eyJ[\w-]{8,4096}\.[\w-]{8,8192}(?:\.[\w-]{0,2048})?"  # JSON web tokens
    r")"
)
_PEM = re.compile(r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")
_PEM_END = re.compile(r"-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")
_NAMED = re.compile(
    r"(?:pass(?:word|wd|phrase|code)?|pwd|secret|credential|token|pin|api[_ -]?key|access[_ -]?key|private[_ -]?key|"
    r"client[_ -]?secret|auth(?:orization)?)[\"']?(?:[ \t]{0,3}(?P<sign>=|:|=>|:=)[ \t]{0,3}|"
    r"[ \t](?P<verb>is|was|(?:will|to|should) be)[ \t])"
    r"(?P<quote>[\"'`]?)(?:(?:Bearer|Basic)[ \t])?(?P<value>[^\s\"'`,;<>]{3,512})",
    re.IGNORECASE,
)
_PROSE = (
    "also always changed correct encrypted expired hashed here incorrect invalid just kept longer missing more needed "
    "never only optional reset required sent shared stored that this used valid weak wrong your"
)
_NOT_PASSWORDS = frozenset(_PROSE.split())
_TOKEN = re.compile(r"(?<![\w+/-])[\w+/-]{20,512}={0,2}(?![\w+/-])")
_HEX = re.compile(r"[0-9a-f-]+|[0-9A-F-]+")
_MIN_HEX = 32
_MIN_ENTROPY_BITS = 3.5
_MIN_HEX_ENTROPY_BITS = 3.0


def entropy_bits(text: str) -> float:
    """Shannon entropy of the characters' frequencies, in bits per character.

    Example:
        >>> entropy_bits("aabb"), entropy_bits("abcd")
        (1.0, 2.0)
    """
    return sum(-count / len(text) * math.log2(count / len(text)) for count in Counter(text).values())


class ApiKeyDetector:
    """Finds secrets; kind KEY, identity as written.

    By entropy: words of at least 20 characters with a digit and letters of both cases and 3.5 bits a character, or at
    least 32 hexadecimal digits with 3 bits (also digests and UUIDs, which name a thing or a person as well).

    Example:
        >>> text = "export TOKEN=hunter22 # and sk-proj-abcdEFGH12345678ijkl"
        >>> [f.identity for f in ApiKeyDetector().find(text)]
        ['sk-proj-abcdEFGH12345678ijkl', 'hunter22', 'sk-proj-abcdEFGH12345678ijkl']
    """

    def find(self, text: str) -> Iterator[Finding]:
        """See `Detector`."""
        for prefixed in _PREFIXED.finditer(text):
            yield Finding(prefixed.start(), prefixed.end(), "KEY", prefixed[0])
        for opening in _PEM.finditer(text):
            closing = _PEM_END.search(text, opening.end())
            end = closing.end() if closing else len(text)
            yield Finding(opening.start(), end, "KEY", text[opening.start() : end])
        for named in _NAMED.finditer(text):
            if _is_value(named):
                value = named["value"].rstrip(".!?)}]") or named["value"]
                start = named.start("value")
                yield Finding(start, start + len(value), "KEY", value)
        for token in _TOKEN.finditer(text):
            if _is_random(token[0]):
                yield Finding(token.start(), token.end(), "KEY", token[0])


def _is_value(named: re.Match[str]) -> bool:
    """Prose says `the secret: be kind`; a value has a digit, is quoted, or stands after an equals sign.

    After `password is` almost anything is one.
    """
    value = named["value"]
    if named["verb"] and named[0].lower().startswith("pass"):
        return value.rstrip(".!?").lower() not in _NOT_PASSWORDS
    assigned = named["sign"] in ("=", ":=", "=>") or named["quote"] != ""
    return any(letter.isdigit() for letter in value) or (assigned and value.isascii() and "(" not in value)


def _is_random(token: str) -> bool:
    if _HEX.fullmatch(token):
        digits = token.replace("-", "")
        has_both = any(d.isdigit() for d in digits) and any(d.isalpha() for d in digits)
        return len(digits) >= _MIN_HEX and has_both and entropy_bits(digits) >= _MIN_HEX_ENTROPY_BITS
    classes = (str.isdigit, str.islower, str.isupper)
    return all(any(map(has, token)) for has in classes) and entropy_bits(token) >= _MIN_ENTROPY_BITS
