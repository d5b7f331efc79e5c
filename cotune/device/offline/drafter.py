"""An offline model as the drafter of the `drafted` and `auto` schedules: it guesses how the cloud's text goes on.

Speculative decoding (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318) with the draft on the device
and the check in the cloud. A draft decides nothing, so that the text stays what it is without one.
"""

from __future__ import annotations

from functools import partial

from cotune.device.offline.model import Adapter, OfflineModel
from cotune.device.offline.reader import TextReader
from cotune.errors import MismatchError


class OfflineDrafter:
    """Continues a text greedily. Fits `Drafter`.

    What the text loses and gains between two calls is cut off and read; a long prompt is read over several calls,
    which draft nothing until it is read.

    Args:
        model: of the same tokenizer as the cloud's.
        adapter: that it drafts with.
    """

    def __init__(self, model: OfflineModel, adapter: Adapter | None = None) -> None:
        self._context = model.context
        self._vocab_size = model.description.vocab_size
        self._end_ids = model.description.end_ids
        self._open = partial(model.open, adapter)
        # At the first draft: most schedules never ask for one.
        self._reader: TextReader | None = None

    def draft(self, history: list[int], k: int) -> list[int]:
        room = min(k, self._context - len(history))
        if room < 1 or not history or not 0 <= min(history) <= max(history) < self._vocab_size:
            return []
        self._reader = self._reader or TextReader(self._open())
        path = list(history)
        while len(path) < len(history) + room:
            logits = self._reader.read(path)
            if logits is None:
                break
            path.append(int(logits.argmax()))
            if path[-1] in self._end_ids:
                break
        return path[len(history) :]


def check_same_tokenizer(model: OfflineModel, tokenizer_json: bytes) -> None:
    """Make sure that an offline model reads the very tokens of a cloud.

    Args:
        model: on the device.
        tokenizer_json: of the cloud, as plugins keep it.

    Raises:
        MismatchError: they have other tokenizers.
    """
    if not model.description.reads_with(tokenizer_json):
        raise MismatchError(
            f"the offline model in {model.folder.path} has another tokenizer than the cloud, expected the same one to "
            "draft with; export an offline model of the cloud's own family, or use schedule optimistic"
        )
