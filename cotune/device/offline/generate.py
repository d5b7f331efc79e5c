"""Text from an offline model alone: the same sampling, noise, limits and ends as everywhere in cotune.

The tokens are a pure function of (weights, prompt, seed), for one runtime with one number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from cotune.device.offline.model import Adapter, OfflineModel
from cotune.device.offline.reader import TextReader
from cotune.errors import InputError
from cotune.generation.request import GenerationRequest
from cotune.generation.sampling import choose, log_probabilities, most_probable
from cotune.generation.stopping import Detokenize, Ending, find_ending


@dataclass(frozen=True, kw_only=True)
class OfflineToken:
    """One token.

    Attributes:
        token_id: what was chosen.
        logprob: natural logarithm of its probability at temperature 1.
        alternatives: the likeliest tokens and their log probabilities, the likeliest first; as many as were asked for.
    """

    token_id: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


class OfflineGeneration:
    """One text that grows by a token with each call, or reads a piece of its prompt.

    Args:
        model: writes it.
        request: what to do; its mode is not looked at.
        adapter: that it is written with.
        detokenize: needed for stop strings.
        num_alternatives: likely tokens to report at each place.

    Attributes:
        request: with as many new tokens as the context has room for.
        token_ids: the text so far.
        ending: how it ended; None while it has not.

    Raises:
        InputError: the prompt leaves no room in the context.
    """

    def __init__(
        self,
        model: OfflineModel,
        request: GenerationRequest,
        *,
        adapter: Adapter | None = None,
        detokenize: Detokenize | None = None,
        num_alternatives: int = 0,
    ) -> None:
        room = model.context - len(request.prompt_ids)
        if room < 1:
            raise InputError(
                f"the prompt has {len(request.prompt_ids)} tokens, expected fewer than {model.context}, the context of "
                "the offline model; shorten it, or open the model with a longer context"
            )
        self.request = replace(request, max_new_tokens=min(request.max_new_tokens, room))
        self.token_ids: list[int] = []
        self.ending: Ending | None = None
        self._tokens: list[int] = request.prompt_ids.tolist()
        self._detokenize = detokenize
        self._num_alternatives = num_alternatives
        self._reader = TextReader(model.open(adapter))

    def advance(self) -> OfflineToken | None:
        """The next token, or None where a piece of the prompt was read and there is more to read.

        Raises:
            InputError: the text has ended, or the runtime failed.
        """
        if self.ending is not None:
            raise InputError(f"the text has ended ({self.ending.reason}), expected one that goes on; begin another")
        logits = self._reader.read(self._tokens)
        if logits is None:
            return None
        token_id = choose(logits, self.request.sampling, len(self._tokens))
        self._tokens.append(token_id)
        self.token_ids.append(token_id)
        self.ending = find_ending(self.token_ids, self.request, self._detokenize)
        logprobs = log_probabilities(logits)
        return OfflineToken(
            token_id=token_id,
            logprob=float(logprobs[token_id]),
            alternatives=most_probable(logprobs, self._num_alternatives),
        )

    def close(self) -> None:
        """Give the text's memory back."""
        self._reader.close()


@contextmanager
def offline_generation(
    model: OfflineModel,
    request: GenerationRequest,
    *,
    adapter: Adapter | None = None,
    detokenize: Detokenize | None = None,
) -> Iterator[OfflineGeneration]:
    """An `OfflineGeneration` whose memory is given back at the end."""
    generation = OfflineGeneration(model, request, adapter=adapter, detokenize=detokenize)
    try:
        yield generation
    finally:
        generation.close()


def generate_offline(
    model: OfflineModel,
    request: GenerationRequest,
    *,
    adapter: Adapter | None = None,
    detokenize: Detokenize | None = None,
) -> OfflineGeneration:
    """Write a whole text.

    Args:
        model: writes it.
        request: what to do.
        adapter: that it is written with.
        detokenize: needed for stop strings.

    Returns:
        The generation at its end, with `token_ids` and `ending`.

    Raises:
        InputError: the prompt leaves no room in the context.

    Example:
        >>> codec = TextCodec(model.folder.tokenizer_json)                                   # doctest: +SKIP
        >>> request = GenerationRequest(prompt_ids=codec.encode_prompt("Dear Ada,"),         # doctest: +SKIP
        ...                             stop_token_ids=model.description.end_ids)
        >>> codec.decode(generate_offline(model, request).token_ids)                         # doctest: +SKIP
        ' thank you for the letter.'
    """
    with offline_generation(model, request, adapter=adapter, detokenize=detokenize) as generation:
        while generation.ending is None:
            generation.advance()
        return generation
