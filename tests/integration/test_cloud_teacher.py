"""A student learns from a teacher behind a real cloud: the same numbers, each text sent once, all in the ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clouds import in_a_thread
from tiny_models import VOCAB, tiny_backbone

from cotune.cloud.hosted import HostedModel
from cotune.compression.distil import DistilResult, DistilSettings, distil
from cotune.compression.fewer_layers import with_fewer_layers
from cotune.compression.teacher_cache import CachedTeacher
from cotune.data.batches import EncodedExample
from cotune.device.features import RemoteFeatureSource
from cotune.distillation.divergences import JensenShannon
from cotune.distillation.teacher import CloudTeacher, LocalTeacher, Teacher
from cotune.errors import RefusedError
from cotune.ledger import EgressLedger
from cotune.tuning.loop import LoopConfig
from cotune.wire.frames import HEADER_BYTES
from cotune.wire.ledgered import LedgeredConnection
from cotune.wire.transport import Connection
from cotune.wire.websocket import connect

pytestmark = pytest.mark.integration
TOP_K = 30
RNG = np.random.default_rng(0)
TEXTS = [EncodedExample(RNG.integers(2, VOCAB, length), 3) for length in (9, 12, 7, 10, 8, 11)]
SETTINGS = DistilSettings(
    loop=LoopConfig(epochs=2, learning_rate=1e-2),
    divergence=JensenShannon(0.5),
    teacher_share=0.7,
    top_k=TOP_K,
    on_policy_share=0.5,
    max_new_tokens=4,
    num_batch_sequences=3,
)


def test_a_cloud_teaches_as_the_model_at_hand_does(tmp_path: Path) -> None:
    teacher = tiny_backbone("llama")
    student = with_fewer_layers(teacher, (0, 2))

    def run(by: Teacher) -> DistilResult:
        return distil(student, by, TEXTS, SETTINGS, heldout=TEXTS)

    local, ledger = run(LocalTeacher(teacher)), EgressLedger(None)
    with in_a_thread(HostedModel.of(tiny_backbone("llama"))) as url:

        async def ledgered() -> Connection:
            return LedgeredConnection(await connect(url), ledger, "distil")

        with RemoteFeatureSource(ledgered, want_hidden=False) as source:
            received = source.bytes_received
            for top_k in (TOP_K, VOCAB):
                told = CloudTeacher(source).top_log_probs(TEXTS, top_k)
                expected = CloudTeacher(teacher).top_log_probs(TEXTS, top_k)  # the same passes in this process
                assert torch.equal(told.ids, expected.ids) and torch.equal(told.log_probs, expected.log_probs)
                at_hand = [LocalTeacher(teacher).top_log_probs([text], top_k) for text in TEXTS]
                assert torch.equal(told.ids, torch.cat([top.ids for top in at_hand]))
                # A float32 logit less a float32 log normaliser, against a log softmax.
                torch.testing.assert_close(
                    told.log_probs, torch.cat([top.log_probs for top in at_hand]), atol=2e-6, rtol=2e-7
                )
            num_targets = len(told)
            # Ids of 3 bytes, logits of 4; taps, target and log normaliser; no hidden states.
            about = source.description
            per_target = 3 + 8 + about.num_taps * (2 + about.tap_dim)
            sizes = [HEADER_BYTES * len(TEXTS) + num_targets * (per_target + 7 * k) for k in (TOP_K, VOCAB)]
            assert source.bytes_received - received == sum(sizes)

            before = ledger.totals()["features request"]
            cached = CachedTeacher(CloudTeacher(source), tmp_path / "teacher")
            cached.reserve(TEXTS, TOP_K)
            remote = run(cached)
            after = ledger.totals()["features request"]
            assert cached.num_asked == after["count"] - before["count"] == 6 + 6  # given texts, and half of two epochs
            assert set(ledger.totals()) == {"hello", "features request"}
            with pytest.raises(RefusedError, match="the sequence has 129 tokens"):
                CloudTeacher(source).top_log_probs([EncodedExample(np.full(129, 7), 1)], TOP_K)
        description = source.description
    # Own texts are discrete, so that rounding of 1e-6 leaves them as they are.
    assert remote.adapter.params.keys() == local.adapter.params.keys()
    for name, value in remote.adapter.params.items():
        torch.testing.assert_close(value, local.adapter.params[name], atol=2e-3, rtol=0)

    class Gone:
        """The cloud is out of reach; what it hosted is known."""

        def __init__(self) -> None:
            self.description = description

        def features(self, input_ids: np.ndarray, first_target: int, top_k: int) -> Any:
            raise AssertionError("asked again")

    again = run(CachedTeacher(CloudTeacher(Gone()), tmp_path / "teacher"))
    assert all(torch.equal(value, remote.adapter.params[name]) for name, value in again.adapter.params.items())
