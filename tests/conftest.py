"""For all tests: products that do not depend on threads, as the `cotune` command asks for too, and one thread."""

from __future__ import annotations

import os

import pytest

# Before PyTorch is loaded; see `cotune.models.row_invariance`.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
# Several workers run beside each other. With as many threads each as there are cores, threads wait for threads that
# wait for a core, and a test of one second took two minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-seconds", default="6", help="how long tests/wire/test_fuzz.py goes on, seconds in all")
    parser.addoption("--connects", default="3000", help="connections in tests/cloud/test_front.py that come and go")
