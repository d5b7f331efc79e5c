"""What a benchmark leaves behind."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

from measurement import Target, finish


def test_a_result_file_names_models_and_no_folders(tmp_path: Path) -> None:
    (tmp_path / "my-llama").mkdir()
    args = Namespace(out=tmp_path / "found.json", model=str(tmp_path / "my-llama"), texts=tmp_path, dtype="a/b", rows=3)
    target = Target(what="speed", measured=2.0, limit=1.0, unit="times", is_upper=False)
    finish("decode", args, {"cores": 2}, {"ms": 1.5}, [target])
    record = json.loads(args.out.read_text(encoding="utf-8"))
    assert record["config"] == {"model": "my-llama", "dtype": "a/b", "rows": 3}
    assert record["targets"][0]["verdict"] == "PASS" and record["results"] == {"ms": 1.5}
