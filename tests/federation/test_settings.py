"""The TOML of a federation: what is read, and each way to get it wrong."""

from __future__ import annotations

import tomllib
from datetime import UTC
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.errors import InputError
from cotune.federation.settings import DataSettings, FederationSettings, as_toml
from cotune.federation.tables import from_table


def read(tmp_path: Path, text: str) -> FederationSettings:
    path = tmp_path / "c.toml"
    path.write_text(text, encoding="utf-8")
    return FederationSettings.read(path)


def test_what_is_left_out_has_its_default(tmp_path: Path) -> None:
    assert read(tmp_path, "") == FederationSettings()
    found = read(
        tmp_path,
        'algorithm = "seed"\n[data]\nnum_devices = 3\nlimit = 50\nnum_judge = 5\n[adapter]\ntargets = ["q_proj"]\n'
        '[steps]\nlearning_rate = 1\n[combine]\nrule = "median"\noptions = {}\n',
    )
    assert (found.algorithm, found.data.num_devices, found.data.limit) == ("seed", 3, 50)
    assert found.adapter.targets == ("q_proj",) and found.steps.learning_rate == 1.0
    assert isinstance(found.steps.learning_rate, float)
    assert found.combine.rule == "median" and found.combine.options == {}


def test_the_example_is_the_defaults(tmp_path: Path) -> None:
    assert read(tmp_path, as_toml(FederationSettings())) == FederationSettings()


# As TOML may have them, in what an algorithm is told.
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
PLAIN = (
    NAMES
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.datetimes(timezones=st.none() | st.just(UTC))
    | st.dates()
    | st.times()
)
VALUES = st.recursive(
    PLAIN, lambda own: st.lists(own, max_size=2) | st.dictionaries(NAMES, own, max_size=2), max_leaves=4
)


@settings(max_examples=60, deadline=None)
@given(options=st.dictionaries(NAMES, st.dictionaries(NAMES, VALUES, max_size=3), max_size=2), path=NAMES)
def test_what_is_written_is_read_again(options: dict[str, dict[str, object]], path: str) -> None:
    asked = FederationSettings(data=DataSettings(path=path, limit=90), options=options)
    assert from_table(FederationSettings, tomllib.loads(as_toml(asked))) == asked


def test_options_are_tables() -> None:
    with pytest.raises(InputError, match=r"options\.seed is 3, expected a table"):
        as_toml(FederationSettings(options={"seed": 3}))
    tables = {"seed": {"gate": 2, "learning_rate": 1e-05}, "mixed": {"seed_mode": {"batch_size": 1}}}
    written = as_toml(FederationSettings(options=tables))
    assert written.endswith(
        "\n[options.seed]\ngate = 2\nlearning_rate = 1e-05\n\n[options.mixed]\nseed_mode = { batch_size = 1 }\n"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("algoritm = 'seed'", "algoritm is not known, expected one of algorithm"),
        ("[data]\nnum_device = 3", "data.num_device is not known"),
        ("[data]\nnum_devices = 'three'", "data.num_devices is 'three', expected a whole number"),
        ("[data]\nnum_devices = true", "data.num_devices is True"),
        ("[data]\nnum_devices = 0", "data: num_devices is 0"),
        ("[data]\nsplit = 'random'", "split is 'random', expected one of iid"),
        ("[data]\nlimit = 5", "limit is 5, expected at least 74"),
        ("data = 3", "data is 3, expected a table"),
        ("[adapter]\ntargets = 'q_proj'", "adapter.targets is 'q_proj', expected a list"),
        ("[adapter]\nstart = 'pissa'", "start is 'pissa'"),
        ("[adapter]\nscale = 'large'", "scale is 'large', expected one of lora, rslora"),
        ("[adapter]\nrefresh_rounds = 0", "refresh_rounds is 0"),
        ("[privacy]\nnoise_multiplier = -1", "privacy: noise_multiplier is -1"),
        ("[audit]\nnum_canaries = 2", "num_canaries is 2, expected at least 3, or 0"),
        ("[audit]\nnorm = 0", "norm is 0.0"),
        ("[combine]\noptions = 3", "combine.options is 3, expected a table"),
        ("[rounds]\nquorum = 2", "rounds: quorum is 2.0"),
        ("[adapter]\nkind = 'ia3'", "kind is 'ia3', expected one of lora, prefix"),
        ("[adapter]\nvirtual_tokens = 0", "virtual_tokens is 0"),
        ("seed = [", "is no TOML"),
        ("[adapter]\nrank = 0", "adapter: rank is 0, expected at least 1"),
        ("[adapter]\nalpha = inf", "adapter: alpha is inf, expected a positive number"),
        ("seed = -1", "seed is -1, expected at least 0"),
        ("[rounds]\nseed = -1", "rounds: seed is -1, expected at least 0"),
        ("[steps]\nnum_steps = 9223372036854775808", "steps.num_steps is 9223372036854775808, expected at most"),
    ],
)
def test_a_wrong_file_is_named_with_the_key(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    assert words in str(caught.value) and "c.toml" in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        FederationSettings.read(tmp_path / "none.toml")
    (tmp_path / "big.toml").write_bytes(b"#" * 1_000_001)
    with pytest.raises(InputError, match="1000000 bytes"):
        FederationSettings.read(tmp_path / "big.toml")
