"""How many cores' time the control groups that hold this process grant it, as containers are limited.

A group that has used up its time is stopped for the rest of a period, tens of milliseconds and many tokens:
more threads than that compute less, not more.
"""

from pathlib import Path


def granted(proc: Path = Path("/proc"), mounted: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Threads that may compute at once, one core of several being left to whoever else works for the process;
    None where nothing limits it."""
    found = [quota for quota in _quotas(proc, mounted) if quota > 0]
    if not found:
        return None
    whole = int(min(found))
    return max(1, whole - 1 if whole > 2 else whole)


def _quotas(proc: Path, mounted: Path) -> list[float]:
    """The limit of each group, in cores."""
    found = []
    for line in _text(proc / "self/cgroup").splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        group = Path(name.lstrip("/"))
        for place in (group, *group.parents):
            if controllers:  # version 1
                files = [mounted / "cpu" / place / f"cpu.cfs_{part}_us" for part in ("quota", "period")]
                words = [word for file in files for word in _text(file).split()]
            else:
                words = _text(mounted / place / "cpu.max").split()
            if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):
                found.append(int(words[0]) / int(words[1]))  # no limit: "max" or -1
    return found


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
