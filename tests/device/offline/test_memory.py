"""Whether a model fits: the sum, and what the system says is free."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from offline_folders import CONTEXT, HEAD_DIM, KV_HEADS, LAYERS, write_onnx_folder
from toy import VOCAB

from cotune.device.offline.folder import OfflineFolder
from cotune.device.offline.memory import RUNTIME_BYTES, available_bytes, fit_memory, memory_need
from cotune.device.offline.model import OfflineSettings
from cotune.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> OfflineFolder:
    return OfflineFolder.open(write_onnx_folder(tmp_path_factory.mktemp("offline") / "model"))


def test_the_need_is_the_sum_of_its_parts(folder: OfflineFolder) -> None:
    need = memory_need(folder, OfflineSettings(context=10, num_texts=3))
    assert need.weights == sum((folder.path / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert need.caches == 3 * 2 * LAYERS * KV_HEADS * HEAD_DIM * 10 * 4
    assert need.logits == 10 * VOCAB * 4
    assert need.total == need.weights + need.caches + need.logits + RUNTIME_BYTES
    files = {**folder.description.files, "model.gguf": "0" * 64}
    half = replace(folder, description=replace(folder.description, runtime="gguf", files=files))
    (folder.path / "model.gguf").write_bytes(b"123")
    assert memory_need(half, OfflineSettings(context=10)).caches == 2 * LAYERS * KV_HEADS * HEAD_DIM * 10 * 2
    assert half.num_model_bytes == 3
    assert memory_need(folder, OfflineSettings()).caches == 2 * LAYERS * KV_HEADS * HEAD_DIM * CONTEXT * 4


def test_a_model_fits_exactly_or_is_refused_with_its_parts(folder: OfflineFolder) -> None:
    need = memory_need(folder, OfflineSettings()).total
    exact = OfflineSettings(memory_limit_bytes=need)
    assert fit_memory(folder, exact, available=lambda: None) == exact
    with pytest.raises(InputError, match=r"needs 48\.1 MiB \(0\.0 MiB of weights.*, the memory limit; take a shorter"):
        fit_memory(folder, replace(exact, memory_limit_bytes=need - 1), available=lambda: None)
    with pytest.raises(InputError, match="the memory limit"):
        fit_memory(folder, replace(exact, memory_limit_bytes=need - 1), available=lambda: 2 * need)
    with pytest.raises(InputError, match=r"expected at most 0\.0 MiB, the memory that is free; take a shorter context"):
        fit_memory(folder, exact, available=lambda: 100)
    # What the system does not say is no reason to refuse.
    assert fit_memory(folder, OfflineSettings(num_texts=9), available=lambda: None).num_texts == 9


def test_as_many_texts_as_there_is_room_for(folder: OfflineFolder) -> None:
    one, three = (memory_need(folder, OfflineSettings(num_texts=num)).total for num in (1, 3))
    settings = OfflineSettings(num_texts=8)
    for limit, num in ((one, 1), (three - 1, 2), (three, 3), (2 * three, 8)):
        assert fit_memory(folder, settings, available=lambda limit=limit: limit).num_texts == num  # type: ignore[misc]
    assert fit_memory(folder, replace(settings, num_texts=2), available=lambda: 2 * three).num_texts == 2


def test_the_default_asks_this_system(folder: OfflineFolder) -> None:
    enormous = replace(folder, description=replace(folder.description, num_layers=4096, num_kv_heads=4096))
    enormous = replace(enormous, description=replace(enormous.description, context=2**24, head_dim=2**16))
    with pytest.raises(InputError, match="the memory that is free"):
        fit_memory(enormous, OfflineSettings())


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_least_of_machine_and_control_group_counts(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) is None
    write(tmp_path, "proc/meminfo", "MemTotal:  9 kB\nMemAvailable:    5000 kB\n")
    assert available_bytes(tmp_path) == 5000 * 1024
    group = "sys/fs/cgroup"
    write(tmp_path, f"{group}/memory.max", "max\n")
    write(tmp_path, f"{group}/memory.current", "1000000\n")
    assert available_bytes(tmp_path) == 5000 * 1024
    write(tmp_path, f"{group}/memory.max", "3000000\n")
    assert available_bytes(tmp_path) == 2_000_000
    write(tmp_path, f"{group}/memory.stat", "anon 1\ninactive_file 50\n")
    assert available_bytes(tmp_path) == 2_000_050
    write(tmp_path, f"{group}/memory.current", "9000000\n")
    assert available_bytes(tmp_path) == 0


def test_the_older_control_groups(tmp_path: Path) -> None:
    write(tmp_path, "sys/fs/cgroup/memory/memory.limit_in_bytes", "500\n")
    write(tmp_path, "sys/fs/cgroup/memory/memory.usage_in_bytes", "200\n")
    assert available_bytes(tmp_path) == 300


def test_the_limit_of_the_process_counts_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    write(tmp_path, "proc/self/status", "Name:\tpython\nVmSize:\t 600 kB\n")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1_000_000, 2_000_000))
    assert available_bytes(tmp_path) == 1_000_000 - 600 * 1024
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert available_bytes(tmp_path) is None
