"""The server, and whoever calls it: swaps, the client, its journal, the load test."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tickserve.config.section import Section

BackendKind = Literal["native", "python"]


class ServeSettings(Section):
    """The embedded server. It binds to loopback only. Port 0 takes a free one."""

    backend: BackendKind = Field(
        "native",
        description="native: models run in the server; python: in a process each, slower, apart from it",
    )
    http_port: int = Field(8000, ge=0, le=65_535)
    grpc_port: int = Field(8001, ge=0, le=65_535)
    metrics_port: int = Field(8002, ge=0, le=65_535)
    start_timeout_s: float = Field(60.0, gt=0)
    stop_timeout_s: float = Field(10.0, gt=0)
    hang_s: float = Field(
        10.0, ge=0, description="requests wait and none ends: start the model's process anew; 0: never"
    )
    http: Literal["open", "probes"] = Field(
        "open", description="probes: HTTP answers health to anyone, the rest to none"
    )
    http_threads: int = Field(8, ge=1, le=256, description="threads of the HTTP server; each holds many connections")
    control: Literal["none", "explicit"] = Field(
        "none", description="of the container: explicit allows swaps over the network, with tls_client_ca only"
    )
    tls_cert: str = Field("", description="PEM certificate chain of the server; gRPC then speaks TLS only")
    tls_key: str = Field("", description="its PEM private key")
    tls_client_ca: str = Field("", description="PEM authority that signed the clients' certificates: mutual TLS")

    @model_validator(mode="after")
    def _ports_differ(self) -> ServeSettings:
        ports = [port for port in (self.http_port, self.grpc_port, self.metrics_port) if port]
        if len(set(ports)) < len(ports):
            raise ValueError(f"http_port, grpc_port, metrics_port: expected three different ports, was {ports}")
        return self

    @model_validator(mode="after")
    def _certificate_with_its_key(self) -> ServeSettings:
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("tls_cert, tls_key: expected both or neither, was one of them")
        if self.tls_client_ca and not self.tls_cert:
            raise ValueError("tls_client_ca: expected tls_cert and tls_key with it, was neither")
        return self


class SwapSettings(Section):
    """Putting another version of a served model in force while the server runs."""

    load_timeout_s: float = Field(60.0, gt=0, description="longest load of a version, and longest wait for its end")
    memory_requests: int = Field(240, ge=8, description="batches the new version scores while its memory is watched")
    memory_growth_mb: float = Field(8.0, gt=0, description="growth over those batches that is a leak")
    drain_quiet_ms: float = Field(300.0, gt=0, description="the old version is drained after so long without a request")
    drain_timeout_s: float = Field(
        10.0, gt=0, description="the old version stays when it is asked for longer than this"
    )
    credential_file: str = Field(
        "", description="for a server elsewhere: a file with 'header=value' of its closed APIs"
    )


class ClientSettings(Section):
    """The scoring client."""

    transport: Literal["http", "grpc", "shm"] = Field(
        "http", description="of predict and replay to host:port; shm: shared memory with a server on this machine"
    )
    deadline_ms: float = Field(100.0, gt=0)
    attempts: int = Field(3, ge=1, le=100, description="replicas that one call may ask")
    retry_tokens: int = Field(100, ge=2, le=1_000_000, description="retries stop while half of them are spent")
    retry_ratio: float = Field(0.1, ge=0, le=1, description="tokens that a success gives back")
    hedge_quantile: float = Field(0.95, ge=0.5, le=0.9999, description="a call slower than this is sent again")
    hedge_budget: float = Field(0.05, ge=0, le=1, description="largest share of hedged calls; 0 is never")
    breaker_failures: int = Field(5, ge=1, le=1_000_000, description="in a row, and a replica is left alone")
    backoff_ms: float = Field(100.0, ge=1, le=3_600_000, description="for how long at first")
    max_backoff_ms: float = Field(1_000.0, ge=1, le=3_600_000, description="for how long at most")
    slow_factor: float = Field(3.0, ge=1.5, le=1_000, description="how much slower than another is too slow")

    @model_validator(mode="after")
    def _backoff_grows(self) -> ClientSettings:
        if self.max_backoff_ms < self.backoff_ms:
            raise ValueError(
                f"max_backoff_ms: expected at least backoff_ms ({self.backoff_ms:g}), was {self.max_backoff_ms:g}"
            )
        return self


class JournalSettings(Section):
    """The journal of decisions: how much it holds, and how much of it a crash may cost."""

    flush_ms: float = Field(100.0, ge=1, le=60_000, description="longest a record waits before it is written")
    fsync: Literal["frame", "second", "segment"] = Field("second", description="how often the disk is waited for")
    segment_bytes: int = Field(64 * 1024**2, ge=16 * 1024, description="a file is full at this size")
    segment_s: float = Field(3_600.0, ge=0.1, description="or at this age")
    max_bytes: int = Field(4 * 1024**3, ge=32 * 1024, description="of all files of one journal together")
    on_limit: Literal["remove_oldest", "refuse"] = Field("remove_oldest", description="at max_bytes")
    queue_records: int = Field(65_536, ge=1, description="records waiting to be written")
    queue_bytes: int = Field(64 * 1024**2, ge=1, description="about how many bytes of tensors may wait")
    on_full: Literal["drop", "block"] = Field("drop", description="when the queue is full: lose (counted) or wait")
    block_ms: float = Field(50.0, gt=0, description="with block: longest a call waits before its record is lost")
    level: int = Field(3, ge=1, le=19, description="of zstd")

    @model_validator(mode="after")
    def _segments_fit(self) -> JournalSettings:
        if self.max_bytes < 2 * self.segment_bytes:
            raise ValueError(
                f"max_bytes: expected at least two segments ({2 * self.segment_bytes}), was {self.max_bytes}"
            )
        return self


class MetricsSettings(Section):
    """The metrics of a client, as Prometheus scrapes them."""

    port: int = Field(9104, ge=0, le=65_535, description="of /metrics; 0 takes a free one")
    address: str = Field("127.0.0.1", min_length=1, description="bound to; whoever reaches it reads the metrics")
    buckets_per_decade: int = Field(5, ge=1, le=20, description="of the histograms of times, 10 us to 10 s")
    buffer_records: int = Field(65_536, ge=1, description="decisions waiting to be counted; more are lost, and counted")
    flush_ms: float = Field(100.0, ge=1, le=60_000, description="longest a decision waits to be counted")


class LoadtestSettings(Section):
    """Locust against the served models."""

    users: int = Field(4, ge=1, le=1_000)
    duration_s: float = Field(5.0, gt=0)
    transports: tuple[Literal["http", "grpc"], ...] = Field(("http", "grpc"), min_length=1)
