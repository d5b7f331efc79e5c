"""News articles with one file each: `.story` of CNN/DailyMail and `.summary` of XSum, as their makers publish them.

Both become rows with the columns and the text that the Hugging Face hub has for the same article.
"""

from __future__ import annotations

import re

from cotune.data.templates import Row
from cotune.errors import DataError

HIGHLIGHT = "@highlight"
SENTENCE_ENDS = (".", "!", "?", "...", "'", "`", '"', "\u2019", "\u201d", ")")
XSUM_PARTS = ("FIRST-SENTENCE", "RESTBODY")
# Lines of the BBC's page that its articles come with.
XSUM_PAGE_LINES = frozenset(
    (
        "Share this with",
        "Email",
        "Facebook",
        "Messenger",
        "Twitter",
        "Pinterest",
        "WhatsApp",
        "Linkedin",
        "LinkedIn",
        "Copy this link",
        "These are external links and will open in a new window",
    )
)


def parse_story(text: str) -> Row:
    """`article` and `highlights`: the paragraphs with spaces between them, the highlights one a line.

    Example:
        >>> parse_story("It rained.\\n\\nIt poured.\\n\\n@highlight\\n\\nWet day")
        {'article': 'It rained. It poured.', 'highlights': 'Wet day .'}

    Raises:
        DataError: there is no highlight.
    """
    body, *highlights = re.split(rf"^{HIGHLIGHT}\s*$", text, flags=re.MULTILINE)
    joined = [" ".join(ended_lines(each)) for each in highlights]
    if not any(joined):
        raise DataError(f"the story has no highlight, expected lines '{HIGHLIGHT}' with text below them")
    return {"article": " ".join(ended_lines(body)), "highlights": "\n".join(filter(None, joined))}


def ended_lines(text: str) -> list[str]:
    """The lines with text; one that lacks the end of its sentence gets a full stop."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [line if line.endswith(SENTENCE_ENDS) else f"{line} ." for line in lines]


def parse_summary(text: str) -> Row:
    """`document` and `summary`: the body without the lines of the page around it, and the first sentence.

    Example:
        >>> parse_summary("[SN]FIRST-SENTENCE[SN]\\nIt rained.\\n[SN]RESTBODY[SN]\\nEmail\\nAll day.\\n")
        {'document': 'All day.', 'summary': 'It rained.'}

    Raises:
        DataError: one of the parts is missing.
    """
    pieces = re.split(r"\[SN\]([A-Z-]+)\[SN\]", text)
    parts = dict(zip(pieces[1::2], pieces[2::2], strict=True))
    missing = [f"[SN]{name}[SN]" for name in XSUM_PARTS if name not in parts]
    if missing:
        raise DataError(f"the file has no part {' and '.join(missing)}, expected the parts of an XSum .summary file")
    lines = [line.strip() for line in parts["RESTBODY"].splitlines()]
    document = "\n".join(line for line in lines if line and line not in XSUM_PAGE_LINES)
    return {"document": document, "summary": " ".join(parts["FIRST-SENTENCE"].split())}
