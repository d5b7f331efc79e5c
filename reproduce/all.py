"""All studies, as far as the time goes: finished cells are never run again, so run it as often as you like.

Every study gets what is left of the budget, in an order in which the cheap and shared cells come first. A study that
does not get through keeps what it finished and is tried again the next time.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from study_options import StudyParser, positive

HERE = Path(__file__).parent
STUDIES = (
    "spa_table2",
    "spa_table4",
    "spa_figures3_4",
    "spa_figure5",
    "spa_gate_curve",
    "spa_goals",
    "spa_table3",
    "spa_ablations",
    "spa_gate_inputs",
    "spa_beams",
    "spa_table1",
)


def main() -> None:
    """Entry point."""
    parser = StudyParser(
        prog="python reproduce/all.py",
        description=__doc__,
        epilog="examples:\n"
        "  python reproduce/all.py --budget-minutes 60 --data-root my-data\n"
        "  python reproduce/all.py --only spa_table2 spa_table4 --data-root my-data --model ./llama-7b\n\n"
        "All other options go to the studies; see python reproduce/spa_table2.py --help.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--budget-minutes", type=positive, default=60.0, help="in all (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=STUDIES, default=STUDIES)
    args, others = parser.parse_known_args()
    ends_s = time.monotonic() + 60 * args.budget_minutes
    states: dict[str, str] = {}
    for name in args.only:
        left = (ends_s - time.monotonic()) / 60
        if left <= 0:
            states[name] = "no time left"
            continue
        print(f"== {name}, {left:.0f} minutes left", flush=True)
        command = [sys.executable, str(HERE / f"{name}.py"), *others, "--budget-minutes", f"{left:.3f}"]
        states[name] = "done" if subprocess.run(command, check=False).returncode == 0 else "not finished, see above"
    for name, state in states.items():
        print(f"{name:18s} {state}")
    sys.exit(0 if all(state == "done" for state in states.values()) else 1)


if __name__ == "__main__":
    main()
