"""Generated text with every token coloured by who decided it, as in SPA's Figure 5.

Classes, told apart by colour and by underline: the cloud alone; the side network was consulted and agreed; the device
changed the token; or wrote it alone, while the cloud was out of reach. Pieces of text are untrusted and shown as text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal, TypeAlias

from cotune.evaluation.generation_metrics import GenerationMetrics
from cotune.evaluation.markup import Html, escape, join, share

Decision: TypeAlias = Literal["cloud", "agreed", "device", "local"]

DECISIONS: dict[Decision, tuple[str, str]] = {
    "cloud": ("Cloud alone", "The cloud alone decided this token; the device was not consulted"),
    "agreed": ("Consulted, agreed", "The device was consulted and agreed with the cloud"),
    "device": ("Changed by the device", "The device changed this token"),
    "local": ("Offline", "The device wrote this token alone, while the cloud was out of reach"),
}
"""Name in the legend and sentence in the tooltip, for each class."""


def decisions(generation: GenerationMetrics) -> list[Decision]:
    """The class of each token.

    Example:
        sources cloud, cloud, device with consulted no, yes, yes -> cloud, agreed, device.
    """
    return _classes(generation.sources, generation.consulted)


def coloured_text(generation: GenerationMetrics) -> Html:
    """The tokens in order, each with its class and, as a tooltip, who decided it."""
    return coloured_tokens(generation.tokens, generation.token_ids, generation.sources, generation.consulted)


def coloured_tokens(
    pieces: Sequence[str], token_ids: Sequence[int], sources: Sequence[str], consulted: Sequence[bool]
) -> Html:
    """As `coloured_text`, from one value of each kind for every token."""
    by_token = zip(_classes(sources, consulted), pieces, token_ids, strict=True)
    spans = (
        Html(
            f'<span class="t-{decision}" title="{DECISIONS[decision][1]}. '
            f'Token {position + 1}, id {token_id}.">{_piece(piece)}</span>'
        )
        for position, (decision, piece, token_id) in enumerate(by_token)
    )
    return Html(f'<p class="generated">{join(spans)}</p>')


def _classes(sources: Sequence[str], consulted: Sequence[bool]) -> list[Decision]:
    return [
        "agreed" if source == "cloud" and asked else source  # type: ignore[misc]
        for source, asked in zip(sources, consulted, strict=True)
    ]


def legend() -> Html:
    """What the colours mean; reports are made with a cloud throughout."""
    with_cloud = {key: name for key, (name, _) in DECISIONS.items() if key != "local"}
    items = (Html(f'<li><span class="t-{key}">{name}</span></li>') for key, name in with_cloud.items())
    return Html(f'<ul class="legend" aria-label="Who decided a token">{join(items)}</ul>')


def decision_bar(generation: GenerationMetrics) -> Html:
    """How many tokens each class has: a stacked bar and one sentence."""
    counts = Counter(decisions(generation))
    parts = join(
        Html(f'<span class="b-{key}" style="flex-grow:{counts[key]}"></span>') for key in DECISIONS if counts[key]
    )
    total = max(1, generation.num_tokens)
    words = ", ".join(
        f"{counts[key]} {name[0].lower()}{name[1:]} ({share(counts[key] / total)})"
        for key, (name, _) in DECISIONS.items()
        if counts[key]
    )
    sentence = f"{generation.num_tokens} tokens: {words}." if words else "No token was generated."
    return Html(f'<div class="bar" aria-hidden="true">{parts}</div><p class="note">{escape(sentence)}</p>')


def _piece(piece: str) -> Html:
    """A token without text (an end mark, say) still has to be seen, and counted."""
    return escape(piece) if piece else Html('<span class="empty">∅</span>')
