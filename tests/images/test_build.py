"""Every target of the Dockerfile, built and started from its root file system: a read-only root, a plain user.

The bases cannot be had here. A Debian of this machine's stands in for the Python image; the same Debian with the
embedded tritonserver, and Python 3.12 where this machine has one, stands in for NVIDIA's, and its label says so. What
is shown with it is that the target builds, that the sync runs, and that the arguments start a server: not NVIDIA's.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from export.publish import NO_TERMS, Terms
from export.repository.bucket import Bucket
from export.repository.places import Local, open_repository
from export.repository.source import Folder
from export.repository.sync import sync
from export.repository.transfer import transfer
from tests.export.tiny import NAME, publish_seeds
from tests.images.builder import Builder, Image, builder, debian
from tests.test_dockerfile import NOT_IN_EMBEDDED, answer, entries, free_ports
from tickserve import signing
from tickserve.client import Client
from tickserve.config import RepositorySettings
from tickserve.current import folder_in_force
from tickserve.golden import read_golden
from tickserve.manifest import GOLDEN_NAME, load_manifest

pytestmark = [pytest.mark.system, pytest.mark.timeout(2_400)]

PYTHON, TRITON = "standin-python:3.11-slim-bookworm", "standin-triton:26.06-py3"
BASES = {"python_image": "localhost/standin-python", "triton_image": "localhost/standin-triton", "torch_index": ""}
LOCKS = {"server": "sync", "server-cpu": "serve", "train": "train", "loadtest": "loadtest"}
READY_S = 60.0

Build = Callable[[str], Builder]


def python_3_12() -> dict[Path, str]:
    """This machine's Python 3.12, which is what NVIDIA's image has; none where there is none."""
    code = "import sys; print(sys.base_prefix)"
    try:
        done = subprocess.run(
            ["python3.12", "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, "PYENV_VERSION": "3.12"},
            check=False,
        )
    except FileNotFoundError:
        return {}
    return {Path(done.stdout.strip()): "/usr/local"} if done.returncode == 0 else {}


@pytest.fixture(scope="module")
def bases() -> Iterator[Builder]:
    if os.geteuid() != 0:
        reason = "only root can mount a root file system and give another user's process to it"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with builder() as made:
        if not made.has(PYTHON):
            with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:  # in memory: dpkg waits for no disk
                made.base(PYTHON, {debian(Path(folder) / "debian"): "/"})
        if not made.has(TRITON):
            package = Path(str(metadata.distribution("nvidia-pytriton").locate_file("pytriton")))
            layers = {
                package / "tritonserver": "/opt/tritonserver",
                package.parent / "nvidia_pytriton.libs": "/nvidia_pytriton.libs",
            }
            made.base(TRITON, layers | python_3_12(), on=f"localhost/{PYTHON}")
        yield made


@pytest.fixture(scope="module")
def built(bases: Builder) -> Build:
    """Builds a target, once."""

    @functools.cache
    def build(target: str) -> Builder:
        bases.build(target, revision="0123abc", source="https://example.com/tickserve", **BASES)
        return bases

    return build


def readable(folder: Path) -> Path:
    """What lies in `folder`, for another user to read; pytest keeps its folders to itself."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


@pytest.fixture(scope="module")
def key() -> signing.SigningKey:
    return signing.generate_key()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, key: signing.SigningKey) -> Path:
    root = tmp_path_factory.mktemp("published") / "models"
    publish_seeds(root, 1, 2, terms=Terms(key, {key.key_id: key.public()}))
    return readable(root)


@pytest.fixture
def bucket(models: Path) -> Iterator[dict[str, str]]:
    """The published models in S3, `s3://desk/models`, and the environment that leads there."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    service = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    service.start()
    host, port = service.get_host_and_port()
    found = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "TICKSERVE_REPOSITORY__S3_ENDPOINT_URL": f"http://{host}:{port}",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in found.items():
            patch.setenv(name, value)
        settings = RepositorySettings(s3_endpoint_url=f"http://{host}:{port}")
        Bucket("s3://desk/models", settings)._fs.mkdir("desk")
        with open_repository("s3://desk/models", settings) as remote:
            transfer(Local(models), remote, keep=2, terms=NO_TERMS)
    yield found
    service.stop()


@pytest.fixture(scope="module")
def synced(models: Path, key: signing.SigningKey, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an init container leaves for a server: the version in force, and nothing else."""
    into = tmp_path_factory.mktemp("synced") / "models"
    sync(Folder(models), into, trusted={key.key_id: key.public()})
    return readable(into)


def wait_ready(process: subprocess.Popen[str], port: int) -> None:
    end = time.monotonic() + READY_S
    while time.monotonic() < end and process.poll() is None:
        if answer(port, "/v2/health/ready") == 200:
            return
        time.sleep(0.2)
    process.kill()
    raise AssertionError(f"not ready: {process.communicate()}")


def ended(process: subprocess.Popen[str]) -> int:
    """The exit code of a process that is asked to end."""
    process.terminate()
    try:
        process.communicate(timeout=40)
    finally:
        process.kill()
    return int(process.returncode)


def rights(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def check_plain(process: subprocess.Popen[str]) -> None:
    """It runs as the image's user, with no capability, and cannot get any."""
    found = rights(process.pid)
    assert set(found["Uid"].split()) == {"1000"}
    assert int(found["CapEff"], 16) == int(found["CapBnd"], 16) == 0
    assert found["NoNewPrivs"] == "1"


def check_labels(image: Image, target: str) -> None:
    wanted = {"title": f"tickserve-{target}", "revision": "0123abc", "source": "https://example.com/tickserve"}
    assert {name: image.labels[f"org.opencontainers.image.{name}"] for name in wanted} == wanted
    assert image.labels["tickserve.standin"] == "true"


def check_read_only(image: Image, python: str = "python") -> None:
    code = "import pathlib; pathlib.Path('/tmp/x').touch(); pathlib.Path('/opt/x').touch()"
    done = image.run(command=[python, "-c", code])
    assert done.returncode == 1
    assert "Read-only file system: '/opt/x'" in done.stderr


@contextmanager
def serving(built: Build, models: Path) -> Iterator[tuple[Image, subprocess.Popen[str], list[int]]]:
    """The image server-cpu, started, and its HTTP, gRPC and metrics ports."""
    ports = free_ports()
    environment = {
        f"TICKSERVE_SERVE__{name}_PORT": str(port)
        for name, port in zip(("HTTP", "GRPC", "METRICS"), ports, strict=True)
    }
    with built("server-cpu").opened("tickserve-server-cpu") as image:
        # Triton loads its backends from where it works.
        process = image.popen(read_only={models: "/models"}, environment=environment, tmp="exec")
        try:
            wait_ready(process, ports[0])
            yield image, process, ports
        finally:
            process.kill()
            process.communicate()


def test_the_cpu_server_answers_from_its_root_file_system(built: Build, synced: Path) -> None:
    version = folder_in_force(synced / NAME)
    assert version is not None
    manifest = load_manifest(version)
    pairs = read_golden(version / GOLDEN_NAME, manifest.inputs, manifest.outputs)
    with serving(built, synced) as (image, process, (http, grpc, _)):
        check_labels(image, "server-cpu")
        check_plain(process)
        for url in (f"127.0.0.1:{http}", f"grpc://127.0.0.1:{grpc}"):
            with Client(url, manifest=synced, deadline_ms=5_000) as client:
                found = client.score(NAME, pairs["features"])
            assert (found.status, found.version) == ("OK", int(version.name))
            assert found.probabilities == pytest.approx(pairs["probabilities"], abs=1e-6)
        check = [word.replace(":8000/", f":{http}/") for word in image.config["Healthcheck"]["Test"][1:]]
        assert image.run(command=check).returncode == 0
        check_read_only(image)
        assert ended(process) in (0, 128 + 15)
        assert image.run(command=check).returncode != 0


def test_the_load_test_runs_against_it(built: Build, models: Path, tmp_path: Path) -> None:
    results = tmp_path / "work"
    results.mkdir()
    os.chown(results, 1000, 1000)
    tmp_path.chmod(0o755)
    with (
        serving(built, models) as (_, _, (http, grpc, _)),
        built("loadtest").opened("tickserve-loadtest") as image,
    ):
        check_labels(image, "loadtest")
        addresses = ("--http", f"127.0.0.1:{http}", "--grpc", f"127.0.0.1:{grpc}")
        done = image.run(
            *("loadtest", "run", "--repository", "/models", *addresses, "--users", "2", "--duration-s", "2", "--json"),
            mounts={results: "/work"},
            read_only={models: "/models"},
        )
        assert done.returncode == 0, done.stderr
        check_read_only(image)
    rows = json.loads(done.stdout)["rows"]
    assert {row["transport"] for row in rows} == {"http", "grpc"}
    assert all(row["requests"] > 10 and row["failures"] == 0 for row in rows)
    assert (results / "runs" / "loadtest" / "loadtest.json").is_file()


def test_the_production_server_starts_and_syncs(
    built: Build, models: Path, bucket: dict[str, str], key: signing.SigningKey, tmp_path: Path
) -> None:
    keys, into = tmp_path / "keys", tmp_path / "into"
    for folder in (keys, into):
        folder.mkdir()
    (keys / "desk.pub").write_text(key.public_line())
    (keys / "other.pub").write_text(signing.generate_key().public_line())
    os.chown(into, 1000, 1000)
    tmp_path.chmod(0o755)
    command = ["python3", "-m", "tickserve.cli", "repo", "sync", "--into", "/models", "--json"]
    local, remote = ["--source", "/source"], ["--source", "s3://desk/models"]
    mounted = {"mounts": {into: "/models"}, "read_only": {models: "/source", keys: "/keys"}}
    with built("server").opened("tickserve-server") as image:
        check_labels(image, "server")
        assert image.labels["org.opencontainers.image.base.name"] == f"localhost/{TRITON}"
        refused = image.run(command=[*command, *local, "--public-key", "/keys/other.pub"], **mounted)
        assert (refused.returncode, "not trusted" in refused.stderr) == (3, True)
        assert not (into / NAME).exists()
        for source, copied in ((remote, True), (local, False)):
            done = image.run(
                command=[*command, *source, "--public-key", "/keys/desk.pub"], environment=bucket, **mounted
            )
            assert done.returncode == 0, done.stderr
            rows = json.loads(done.stdout)["models"]
            assert [(row["model"], row["version"], row["copied"]) for row in rows] == [(NAME, 2, copied)]
        assert folder_in_force(into / NAME) == into / NAME / "2"
        if python_3_12():
            assert image.run(command=["python3", "--version"]).stdout.startswith("Python 3.12.")
        check_read_only(image, "python3")
        check_starts(image, tmp_path)


def check_starts(image: Image, folder: Path) -> None:
    """The entry point, without what the stand-in's release does not know, over a repository without a model."""
    (folder / "empty").mkdir()
    http, grpc, metrics = free_ports()
    known = [word for word in image.command([]) if not word.startswith(NOT_IN_EMBEDDED)]
    here = [f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}"]
    loopback = [f"--{name}-address=127.0.0.1" for name in ("http", "grpc", "metrics")]
    process = image.popen(command=[*known, *here, *loopback], read_only={folder / "empty": "/models"})
    wait_ready(process, http)
    check_plain(process)
    check = [word.replace(":8000/", f":{http}/") for word in image.config["Healthcheck"]["Test"][1:]]
    assert image.run(command=check).returncode == 0
    assert ended(process) == 0


def test_the_training_image_has_its_stages_and_its_kernels(built: Build) -> None:
    with built("train").opened("tickserve-train") as image:
        check_labels(image, "train")
        done = image.run("train", "--help")
        assert (done.returncode, "--data" in done.stdout) == (0, True)
        code = "import torch, xgboost, onnxruntime, training, market.readers; print(torch.ones(2).sum().item())"
        done = image.run(command=["python", "-c", code])
        assert (done.returncode, done.stdout) == (0, "2.0\n"), done.stderr
        assert list((image.root / "opt" / "numba-cache").rglob("*.nbc")), "the kernels are compiled"
        check_read_only(image)


def test_the_bill_of_materials_names_what_was_installed(built: Build, tmp_path: Path) -> None:
    for target in LOCKS:
        built(target)
    made = built("server")
    made.build("sbom", output=tmp_path, revision="0123abc", source="https://example.com/tickserve", **BASES)
    assert {path.name for path in tmp_path.iterdir()} == {f"{target}.cdx.json" for target in LOCKS}
    for target, lock in LOCKS.items():
        document = json.loads((tmp_path / f"{target}.cdx.json").read_text())
        assert document["bomFormat"] == "CycloneDX"
        listed = {
            part["name"].lower().replace("_", "-").replace(".", "-"): part["version"] for part in document["components"]
        }
        locked = {name.replace(".", "-"): pin[0] for name, pin in entries(f"requirements-{lock}.lock").items()}
        assert {name: listed.get(name) for name in locked} == locked
        beyond = set(listed) - set(locked) - {"pip", "setuptools", "wheel"}
        assert beyond == ({"torch"} if target == "train" else set())
        assert all(part.get("purl", "").startswith("pkg:pypi/") for part in document["components"])
