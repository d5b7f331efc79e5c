"""Models for all tests of this folder, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from co_tuning_scene import make_models


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("comparison"))
