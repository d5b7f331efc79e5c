"""What a study found, as its result folder, its page and its lines on the terminal."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from result_folder import write_results

from cotune.cli.run_folder import versions
from cotune.evaluation.report import Section


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a study found.

    Attributes:
        title, lead: of its page.
        expected, measured: what the paper says, and what came.
        sections: tables and plots.
        deviations: beside those that all studies have.
        lines: for the terminal.
        unfinished: what the budget left out; the page shows the rest.
    """

    title: str
    lead: str
    expected: Mapping[str, Any]
    measured: Mapping[str, Any]
    sections: Sequence[Section]
    deviations: Sequence[str] = ()
    lines: Sequence[str] = ()
    unfinished: Sequence[str] = ()

    def publish(self, out: Path, *, about: Mapping[str, Any], lead: str = "", deviations: Sequence[str] = ()) -> None:
        """Write the result folder and print the lines; ends with status 1 where the budget left something out.

        Args:
            out: the folder.
            about: from `about_run`.
            lead: a sentence after the page's own.
            deviations: before the page's own.
        """
        write_results(
            out,
            title=self.title,
            lead=f"{self.lead} {lead}".strip(),
            about=about,
            expected=self.expected,
            measured=self.measured,
            sections=self.sections,
            deviations=(*deviations, *self.deviations, *[f"Not finished: {one}." for one in self.unfinished]),
        )
        for line in self.lines:
            print(line)
        print(f"report: {out / 'report.html'}")
        if self.unfinished:
            count = f"{len(self.unfinished)} parts, the first of them " if len(self.unfinished) > 1 else ""
            sys.exit(f"the budget is spent before {count}{self.unfinished[0]}; run again to go on")


def about_run(config: Mapping[str, Any], *, device: str, threads: int, **more: Any) -> dict[str, Any]:
    """Settings, versions and machine, so that numbers can be judged and repeated.

    Args:
        config: the command's options; paths are left out.
        device: a PyTorch device.
        threads: of the CPU.
        more: what else belongs to it.
    """
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine()
    return {
        "config": {name: value for name, value in config.items() if not isinstance(value, Path)},
        **more,
        "versions": versions(),
        "hardware": {"device": name, "cores": os.cpu_count(), "threads": threads},
    }
