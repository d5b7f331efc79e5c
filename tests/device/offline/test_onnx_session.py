"""How graphs are opened."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from offline_folders import write_onnx_folder

from cotune.device.offline.onnx_session import open_session
from cotune.errors import InputError


def test_a_graph_is_a_file_or_bytes_with_a_folder_of_weights(tmp_path: Path) -> None:
    file = write_onnx_folder(tmp_path / "model") / "model.onnx"
    options = {"name": "tiny", "num_threads": 3}
    sessions = [open_session(file, **options), open_session(file.read_bytes(), weights=file.parent, **options)]
    for session in sessions:
        assert session.get_outputs()[0].name == "logits"
        options_there = session.get_session_options()
        assert options_there.intra_op_num_threads == 3
        # Awake for microseconds within a step, and not at all after it.
        assert int(options_there.get_session_config_entry("session.intra_op.spin_duration_us")) < 100
        assert options_there.get_session_config_entry("session.force_spinning_stop") == "1"
    with pytest.raises(InputError, match="tiny is no model that onnxruntime"):
        open_session(file.read_bytes(), weights=tmp_path, **options)


def test_without_onnxruntime_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"mine needs onnxruntime \(.*\); run: pip install 'cotune\[edge\]'"):
        open_session(tmp_path / "model.onnx", name="mine", num_threads=1)
