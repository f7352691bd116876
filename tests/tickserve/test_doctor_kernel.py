"""What the kernel says, from trees of its files: the good case, the bad one, and the one that does not tell."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tickserve.doctor import kernel, threads
from tickserve.doctor.finding import Finding

Tree = Callable[..., Path]
CORES = len(os.sched_getaffinity(0))
CLOCK = "sys/devices/system/clocksource/clocksource0/current_clocksource"
PAGES = "sys/kernel/mm/transparent_hugepage/enabled"
GOVERNOR = "sys/devices/system/cpu/cpu{}/cpufreq/scaling_governor"
GROUP = {"proc/self/cgroup": "0::/pod/app\n"}
GROUPS_V1 = {"proc/self/cgroup": "4:memory:/pod\n1:cpu,cpuacct:/pod\n"}


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    def write(files: dict[str, str]) -> Path:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("look", "good", "bad"),
    [
        (kernel.swappiness, {"proc/sys/vm/swappiness": "1\n"}, {"proc/sys/vm/swappiness": "60\n"}),
        (kernel.huge_pages, {PAGES: "always [madvise] never\n"}, {PAGES: "[always] madvise never\n"}),
        (
            kernel.governor,
            {GOVERNOR.format(0): "performance\n"},
            {GOVERNOR.format(0): "performance\n", GOVERNOR.format(1): "powersave\n"},
        ),
        (kernel.clock_source, {CLOCK: "tsc\n"}, {CLOCK: "hpet\n"}),
        (
            kernel.cpu_quota,
            GROUP | {"sys/fs/cgroup/pod/app/cpu.max": "max 100000"},
            GROUP
            | {"sys/fs/cgroup/pod/app/cpu.max": "max 100000", "sys/fs/cgroup/pod/cpu.max": f"{CORES * 25000} 50000"},
        ),
        (
            kernel.cpu_quota,
            GROUPS_V1 | {"sys/fs/cgroup/cpu,cpuacct/pod/cpu.cfs_quota_us": "-1"},
            GROUPS_V1
            | {
                "sys/fs/cgroup/cpu,cpuacct/pod/cpu.cfs_quota_us": "50000",
                "sys/fs/cgroup/cpu,cpuacct/pod/cpu.cfs_period_us": "100000",
            },
        ),
        (
            kernel.memory_limit,
            GROUP | {"sys/fs/cgroup/pod/app/memory.max": "max"},
            GROUP | {"sys/fs/cgroup/pod/app/memory.max": "max", "sys/fs/cgroup/pod/memory.max": "1073741824"},
        ),
        (
            kernel.memory_limit,
            GROUPS_V1 | {"sys/fs/cgroup/memory/pod/memory.limit_in_bytes": "9223372036854771712"},
            GROUPS_V1 | {"sys/fs/cgroup/memory/pod/memory.limit_in_bytes": "1073741824"},
        ),
    ],
)
def test_good_bad_and_silent_machines(look: Any, good: Any, bad: Any, tree: Tree, tmp_path: Path) -> None:
    silent: Finding = look(tmp_path)
    assert (silent.ok, silent.word) == (None, "unknown")
    assert silent.fix
    assert look(tree(good)).ok is True, look(tree(good))
    found = look(tree(bad))
    assert found.ok is False, found
    assert found.fix


def test_a_lower_limit_above_in_the_hierarchy_is_the_one_that_holds(tree: Tree) -> None:
    quotas = {"sys/fs/cgroup/pod/app/cpu.max": "400000 100000", "sys/fs/cgroup/pod/cpu.max": "50000 100000"}
    assert kernel.cpu_quota(tree(GROUP | quotas)).found == f"0.50 of {CORES} cores"


@pytest.mark.parametrize(
    ("disk", "flag", "ok"), [("nvme0n1", "0", True), ("sda", "1", False), ("vda", "0", True), ("vda", "1", None)]
)
def test_storage(disk: str, flag: str, ok: bool | None, tree: Tree, tmp_path: Path) -> None:
    assert kernel.storage(tmp_path, tmp_path).ok is None
    number = tmp_path.stat().st_dev
    root = tree({f"sys/devices/{disk}/queue/rotational": f"{flag}\n", f"sys/devices/{disk}/{disk}p1/size": "1\n"})
    (root / "sys/dev/block").mkdir(parents=True)
    link = root / f"sys/dev/block/{os.major(number)}:{os.minor(number)}"
    link.symlink_to(root / f"sys/devices/{disk}/{disk}p1")  # a partition, whose queue is its disk's
    assert kernel.storage(tmp_path, root).ok is ok


def test_limits_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_NOFILE: 1_024, resource.RLIMIT_MEMLOCK: 65_536, resource.RLIMIT_CORE: -1}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limits[which], -1))
    assert [(found.found, found.ok) for found in kernel.ulimits()] == [
        ("1024", False),
        ("65536", False),
        ("unlimited", False),
    ]
    limits |= {resource.RLIMIT_NOFILE: 4_096, resource.RLIMIT_MEMLOCK: -1, resource.RLIMIT_CORE: 0}
    assert all(found.ok for found in kernel.ulimits())


@pytest.mark.parametrize(
    ("value", "ok"), [(None, True), ("2", True), ("1,4", True), ("3", False), ("0", False), ("many", False)]
)
def test_openmp_threads(value: str | None, ok: bool) -> None:
    assert threads.openmp(value, 2).ok is ok


def test_a_library_that_does_not_load_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_imported", lambda _: None)
    found = threads.findings()
    assert [each.what for each in found if each.ok is None] == [
        "PyTorch: threads",
        "PyTorch: MKL",
        "PyTorch: oneDNN",
        "ONNX Runtime",
    ]
