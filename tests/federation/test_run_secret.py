"""Seeds out of a run secret: the standard's own numbers, another implementation's, and nothing on the wire."""

from __future__ import annotations

import base64
from collections.abc import Iterator

import numpy as np
import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.errors import InputError
from cotune.federation.messages import Reply, Task, encode
from cotune.federation.run_secret import (
    SALT,
    RunSecret,
    direction_seed,
    direction_seeds,
    hkdf_expand,
    hkdf_extract,
)

SECRET = RunSecret(bytes(range(32)))
BASE = "ab" * 32
U64 = st.integers(0, 2**64 - 1)


def test_rfc_5869_test_case_1() -> None:
    prk = hkdf_extract(bytes.fromhex("000102030405060708090a0b0c"), b"\x0b" * 22)
    assert prk.hex() == "077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5"
    assert hkdf_expand(prk, bytes.fromhex("f0f1f2f3f4f5f6f7f8f9"), 42).hex() == (
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    )


@settings(max_examples=40, deadline=None)
@given(
    key=st.binary(min_size=1, max_size=80),
    salt=st.binary(max_size=80),
    info=st.binary(max_size=40),
    num_bytes=st.integers(1, 200) | st.just(255 * 32),
)
def test_hkdf_is_that_of_cryptography(key: bytes, salt: bytes, info: bytes, num_bytes: int) -> None:
    theirs = HKDF(algorithm=SHA256(), length=num_bytes, salt=salt, info=info).derive(key)
    assert hkdf_expand(hkdf_extract(salt, key), info, num_bytes) == theirs


@settings(max_examples=40, deadline=None)
@given(round_number=U64, index=U64)
def test_a_seed_is_63_bits_of_hkdf(round_number: int, index: int) -> None:
    info = b"direction seed\0" + round_number.to_bytes(8, "big") + index.to_bytes(8, "big")
    theirs = HKDF(algorithm=SHA256(), length=8, salt=SALT, info=info).derive(SECRET.value)
    seed = direction_seed(SECRET, round_number, index)
    assert seed == int.from_bytes(theirs, "big") // 2
    assert 0 <= seed < 2**63


@settings(max_examples=60, deadline=None)
@given(
    one=st.tuples(st.binary(min_size=32, max_size=32), U64, U64),
    other=st.tuples(st.binary(min_size=32, max_size=32), U64, U64),
    part=st.integers(0, 3),
)
def test_seeds_differ_between_runs_rounds_and_indices(
    one: tuple[bytes, int, int], other: tuple[bytes, int, int], part: int
) -> None:
    # Most often the two differ in one part alone, or have two parts exchanged.
    other = (*one[:part], *other[part : part + 1], *one[part + 1 :]) if part < 3 else (one[0], one[2], one[1])  # type: ignore[assignment]
    seeds = [direction_seed(RunSecret(secret), place, index) for secret, place, index in (one, other)]
    assert (seeds[0] == seeds[1]) == (one == other)


def test_many_seeds_are_the_single_ones_and_all_differ() -> None:
    seeds = direction_seeds(SECRET, 7, 4096)
    assert seeds.dtype == np.int64
    assert [int(seeds[index]) for index in (0, 1, 4095)] == [direction_seed(SECRET, 7, i) for i in (0, 1, 4095)]
    others = direction_seeds(SECRET, 8, 4096)
    assert len(np.unique(np.concatenate([seeds, others]))) == 8192
    assert direction_seeds(SECRET, 7, 0).shape == (0,)
    # Every bit of a seed is a coin: 4,096 throws stay within six standard deviations of a half.
    shares = [float(np.mean(seeds >> bit & 1)) for bit in range(63)]
    assert max(abs(share - 0.5) for share in shares) < 6 * 0.5 / 64


@pytest.mark.parametrize("bad", [-1, 2**64, 1.0, True, "1"])
def test_what_is_no_count_is_refused(bad: int) -> None:
    with pytest.raises(InputError, match="round_number is"):
        direction_seed(SECRET, bad, 0)
    with pytest.raises(InputError, match="index is"):
        direction_seed(SECRET, 0, bad)
    with pytest.raises(InputError, match="num_directions is"):
        direction_seeds(SECRET, 0, bad)
    with pytest.raises(InputError, match="HKDF gives 0 to 8160"):
        hkdf_expand(bytes(32), b"", 8161)


def test_the_public_id_names_a_secret_and_does_not_hold_it() -> None:
    other = RunSecret(bytes(32))
    assert SECRET.public_id == RunSecret(SECRET.value).public_id != other.public_id
    assert len(SECRET.public_id) == 16
    assert not any(found in SECRET.public_id.encode() for found in traces(SECRET, 0, 64))


def traces(secret: RunSecret, round_number: int, num_directions: int) -> Iterator[bytes]:
    """The secret, its key and the seeds of a round, in the forms in which somebody might send them."""
    for key in (secret.value, hkdf_extract(SALT, secret.value)):
        for start in range(0, len(key) - 8, 8):
            piece = key[start : start + 8]
            yield from (piece, piece[::-1], piece.hex().encode())
        yield base64.b64encode(key)[:12]
    for seed in direction_seeds(secret, round_number, num_directions).tolist():
        for order in ("little", "big"):
            yield seed.to_bytes(8, order)  # type: ignore[arg-type]
        yield from (str(seed).encode(), f"{seed:x}".encode())


def leaks(message: Task | Reply) -> list[bytes]:
    return [trace for trace in traces(SECRET, 5, 512) if trace in encode(message)]


def task(**settings_: int) -> Task:
    return Task(
        run_id="run",
        round_number=5,
        device="phone",
        work="seed",
        arrays={"scalars": projections()},
        settings={"lr": 1e-3, "num_directions": 512, **settings_},
        base_digest=BASE,
    )


def projections() -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """What a device would send for this round: a slope along each of its 512 directions."""
    theta = np.linspace(-1, 1, 16)
    return np.array(
        [
            theta @ np.random.default_rng(seed).choice([-1.0, 1.0], 16)
            for seed in direction_seeds(SECRET, 5, 512).tolist()
        ],
        np.float32,
    )


def test_nothing_of_the_secret_is_in_a_round_of_messages() -> None:
    reply = Reply(
        run_id="run",
        round_number=5,
        device="phone",
        arrays={"scalars": projections()},
        num_examples=12,
        metrics={"loss": 0.5},
        base_digest=BASE,
    )
    assert leaks(task()) == []
    assert leaks(reply) == []


def test_the_search_would_find_a_seed() -> None:
    seed = direction_seed(SECRET, 5, 511)
    assert str(seed).encode() in leaks(task(seed=seed))
    careless = Task(
        run_id="run",
        round_number=5,
        device="phone",
        work="seed",
        arrays={"seeds": direction_seeds(SECRET, 5, 512)},
        settings={},
        base_digest=BASE,
    )
    assert len(leaks(careless)) == 512
