"""What the machine gives: read from files of the system, which are made up here."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from edgezo.errors import EdgeModelError
from edgezo.manifest_reader import read_manifest
from edgezo.runtime import machine, weight_files
from edgezo.runtime.machine import available_bytes, default_threads
from edgezo.runtime.model import EdgeModel


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A system without any of the files, and a process that may use four hardware threads."""
    monkeypatch.setattr(machine, "CPUS", tmp_path)
    monkeypatch.setattr(machine, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 4, 5}, raising=False)
    return tmp_path


def write_siblings(system: Path, siblings: dict[int, str]) -> None:
    for cpu, text in siblings.items():
        folder = system / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(text + "\n")


def test_two_hardware_threads_of_a_core_count_once(system: Path) -> None:
    write_siblings(system, {0: "0,4", 4: "0,4", 1: "1,5", 5: "1,5"})
    assert default_threads() == 2


def test_cores_without_siblings_count_each(system: Path) -> None:
    write_siblings(system, {0: "0", 1: "1", 4: "4", 5: "5"})
    assert default_threads() == 4


def test_a_system_that_does_not_tell_siblings_has_a_core_a_thread(system: Path) -> None:
    assert default_threads() == 4


@pytest.mark.parametrize(
    ("quota", "threads"),
    [("200000 100000", 2), ("50000 100000", 1), ("900000 100000", 4), ("max 100000", 4), ("", 4), ("1 0", 4), ("?", 4)],
)
def test_a_container_gets_its_share(system: Path, quota: str, threads: int) -> None:
    (system / "cpu.max").write_text(quota)
    assert default_threads() == threads


def test_a_system_without_affinity_counts_processors(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert default_threads() == 6


def test_free_memory_is_what_system_and_container_leave(system: Path) -> None:
    assert available_bytes() is None
    (system / "meminfo").write_text("MemTotal: 16 kB\nMemFree: 1 kB\nMemAvailable:    8192 kB\n")
    assert available_bytes() == 8192 * 1024
    (system / "memory.max").write_text("5000000\n")
    (system / "memory.current").write_text("3000000\n")
    assert available_bytes() == 2_000_000
    (system / "memory.stat").write_text("anon 500\nfile 900\ninactive_file 700000\nactive_file 100000\nactive_anon 3\n")
    assert available_bytes() == 2_800_000, "files in memory are given back"
    (system / "memory.max").write_text("max\n")
    assert available_bytes() == 8192 * 1024


@pytest.mark.parametrize(
    ("free", "advice"),
    [
        (100_000, "export it with --adapter lora --weights int8"),
        (20_000, "export it with --adapter lora --weights int4"),
        (1_000, "take a smaller model"),
    ],
)
def test_a_model_larger_than_free_memory_is_refused(exported_dir: Path, monkeypatch: pytest.MonkeyPatch, free: int, advice: str) -> None:
    monkeypatch.setattr(weight_files, "available_bytes", lambda: free)
    with pytest.raises(EdgeModelError) as caught:
        EdgeModel(exported_dir)
    assert str(caught.value).startswith(
        f"{exported_dir}: its weights take 0.0 GB of memory, 0.0 GB are free; end other programs, or {advice}"
    )


def test_half_precision_is_unpacked_on_the_cpu(export_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    directory = export_tiny("llama", adapter="lora", weights="fp16")
    tensors = read_manifest(directory).tensors
    stored, half = (sum(tensor.nbytes for tensor in tensors if tensor.dtype in kinds) for kinds in (("float32", "float16"), ("float16",)))
    monkeypatch.setattr(weight_files, "available_bytes", lambda: stored + half // 2)
    with pytest.raises(EdgeModelError, match=r"end other programs, or export it with --adapter lora --weights int8$"):
        EdgeModel(directory)
    monkeypatch.setattr(weight_files, "available_bytes", lambda: stored + half + 2 * 4096 * len(tensors))
    assert EdgeModel(directory).manifest.weights == "fp16"


def test_a_model_that_fits_or_cannot_be_told_is_opened(exported_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for free in (None, 1 << 30):
        monkeypatch.setattr(weight_files, "available_bytes", lambda free=free: free)
        assert EdgeModel(exported_dir).weights
