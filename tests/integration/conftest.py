"""Backbones for tests with real sockets and processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_backbone

import cotune.models
from cotune.models.backbone import Backbone

STARTER = Path(cotune.models.__file__).parent / "starter" / "model.safetensors"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small models run fastest on one thread, and cloud and device share few cores here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def starter() -> Backbone:
    if not STARTER.is_file():
        pytest.skip("the starter model has no weights yet; make them with scripts/train_starter.py")
    return Backbone.from_pretrained("starter")


@pytest.fixture(scope="session", params=["llama", "gpt2", "starter"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    if request.param == "starter":
        return request.getfixturevalue("starter")  # type: ignore[no-any-return]
    return tiny_backbone(request.param)
