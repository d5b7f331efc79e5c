"""Models that the study makes: three architectures and tokenizers, proxies of the cloud's, and a school of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from coplms_models import CLOUD, FAMILIES, PROXY, SIZES, SMALLER_PROXY, make_models, school_texts

from cotune.data.domain_questions import generate_domains
from cotune.federation.causal_model import CausalModel

TINY = replace(SIZES["toy"], school=4, skills=80, cloud_steps=2, small_steps=2)
NEW = [one.name for one in generate_domains(["new"], num_things=20, num_skills=2, seed=5)[0].things]
SCHOOL = school_texts(TINY, known=[])


def test_the_school_teaches_nothing_that_is_asked_later() -> None:
    domains = generate_domains(["school"], num_things=4, num_skills=80, seed=10**6)
    texts = SCHOOL
    met = [domains[0].facts[0], next(one for one in texts if "plus" in one.prompt)]
    (name,) = [thing.name for thing in domains[0].things if thing.name in met[0].prompt]
    left = school_texts(TINY, known=met)
    assert any(name in one.prompt for one in texts) and not any(name in one.prompt for one in left)
    assert not {one.prompt for one in met} & {one.prompt for one in left} and len(left) > len(texts) / 2


def test_models_are_made_once_and_their_kinds_differ(tmp_path: Path) -> None:
    told: list[str] = []
    folder = make_models(tmp_path / "models", TINY, SCHOOL, tell=told.append)
    num_told = len(told)
    assert make_models(tmp_path / "models", TINY, SCHOOL, tell=told.append) == folder and len(told) == num_told == 6
    own = {name: CausalModel(str(folder / name)) for name in (CLOUD, PROXY, SMALLER_PROXY, *FAMILIES)}
    assert len({own[name].tokenizer_digest for name in (CLOUD, PROXY, SMALLER_PROXY)}) == 1
    assert len({own[name].tokenizer_digest for name in (CLOUD, *FAMILIES)}) == 4
    # Names of things that no school has are spelt in pieces that it has.
    for name in (CLOUD, *FAMILIES):
        tokenizer = own[name].reader.tokenizer
        met = {token for one in SCHOOL for token in tokenizer.encode(one.prompt + one.target).ids}
        new = [token for thing in NEW for token in tokenizer.encode(f"What colour is the {thing}?").ids]
        assert sum(token in met for token in new) > 0.85 * len(new), name
    assert own[CLOUD].size_bytes > own[PROXY].size_bytes > own[SMALLER_PROXY].size_bytes
    for name, model in own.items():
        with model.loaded() as loaded:
            assert not loaded.config.tie_word_embeddings
            assert loaded.config.model_type == (name if name in FAMILIES else "llama")
    met = [one for one in SCHOOL if "plus" in one.prompt][:1]
    assert make_models(tmp_path / "models", TINY, school_texts(TINY, known=met)) != folder
    assert len(list((tmp_path / "models").iterdir())) == 2
