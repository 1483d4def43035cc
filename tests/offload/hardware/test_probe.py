import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from offload.hardware import disk
from offload.hardware import probe as probing
from offload.hardware import system as host
from offload.hardware.disk import disk_rate
from offload.hardware.gpu import Gpu
from offload.hardware.probe import Machine, _is_due, compared, faster, judged, keep_better, probe, read_again

GPU = Gpu("Some GPU", 24 * 2**30, 1008.0, 25.0, 26.0, 165.0)
MACHINE = Machine(
    name="box",
    cpu="Some CPU",
    cores=8,
    isa="avx512",
    ram_bytes=64 * 2**30,
    ram_available_bytes=60 * 2**30,
    ram_gb_s=70.0,
    disk_gb_s=6.0,
    int8_gops=2000.0,
    gpu=GPU,
    measured=False,
    notes=("a note",),
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "coldstream"


def test_machine_survives_json() -> None:
    document = json.loads(json.dumps(MACHINE.to_json()))
    assert Machine.from_json(document) == MACHINE
    assert document["pcie_gb_s"] == 25.0 and document["vram_gb_s"] == 1008.0


def test_probe_measures_once_and_then_answers_at_once(tmp_path: Path, cache: Path) -> None:
    first = probe(tmp_path)
    assert first.measured and first.ram_gb_s > 0.5 and first.disk_gb_s > 0.01 and first.int8_gops > 1
    started = time.perf_counter()
    again = probe(tmp_path)
    assert time.perf_counter() - started < 0.2
    same = {"ram_available_bytes": first.ram_available_bytes}
    assert dataclasses.replace(again, **same) == first
    assert [file.suffix for file in cache.iterdir()] == [".json"]
    assert not list(tmp_path.glob(".coldstream-probe-*"))
    written = next(cache.iterdir())
    written.write_text('{"version": 4, "cpu": "torn')
    assert probe(tmp_path).ram_gb_s > 0.5
    assert json.loads(written.read_text())["cpu"] == first.cpu


def test_unreadable_or_foreign_measurements_are_not_believed() -> None:
    good = MACHINE.to_json()
    wrong = {"version": 99, "disk_gb_s": 0, "ram_gb_s": float("nan"), "int8_gops": float("inf"), "cores": 2.5}
    wrong |= {"ram_bytes": "64GiB", "notes": "a note", "gpu": [], "quiet": None, "measured_at": {}, "name": 7}
    torn = [{key: good[key] for key in ("version", "cpu")}, {}, {**good, "gpu": {**good["gpu"], "vram_gb_s": -1.0}}]
    for bad in [{**good, key: value} for key, value in wrong.items()] + torn:
        with pytest.raises(ValueError, match=r"version|validation error|not positive"):
            Machine.from_json(bad)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"[" * 10**6, b"{" + b" " * 2**20, b'{"version": NaN}'])
def test_whatever_lies_in_place_of_a_measurement_is_measured_again(
    content: bytes, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "_measure", lambda *_: dataclasses.replace(MACHINE, measured=True, gpu=None))
    probe(tmp_path)
    [kept] = cache.iterdir()
    whole = json.loads(kept.read_text())
    kept.write_bytes(content)
    assert probe(tmp_path).cpu == MACHINE.cpu
    assert json.loads(kept.read_text()).keys() == whole.keys()
    kept.unlink()
    os.mkfifo(kept)
    assert probe(tmp_path).cpu == MACHINE.cpu


def test_a_measurement_beside_others_work_is_repeated_later_and_only_gets_better(tmp_path: Path, cache: Path) -> None:
    probe(tmp_path)
    kept = next(cache.iterdir())
    slow = json.loads(kept.read_text()) | {"quiet": False, "doubts": 1, "ram_gb_s": 0.5, "int8_gops": 1e9}
    kept.write_text(json.dumps(slow))
    assert probe(tmp_path).ram_gb_s == 0.5  # just measured: not again at once
    kept.write_text(json.dumps(slow | {"measured_at": 1.0}))
    again = probe(tmp_path)
    assert again.ram_gb_s > 0.5
    assert again.quiet or again.int8_gops == 1e9


def test_a_rate_far_below_what_was_measured_before_is_said_and_measured_again() -> None:
    slow = dataclasses.replace(MACHINE, ram_gb_s=20.0, measured_at=2000.0)
    kept, refreshed = (judged(slow, MACHINE, keep_best=best) for best in (True, False))
    for found in (kept, refreshed):
        assert not found.quiet and found.doubts == 1
        [note] = [note for note in found.notes if "slower than on" in note]
        assert "RAM 20, was 70" in note and "disk" not in note
    assert (kept.ram_gb_s, refreshed.ram_gb_s) == (70.0, 20.0)
    usual = dataclasses.replace(MACHINE, ram_gb_s=60.0)
    assert judged(usual, MACHINE, keep_best=False) == usual


def test_a_doubtful_measurement_is_repeated_ever_more_rarely() -> None:
    def due(doubts: int, age: float) -> bool:
        return _is_due(dataclasses.replace(MACHINE, quiet=False, doubts=doubts, measured_at=1e6), 1e6 + age)

    assert [due(1, 59), due(1, 61), due(2, 61), due(2, 601), due(3, 601)] == [False, True, False, True, False]
    assert due(1, -5), "measured in the future: the clock was set"
    assert not _is_due(MACHINE, 1e9)
    again = judged(dataclasses.replace(MACHINE, quiet=False), dataclasses.replace(MACHINE, doubts=4), keep_best=True)
    assert again.doubts == 5 and judged(MACHINE, again, keep_best=True).doubts == 0


def test_a_rate_far_above_what_was_measured_before_is_said() -> None:
    [note] = faster(dataclasses.replace(MACHINE, ram_gb_s=81.0), dataclasses.replace(MACHINE, ram_gb_s=50.0))
    assert "RAM 81, was 50" in note and "disk" not in note
    assert faster(MACHINE, dataclasses.replace(MACHINE, ram_gb_s=65.0)) == faster(MACHINE, None) == []


def test_a_glance_disproves_a_measurement_that_was_too_low_and_doubts_one_that_is_too_high_now() -> None:
    assert compared(MACHINE, 81.0) is None
    for usual in (55.0, 70.0, 74.0):
        assert compared(MACHINE, usual) == MACHINE
    slow = compared(MACHINE, 50.0)
    assert slow is not None and slow.ram_gb_s == 70 and "RAM gives 50 GB/s now, of the 70 that" in slow.notes[-1]
    slower = compared(slow, 40.0)
    assert slower is not None and len(slower.notes) == len(slow.notes), "the last glance counts"
    assert compared(slower, 70.0) == MACHINE


def test_a_machine_in_doubt_says_so_in_one_sentence() -> None:
    assert MACHINE.doubt == ""
    measured = dataclasses.replace(MACHINE, measured=True)
    assert measured.doubt == ""
    assert "was disturbed" in dataclasses.replace(measured, quiet=False).doubt
    slow = compared(measured, 50.0)
    assert slow is not None and "RAM was slower before the run" in slow.doubt


def test_what_is_kept_is_glanced_at_once_a_minute(tmp_path: Path, cache: Path) -> None:
    probe(tmp_path)
    kept = next(cache.iterdir())
    good = json.loads(kept.read_text()) | {"quiet": True, "notes": []}

    def found(looked: float, ram_gb_s: float) -> Machine:
        kept.write_text(json.dumps(good | {"ram_gb_s": ram_gb_s, "looked_at": looked}))
        return probe(tmp_path)

    assert found(time.time(), 0.1).ram_gb_s == 0.1, "just looked"
    assert found(1.0, 0.1).ram_gb_s > 0.5, "far too low: measured again"
    high = found(1.0, 1e6)
    assert high.ram_gb_s == 1e6 and any("of the 1e+06 that were measured" in note for note in high.notes)
    assert json.loads(kept.read_text())["looked_at"] > 1e9


def test_rates_read_after_a_run_are_kept_where_they_are_better(tmp_path: Path, cache: Path) -> None:
    keep_better(tmp_path, ram_gb_s=1.0, disk_gb_s=1.0)  # nothing is kept yet: nothing happens
    first = probe(tmp_path)
    ram, disk = read_again(tmp_path, ram=True, disk=False)
    assert ram is not None and ram > 0.5 and disk is None
    keep_better(tmp_path, ram_gb_s=first.ram_gb_s + 1, disk_gb_s=None)
    better = probe(tmp_path)
    assert (better.ram_gb_s, better.disk_gb_s) == (first.ram_gb_s + 1, first.disk_gb_s)
    keep_better(tmp_path, ram_gb_s=0.1, disk_gb_s=0.1)
    assert probe(tmp_path) == dataclasses.replace(better, ram_available_bytes=probe(tmp_path).ram_available_bytes)


def test_ram_is_read_as_often_and_as_much_after_a_run_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, float]] = []
    monkeypatch.setattr(probing, "_read_ram", lambda *how: asked.append(how) or 30.0 + len(asked))
    before, count = probe(tmp_path).ram_gb_s, len(asked)
    after, _ = read_again(tmp_path, ram=True, disk=False)
    assert asked[:count] == asked[count:], "half as much is read faster where caches are large"
    assert after == before + count < 30.0 + len(asked), "the best of many may be a lucky one"


def test_who_probes_is_told_only_when_there_is_something_to_measure(tmp_path: Path) -> None:
    said: list[str] = []
    probe(tmp_path, say=said.append)
    assert len(said) == 1
    kept = next((tmp_path / "cache" / "coldstream").iterdir())
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"quiet": True}))
    probe(tmp_path, say=said.append)
    assert len(said) == 1


def test_importing_the_machine_does_not_import_torch() -> None:
    code = "import sys, offload.hardware.probe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_large_file_of_the_directory_is_measured_in_place(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.truncate(256 * 2**20)
    before = file.stat()
    assert disk_rate(tmp_path).gb_s > 0.01
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["model.safetensors"]
    assert file.stat().st_mtime_ns == before.st_mtime_ns


def test_a_disk_that_cannot_be_read_is_an_error_and_no_trace_of_a_thread(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)  # reads of it fail
    with pytest.raises(IsADirectoryError):
        disk._window(folder, disk._buffers(), itertools.count(), 99)
    os.close(folder)
    assert capfd.readouterr().err == ""


def test_available_memory_never_exceeds_the_control_group(tmp_path: Path) -> None:
    proc, mounted = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self/cgroup").write_text("0::/user/app\n")
    group = mounted / "user/app"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("8589934592\n")
    (group / "memory.current").write_text("3221225472\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 1073741824\n")
    (mounted / "user/memory.max").write_text("max\n")
    assert host._group_limits(proc, mounted) == [(8589934592, 2147483648)]


def test_memory_is_what_the_kernel_says_or_less() -> None:
    total, available = host.memory()
    assert 0 < available <= total


def test_caches_are_counted_once_however_many_cores_share_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {  # two cores: L1 and L2 of their own, L3 together
        "index0": ("1", "Data", "32K", "{}"),
        "index1": ("1", "Instruction", "32K", "{}"),
        "index2": ("2", "Unified", "1024K", "{}"),
        "index3": ("3", "Unified", "32768K", "0-1"),
    }
    for cpu in ("0", "1"):
        for index, values in sizes.items():
            folder = tmp_path / f"devices/system/cpu/cpu{cpu}/cache/{index}"
            folder.mkdir(parents=True)
            for name, value in zip(("level", "type", "size", "shared_cpu_list"), values, strict=True):
                (folder / name).write_text(value.format(cpu) + "\n")
    monkeypatch.setattr(host, "_SYS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    assert host.cache_bytes() == 34 * 2**20
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1})
    assert host.cache_bytes() == 33 * 2**20
    monkeypatch.setattr(host, "_SYS", tmp_path / "nothing")
    assert host.cache_bytes() == 0
