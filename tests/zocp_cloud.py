"""A scripted cloud for the sandwich's studies: right under one prompt of `nlu`, on the requests that cotune makes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

GOOD = "Answer with one of the labels and nothing else."
OPTIONS = (
    *("--tasks", "nlu", "--cloud-model", "scripted", "--num-train", 2, "--num-validation", 1, "--num-test", 2),
    *(
        "--num-unlabelled",
        1,
        "--seeds",
        1,
        "--num-steps",
        1,
        "--num-restore-steps",
        1,
        "--num-batch-examples",
        2,
        "--rank",
        1,
    ),
)


def label_of(body: Mapping[str, Any]) -> str:
    """The thing in the request; elsewhere than under the good prompt, words."""
    thing = re.search(r"a (\w+)\.", body["messages"][-1]["content"])
    if thing is None:
        return "what?"
    return thing[1] if body["messages"][0]["content"] == GOOD else f"It is the {thing[1]}."
