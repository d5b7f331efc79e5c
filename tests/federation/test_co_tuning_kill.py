"""A co-tuned federation in a process that gets a real SIGKILL in the middle of a step, and goes on to the same bits.

The process is a fork of this one, so that nothing is loaded twice; what it leaves is on disk alone.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from co_tuning import domain_texts, model_folder, write_texts

from cotune.federation.arrays import digest
from cotune.federation.co_tuning_simulation import simulation_of
from cotune.federation.coordinator import Progress, RoundRules
from cotune.federation.device_store import DeviceStore
from cotune.federation.local_model import LocalSteps
from cotune.federation.progress_checkpoint import load_progress, save_progress
from cotune.federation.run_parts import run_id
from cotune.federation.run_secret import RunSecret
from cotune.federation.settings import AdapterSettings, DataSettings, FederationSettings
from cotune.models.backbone import Backbone
from cotune.tuning.gradient import GradientState

SECRET = RunSecret(bytes(range(1, 33)))
DEVICES = ("desk", "phone")
# In a round: each device's private adapter, small model and shared adapter, and on the server cloud and proxy.
STEPS_OF_ROUND = 2 * 3 + 2


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> FederationSettings:
    root = tmp_path_factory.mktemp("kill")
    (root / "texts").mkdir()
    for name, domain in zip(DEVICES, ("law", "med"), strict=True):
        write_texts(root / "texts" / f"{name}.jsonl", domain_texts(domain, 3))
    models = {
        name: str(model_folder(root / name, family, kind, seed=seed))
        for seed, (name, family, kind) in enumerate(
            [("proxy", "llama", "byte_level"), ("cloud", "llama", "byte_level"), ("small", "gpt2", "nfkc")],
            start=1,
        )
    }
    # Of three texts in a small model's step one is its own, one is public, and one is an answered question.
    steps = {"num_steps": 1, "batch_size": 3, "learning_rate": 5e-3}
    public = write_texts(root / "public.jsonl", domain_texts("public", 2))
    questions = root / "questions.jsonl"
    # So many that the proxy has a word for some.
    asked = [json.dumps({"prompt": one.prompt}) for one in domain_texts("public", 7)]
    questions.write_text("\n".join(asked) + "\n", encoding="utf-8")
    return FederationSettings(
        algorithm="coplms",
        model=models["proxy"],
        data=DataSettings(path=str(root / "texts"), split="domains", num_judge=2, max_length=64, min_examples=1),
        adapter=AdapterSettings(rank=2),
        steps=LocalSteps(**steps),  # type: ignore[arg-type]
        rounds=RoundRules(num_rounds=2, tolerance=10.0),
        options={
            "coplms": {
                "private_rank": 1,
                "devices": {"*": models["small"]},
                "answering": {"sure_above": 0.0, "max_new_tokens": 4},
                "cloud": {
                    "model": models["cloud"],
                    "public": str(public),
                    "questions": str(questions),
                    "rank": 2,
                    "steps": steps,
                },
            }
        },
    )


@pytest.fixture(scope="module")
def proxy(settings: FederationSettings) -> Backbone:
    return Backbone.from_pretrained(settings.model)


def go_on(settings: FederationSettings, proxy: Backbone, folder: Path) -> Progress:
    """From the last checkpoint in the folder, or from the beginning, to the end."""
    names = {"run_id": run_id(settings, SECRET), "base_digest": proxy.spec.backbone_digest}
    checkpoints = folder / "checkpoints"

    def save(progress: Progress) -> None:
        save_progress(checkpoints, progress, **names)

    with simulation_of(settings, proxy, secret=SECRET, folder=folder, save=save) as simulation:
        begun = (
            load_progress(checkpoints, **names)
            if checkpoints.is_dir()
            else simulation.coordinator.begin(simulation.adapter)
        )
        *_, end = simulation.coordinator.run(begun)
    return end


def kept(settings: FederationSettings, folder: Path) -> list[str]:
    found = []
    for device in DEVICES:
        own = DeviceStore(folder / "devices" / device / "rounds").last(run_id(settings, SECRET))
        assert own is not None
        found.append(digest({name: one.numpy() for name, one in own.items()}))
    return found


def killed_in(step: int, settings: FederationSettings, proxy: Backbone, folder: Path) -> None:
    """Run in a process that kills itself in the middle of its step of this number."""
    child = os.fork()
    if child == 0:
        try:
            # A pool of threads does not survive a fork.
            torch.set_num_threads(1)
            taken, descend = [0], GradientState.descend

            def dying(self: GradientState, loss: torch.Tensor, *, max_grad_norm: float) -> object:
                taken[0] += 1
                if taken[0] == step:
                    loss.backward()  # type: ignore[no-untyped-call]
                    os.kill(os.getpid(), signal.SIGKILL)
                return descend(self, loss, max_grad_norm=max_grad_norm)

            GradientState.descend = dying  # type: ignore[assignment,method-assign]
            go_on(settings, proxy, folder)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, "it was killed, and did not end"


@pytest.mark.integration
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_whatever_step_it_is_killed_in_a_run_that_goes_on_ends_with_the_same_weights(
    settings: FederationSettings, proxy: Backbone, tmp_path: Path
) -> None:
    whole = go_on(settings, proxy, tmp_path / "whole")
    assert [one.verdict for one in whole.records] == ["accepted", "accepted"]
    assert all(one.shown["answered"] > 0 for one in whole.records), [one.shown for one in whole.records]
    for step in range(1, 2 * STEPS_OF_ROUND + 1):
        folder = tmp_path / str(step)
        folder.mkdir()
        killed_in(step, settings, proxy, folder)
        assert (folder / "checkpoints").is_dir() == (step > STEPS_OF_ROUND)
        end = go_on(settings, proxy, folder)
        assert digest(end.state) == digest(whole.state) and kept(settings, folder) == kept(settings, tmp_path / "whole")
