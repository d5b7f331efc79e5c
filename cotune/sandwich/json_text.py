"""JSON that travels as text: tool-call arguments, and documents inside of strings.

Such a text is redacted and restored in place, without parsing and writing it again, so that what comes back is the
same to the last space.
"""

from __future__ import annotations

import json
import re

from cotune.sandwich.finding import Finding

# Each alternative begins with another character, so a text is read once.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?', re.DOTALL)


def is_json_document(text: str) -> bool:
    """Whether the text is a JSON object or array.

    Example:
        >>> is_json_document(' {"to": "ann@x.org"} '), is_json_document("[sic]"), is_json_document("12")
        (True, False, False)
    """
    if text.strip()[:1] not in ("{", "["):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def escape_json(text: str) -> str:
    """As it stands between the quotes of a JSON string.

    Example:
        >>> print(escape_json('say "hi"'))
        say \\"hi\\"
    """
    return json.dumps(text, ensure_ascii=False)[1:-1]


def unescape_json(text: str) -> str:
    """What a piece of a JSON string says; as it is, where it is cut in the middle of an escape.

    Example:
        >>> unescape_json("caf\\\\u00e9")
        'café'
    """
    try:
        return str(json.loads(f'"{text}"', strict=False))
    except ValueError:
        return text


def clip_to_tokens(text: str, findings: list[Finding]) -> list[tuple[Finding, bool]]:
    """Findings in a JSON document, cut so that none covers quotes, commas or brackets.

    Args:
        text: a JSON document.
        findings: apart from each other, in order.

    Returns:
        Each piece inside of a string, with False; each number of which a part was found, whole, with True.

    Example:
        >>> clip_to_tokens('{"tel": 4155552671}', [Finding(8, 18, "PHONE", "4155552671")])
        [(Finding(start=8, end=18, kind='PHONE'), True)]
    """
    pieces: list[tuple[Finding, bool]] = []
    tokens = _TOKEN.finditer(text)
    token = next(tokens, None)
    for finding in findings:
        while token is not None and token.end() <= finding.start:
            token = next(tokens, None)
        while token is not None and token.start() < finding.end:
            is_number = token[0][0] != '"'
            inside = (token.start(), token.end()) if is_number else (token.start() + 1, token.end() - 1)
            start, end = inside if is_number else (max(inside[0], finding.start), min(inside[1], finding.end))
            already = bool(pieces) and pieces[-1][0].end > start
            if start < end and not already:
                pieces.append((_piece(finding, start, end), is_number))
            if token.end() > finding.end:
                break
            token = next(tokens, None)
    return pieces


def _piece(finding: Finding, start: int, end: int) -> Finding:
    if (start, end) == (finding.start, finding.end):
        return finding
    return Finding(start, end, finding.kind, f"{finding.identity}[{start - finding.start}:{end - finding.start}]")
