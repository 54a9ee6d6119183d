"""What this machine gives a process: cores and memory."""

import os
import sys
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")
MEMORY = Path("/proc/meminfo")
CONTROL_GROUP = Path("/sys/fs/cgroup")  # of a container: what it may take
CACHED = ("active_file ", "inactive_file ")  # files in memory, given back when memory is short


def default_threads() -> int:
    """The physical cores this process may use, at most as many as its container's share of time; all processors where the system does not tell.

    Two hardware threads of one core share the units that matrix products keep busy, so a second one slows the first.
    """
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = len({_siblings(cpu) for cpu in os.sched_getaffinity(0)})
    quota, period = ([*_read(CONTROL_GROUP / "cpu.max").split(), "", ""])[:2]
    return max(1, min(cores, int(quota) // int(period))) if quota.isdigit() and period.isdigit() and int(period) else cores


def available_bytes() -> int | None:
    """Memory that can be had without swapping, within the container's limit; None where the system does not tell."""
    found = [int(line.split()[1]) * 1024 for line in _read(MEMORY).splitlines() if line.startswith("MemAvailable:")]
    limit, taken = (_read(CONTROL_GROUP / name).strip() for name in ("memory.max", "memory.current"))
    if limit.isdigit() and taken.isdigit():
        cached = [int(line.split()[1]) for line in _read(CONTROL_GROUP / "memory.stat").splitlines() if line.startswith(CACHED)]
        found.append(max(0, int(limit) - int(taken) + sum(cached)))
    return min(found, default=None)


def peak_bytes() -> int | None:
    """The most resident memory this process ever had; None where the system does not tell."""
    # Linux: ru_maxrss of a process begins with that of the one that started it, VmHWM does not
    for line in _read(Path("/proc/self/status")).splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _siblings(cpu: int) -> str:
    """The hardware threads of this one's core, as a text; its own number where the system does not tell."""
    return _read(CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").strip() or str(cpu)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
