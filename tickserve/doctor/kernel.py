"""What the kernel and the container allow: limits of a process, memory, clock, processor and disk.

Every function reads below `root`, so that the files of another machine can be looked at.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path

from tickserve.doctor.finding import Finding, text_of, unknown

ROOT = Path("/")
NOFILE_WANTED = 4_096
MEMLOCK_WANTED = 64 * 2**20
SHM_WANTED = 2**30
MEMORY_WANTED = 2 * 2**30
MAX_SWAPPINESS = 10
# Clocks that are read in user space, in tens of nanoseconds; the others cost a system call for every time stamp.
FAST_CLOCKS = ("tsc", "kvm-clock", "arch_sys_counter", "hyperv_clocksource_tsc_page")
# Their drivers leave the kernel's default, rotating, unless the host says otherwise.
VIRTUAL_DISKS = ("vd", "xvd")
# cgroup v1 says "no limit" with a number of this size.
NO_MEMORY_LIMIT = 2**60


def findings(root: Path = ROOT, folder: Path = Path()) -> list[Finding]:
    """Everything of this module; `folder` is where the storage is looked at."""
    return [
        *ulimits(),
        swappiness(root),
        huge_pages(root),
        governor(root),
        cpu_quota(root),
        memory_limit(root),
        shared_memory(root),
        storage(folder, root),
        clock_source(root),
    ]


def _shown(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)


def _enough(limit: int, wanted: int) -> bool:
    return limit == resource.RLIM_INFINITY or limit >= wanted


def ulimits() -> list[Finding]:
    """Open files, locked memory, core dumps, as they hold for this process."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    core, _ = resource.getrlimit(resource.RLIMIT_CORE)
    return [
        Finding("open files (ulimit -n)", _shown(files), _enough(files, NOFILE_WANTED), f"ulimit -n {NOFILE_WANTED}"),
        Finding(
            "locked memory in bytes (ulimit -l)",
            _shown(locked),
            _enough(locked, MEMLOCK_WANTED),
            "ulimit -l unlimited, or --ulimit memlock=-1 for a container: page-locked and RDMA buffers need it",
        ),
        Finding(
            "core dumps in bytes (ulimit -c)",
            _shown(core),
            core == 0,
            "ulimit -c 0: a crashed server writes its whole memory to the disk",
        ),
    ]


def swappiness(root: Path = ROOT) -> Finding:
    """How readily the kernel swaps a server's pages out."""
    what, fix = "swappiness", "sysctl vm.swappiness=1"
    value = text_of(root / "proc/sys/vm/swappiness")
    if value is None or not value.isdigit():
        return unknown(what, "the kernel does not tell", fix)
    return Finding(what, value, int(value) <= MAX_SWAPPINESS, fix)


def huge_pages(root: Path = ROOT) -> Finding:
    """Whether the kernel compacts memory for pages that nobody asked for."""
    what, fix = "transparent huge pages", "madvise avoids compaction stalls"
    text = text_of(root / "sys/kernel/mm/transparent_hugepage/enabled")
    if text is None or "[" not in text:
        return unknown(what, "the kernel does not tell", fix)
    mode = text[text.find("[") + 1 : text.find("]")]
    return Finding(what, mode, mode in ("madvise", "never"), fix)


def governor(root: Path = ROOT) -> Finding:
    """How the processor's frequency follows its load."""
    what, fix = "CPU governor", "cpupower frequency-set -g performance, on the host"
    files = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
    found = sorted({text for path in files if (text := text_of(path))})
    if not found:
        return unknown(what, "not told to this machine, as in most virtual ones", fix)
    return Finding(what, ", ".join(found), found == ["performance"], fix)


def _control_groups(root: Path, controller: str) -> list[Path]:
    """The folders of this process's control group and of those above it, in cgroup v2, or v1's of the controller."""
    base, found = root / "sys/fs/cgroup", []
    for line in (text_of(root / "proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        place = Path(path.lstrip("/"))
        found += [base / controllers / each for each in (place, *place.parents)]
    return found


def cpu_quota(root: Path = ROOT) -> Finding:
    """The share of the processors that the container gets; past it the kernel stops every thread for the period."""
    what = "CPU quota of the control group"
    cores = len(os.sched_getaffinity(0))
    fix = f"give it {cores} whole cores (a cpuset), or as many threads as the quota has cores"
    told = [quota for folder in _control_groups(root, "cpu") if (quota := _quota(folder)) is not None]
    if not told:
        return unknown(what, "no control group tells", fix)
    lowest = min(told)
    if lowest == float("inf"):
        return Finding(what, f"none: all {cores} cores", True)
    return Finding(what, f"{lowest:.2f} of {cores} cores", lowest >= cores, fix)


def _quota(folder: Path) -> float | None:
    """Cores of a group's quota, infinity for no quota, None where it does not tell.

    v2 says `max 100000` or `200000 100000`; v1 says `-1` or `200000`, and the period in a file beside it.
    """
    value = text_of(folder / "cpu.max")
    if value is None:
        parts = [text_of(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
        value = " ".join(part for part in parts if part)
    quota, _, period = value.partition(" ")
    if quota in ("max", "-1"):
        return float("inf")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def memory_limit(root: Path = ROOT) -> Finding:
    """What the container may hold before the kernel kills it."""
    what, fix = "memory limit of the control group", "raise it to 2 GB or more: the kernel kills what passes it"
    names = ("memory.max", "memory.limit_in_bytes")
    groups = _control_groups(root, "memory")
    values = [text for folder in groups for name in names if (text := text_of(folder / name))]
    if not values:
        return unknown(what, "no control group tells", fix)
    limits = [int(value) for value in values if value.isdigit() and int(value) < NO_MEMORY_LIMIT]
    if not limits:
        return Finding(what, "none", True)
    return Finding(what, f"{min(limits) / 2**20:,.0f} MB", min(limits) >= MEMORY_WANTED, fix)


def shared_memory(root: Path = ROOT) -> Finding:
    """The size of /dev/shm, where loader workers and the shared-memory transport put their arrays."""
    what = "shared memory: /dev/shm"
    fix = "--shm-size=1g for a container; in Kubernetes an emptyDir with medium: Memory"
    try:
        told = os.statvfs(root / "dev/shm")
    except OSError:
        return unknown(what, "not there", fix)
    size = told.f_frsize * told.f_blocks
    return Finding(what, f"{size / 2**20:,.0f} MB", size >= SHM_WANTED, fix)


def storage(folder: Path, root: Path = ROOT) -> Finding:
    """Whether the disk below `folder` rotates."""
    what, fix = "storage of the working folder", "put data, runs and the feature cache on an SSD"
    number = folder.resolve().stat().st_dev
    device = (root / f"sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    for place in (device, device.parent):  # a partition's queue is its disk's
        rotates = text_of(place / "queue/rotational")
        if rotates == "1" and place.name.startswith(VIRTUAL_DISKS):
            return unknown(what, f"{place.name}: a virtual disk, which may call itself rotating whatever it is", fix)
        if rotates in ("0", "1"):
            kind = "rotating" if rotates == "1" else "not rotating (SSD or virtual)"
            return Finding(what, f"{place.name}: {kind}", rotates == "0", fix)
    return unknown(what, "no block device is visible (a container's layer, a network or memory file system)", fix)


def clock_source(root: Path = ROOT) -> Finding:
    """What the kernel reads the time from."""
    what, fix = "clock source", "boot with clocksource=tsc where the processor's is reliable; others cost a system call"
    value = text_of(root / "sys/devices/system/clocksource/clocksource0/current_clocksource")
    if not value:
        return unknown(what, "the kernel does not tell", fix)
    return Finding(what, value, value in FAST_CLOCKS, fix)
