"""The reconstruction's loss by hand; its rounds are in the test of all methods."""

from __future__ import annotations

import pytest
import torch
from byte_oracle import longest_match
from torch.nn import functional as F

from cotune.data.templates import Example
from cotune.distillation.mapped_targets import TokenMap
from cotune.distillation.paired_texts import Reader, pair_text
from cotune.errors import InputError
from cotune.federation.comparison.coplms_reconstruction import CoPlmsReconstruction

READERS = [Reader(*longest_match(*tokens), end_id=1) for tokens in (("a", "bbbb", "ccccc"), ("a", "bbb", "b", "ccccc"))]
TEXT = pair_text(Example("a", "abbbbccccc"), READERS[0], READERS[1], max_tokens=16)


def test_the_loss_by_hand_and_its_gradient() -> None:
    method = CoPlmsReconstruction(mix=0.25, temperature=2.0, private_rank=1)
    mapped = TokenMap(READERS[0].table, READERS[1].table)
    warped = mapped.warped(TEXT, teacher=0)
    # The student's targets a, bbb, b, ccccc and the end lie beside a, bbbb, bbbb, ccccc and the end.
    assert warped.beside == [[0], [1], [2], [3], [3], [4], [5]]
    told = torch.arange(24, dtype=torch.float64).reshape(4, 6).sin() * 3
    own = (torch.arange(35, dtype=torch.float64).reshape(5, 7).cos() * 2).requires_grad_()
    targets = torch.tensor([3, 4, 5, 6, 1])
    value = method.loss(mapped, [warped], told, own, targets)
    p = torch.zeros(5, 7)
    for row, teacher in enumerate([0, 1, 1, 2, 3]):
        for token, share in enumerate((told[teacher] / 2).softmax(0).tolist()):
            p[row, int(mapped.nearest([token])[0])] += share
    log_q = (own.float() / 2).log_softmax(1)
    divergence = torch.where(p > 0, p * (p.clamp_min(1e-30).log() - log_q), 0.0).sum(1).mean()
    wanted = 0.75 * F.cross_entropy(own.float(), targets) + 0.25 * 4 * divergence
    assert value.item() == pytest.approx(wanted.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(value, own)
    (expected,) = torch.autograd.grad(wanted, own)
    assert torch.allclose(gradient, expected, atol=1e-6) and gradient.abs().max() > 0.01


def test_a_model_distilled_from_itself_has_only_the_texts_to_learn() -> None:
    method, reader = CoPlmsReconstruction(mix=1.0, private_rank=1), READERS[1]
    same = pair_text(Example("a", "abbbbccccc"), reader, reader, max_tokens=16)
    mapped = TokenMap(reader.table, reader.table)
    logits = torch.arange(35.0).reshape(5, 7).sin()
    # Begin and unknown tokens write nothing and are one string: on them nothing is lost where nothing is expected.
    logits[:, [0, 2]] = -50.0
    targets = torch.tensor([3, 4, 5, 6, 1])
    assert float(method.loss(mapped, [mapped.warped(same, teacher=0)], logits, logits, targets)) < 1e-6


@pytest.mark.parametrize(
    ("options", "words"),
    [({"mix": 0.0}, "mix is 0.0"), ({"temperature": 0.0}, "temperature"), ({"private_rank": 0}, "rank")],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        CoPlmsReconstruction(**options)  # type: ignore[arg-type]
