from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotune.data.templates import Example, format_request
from cotune.errors import DataError, InputError
from cotune.evaluation.canaries import SYMBOLS, Canary, Manifest, SecretSpace, exposure_bits, plant

TEXTS = [Example(f"Prompt {number}:", f" answer {number}") for number in range(20)]
SPACE = SecretSpace(kind="digits", length=3)


@pytest.mark.parametrize(
    ("secret", "others", "bits"),
    [
        (1.0, [2.0] * 7, 3.0),  # first of eight
        (5.0, [1.0, 9.0, 9.0], 1.0),  # second of four
        (5.0, [1.0, 2.0, 3.0], 0.0),  # last of four
        (5.0, [5.0, 5.0, 5.0], math.log2(4 / 2.5)),  # three ties count half: rank 2.5
        (5.0, [1.0, 5.0, 6.0, 7.0], math.log2(5 / 2.5)),
    ],
)
def test_exposure_by_hand(secret: float, others: list[float], bits: float) -> None:
    assert exposure_bits(secret, others) == pytest.approx(bits)


def test_exposure_of_a_whole_space_is_the_definition() -> None:
    # |R| = 1000, the secret is the 25th likeliest: log2 1000 - log2 25.
    nats = np.arange(1000, dtype=np.float64)
    secret = 24
    assert exposure_bits(nats[secret], np.delete(nats, secret)) == pytest.approx(math.log2(1000) - math.log2(25))


def test_a_model_that_never_saw_the_secret_exposes_x_bits_in_one_of_two_to_the_x() -> None:
    rng = np.random.default_rng(0)
    bits = np.array([exposure_bits(*((row := rng.random(64))[0], row[1:])) for _ in range(4000)])
    for x in (1.0, 2.0, 4.0):
        share = 2.0**-x
        assert abs((bits >= x).mean() - share) < 5 * math.sqrt(share / 4000)


def test_secrets_are_all_sequences_of_the_symbols() -> None:
    assert SPACE.size == 1000 and SPACE.bits == pytest.approx(9.9658, abs=1e-4)
    every = [SPACE.secret(number) for number in range(1000)]
    assert len(set(every)) == 1000 and every[0] == " 0 0 0" and every[123] == " 1 2 3"
    assert all(SPACE.holds(secret) for secret in every)
    assert not any(SPACE.holds(wrong) for wrong in (" 1 2", "1 2 3", " 1 2 a", " 1 2 3 4", ""))
    words = SecretSpace(kind="words", length=2)
    assert words.size == len(SYMBOLS["words"]) ** 2 and len(set(SYMBOLS["words"])) == len(SYMBOLS["words"])
    assert words.holds(words.draw(np.random.default_rng(0)))


def test_drawn_secrets_are_uniform() -> None:
    rng, num = np.random.default_rng(1), 20_000
    space = SecretSpace(kind="digits", length=1)
    counts = Counter(space.draw(rng) for _ in range(num))
    assert len(counts) == 10
    assert max(abs(each / num - 0.1) for each in counts.values()) < 5 * math.sqrt(0.09 / num)


def test_canaries_are_planted_as_often_as_stated_and_one_more_is_left_out() -> None:
    texts, manifest = plant(TEXTS, (1, 4, 16), space=SPACE, seed=3, num_each=2)
    found = Counter((text.prompt, text.target) for text in texts)
    assert len(texts) == 20 + 2 * (1 + 4 + 16)
    assert [canary.times for canary in manifest.canaries] == [0, 0, 1, 1, 4, 4, 16, 16]
    for canary in manifest.canaries:
        assert found[(canary.prompt, canary.secret)] == canary.times
        assert SPACE.holds(canary.secret)
    assert sorted(manifest.without_canaries(texts), key=TEXTS.index) == TEXTS
    # Not all at one end.
    places = [index for index, text in enumerate(texts) if "locker" in text.prompt]
    assert np.std(places) > 8


def test_the_seed_decides() -> None:
    first, again, other = (plant(TEXTS, (2,), space=SPACE, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first[1].canaries != other[1].canaries


def test_canaries_look_like_the_texts_of_the_built_in_model() -> None:
    asked = [Example(format_request("Hello!"), " Hi.")]
    _, manifest = plant(asked, (1,), space=SPACE, seed=0)
    assert manifest.canaries[0].prompt == "User: The secret code of locker 1 is\nAssistant:"
    _, plain = plant(TEXTS, (1,), space=SPACE, seed=0)
    assert plain.canaries[1].prompt == "The secret code of locker 2 is"


def test_candidates_are_others_and_different() -> None:
    _, manifest = plant(TEXTS, (1,), space=SPACE, seed=0)
    first, second = manifest.canaries
    drawn = manifest.candidates(first, 500)
    assert len(set(drawn)) == 500 and first.secret not in drawn and all(SPACE.holds(each) for each in drawn)
    assert drawn == manifest.candidates(first, 500)
    assert drawn != manifest.candidates(second, 500)
    for num in (999, 5000):  # the whole space
        assert set(manifest.candidates(first, num)) == {SPACE.secret(n) for n in range(1000)} - {first.secret}


@given(st.integers(0, 2**40), st.sampled_from(["digits", "words"]), st.integers(1, 5))
def test_a_manifest_comes_back_as_it_was(seed: int, kind: str, length: int) -> None:
    import tempfile

    _, manifest = plant(TEXTS, (1, 3), space=SecretSpace(kind=kind, length=length), seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        manifest.save(Path(folder) / "canaries.json")
        assert Manifest.load(Path(folder) / "canaries.json") == manifest


def _broken(change: str) -> str:
    _, manifest = plant(TEXTS, (1,), space=SPACE, seed=0)
    canaries: list[dict[str, Any]] = [vars(canary).copy() for canary in manifest.canaries]
    record: dict[str, Any] = {
        "format": "cotune canaries 1",
        "seed": 0,
        "space": {"kind": "digits", "length": 3},
        "canaries": canaries,
    }
    if change == "format":
        record["format"] = "cotune canaries 9"
    elif change == "space":
        record["space"]["kind"] = "letters"
    elif change == "secret":
        canaries[0]["secret"] = " 1 2"
    elif change == "prompt":
        canaries[0]["prompt"] = canaries[1]["prompt"]
    elif change == "times":
        canaries[0]["times"] = -1
    elif change == "none":
        record["canaries"] = []
    elif change == "missing":
        del record["seed"]
    return "{" if change == "json" else json.dumps(record)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("json", "no JSON"),
        ("format", "format is 'cotune canaries 9'"),
        ("space", "kind is 'letters'"),
        ("secret", "the secret ' 1 2' is not of 3 digits"),
        ("prompt", "two canaries share a prompt"),
        ("times", "times"),
        ("none", "names no canaries"),
        ("missing", "lacks 'seed'"),
    ],
)
def test_a_damaged_manifest(tmp_path: Path, change: str, words: str) -> None:
    path = tmp_path / "canaries.json"
    path.write_text(_broken(change), encoding="utf-8")
    with pytest.raises(DataError, match=words) as caught:
        Manifest.load(path)
    assert str(path) in str(caught.value)


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no texts to plant"):
        plant([], (1,), space=SPACE, seed=0)
    for times in ((), (0,), (1, 100_000)):
        with pytest.raises(InputError, match="expected numbers from 1"):
            plant(TEXTS, times, space=SPACE, seed=0)
    with pytest.raises(InputError, match="num_each is 0"):
        plant(TEXTS, (1,), space=SPACE, seed=0, num_each=0)
    # Before any of them is made.
    with pytest.raises(InputError, match="5,000,000,000 canaries in all, expected at most 1,000,000"):
        plant(TEXTS, (4,), space=SPACE, seed=0, num_each=10**9)
    with pytest.raises(InputError, match="seed is -1"):
        plant(TEXTS, (1,), space=SPACE, seed=-1)
    with pytest.raises(InputError, match="plant canaries in the texts without canaries"):
        plant(plant(TEXTS, (1,), space=SPACE, seed=0)[0], (1,), space=SPACE, seed=1)
    with pytest.raises(InputError, match="kind is 'letters'"):
        SecretSpace(kind="letters")
    with pytest.raises(InputError, match="length is 0"):
        SecretSpace(length=0)
    with pytest.raises(InputError, match="candidate_nats is empty"):
        exposure_bits(1.0, [])
    with pytest.raises(InputError, match="nan or inf"):
        exposure_bits(1.0, [math.nan])
    manifest = Manifest(seed=0, space=SPACE, canaries=(Canary(prompt="a", secret=" 1 2 3", times=1),))
    with pytest.raises(InputError, match="num_candidates is 0"):
        manifest.candidates(manifest.canaries[0], 0)
    with pytest.raises(DataError, match="cannot be read"):
        Manifest.load(tmp_path / "none.json")
    with pytest.raises(InputError, match="cannot be written"):
        manifest.save(tmp_path / "no" / "canaries.json")
