"""Goes on with a text of a cloud's tokens by an offline model, which may have other tokens.

With the same tokenizer the model reads the very tokens and adds its own. With another one it reads the text, and what
it writes is encoded in the cloud's tokens piece by piece, each checked to spell exactly what was written: so the text
may go back to the cloud at any place between two pieces, and nothing is lost or said twice.
"""

from __future__ import annotations

from collections.abc import Sequence

from cotune.device.offline.model import OfflineModel
from cotune.device.offline.reader import TextReader
from cotune.errors import InputError
from cotune.generation.request import GenerationRequest
from cotune.generation.sampling import choose
from cotune.generation.text import Detokenizer, TextCodec

# Tokens whose text is looked at to see what new ones add; a character has at most four bytes.
_WINDOW = 16
# Text that the cloud's tokens cannot spell is held back up to this many characters.
_MAX_HELD = 32


class Continuation:
    """One text, which the model may take over several times.

    Args:
        model: writes.
        reader: an empty text in it, with room for this one.
        own: the model's tokenizer.
        cloud: the cloud's.
        cloud_tokenizer_json: the same as bytes, to see whether both are the same.
        prompt: as text.
        request: with the prompt's tokens and the sampling.

    Attributes:
        ending: `end_token` or `length` where the model ended the text; None while it goes on.
    """

    def __init__(
        self,
        model: OfflineModel,
        reader: TextReader,
        *,
        own: TextCodec,
        cloud: TextCodec,
        cloud_tokenizer_json: bytes,
        prompt: str,
        request: GenerationRequest,
    ) -> None:
        self.ending: str | None = None
        self._model = model
        self._reader = reader
        self._own, self._cloud = own, cloud
        self._is_same = model.description.reads_with(cloud_tokenizer_json)
        self._prompt = prompt
        self._request = request
        self._tokens: list[int] = []
        self._tail: list[int] = []
        self._held = ""
        self._detokenizer = Detokenizer(own)

    @property
    def is_between(self) -> bool:
        """Whether everything that was written has been given out, so that the cloud may take over here."""
        return not self._held

    def begin(self, token_ids: Sequence[int]) -> int:
        """Take over after the text's tokens so far.

        Args:
            token_ids: that were generated, of the cloud's.

        Returns:
            How many of the last of them are half a character, which is written anew: they have to be forgotten.

        Raises:
            InputError: the text has no room in the model's context.
        """
        num_half = 0
        if self._is_same:
            self._tokens = [*self._request.prompt_ids.tolist(), *token_ids]
        else:
            num_half = _num_half(self._cloud, token_ids)
            whole = list(token_ids[: len(token_ids) - num_half])
            self._tail = whole[-_WINDOW:]
            self._tokens = self._own.encode_prompt(self._prompt + self._cloud.decode(whole)).tolist()
            self._detokenizer, self._held = Detokenizer(self._own), ""
        if len(self._tokens) >= self._model.context:
            raise InputError(
                f"the text has {len(self._tokens)} tokens, expected fewer than {self._model.context}, the context of "
                "the offline model"
            )
        return num_half

    def advance(self) -> list[int]:
        """The cloud's tokens that the next step gives: none while a piece of the prompt is read, or a character grows.

        Raises:
            InputError: the cloud's tokens cannot spell what was written, or the runtime failed.
        """
        if self.ending is not None:
            return []
        if len(self._tokens) >= self._model.context:
            self.ending = "length"
            return self._rest()
        logits = self._reader.read(self._tokens)
        if logits is None:
            return []
        token = choose(logits, self._request.sampling, len(self._tokens))
        self._tokens.append(token)
        if token in self._model.description.end_ids:
            self.ending = "end_token"
            return [token] if self._is_same else self._rest()
        return [token] if self._is_same else self._spell(self._detokenizer.add(token))

    def _rest(self) -> list[int]:
        return [] if self._is_same else self._spell(self._detokenizer.rest())

    def _spell(self, piece: str) -> list[int]:
        """The cloud's tokens of what was written and not given out yet; none where that has to grow first."""
        self._held += piece
        if not self._held:
            return []
        before = self._cloud.decode(self._tail)
        for candidate in self._candidates():
            if self._cloud.decode([*self._tail, *candidate]) == before + self._held:
                self._tail = [*self._tail, *candidate][-_WINDOW:]
                self._held = ""
                return candidate
        if len(self._held) > _MAX_HELD or self.ending is not None:
            raise InputError(
                f"the cloud's tokenizer cannot spell {self._held!r:.100}, which the offline model wrote; use an "
                "offline model of the cloud's own family"
            )
        return []

    def _candidates(self) -> list[list[int]]:
        """As it stands, and as it is after other text: some tokenizers put a space in front of every text.

        After a line break, which no word begins with, where a word was cut in two; and after a space, which is lost at
        the start of a text.
        """
        found = [self._cloud.encode_text(self._held)]
        for other in ("\n", " "):
            joined = self._cloud.encode_text(other + self._held)
            found += [joined[start:] for start in range(len(joined))]
        return found


def _num_half(codec: TextCodec, token_ids: Sequence[int]) -> int:
    """How many of the last tokens are a character that is not complete."""
    for num_half in range(min(4, len(token_ids)) + 1):
        end = len(token_ids) - num_half
        if not codec.decode(token_ids[max(0, end - _WINDOW) : end]).endswith("\ufffd"):
            return num_half
    # Bytes that no character has: they stay as they are.
    return 0
