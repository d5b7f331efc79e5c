"""The peak memory of another process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from cotune.errors import CotuneError

# A process between, because the kernel counts a parent's memory to its child until the child has become another
# program. This one is small.
_LAUNCHER = """
import os, sys
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(pid, 0)
sys.stderr.write(f"\\n{usage.ru_maxrss}\\n")
sys.exit(os.waitstatus_to_exitcode(status))
"""
_BYTES_PER_UNIT = 1 if sys.platform == "darwin" else 1024


def run_with_peak(arguments: Sequence[str], *, stdin: str = "", timeout_s: float = 300.0) -> tuple[str, float]:
    """Run Python with these arguments.

    Returns:
        What it printed, and the most memory that it held, in megabytes (10^6 bytes).

    Raises:
        CotuneError: it failed.
    """
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _LAUNCHER, sys.executable, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    said = done.stderr.strip().splitlines()
    if done.returncode != 0 or not said:
        raise CotuneError(f"{' '.join(arguments[:3])} failed: {' / '.join(said[-3:])}")
    return done.stdout, int(said[-1]) * _BYTES_PER_UNIT / 1e6
