"""The Kubernetes Job that builds a plan where the GPU is, for a machine that has none."""

from __future__ import annotations

import json
import re
from pathlib import Path
from string import Template

from export.tensorrt.plan import TIMINGS
from tickserve.config import Config
from tickserve.store import sha256_bytes, write_atomic

TEMPLATE = Path(__file__).with_name("job.yaml")
REPOSITORY = "/models"
JOBS = Path("runs/tensorrt")
# NVIDIA's feature discovery labels every node that has a GPU.
ANY_GPU = {"nvidia.com/gpu.present": "true"}
PRODUCT = "nvidia.com/gpu.product"
LABEL_CHARACTERS = 63
ENV_PREFIX = "TICKSERVE_TENSORRT__"


def job_name(model: str, version: int) -> str:
    """A name that Kubernetes takes, the same for the same version, and another for every other one."""
    plain = re.sub(r"[^a-z0-9-]+", "-", model).strip("-")
    digest = sha256_bytes(f"{model}/{version}".encode()).removeprefix("sha256:")[:8]
    tail = f"-{version}-{digest}"
    return f"tensorrt-{plain}"[: LABEL_CHARACTERS - len(tail)].rstrip("-") + tail


def job_text(model: str, version: int, config: Config) -> str:
    """The Job as YAML: the same command as here, with this configuration, on a node with the GPU."""
    settings = config.tensorrt
    selector = {PRODUCT: settings.gpu_product} if settings.gpu_product else ANY_GPU
    arguments = ["tensorrt", "build", model, "--version", str(version), "--repository", REPOSITORY]
    values = {
        "name": job_name(model, version),
        "selector": selector,
        "image": settings.image,
        "arguments": arguments,
        "environment": [{"name": name, "value": value} for name, value in _environment(model, config)],
        "claim": settings.claim,
    }
    # JSON is YAML, so no value can break out of its place.
    return Template(TEMPLATE.read_text("utf-8")).substitute({key: json.dumps(value) for key, value in values.items()})


def _environment(model: str, config: Config) -> list[tuple[str, str]]:
    """What decides the engine, as the environment of the command."""
    names = ("typing", "workspace_mb", "optimization_level", "version_compatible", "hardware_compatible")
    own = [(f"{ENV_PREFIX}{name.upper()}", _text(getattr(config.tensorrt, name))) for name in names]
    batches = _text(list(config.export.preferred_batch_rows))
    return [
        *own,
        (f"{ENV_PREFIX}TIMING_CACHE", f"{REPOSITORY}/{model}/{TIMINGS}"),
        ("TICKSERVE_EXPORT__PREFERRED_BATCH_ROWS", batches),
    ]


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def write_job(path: Path, model: str, version: int, config: Config) -> Path:
    """Write the Job to `path`, and give the path. Raises ComponentError when it cannot be written."""
    write_atomic(path, job_text(model, version, config).encode())
    return path


def default_path(model: str, version: int) -> Path:
    """Where the Job is written unless told otherwise: with what else commands make, `runs/`."""
    return JOBS / f"{job_name(model, version)}.yaml"
