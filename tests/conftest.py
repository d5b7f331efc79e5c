"""For all tests: products that do not depend on threads, as the `cotune` command asks for too."""

from __future__ import annotations

import os

# Before PyTorch is loaded; see `cotune.models.row_invariance`.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
