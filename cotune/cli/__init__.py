"""The command line."""

import os

# Libraries read these when they are loaded, so before all else. Products that do not depend on threads or memory, see
# `cotune.models.row_invariance`; and no threads for NumPy's small ones, which would wait for each other.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
