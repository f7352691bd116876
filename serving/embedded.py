"""The embedded Triton: NVIDIA's tritonserver on this machine, loopback only, ready once golden pairs answer.

A model repository goes in as it is; HTTP, gRPC and metrics come out on 127.0.0.1. The build inside the wheel is older
than the fixes a server open to a network needs, so it never listens anywhere else; production runs the image.
"""

from __future__ import annotations

import http.client
import os
import secrets
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from serving import arguments, view
from serving.control import GRPC_HEADER_PREFIX as GRPC_HEADER_PREFIX
from serving.folders import OwnedFolder, sweep
from serving.golden import check_golden
from serving.ports import LOOPBACK, Ports, reserved
from serving.process import ServerProcess
from serving.repository import Survey, survey
from serving.supervisor import Supervisor
from serving.target import Target
from serving.tls import check_certificates
from serving.triton_files import TritonFiles, environment, find_triton, lay_out_backends
from tickserve.config import ServeSettings
from tickserve.errors import ArtifactError, PortInUseError, ServerStartError, TickserveError
from tickserve.manifest import Manifest, load_manifest
from tickserve.model_config import CONFIG_NAME
from tickserve.signing import TrustedKeys
from tickserve.store import unwritable

START_ATTEMPTS = 3
POLL_S = 0.02
TAIL_LINES = 30
# How long Triton waits at its end for requests under way; it waits as long for a connection that is merely kept open.
DRAIN_S = 2
# How Triton's log says that somebody was faster on a port.
PORT_MESSAGES = ("Address already in use", "failed to bind", "Socket '", "port is not available", "Only one usage")
# A load request may carry a model's files, code for the Python backend among them: whoever reaches the port, a web page
# in this machine's browser included, would run it. The secret that opens these is new for each start. It shows in the
# process list, so it stops what cannot read that (a browser, another container) and not another process of the same
# machine that can.
CLOSED_APIS = ("model-repository", "shared-memory", "trace", "logging")
CLOSED_HEADER = "tickserve-closed"


def _from_anywhere(settings: ServeSettings) -> ServeSettings:
    """`settings` whose certificate files are found from any folder: the server does not run in the caller's."""
    names = ("tls_cert", "tls_key", "tls_client_ca")
    given = {name: getattr(settings, name) for name in names}
    return settings.model_copy(update={name: str(Path(path).absolute()) for name, path in given.items() if path})


class EmbeddedTriton:
    """A context manager around one server; `start` and `stop` for callers without a `with` block.

    `models` are the names to serve, by default every model of the repository. With `trusted` keys, a version that none
    of them signed is not served. A process that scores a model and dies or hangs is started anew. `log` keeps Triton's
    log; without it the log is gone after `stop`, but for its tail; when the server ended by itself it is kept, and
    `log` says where.
    """

    def __init__(
        self,
        repository: Path,
        settings: ServeSettings,
        models: Sequence[str] | None = None,
        log: Path | None = None,
        trusted: TrustedKeys | None = None,
    ) -> None:
        self._repository, self._settings, self._trusted = Path(repository), settings, trusted
        self._wanted = None if models is None else list(dict.fromkeys(models))
        self._log_wanted = log
        self._log: Path | None = None
        self._last_lines: list[str] = []
        self._folder: OwnedFolder | None = None
        self._process: ServerProcess | None = None
        self._secret: str | None = None
        self._ports: Ports | None = None
        self._surveys: dict[str, Survey] = {}
        self._supervisor: Supervisor | None = None
        self._ready = False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def running(self) -> bool:
        """Whether the server process is there."""
        return self._process is not None and self._process.running

    @property
    def problem(self) -> str | None:
        """What is wrong with a server that was ready; None while all of it is there."""
        if not self._ready or self._process is None:
            return None
        if not self._process.running:
            code = self._process.exit_code or 0
            return "the server ended by itself " + (f"(signal {-code})" if code < 0 else f"(exit code {code})")
        return None if self._supervisor is None else self._supervisor.problem

    @property
    def healthy(self) -> bool:
        """Whether the server is there, and every version it has lost came back, once `start` returned."""
        return self.running and self.problem is None

    @property
    def log(self) -> Path | None:
        """Where Triton's log is; after `stop` only when it was asked for or something was wrong."""
        return self._log if self._log is not None and self._log.is_file() else None

    @property
    def refused(self) -> dict[str, dict[int, str]]:
        """The versions of the served models that cannot be trusted and are not served, each with the reason."""
        return {name: dict(found.refused) for name, found in self._surveys.items() if found.refused}

    @property
    def pid(self) -> int:
        """The server's process id. Raises ServerStartError before `start` and after `stop`."""
        if self._process is None:
            raise ServerStartError("the server is not started")
        return self._process.pid

    @property
    def credential(self) -> tuple[str, str]:
        """Header name and value that open the closed APIs over HTTP; new for each start.

        Over gRPC the metadata key has `GRPC_HEADER_PREFIX` in front. Raises ServerStartError before `start`.
        """
        if self._secret is None:
            raise ServerStartError("the server is not started")
        return CLOSED_HEADER, self._secret

    @property
    def http_url(self) -> str:
        """`127.0.0.1:port` of HTTP."""
        return f"{LOOPBACK}:{self._chosen().http}"

    @property
    def grpc_url(self) -> str:
        """`127.0.0.1:port` of gRPC."""
        return f"{LOOPBACK}:{self._chosen().grpc}"

    @property
    def metrics_url(self) -> str:
        """The address Prometheus scrapes."""
        return f"http://{LOOPBACK}:{self._chosen().metrics}/metrics"

    @property
    def models(self) -> dict[str, Manifest]:
        """The newest served version's manifest of each model."""
        known = {name: found.served for name, found in self._surveys.items()}
        newest = {name: max(numbers) for name, numbers in self.versions.items()}
        return {
            name: known[name].get(number) or load_manifest(self._repository / name / str(number))
            for name, number in newest.items()
        }

    @property
    def versions(self) -> dict[str, tuple[int, ...]]:
        """The served versions of each model, oldest first."""
        chosen = {name: tuple(sorted(found.served)) for name, found in self._surveys.items()}
        return {name: view.shown(self._view / name) or numbers for name, numbers in chosen.items()}

    @property
    def revived(self) -> list[tuple[str, int]]:
        """The versions that lost their process and came back, in order, since `start`."""
        return [] if self._supervisor is None else list(self._supervisor.revived)

    @property
    def target(self) -> Target:
        """What a swap works on (serving/swap.py). Raises ServerStartError before `start`."""
        # gRPC with TLS would ask us for a certificate too; then loads go over HTTP, where no engine is.
        grpc = None if self._settings.tls_cert else self.grpc_url
        return Target(self.http_url, grpc, self.credential, self._repository, self._view, self.pid, self._trusted)

    def tail(self, lines: int = TAIL_LINES) -> list[str]:
        """The last lines of Triton's log, also after `stop`."""
        if self._log is not None and self._log.is_file():
            self._last_lines = self._log.read_text("utf-8", "replace").splitlines()[-200:]
        return self._last_lines[-lines:] if lines > 0 else []

    def start(self) -> None:
        """Verify the models, start the server and wait until every model answers its golden pairs.

        Raises, with nothing left running: ArtifactError and its kin for a repository that cannot be trusted,
        PortInUseError, UnsupportedPlatformError, MissingExtraError, and ServerStartError with the log's last lines.
        """
        if self.running:
            raise ServerStartError("the server is started already")
        files = find_triton()
        check_certificates(self._settings)
        with reserved(self._settings):
            # A taken port is reported before anything else is done.
            self._surveys = self._verified()
        sweep()
        try:
            self._open_folder()
            self._start_on_ports(files)
            self._check_answers()
            self._ready = True
            self._supervise()
        except Exception:
            self.stop()
            raise
        except BaseException:  # told to end: nobody has asked this server anything yet, so it is not waited for
            self._end(patience_s=0)
            raise

    def stop(self) -> None:
        """End the server and its stubs and remove its folder; may be called again, and before `start`."""
        self._end(self._settings.stop_timeout_s)

    def _end(self, patience_s: float) -> None:
        bad, self._ready = self.problem is not None, False
        if self._supervisor is not None:
            self._supervisor.stop()
            self._supervisor = None
        if self._process is not None:
            self._process.stop(patience_s)
            self._process = self._secret = None
        self.tail()
        if self._folder is not None:
            if bad:
                self._keep_log(self._folder.path)
            self._folder.remove()
            self._folder = None

    def _supervise(self) -> None:
        settings = self._settings
        self._supervisor = Supervisor(
            self.target,
            self._surveys,
            self.metrics_url,
            settings.hang_s,
            settings.start_timeout_s,
            has_processes=settings.backend == "python",
        )
        self._supervisor.start()

    @property
    def _view(self) -> Path:
        return (self._folder.path if self._folder else Path(os.devnull)) / "models"

    def _keep_log(self, folder: Path) -> None:
        """Move the log out of the folder that is about to go."""
        if self._log is None or self._log.parent != folder:
            return
        with suppress(OSError):
            self._log = self._log.rename(folder.with_name(f"{folder.name}.log"))

    def _chosen(self) -> Ports:
        if self._ports is None:
            raise ServerStartError("the server is not started")
        return self._ports

    def _verified(self) -> dict[str, Survey]:
        """Each chosen model's versions, every digest checked. Raises ArtifactError."""
        have = sorted(path.parent.name for path in self._repository.glob(f"[a-z0-9]*/{CONFIG_NAME}"))
        names = have if self._wanted is None else self._wanted
        if not names:
            raise ArtifactError(f"no model in the repository {self._repository.name!r}", field="repository")
        for name in names:
            if name not in have:
                raise ArtifactError(
                    "no such model in the repository",
                    field="model",
                    expected=" or ".join(have) or "a published model",
                    was=repr(name[:100]),
                )
        return {name: survey(self._repository / name, self._trusted) for name in names}

    def _open_folder(self) -> None:
        try:
            self._folder = OwnedFolder()
            self._log = self._log_wanted or self._folder.path / "triton.log"
            self._log.parent.mkdir(parents=True, exist_ok=True)
            self._log.write_bytes(b"")
        except OSError as error:
            self.stop()
            raise unwritable(self._log_wanted or Path(tempfile.gettempdir()), error) from error

    def _start_on_ports(self, files: TritonFiles) -> None:
        """Start the server; again on other free ports when somebody took one between choosing and starting."""
        assert self._folder is not None  # noqa: S101 - `start` opened it
        backends = lay_out_backends(files, self._folder.path / "backends", self._settings.backend)
        models = view.lay_out_models(self._repository, self.versions, self._view)
        for attempt in range(1, START_ATTEMPTS + 1):
            with reserved(self._settings) as ports:
                self._ports = ports
            try:
                self._launch(files, backends, models)
                return
            except PortInUseError:
                if attempt == START_ATTEMPTS:
                    raise

    def _launch(self, files: TritonFiles, backends: Path, models: Path) -> None:
        assert self._log is not None  # noqa: S101 - `start` opened it
        prefix = f"tickserve-{os.getpid()}-{secrets.token_hex(4)}-"
        command = self._command(files, backends, models, prefix)
        variables = environment(files, backends, self._settings)
        self._process = ServerProcess(command, variables, self._log, prefix, self._empty_folder())
        self._process.start()
        self._wait_ready(time.monotonic() + self._settings.start_timeout_s)

    def _empty_folder(self) -> Path:
        assert self._folder is not None  # noqa: S101 - `start` opened it
        folder = self._folder.path / "empty"
        folder.mkdir(exist_ok=True)
        return folder

    def _command(self, files: TritonFiles, backends: Path, models: Path, shm_prefix: str) -> list[str]:
        ports, self._secret = self._chosen(), secrets.token_urlsafe(24)
        name, secret = self.credential
        http_apis = arguments.ALL_BUT_HEALTH if self._settings.http == "probes" else CLOSED_APIS
        return [
            str(files.binary),
            f"--model-repository={models}",
            f"--backend-directory={backends}",
            f"--cache-directory={files.caches}",
            "--model-control-mode=explicit",
            *(f"--load-model={name}" for name in self._surveys),
            *arguments.STRICT,
            f"--exit-timeout-secs={max(1, min(DRAIN_S, int(self._settings.stop_timeout_s) - 1))}",
            f"--http-address={LOOPBACK}",
            f"--http-port={ports.http}",
            f"--http-thread-count={self._settings.http_threads}",
            f"--grpc-address={LOOPBACK}",
            f"--grpc-port={ports.grpc}",
            *arguments.KEEPALIVE,
            *arguments.tls_arguments(_from_anywhere(self._settings)),
            f"--metrics-address={LOOPBACK}",
            f"--metrics-port={ports.metrics}",
            "--allow-metrics=true",
            # Quantiles of one server cannot be added up over servers; the client and the load test keep histograms.
            "--metrics-config=summary_latencies=false",
            f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
            *arguments.closing_arguments(name, secret, CLOSED_APIS, http_apis),
        ]

    def _wait_ready(self, deadline: float) -> None:
        paths = ["/v2/health/ready"]
        paths += [f"/v2/models/{name}/versions/{n}/ready" for name, chosen in self.versions.items() for n in chosen]
        while paths:
            if not self.running:
                raise self._failed("the server ended before it was ready")
            if time.monotonic() > deadline:
                raise self._failed(f"not ready after {self._settings.start_timeout_s:g} s")
            if self._answers_ok(paths[0]):
                paths.pop(0)
            else:
                time.sleep(POLL_S)

    def _answers_ok(self, path: str) -> bool:
        connection = http.client.HTTPConnection(self.http_url, timeout=5)
        try:
            connection.request("GET", path, headers=dict([self.credential]))
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _check_answers(self) -> None:
        headers = dict([self.credential])
        for name, versions in self.versions.items():
            folder = self._repository / name
            for version in versions:
                try:
                    check_golden(self.http_url, name, version, folder / str(version), headers=headers)
                except TickserveError as error:
                    raise self._failed(f"model {name!r} version {version}: {error}") from error

    def _failed(self, reason: str) -> TickserveError:
        lines = self.tail(200)
        taken = next((line for line in lines if any(message in line for message in PORT_MESSAGES)), None)
        if taken and not self.running:
            return PortInUseError("a port was taken while the server started", hint=taken[-200:])
        errors = [line for line in lines if line.startswith("E") or " error" in line.lower()] or lines
        return ServerStartError(f"{reason}; the log says:\n" + "\n".join(line[:300] for line in errors[-8:]))
