"""`tickserve doctor`: what this machine and environment allow, and the fix for what is missing."""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import os
import platform
import resource
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from tickserve import stages
from tickserve.cli import options
from tickserve.cli.output import emit, table
from tickserve.errors import ComponentError

NOFILE_WANTED = 4_096


@dataclass(frozen=True)
class Finding:
    """One thing looked at; `fix` is empty where there is nothing to do; `needed` ones decide the exit code."""

    what: str
    found: str
    ok: bool
    fix: str = ""
    needed: bool = False


def doctor(as_json: options.AsJson = False) -> None:
    """List what is there, what is not, and the fix. Exits 4 when something that `tickserve demo` needs is missing."""
    findings = [*_platform(), *_stages(), *_libraries(), _native_backend(), *_limits(), *_accelerator()]
    rows = [(item.what, item.found, "ok" if item.ok else "no", item.fix) for item in findings]
    emit([asdict(item) for item in findings], as_json, lambda: table("doctor", ("what", "found", "", "fix"), rows))
    missing = [item.what for item in findings if item.needed and not item.ok]
    if missing:
        raise ComponentError(f"missing for 'tickserve demo': {', '.join(missing)}")


def _platform() -> list[Finding]:
    system = f"{platform.system()} {platform.machine()}"
    python = platform.python_version()
    return [
        Finding("platform", system, system == "Linux x86_64", "the embedded server runs on Linux x86_64", needed=True),
        Finding("python", python, sys.version_info[:2] == (3, 11), "use Python 3.11", needed=True),
        Finding("cores", str(len(os.sched_getaffinity(0))), True),
    ]


def _stages() -> list[Finding]:
    root = stages.checkout_root()
    found = [name for name in stages.STAGES if (root / name / "__init__.py").is_file()]
    missing = sorted(set(stages.STAGES) - set(found))
    fix = "" if not missing else f"missing: {', '.join(missing)}; run from a checkout or the image"
    return [Finding("stage folders", f"{len(found)} of {len(stages.STAGES)}", not missing, fix, needed=True)]


def _libraries() -> list[Finding]:
    distributions = {
        "pytriton": "nvidia-pytriton",
        "sklearn": "scikit-learn",
        "onnxconverter_common": "onnxconverter-common",
        "prometheus_client": "prometheus-client",
    }
    findings = [_numpy()]
    for module, extra in stages.EXTRAS.items():
        installed = find_spec(module) is not None
        found = importlib.metadata.version(distributions.get(module, module)) if installed else "not installed"
        fix = "" if installed else f"pip install 'tickserve[{extra}]'"
        findings.append(Finding(module, found, installed, fix, needed=True))
    return findings


def _numpy() -> Finding:
    version = importlib.metadata.version("numpy")
    ok = int(version.partition(".")[0]) < 2
    return Finding("numpy", version, ok, "" if ok else "the embedded server's Python stub needs numpy<2", needed=True)


def _native_backend() -> Finding:
    what = "native backend (serve.backend)"
    try:
        return Finding(what, str(stages.load("serving.native").find_library().name), True)
    except ComponentError as error:
        return Finding(what, "not built", False, error.hint or str(error), needed=True)


def _limits() -> list[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    threads = os.environ.get("OMP_NUM_THREADS")
    return [
        Finding("open files (ulimit -n)", str(soft), soft >= NOFILE_WANTED, f"ulimit -n {NOFILE_WANTED}"),
        Finding("OMP_NUM_THREADS", threads or "not set", True),
        _kernel_setting("swappiness", Path("/proc/sys/vm/swappiness"), ("0", "1", "10"), "sysctl vm.swappiness=1"),
        _huge_pages(),
    ]


def _kernel_setting(what: str, path: Path, good: tuple[str, ...], fix: str) -> Finding:
    value = path.read_text().strip() if path.is_file() else "unknown"
    return Finding(what, value, value in good, "" if value in good else fix)


def _huge_pages() -> Finding:
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    text = path.read_text() if path.is_file() else "[unknown]"
    mode = text[text.find("[") + 1 : text.find("]")]
    ok = mode in ("madvise", "never")
    return Finding("transparent huge pages", mode, ok, "" if ok else "madvise avoids compaction stalls")


def _accelerator() -> list[Finding]:
    driver = ctypes.util.find_library("cuda") is not None or shutil.which("nvidia-smi") is not None
    tensorrt = find_spec("tensorrt") is not None
    return [
        Finding("NVIDIA driver", "found" if driver else "none", driver, "" if driver else "CPU paths are used"),
        Finding(
            "tensorrt",
            "installed" if tensorrt else "not installed",
            tensorrt,
            "" if tensorrt else "optional; the ONNX model is served as it is",
        ),
    ]
