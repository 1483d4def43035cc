"""A container's limit on CPU time is found, in either version of control groups."""

from pathlib import Path

import pytest

from quant.kernels.cores import granted


def _groups(folder: Path, line: str, files: dict[str, str]) -> tuple[Path, Path]:
    proc, mounted = folder / "proc", folder / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self/cgroup").write_text(line)
    for name, text in files.items():
        (mounted / name).parent.mkdir(parents=True, exist_ok=True)
        (mounted / name).write_text(text)
    return proc, mounted


@pytest.mark.parametrize(
    ("line", "files", "threads"),
    [
        ("0::/\n", {"cpu.max": "1600000 100000\n"}, 15),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "250000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {}, None),
        (
            "4:memory:/\n3:cpu,cpuacct:/job\n",
            {"cpu/job/cpu.cfs_quota_us": "800000\n", "cpu/job/cpu.cfs_period_us": "100000\n"},
            7,
        ),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
    ],
)
def test_a_limit_on_cpu_time_limits_the_threads(
    line: str, files: dict[str, str], threads: int | None, tmp_path: Path
) -> None:
    assert granted(*_groups(tmp_path, line, files)) == threads


def test_a_system_without_control_groups_has_no_limit(tmp_path: Path) -> None:
    assert granted(tmp_path / "proc", tmp_path / "cgroup") is None
