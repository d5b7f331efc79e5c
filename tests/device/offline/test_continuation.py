"""Going on with a cloud's text: with the same tokens and with others, at any place, in half a character too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from byte_tokens import EOS, TOKENIZER, byte_tokenizer
from offline_folders import CONTEXT, END, TinyLlama, write_onnx_folder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from toy_plugin import words_json

from cotune.device.offline.continuation import Continuation
from cotune.device.offline.folder import OfflineFolder
from cotune.device.offline.model import OfflineModel, OfflineSettings
from cotune.device.offline.reader import TextReader
from cotune.device.offline.runtimes import load_offline_model
from cotune.errors import InputError
from cotune.generation.request import GenerationRequest
from cotune.generation.sampling import Sampling, choose
from cotune.generation.text import TextCodec

TINY = TinyLlama()


def byte_fallback() -> Tokenizer:
    """As Llama 2 and Mistral have it: a space in front of every text, and bytes for all that is no word."""
    words = ["<unk>", "▁", "a", "b", "▁a", "ab", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {word: token for token, word in enumerate(words)}
    merges = [("▁", "a"), ("a", "b")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


BYTES = TOKENIZER.to_str().encode()
CLOUDS = {
    "byte_level": byte_tokenizer(merges=(("a", "b"), ("Ġ", "a"), ("Ã", "¶"))).to_str().encode(),
    "byte_fallback": byte_fallback().to_str().encode(),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> OfflineModel:
    folder = write_onnx_folder(tmp_path_factory.mktemp("offline") / "model", TINY)
    return load_offline_model(folder, OfflineSettings(num_threads=1))


def request(**changes: Any) -> GenerationRequest:
    return GenerationRequest(**{"prompt_ids": np.array([5, 9, 30]), **changes})


def same_tokens(model: OfflineModel, wanted: GenerationRequest) -> Continuation:
    words = TextCodec(words_json())
    return Continuation(
        model,
        TextReader(model.open()),
        own=words,
        cloud=words,
        cloud_tokenizer_json=words_json(),
        prompt="never read",
        request=wanted,
    )


def expected(tokens: list[int], num: int, sampling: Sampling) -> list[int]:
    path = list(tokens)
    while len(path) < len(tokens) + num:
        path.append(choose(TINY.logits(path)[-1], sampling, len(path)))
    return path[len(tokens) :]


def test_with_the_same_tokens_it_goes_on_with_them_as_often_as_asked(model: OfflineModel) -> None:
    sampling = Sampling(temperature=0.8, seed=2)
    continuation = same_tokens(model, request(sampling=sampling))
    for generated in ([40, 41], [40, 41, 60, 61, 62], [40], []):
        assert continuation.begin(generated) == 0
        found = [continuation.advance() for _ in range(4)]
        assert found == [[token] for token in expected([5, 9, 30, *generated], 4, sampling)]
        assert continuation.is_between and continuation.ending is None


def test_an_end_token_of_the_model_ends_the_text(model: OfflineModel, tmp_path: Path) -> None:
    tokens = expected([5, 9, 30], 3, Sampling())
    folder = write_onnx_folder(tmp_path / "model", TINY, end_ids=(END, tokens[2]))
    continuation = same_tokens(load_offline_model(folder), request())
    continuation.begin([])
    assert [continuation.advance() for _ in range(3)] == [[token] for token in tokens]
    assert continuation.ending == "end_token" and continuation.advance() == []


def test_the_context_is_the_end_and_too_much_text_is_told(model: OfflineModel) -> None:
    continuation = same_tokens(model, request())
    continuation.begin([7] * (CONTEXT - 5))
    assert len(continuation.advance()) == 1 and len(continuation.advance()) == 1 and continuation.ending is None
    assert continuation.advance() == [] and continuation.ending == "length"
    with pytest.raises(InputError, match="the text has 64 tokens, expected fewer than 64, the context of the offline"):
        same_tokens(model, request()).begin([7] * (CONTEXT - 3))


def test_a_long_text_is_read_over_several_steps(model: OfflineModel) -> None:
    continuation = same_tokens(model, request())
    continuation._reader._piece = 8
    generated = [7] * 20
    continuation.begin(generated)
    found = [continuation.advance() for _ in range(3)]
    assert found == [[], [], expected([5, 9, 30, *generated], 1, Sampling())]


# With other tokens: the model's are bytes, and it says what the test wants.


@dataclass
class Saying:
    """A reader of a model that says `tokens` after whatever it read first. Fits `TextReader`."""

    tokens: list[int]
    begun_with: list[int] | None = None

    def read(self, token_ids: Sequence[int]) -> Any:
        if self.begun_with is None:
            self.begun_with = list(token_ids)
        logits = np.zeros(258, np.float32)
        logits[self.tokens[len(token_ids) - len(self.begun_with)]] = 1
        return logits

    def close(self) -> None:
        return


@pytest.fixture(scope="module")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> OfflineModel:
    path = tmp_path_factory.mktemp("offline") / "bytes"
    folder = write_onnx_folder(path, TinyLlama(vocab_size=258), tokenizer_json=BYTES, end_ids=(EOS,))
    described = OfflineFolder.open(folder).description
    (folder / "offline.json").write_bytes(replace(described, context=64).to_json())
    return load_offline_model(folder, OfflineSettings(num_threads=1))


class OtherTokens:
    """A continuation whose model says a certain text."""

    def __init__(self, model: OfflineModel, cloud_json: bytes, prompt: str, says: str | list[int]) -> None:
        self.own, self.cloud = TextCodec(BYTES), TextCodec(cloud_json)
        tokens = self.own.encode_text(says) if isinstance(says, str) else says
        self.saying = Saying([*tokens, EOS, EOS])
        reader: Any = self.saying
        self.continuation = Continuation(
            model,
            reader,
            own=self.own,
            cloud=self.cloud,
            cloud_tokenizer_json=cloud_json,
            prompt=prompt,
            request=request(prompt_ids=self.cloud.encode_prompt(prompt)),
        )
        self.generated: list[int] = []

    def run(self, generated: list[int]) -> str:
        """The text of the cloud's tokens after the model has said everything; checked after each step."""
        self.generated = generated[: len(generated) - self.continuation.begin(generated)]
        while self.continuation.ending is None:
            before = self.cloud.decode(self.generated)
            self.generated += self.continuation.advance()
            assert self.cloud.decode(self.generated).startswith(before)
        return self.cloud.decode(self.generated)


@pytest.mark.parametrize("name", CLOUDS)
@pytest.mark.parametrize("said", ["ab ab  a", " a b", "b", "", "ö 語 b", "  ", "a\n\nb", "aöaöaö" * 3])
@pytest.mark.parametrize("begun", ["", "a", "ba ", "öö", "語a b a b a b a b a"])
def test_what_was_said_is_spelt_in_the_clouds_tokens(
    byte_model: OfflineModel, name: str, said: str, begun: str
) -> None:
    case = OtherTokens(byte_model, CLOUDS[name], "b: ", said)
    generated = case.cloud.encode_text(begun) if begun else []
    so_far = case.cloud.decode(generated)
    assert case.run(generated) == so_far + said
    # The model read the prompt and the text before it, in its own tokens.
    assert case.saying.begun_with == case.own.encode_prompt("b: " + so_far).tolist()
    assert case.continuation.ending == "end_token" and case.continuation.is_between


@pytest.mark.parametrize("name", CLOUDS)
@pytest.mark.parametrize("num_bytes", [1, 2])
def test_half_a_character_is_forgotten_and_written_anew(byte_model: OfflineModel, name: str, num_bytes: int) -> None:
    case = OtherTokens(byte_model, CLOUDS[name], "b: ", "語b")
    whole = case.cloud.encode_text("ab語")
    generated = whole[: len(whole) - num_bytes]
    assert case.continuation.begin(generated) == 3 - num_bytes
    assert case.run(generated) == "ab語b"


def test_a_character_is_given_out_when_it_is_whole(byte_model: OfflineModel) -> None:
    case = OtherTokens(byte_model, CLOUDS["byte_level"], "b: ", "語b")
    case.continuation.begin([])
    found = [case.continuation.advance() for _ in range(4)]
    assert [len(tokens) for tokens in found] == [0, 0, 3, 1]


def test_bytes_that_no_character_has_do_not_stop_it(byte_model: OfflineModel) -> None:
    broken = TextCodec(BYTES).encode_text("語")[:1]
    case = OtherTokens(byte_model, CLOUDS["byte_level"], "b: ", [*broken, *TextCodec(BYTES).encode_text("b")])
    assert case.run([]) == "\ufffdb"
    # Of the cloud's too: what stands before stays as it is.
    broken = TextCodec(CLOUDS["byte_level"]).encode_text("語")[1:2] * 6
    case = OtherTokens(byte_model, CLOUDS["byte_level"], "b: ", "b")
    assert case.continuation.begin(broken) == 0


def test_text_that_the_cloud_has_no_tokens_for_is_told_and_holds_the_place(byte_model: OfflineModel) -> None:
    case = OtherTokens(byte_model, words_json(), "w5", "w7 xyz")
    case.continuation.begin([])
    while case.continuation.is_between or case.continuation.ending is None:
        try:
            case.continuation.advance()
        except InputError as error:
            assert "cannot spell" in str(error) and "offline model of the cloud's own family" in str(error)
            break
    else:
        pytest.fail("it was spelt")
    assert not case.continuation.is_between


def test_text_is_not_held_back_for_ever(byte_model: OfflineModel) -> None:
    short = OtherTokens(byte_model, CLOUDS["byte_level"], "b" * 59, "語語")
    assert short.run([]) == "語\ufffd" and short.continuation.ending == "length"
    case = OtherTokens(byte_model, words_json(), "w5", "x" * 100)
    case.continuation.begin([])
    with pytest.raises(InputError, match=f"cannot spell '{'x' * 33}'"):
        for _ in range(100):
            case.continuation.advance()
