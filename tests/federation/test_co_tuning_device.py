"""A device and its round: three architectures, one model in memory at a time, what is private, and done again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from co_tuning import CANARY, KINDS, domain_texts, model_folder, reader_of
from leak_search import SentBytes, directions_alike
from numpy.typing import NDArray
from tokenizer_kinds import tokenizer_of

from cotune.data.templates import Example
from cotune.distillation.mutual_loss import MutualLossConfig
from cotune.distillation.paired_texts import pair_texts
from cotune.errors import InputError, MismatchError
from cotune.federation.algorithm import Job
from cotune.federation.array_layout import to_layout
from cotune.federation.arrays import Arrays, digest, num_bytes, shapes_of
from cotune.federation.backbone_model import to_arrays
from cotune.federation.causal_model import CausalModel
from cotune.federation.co_tuning_device import (
    LIKELIHOODS,
    PRIVATE,
    SMALL,
    CoTuningDevice,
    CoTuningSteps,
    fold_all,
    term_of,
)
from cotune.federation.device_agent import DeviceAgent
from cotune.federation.flora import fresh_adapter
from cotune.federation.greedy_texts import write_greedily
from cotune.federation.local_model import LocalSteps
from cotune.federation.messages import Reply, Task, decode, encode
from cotune.federation.mutual_descent import SideBatch
from cotune.federation.open_questions import Answering
from cotune.federation.open_questions import to_arrays as question_arrays
from cotune.federation.public_chunks import PublicText, from_codes
from cotune.federation.public_chunks import to_arrays as public_arrays
from cotune.federation.reading_cache import ReadingCache
from cotune.federation.row_codes import RowCodes, dither_seed
from cotune.federation.run_secret import RunSecret
from cotune.federation.signing import DeviceKey
from cotune.models.adapters import LoraAdapter, LoraShape
from cotune.models.low_rank_terms import low_rank_terms

STEPS = LocalSteps(num_steps=2, batch_size=3, learning_rate=5e-3)
PLAN = CoTuningSteps(
    dst=STEPS,
    proxy=STEPS,
    small=STEPS,
    private_rank=1,
    loss=MutualLossConfig(),
    proxy_mix=0.5,
    public_share=1 / 3,
    answering=Answering(max_new_tokens=5, sure_above=0.0),
    bits=32,
)
SCALE = 2.0


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    found = {family: model_folder(root / family, family, kind, seed=3) for family, kind in KINDS.items()}
    return found | {"proxy": model_folder(root / "proxy", "llama", "byte_level", seed=1)}


@pytest.fixture(scope="module")
def shared(folders: dict[str, Path]) -> dict[str, NDArray[np.float32]]:
    """The proxy's adapter, with a B that is not zero."""
    with CausalModel(str(folders["proxy"])).loaded() as model:
        fresh = to_arrays(LoraAdapter.fresh(model, LoraShape(rank=2)).params)
    draw = np.random.default_rng(0)
    return {
        n: a if "lora_A" in n else (0.02 * draw.standard_normal(a.shape)).astype(np.float32) for n, a in fresh.items()
    }


def device(folders: dict[str, Path], family: str, folder: Path, *, has_proxy: bool = True) -> CoTuningDevice:
    return CoTuningDevice(
        domain_texts("med"),
        small=CausalModel(str(folders[family])),
        proxy=CausalModel(str(folders["proxy"])) if has_proxy else None,
        folder=folder,
        scale=SCALE,
        max_tokens=64,
    )


def sent_down(arrays: Arrays, bits: int, round_number: int) -> dict[str, NDArray[Any]]:
    """As a plan carries an adapter to a device that has nothing yet."""
    coded = RowCodes(bits).encode(arrays, dither_seed(round_number, "down"))
    return coded | to_layout(shapes_of(arrays))


def job(arrays: Arrays, plan: CoTuningSteps = PLAN, *, round_number: int = 1, seed: int = 7) -> Job:
    return Job(
        round_number=round_number,
        arrays=sent_down(arrays, plan.bits, round_number) if "public/texts" not in arrays else arrays,
        settings=plan.as_settings() | {"dither": "d"},
        model=None,  # type: ignore[arg-type]
        seeds=lambda r, k: 0,
        batch_seed=seed,
        run_id="run",
    )


@pytest.mark.parametrize("family", list(KINDS))
def test_a_round_of_each_architecture_with_one_model_in_memory_at_a_time(
    folders: dict[str, Path], shared: Arrays, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, order = [0], []
    real = CausalModel.loaded

    @contextmanager
    def watched(self: CausalModel) -> Iterator[object]:
        loaded[0] += 1
        assert loaded[0] == 1, "another model is in memory"
        order.append(Path(self.name).name)
        try:
            with real(self) as model:
                yield model
        finally:
            loaded[0] -= 1

    monkeypatch.setattr(CausalModel, "loaded", watched)
    own = device(folders, family, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folders["proxy"].iterdir()}
    done = own.co_tune(job(shared))
    assert order == ["proxy", family, "proxy"]
    assert done.arrays.keys() == shared.keys() and all(np.isfinite(one).all() for one in done.arrays.values())
    assert all(np.abs(one).max() > 1e-4 for one in done.arrays.values())
    kept = own.store.last("run")
    assert kept is not None and {name.partition("/")[0] for name in kept} == {"private", "small"}
    # Weights and what trains, of one model: of the small one, all of it; of the proxy, an adapter.
    sizes = {}
    for name in (family, "proxy"):
        with real(CausalModel(str(folders[name]))) as model:
            sizes[name] = sum(one.nbytes for one in [*model.parameters(), *model.buffers()])
            trained = sum(one.nbytes for one in model.parameters())
        if name == family:
            sizes[name] += 3 * trained
    most = max(sizes[family], sizes["proxy"] + 5 * sum(one.nbytes for one in shared.values()))
    assert max(sizes.values()) <= done.metrics["held_bytes"] <= most + 10_000
    assert before == {path: path.stat().st_mtime_ns for path in folders["proxy"].iterdir()}


@pytest.mark.parametrize("bits", [5, 32])
def test_what_is_private_occurs_in_nothing_that_was_sent(
    folders: dict[str, Path], shared: Arrays, tmp_path: Path, bits: int
) -> None:
    own = device(folders, "gpt2", tmp_path)
    agent = DeviceAgent(
        "d", own, base_digest="b" * 64, secret=RunSecret(bytes(range(32))), key=DeviceKey.generate(), works=own.works
    )
    sent: list[bytes] = []
    kept: list[dict[str, NDArray[np.float32]]] = []
    for number in (1, 2):
        task = Task(
            run_id="run",
            round_number=number,
            device="d",
            work="co_tune",
            arrays=sent_down(shared, bits, number),
            settings=replace(PLAN, bits=bits).as_settings() | {"since": -1, "dither": "d"},
            base_digest="b" * 64,
        )
        sent.append(agent.handle(encode(task)))
        stored = own.store.last("run")
        assert stored is not None
        # What is sent in a round is what was learnt in it: the next round moves the private adapter on.
        kept.append({name: one.numpy() for name, one in stored.items() if one.ndim})
    codes, shapes = RowCodes(bits), shapes_of(shared)
    replies = [decode(one, Reply) for one in sent]
    privates = [{n.removeprefix(PRIVATE): one for n, one in all_.items() if n.startswith(PRIVATE)} for all_ in kept]
    smalls = [{n: one for n, one in all_.items() if n.startswith(SMALL)} for all_ in kept]
    assert all(len(private) == len(shared) and small for private, small in zip(privates, smalls, strict=True))
    assert all(not np.array_equal(privates[0][name], privates[1][name]) for name in shared)

    def leaks(frames: list[bytes]) -> list[str]:
        """As bytes, and as the server reads it, of every round in every round."""
        found, bytes_ = [], SentBytes(frames)
        for frame in frames:
            reply = decode(frame, Reply)
            update = codes.decode(reply.arrays, shapes, dither_seed(reply.round_number, "up d"))
            found += [name for private in privates for name in directions_alike(update, private)]
        return found + [name for tensors in (*privates, *smalls) for name in bytes_.leaks(tensors)]

    assert leaks(sent) == []
    found = SentBytes(sent)
    ids = tokenizer_of("byte_level").encode(f" {CANARY}.").ids
    texts = [CANARY.encode(), *(np.array(ids, kind).tobytes() for kind in ("<i8", "<i4", "<u2"))]
    assert not any(found.holds_part_of(one) for one in texts)
    # The search finds what is there: the change of the shared adapter, an escaped text, and a private adapter in place
    # of a direction of the change.
    assert found.holds_part_of(next(iter(replies[0].arrays.values())).tobytes())
    assert SentBytes([json.dumps(CANARY).encode()]).holds_part_of(CANARY.encode())
    for reply, private in zip(replies, privates, strict=True):
        seed = dither_seed(reply.round_number, "up d")
        planted = {name: np.array(one) for name, one in codes.decode(reply.arrays, shapes, seed).items()}
        for name, matrix in private.items():
            planted[name][(0, ...) if "lora_A" in name else (..., 0)] = matrix.ravel()
        assert set(leaks([encode(replace(reply, arrays=codes.encode(planted, seed)))])) >= shared.keys()
    assert {"held_bytes", "dst_loss", "small_loss", "proxy_loss", "loss"} <= replies[0].metrics.keys()


def test_dst_moves_the_private_adapter_alone_and_saml_the_shared_one_with_it_attached(
    folders: dict[str, Path], shared: Arrays, tmp_path: Path
) -> None:
    own = device(folders, "llama", tmp_path / "a")
    done = own.co_tune(job(shared))
    kept = own.store.last("run")
    assert kept is not None
    private = {name.removeprefix(PRIVATE): one for name, one in kept.items() if name.startswith(PRIVATE)}
    fresh = fresh_adapter(shared, 1, 7)
    assert all(not np.allclose(private[name].numpy(), fresh[name], atol=1e-4) for name in fresh)
    # By hand: one step of SGD on the answers alone, with w attached.
    alone = replace(
        PLAN,
        loss=MutualLossConfig(mix=0.0),
        proxy_mix=0.0,
        proxy=LocalSteps(num_steps=1, batch_size=6, learning_rate=1e-3, optimizer="sgd"),
    )
    found = device(folders, "llama", tmp_path / "b")
    change = found.co_tune(job(shared, alone)).arrays
    kept = found.store.last("run")
    assert kept is not None
    w = {name.removeprefix(PRIVATE): one for name, one in kept.items() if name.startswith(PRIVATE)}
    slopes = {}
    for has_w in (True, False):
        with CausalModel(str(folders["proxy"])).loaded() as proxy:
            leaves = {n: torch.from_numpy(a.copy()).requires_grad_() for n, a in shared.items()}
            with low_rank_terms(proxy, [term_of(leaves)] + ([term_of(w)] if has_w else []), scale=SCALE):
                batch = SideBatch.of(found.texts, 0, proxy.device)
                batch.answer_loss(batch.logits(proxy)).backward()
        whole = torch.sqrt(sum((one.grad.square().sum() for one in leaves.values()), torch.zeros(())))  # type: ignore[union-attr]
        slopes[has_w] = {n: (one.grad / whole.clamp(min=1.0)).numpy() for n, one in leaves.items()}  # type: ignore[operator]
    for name, array in change.items():
        assert np.allclose(array, -1e-3 * slopes[True][name], atol=2e-7), name
    assert any(not np.allclose(change[name], -1e-3 * slopes[False][name], atol=2e-7) for name in change)
    assert done.metrics.keys() == {"held_bytes", "dst_loss", "small_loss", "proxy_loss"}


def test_a_round_that_was_killed_in_any_phase_is_the_same_when_done_again(
    folders: dict[str, Path], shared: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    whole, cut = device(folders, "gpt2", tmp_path / "whole"), device(folders, "gpt2", tmp_path / "cut")
    whole.co_tune(job(shared))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    later = job(shared, round_number=2, seed=8)
    expected, real = whole.co_tune(later), CausalModel.loaded
    for phase in range(3):
        counted = [0]

        @contextmanager
        def dying(self: CausalModel, last: int = phase, seen: list[int] = counted) -> Iterator[object]:
            with real(self) as model:
                yield model
                seen[0] += 1
                if seen[0] > last:
                    raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(CausalModel, "loaded", dying)
            with pytest.raises(Killed):
                cut.co_tune(later)
        assert counted[0] == phase + 1
    again = device(folders, "gpt2", tmp_path / "cut")
    for _ in range(2):  # also where the reply was lost
        assert digest(again.co_tune(later).arrays) == digest(expected.arrays)
    one, other = whole.store.last("run"), again.store.last("run")
    assert one is not None and other is not None and one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_folds_become_a_part_of_the_proxy_in_the_order_of_rounds(folders: dict[str, Path], shared: Arrays) -> None:
    folds = {2: dict(shared), 1: {name: 2 * array for name, array in shared.items()}}
    model = CausalModel(str(folders["proxy"]))
    with model.loaded() as one:
        before = {name: parameter.clone() for name, parameter in one.named_parameters()}
        fold_all(one, folds, scale=0.5)
        changed = {name for name, parameter in one.named_parameters() if not torch.equal(parameter, before[name])}
        layer = next(iter(term_of({n: torch.from_numpy(a) for n, a in shared.items()})))
        term = term_of({n: torch.from_numpy(a) for n, a in shared.items()})[layer]
        weight = dict(one.named_parameters())[f"{layer}.weight"]
        assert torch.allclose(weight, before[f"{layer}.weight"] + 0.5 * 5 * term.b @ term.a, atol=1e-6)
    assert len(changed) == len(shared) / 2


@pytest.mark.parametrize(
    "plan",
    [
        replace(PLAN, private_rank=0),
        replace(PLAN, loss=MutualLossConfig(mix=0.0), proxy_mix=0.0),
        replace(PLAN, loss=MutualLossConfig(gate=None, byte_weight=0.0)),
        replace(PLAN, loss=MutualLossConfig(token_weight=0.5, top_k=4, drops_merged=True)),
    ],
    ids=["no dst", "no saml", "no gate", "tokens"],
)
def test_parts_can_be_left_out(
    folders: dict[str, Path], shared: Arrays, tmp_path: Path, plan: CoTuningSteps, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert CoTuningSteps.of_settings(plan.as_settings()) == plan
    own, filled = device(folders, "gpt2", tmp_path), []
    real = ReadingCache.fill
    monkeypatch.setattr(ReadingCache, "fill", lambda *given, **named: filled.append(real(*given, **named)))
    done = own.co_tune(job(shared, plan))
    kept = own.store.last("run")
    assert kept is not None and any(name.startswith(PRIVATE) for name in kept) == (plan.private_rank > 0)
    assert ("dst_loss" in done.metrics) == (plan.private_rank > 0)
    # Six texts in both directions; nothing of it is left.
    assert filled == ([6, 6] if plan.loss.mix > 0 else []) and not (tmp_path / "readings").exists()


@pytest.mark.parametrize("bits", [5, 8])
def test_a_few_bits_send_the_same_change_in_a_fraction_of_the_bytes(
    folders: dict[str, Path], shared: Arrays, tmp_path: Path, bits: int
) -> None:
    codes = RowCodes(bits)
    had = codes.rounded(shared, dither_seed(1, "down"))
    exact = device(folders, "gpt2", tmp_path / "a").co_tune(job(had)).arrays
    coded = device(folders, "gpt2", tmp_path / "b").co_tune(job(shared, replace(PLAN, bits=bits))).arrays
    found = codes.decode(coded, shapes_of(shared), dither_seed(1, "up d"))
    for name, array in exact.items():
        axis = 1 if array.shape[0] <= array.shape[1] else 0
        step = np.abs(array).max(axis=axis) / (2**bits - 1) * 2
        assert (np.abs(found[name] - array).max(axis=axis) <= 0.5001 * step).all()
    scales = sum(4 * min(array.shape) for array in exact.values())
    assert num_bytes(coded) - scales == -(-num_bytes(exact) * bits // 32)


def public_texts(domain: str = "public") -> list[PublicText]:
    """As the server hands them out."""
    server = reader_of("byte_level")
    return [PublicText.of(one) for one in pair_texts(domain_texts(domain), server, server, max_tokens=64)]


def test_public_texts_are_learnt_as_own_ones_are_by_a_proxy_without_the_private_adapter(
    folders: dict[str, Path], shared: Arrays, tmp_path: Path
) -> None:
    """All of a step, and everything from the proxy: the same small model as one whose own texts these are."""

    def small_after(name: str, domain: str, *, has_public: bool, **changes: Any) -> tuple[dict[str, Any], Arrays]:
        own = CoTuningDevice(
            domain_texts(domain),
            small=CausalModel(str(folders["llama"])),
            proxy=CausalModel(str(folders["proxy"])),
            folder=tmp_path / name,
            scale=SCALE,
            max_tokens=64,
        )
        plan = replace(PLAN, loss=MutualLossConfig(mix=1.0), **changes)
        asked = job(shared, plan)
        public = public_arrays(public_texts()) if has_public else {}
        done = own.co_tune(replace(asked, arrays={**asked.arrays, **public}))
        kept = own.store.last("run")
        assert kept is not None
        return {n: one for n, one in kept.items() if n.startswith(SMALL)}, done.arrays

    wanted, _ = small_after("own", "public", has_public=False, private_rank=0)
    found, _ = small_after("public", "med", has_public=True, public_share=1.0)
    assert all(torch.equal(found[name], one) for name, one in wanted.items())
    # A third of a step moves the small model, and the shared adapter only through what it says.
    alone, change = small_after("alone", "med", has_public=True, public_share=0.0, proxy_mix=0.0)
    some, same = small_after("some", "med", has_public=True, proxy_mix=0.0)
    assert any(not torch.equal(some[name], one) for name, one in alone.items())
    assert all(np.array_equal(same[name], one) for name, one in change.items())
    none, _ = small_after("none", "med", has_public=False, proxy_mix=0.0)
    assert all(torch.equal(none[name], one) for name, one in alone.items())


def test_what_the_proxy_answers_to_open_questions_is_learnt_as_a_public_text_is(
    folders: dict[str, Path], shared: Arrays, tmp_path: Path
) -> None:
    """By hand: the proxy with the shared adapter answers; a device that is given these answers as public texts learns
    the same, to the bit. Below the wanted probability nothing is learnt, and what is sent holds no answer."""
    questions = [one.prompt for one in domain_texts("public")]
    proxy = CausalModel(str(folders["proxy"]))
    with proxy.loaded() as model:
        term = term_of({name: torch.from_numpy(np.array(one)) for name, one in shared.items()})
        with low_rank_terms(model, [term], scale=SCALE):
            written = write_greedily(model, proxy.reader, questions, max_new_tokens=5)
    answers = [
        Example(question, one.text)
        for question, one in zip(questions, written, strict=True)
        if one.text.strip() and "\ufffd" not in one.text
    ]
    assert len(answers) >= 2
    server = reader_of("byte_level")
    told = public_arrays([PublicText.of(one) for one in pair_texts(answers, server, server, max_tokens=64)])

    def small_after(name: str, more: dict[str, Any], **changes: Any) -> tuple[dict[str, torch.Tensor], Arrays]:
        own = device(folders, "llama", tmp_path / name)
        asked = job(shared, replace(PLAN, **{"public_share": 2 / 3, **changes}))
        done = own.co_tune(replace(asked, arrays={**asked.arrays, **more}))
        kept = own.store.last("run")
        assert kept is not None
        return {n: one for n, one in kept.items() if n.startswith(SMALL)}, done.arrays

    asked = question_arrays(questions)
    found, sent = small_after("asked", asked)
    wanted, _ = small_after("told", told)
    assert all(torch.equal(found[name], one) for name, one in wanted.items())
    assert sent.keys() == shared.keys()
    unsure, _ = small_after("unsure", asked, answering=Answering(max_new_tokens=5, sure_above=1.0))
    alone, _ = small_after("alone", {})
    assert all(torch.equal(unsure[name], one) for name, one in alone.items())
    assert any(not torch.equal(found[name], one) for name, one in alone.items())
    # Beside public texts they have their share of a step.
    both, _ = small_after("both", {**asked, **public_arrays(public_texts())})
    public, _ = small_after("public alone", public_arrays(public_texts()))
    assert any(not torch.equal(both[name], one) for name, one in public.items())
    silent, _ = small_after(
        "silent",
        {**asked, **public_arrays(public_texts())},
        answering=Answering(max_new_tokens=5, sure_above=0.0, share=0.0),
    )
    assert all(torch.equal(silent[name], one) for name, one in public.items())


def test_a_public_text_is_a_prompt_and_what_is_marked() -> None:
    assert [one.example() for one in public_texts()] == domain_texts("public")
    assert PublicText("caf\u00e9 \u00fcber", 6, np.array([5]), False).example() == Example("caf\u00e9 ", "\u00fcber")


def test_a_device_without_the_proxy_tells_likelihoods_of_public_texts_alone(
    folders: dict[str, Path], shared: Arrays, tmp_path: Path
) -> None:
    public = public_texts()
    own = device(folders, "mamba2", tmp_path, has_proxy=False)
    done = own.tell_likelihoods(job(public_arrays(public)))
    (codes,) = done.arrays.values()
    assert done.arrays.keys() == {LIKELIHOODS} and codes.dtype == np.uint8
    assert len(codes) == sum(one.num_slots for one in public)
    values = from_codes(codes)
    assert (values <= 0).sum() > 10 and values.min() < -1
    own.save_small("run", tmp_path / "out")
    with CausalModel(str(tmp_path / "out")).loaded() as model, CausalModel(str(folders["mamba2"])).loaded() as start:
        parameters = dict(start.named_parameters())
        assert any(not torch.equal(p, parameters[name]) for name, p in model.named_parameters())
    with pytest.raises(InputError, match="which this device does not have"):
        own.co_tune(job(shared))
    with pytest.raises(InputError, match="has no round of run other"):
        own.save_small("other", tmp_path / "nothing")
    with pytest.raises(MismatchError, match="of another small model"):
        device(folders, "gpt2", tmp_path).tell_likelihoods(job(public_arrays(public), round_number=2))
