"""An offline model for many askers: its tokenizer, its adapter, and as many texts at once as memory has room for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cotune.device.offline.generate import OfflineGeneration
from cotune.device.offline.model import Adapter, OfflineModel
from cotune.device.offline.reader import TextReader
from cotune.errors import InputError
from cotune.generation.request import GenerationRequest
from cotune.generation.text import TextCodec


class OfflineWriter:
    """A model, what it reads text with, and what it writes with.

    Args:
        model: the model.
        adapter: that all texts are written with, unless it is changed.
        num_texts: at once; one more waits until a place is free. As many as the model has memory for, if left out.

    Attributes:
        adapter: for texts that begin from now on; another one may be set at any time.

    Example:
        >>> writer = OfflineWriter(load_offline_model("my-model"))         # doctest: +SKIP
        >>> async with writer.generation(request) as generation:           # doctest: +SKIP
        ...     token = await asyncio.to_thread(generation.advance)
    """

    def __init__(self, model: OfflineModel, *, adapter: Adapter | None = None, num_texts: int | None = None) -> None:
        num_texts = model.num_texts if num_texts is None else num_texts
        if num_texts < 1:
            raise InputError(f"num_texts is {num_texts}, expected at least 1")
        self.model = model
        self.adapter = adapter
        self.text = TextCodec(model.folder.tokenizer_json)
        self._places = asyncio.Semaphore(num_texts)

    def info(self) -> dict[str, object]:
        """What a page tells of it; JSON values only."""
        return {
            "bits": self.model.description.bits,
            "context": self.model.context,
            "adapter": None if self.adapter is None else self.adapter.name,
        }

    @asynccontextmanager
    async def generation(
        self, request: GenerationRequest, *, num_alternatives: int = 0
    ) -> AsyncIterator[OfflineGeneration]:
        """A text, when there is a place for it; its memory is given back at the end.

        Raises:
            InputError: the prompt leaves no room in the context.
        """
        async with self._places:
            generation = OfflineGeneration(
                self.model,
                request,
                adapter=self.adapter,
                detokenize=self.text.decode,
                num_alternatives=num_alternatives,
            )
            try:
                yield generation
            finally:
                generation.close()

    async def take(self) -> TextReader:
        """An empty text to read and extend, when there is a place for it; to be given back."""
        await self._places.acquire()
        try:
            return TextReader(self.model.open(self.adapter))
        except BaseException:
            self._places.release()
            raise

    def give_back(self, reader: TextReader) -> None:
        """End a text that was taken."""
        reader.close()
        self._places.release()
