"""The images as far as they can be held without building them: lint, users, context, libraries, and real arguments.

The production arguments are given to a real tritonserver, the embedded one, with and without the credential; nothing
here stands in for it. `tests/images` builds the targets and starts what comes out.
"""

from __future__ import annotations

import itertools
import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import tickserve
from serving import native

ROOT = Path(__file__).resolve().parents[1]
HADOLINT = Path(sys.executable).parent / "hadolint"
TARGETS = ("server", "server-cpu", "train", "loadtest")
LOCKS = {"server": "sync", "server-cpu": "serve", "train": "train", "loadtest": "loadtest"}
# Used by a library where they are installed, and not needed: compression, and certificates beside those it brings.
OPTIONAL = {"brotli", "certifi", "zstandard"}
STAGES = {"market", "models", "export", "training", "serving", "loadtest", "monitoring"}
# Newer than the embedded build (release 24.10); NVIDIA's own tests use it as it is used here.
NOT_IN_EMBEDDED = ("--http-max-input-size",)


def instructions() -> dict[str, list[tuple[str, str]]]:
    """Stage name -> its (keyword, rest) pairs, with what its base stage says first."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    stages: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        keyword, _, rest = line.strip().partition(" ")
        if keyword == "FROM":
            base, _, name = rest.partition(" AS ")
            current = stages[name] = [*stages.get(base, []), (keyword, base)]
        elif keyword:
            current.append((keyword, rest.strip()))
    return stages


def said(target: str, keyword: str) -> list[str]:
    return [rest for word, rest in instructions()[target] if word == keyword]


def copied(target: str) -> list[str]:
    """What comes out of the build context; not what another stage made."""
    lines = [rest for rest in said(target, "COPY") if not rest.startswith("--from=")]
    return [source for rest in lines for source in rest.split()[:-1]]


def hadolint(dockerfile: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([HADOLINT, "--no-color", dockerfile], capture_output=True, text=True, check=False)


def test_hadolint_has_nothing_to_say() -> None:
    done = hadolint(ROOT / "Dockerfile")
    assert (done.returncode, done.stdout) == (0, "")


def test_hadolint_refuses_a_bad_dockerfile(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM debian\nRUN cd /tmp && pip install numpy\n")
    done = hadolint(bad)
    assert done.returncode == 1
    assert {"DL3006", "DL3013"} <= set(re.findall(r"DL\d{4}", done.stdout))


def test_every_lint_exception_says_why() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    for before, line in itertools.pairwise(lines):
        for rule in re.findall(r"DL\d{4}", line) if "hadolint ignore" in line else []:
            assert before.startswith("#"), rule
            assert rule in before


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_as_a_plain_user_and_says_what_it_is(target: str) -> None:
    assert said(target, "USER")[-1] == "1000:1000"
    assert instructions()[target][-1][0] != "USER"
    labels = " ".join(said(target, "LABEL"))
    assert f'org.opencontainers.image.title="tickserve-{target}"' in labels
    assert len(said(target, "HEALTHCHECK")) == 1
    json.loads(said(target, "ENTRYPOINT")[-1])


def test_no_digest_is_invented_and_no_tag_floats() -> None:
    arguments = dict(re.findall(r"^ARG (\w+)=(.*)$", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE))
    assert arguments["TRITON_DIGEST"] == arguments["PYTHON_DIGEST"] == ""
    year, month = (int(part) for part in arguments["TRITON_TAG"].removesuffix("-py3").split("."))
    assert (year, month) >= (26, 6)
    assert arguments["PYTHON_TAG"].startswith("3.11-")
    assert arguments["SOURCE"] == arguments["REVISION"] == ""
    assert arguments["VERSION"] == tickserve.__version__


@pytest.mark.parametrize(("stage", "argument"), [("python-base", "PYTHON_DIGEST"), ("sync-libraries", "TRITON_DIGEST")])
def test_a_missing_digest_is_warned_about(stage: str, argument: str) -> None:
    """The line of the build, word for word, up to what it goes on with."""
    assert argument in said(stage, "ARG")
    (line,) = [rest for rest in said(stage, "RUN") if argument in rest]
    check = line[: line.index("; }") + 3].replace("${" + argument + "}", "$DIGEST")
    for digest, warned in (("", True), ("sha256:" + "0" * 64, False)):
        done = subprocess.run(["sh", "-euc", check], env={"DIGEST": digest}, capture_output=True, text=True, check=True)
        assert (f"WARNING: {argument} is empty" in done.stderr) == warned


@pytest.mark.parametrize("target", TARGETS)
def test_the_labels_say_what_it_was_made_of(target: str) -> None:
    labels = " ".join(said(target, "LABEL"))
    base = "TRITON" if target == "server" else "PYTHON"
    for name, value in (
        *((name, "${" + name.upper() + "}") for name in ("source", "revision", "version")),
        ("base.name", f"${{{base}_IMAGE}}:${{{base}_TAG}}"),
        ("base.digest", f"${{{base}_DIGEST}}"),
    ):
        assert f'org.opencontainers.image.{name}="{value}"' in labels
    assert {"SOURCE", "REVISION", "VERSION", f"{base}_DIGEST"} <= set(said(target, "ARG"))


def test_nothing_is_run_in_the_production_image() -> None:
    """What is added is copied: the sync, its libraries, and what lets them be found."""
    assert said("server", "RUN") == []
    assert set(copied("server")) == {"LICENSE", "tickserve", "export"}
    assert [rest for rest in said("server", "COPY") if "--from=" in rest] == [
        "--from=sync-libraries /opt/sync/lib /opt/sync/lib"
    ]
    (environment,) = said("server", "ENV")
    assert environment.startswith("PYTHONPATH=/opt/tickserve:/opt/sync/lib ")
    assert "--only-binary=:all:" in " ".join(said("sync-libraries", "RUN"))


def allowed() -> set[str]:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*", "the context is what is named, and nothing else"
    return {rule[1:] for rule in rules if rule.startswith("!")}


@pytest.mark.parametrize("target", TARGETS)
def test_the_context_holds_what_is_copied(target: str) -> None:
    assert set(copied(target)) <= allowed()
    assert all((ROOT / source).exists() for source in copied(target))


def test_the_context_holds_no_data_models_or_secrets() -> None:
    used = {source for stage in instructions() for source in copied(stage)}
    assert allowed() == used


@pytest.mark.parametrize("target", ["server-cpu", "train"])
def test_what_serves_has_the_native_backend_and_not_its_compiler(target: str) -> None:
    (brought,) = [rest for rest in said(target, "COPY") if rest.startswith("--from=")]
    folder = f"/opt/tickserve/{native.SOURCES.relative_to(ROOT)}/"
    assert brought == f"--from=native-backend {folder}*.so {folder}"
    assert "requirements-build.lock" in copied("native-backend")
    assert "compiler" not in " ".join(rest for _, rest in instructions()[target])


def entries(lock: str) -> dict[str, tuple[str, frozenset[str]]]:
    """Package -> (version, hashes)."""
    found: dict[str, tuple[str, frozenset[str]]] = {}
    for block in re.split(r"\n(?=[a-z0-9])", (ROOT / lock).read_text()):
        pin = re.match(r"([a-z0-9._-]+)==(\S+)", block)
        if pin:
            found[pin[1]] = (pin[2], frozenset(re.findall(r"--hash=(sha256:[0-9a-f]{64})", block)))
    return found


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def missing_requirements(lock: dict[str, tuple[str, frozenset[str]]]) -> set[str]:
    """What the packages of a lock, and tickserve's base, need here and is not in it."""
    wanted: set[str] = set()
    for name in ("tickserve", *lock):
        for text in metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                wanted.add(plain(requirement.name))
    return wanted - set(lock)


@pytest.mark.parametrize("lock", LOCKS.values())
def test_the_lock_of_an_image_is_a_cut_of_the_lock(lock: str) -> None:
    cut, everything = entries(f"requirements-{lock}.lock"), entries("requirements.lock")
    stale = {name for name, pin in cut.items() if everything.get(name) != pin}
    assert not stale, "make lock"
    assert all(hashes for _, hashes in cut.values())
    assert not {"torch", "pytest-xdist", "moto", "mypy"} & set(cut)


def test_each_lock_holds_what_its_image_is_for() -> None:
    found = {lock: set(entries(f"requirements-{lock}.lock")) for lock in (*LOCKS.values(), "sbom")}
    assert {"nvidia-pytriton", "onnxruntime", "tritonclient"} <= found["serve"]
    assert {"cryptography", "s3fs", "typer"} <= found["sync"]
    assert {"locust", "matplotlib", "tritonclient"} <= found["loadtest"]
    assert {"xgboost", "polars", "locust", "prometheus-client", "ray"} <= found["train"]
    assert "cyclonedx-bom" in found["sbom"]
    assert not {"xgboost", "polars", "ray"} & (found["serve"] | found["sync"] | found["loadtest"])
    assert not {"onnx", "onnxruntime", "tritonclient", "grpcio", "protobuf"} & found["sync"]
    assert not {"nvidia-pytriton", "onnxruntime"} & found["loadtest"]


@pytest.mark.parametrize("lock", LOCKS.values())
def test_the_lock_of_an_image_needs_nothing_outside_itself(lock: str) -> None:
    cut = entries(f"requirements-{lock}.lock")
    # Without a hash of its own, and in every environment that the Python of the image makes.
    assert missing_requirements(cut) == ({"torch", "setuptools"} if lock == "train" else set())
    del cut["pydantic-core"]
    assert "pydantic-core" in missing_requirements(cut)


def imported(module: str) -> tuple[set[str], set[str]]:
    """The stages and the installed distributions that importing modules brings in, in a new interpreter."""
    shown = "{name: getattr(each, '__file__', None) or '' for name, each in list(sys.modules.items())}"
    code = f"import sys, {module}, json; print(json.dumps({shown}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    files: dict[str, set[str]] = {}
    for name, file in json.loads(done.stdout).items():
        files.setdefault(name.partition(".")[0], set()).add(file)
    owners = metadata.packages_distributions()
    libraries = files.keys() - STAGES - {"tickserve"}
    distributions = {plain(each) for name in libraries for each in of_the_files(set(owners.get(name, [])), files[name])}
    return set(files) & STAGES, distributions


def of_the_files(owners: set[str], loaded: set[str]) -> set[str]:
    """Of the distributions that share a namespace such as `google`, those with a file that was loaded."""
    if len(owners) < 2:
        return owners
    return {
        owner
        for owner in owners
        if any(str(metadata.distribution(owner).locate_file(file)) in loaded for file in metadata.files(owner) or [])
    }


def not_in_image(module: str, target: str) -> set[str]:
    stages, distributions = imported(module)
    # setuptools leaves a start-up file in every environment that has it; nothing of ours imports it.
    libraries = distributions - set(entries(f"requirements-{LOCKS[target]}.lock")) - {"setuptools"} - OPTIONAL
    return libraries | (stages - set(copied(target)))


def test_an_image_has_all_that_its_commands_import() -> None:
    assert not_in_image("tickserve.cli.commands, serving.embedded", "server-cpu") == set()
    sync = "export.repository.sync, export.repository.source, s3fs, cryptography.hazmat.primitives.asymmetric.ed25519"
    assert not_in_image(f"tickserve.cli.commands, {sync}", "server") == set()
    assert not_in_image("tickserve.cli.commands, loadtest.run, loadtest.service_times, locust", "loadtest") == set()
    assert "matplotlib" in not_in_image("matplotlib", "server-cpu"), "a library that the image lacks is noticed"
    assert "onnx" in not_in_image("export.verify", "server"), "and so is one that the sync may not need"


def tritonserver() -> tuple[Path, Path]:
    """The embedded server's binary and its libraries."""
    package = Path(str(metadata.distribution("nvidia-pytriton").locate_file("pytriton")))
    return package / "tritonserver" / "bin" / "tritonserver", package.parent / "nvidia_pytriton.libs"


def production_arguments() -> list[str]:
    """What a pod runs: the image's arguments, then the Deployment's."""
    binary, *image = json.loads(said("server", "ENTRYPOINT")[-1])
    assert binary == "/opt/tritonserver/bin/tritonserver"
    deployment = yaml.safe_load((ROOT / "k8s/overlays/cpu/deployment-triton-tickserve.yaml").read_text())
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    return [*image, *(text.replace("$(TRITON_RESTRICTED_VALUE)", "s3cret") for text in container["args"])]


def free_ports() -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def running(repository: Path, arguments: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A tritonserver on loopback: (process, HTTP port)."""
    binary, libraries = tritonserver()
    http, grpc, metrics = free_ports()
    known = [text for text in arguments if not text.startswith(NOT_IN_EMBEDDED)]
    here = [
        f"--model-repository={repository}",
        f"--http-port={http}",
        f"--grpc-port={grpc}",
        f"--metrics-port={metrics}",
    ]
    loopback = [f"--{name}-address=127.0.0.1" for name in ("http", "grpc", "metrics")]
    served = [text for text in known if not text.startswith("--model-repository")]
    process = subprocess.Popen(
        [binary, *served, *here, *loopback],
        env={"LD_LIBRARY_PATH": str(libraries)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process, http
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answer(port: int, path: str, *, method: str = "GET", header: str | None = None) -> int:
    """The HTTP status, 0 where nobody answers."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", method=method)
    if header is not None:
        request.add_header("triton-restricted", header)
    try:
        with urllib.request.urlopen(request, timeout=5) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except (urllib.error.URLError, ConnectionError):
        return 0


def wait_ready(process: subprocess.Popen[bytes], port: int) -> bool:
    end = time.monotonic() + 30
    while time.monotonic() < end and process.poll() is None:
        if answer(port, "/v2/health/ready") == 200:
            return True
        time.sleep(0.1)
    return False


def health_check(port: int) -> int:
    """Run the health check of server-cpu, word for word but for its port."""
    command = json.loads(said("server-cpu", "HEALTHCHECK")[-1].partition("CMD ")[2])
    shown = [sys.executable, *(text.replace(":8000/", f":{port}/") for text in command[1:])]
    return subprocess.run(shown, capture_output=True, check=False).returncode


def test_the_arguments_of_production_are_all_there() -> None:
    values = dict(text.removeprefix("--").partition("=")[::2] for text in production_arguments())
    wanted = {
        "model-repository": "/models",
        "model-control-mode": "none",
        "disable-auto-complete-config": "",
        "strict-readiness": "true",
        "exit-on-error": "true",
        "grpc-keepalive-time": "10000",
        "grpc-keepalive-timeout": "3000",
    }
    assert {name: values.get(name) for name in wanted} == wanted
    assert {"exit-timeout-secs", "grpc-max-connection-age", "http-max-input-size"} <= set(values)
    assert int(values["grpc-http2-min-recv-ping-interval-without-data"]) <= int(values["grpc-keepalive-time"])


def test_a_real_tritonserver_takes_the_production_arguments(tmp_path: Path) -> None:
    with running(tmp_path, production_arguments()) as (process, port):
        assert wait_ready(process, port)
        assert answer(port, "/v2") == 200
        index = "/v2/repository/index"
        assert answer(port, index, method="POST") == 403
        assert answer(port, index, method="POST", header="wrong") == 403
        assert answer(port, index, method="POST", header="s3cret") == 200
        for path in ("/v2/logging", "/v2/trace/setting", "/v2/systemsharedmemory/status", "/v2/models/stats"):
            assert answer(port, path) == 403, path
        assert health_check(port) == 0
    assert process.returncode == 0, "SIGTERM ends it in order"
    assert health_check(port) != 0


def test_control_mode_none_refuses_a_load_even_with_the_credential(tmp_path: Path) -> None:
    with running(tmp_path, production_arguments()) as (process, port):
        assert wait_ready(process, port)
        assert answer(port, "/v2/repository/models/x/load", method="POST", header="s3cret") >= 400


def test_a_model_that_does_not_load_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "no-config" / "1").mkdir(parents=True)
    with running(tmp_path, production_arguments()) as (process, port):
        assert not wait_ready(process, port)
    assert process.returncode != 0


def test_an_unknown_argument_is_refused(tmp_path: Path) -> None:
    with running(tmp_path, [*production_arguments(), "--no-such-argument=1"]) as (process, port):
        assert not wait_ready(process, port)
    assert process.returncode != 0
