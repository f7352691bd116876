"""The arguments of Triton: one production list, which the image carries and the embedded server follows where it can.

`Dockerfile` (target `server`) and `k8s/chart` hold what `image_arguments` and `closing_arguments` say; a test compares
them. What the embedded server does otherwise is in `DIFFERENCES`, each with its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tickserve.config import ServeSettings
from tickserve.errors import ConfigError

BODY_LIMIT_BYTES = 8 * 1024 * 1024
EXIT_TIMEOUT_S = 30
RESTRICTED_HEADER = "triton-restricted"
# What a Deployment puts in the place of the value, from a Secret.
RESTRICTED_VALUE = "$(TRITON_RESTRICTED_VALUE)"
# Whatever can read or change the server, beyond health, metadata and inference.
RESTRICTED_APIS = ("shared-memory", "model-config", "model-repository", "statistics", "trace", "logging")
# All that is left of HTTP is /v2/health/live and /v2/health/ready.
ALL_BUT_HEALTH = (*RESTRICTED_APIS, "metadata", "inference")

KEEPALIVE = (
    # A half-open connection is noticed within 13 s; engines may ping as often, also between calls.
    "--grpc-keepalive-time=10000",
    "--grpc-keepalive-timeout=3000",
    "--grpc-keepalive-permit-without-calls=true",
    "--grpc-http2-min-recv-ping-interval-without-data=5000",
    "--grpc-http2-max-pings-without-data=0",
    # Engines reconnect after 5 minutes, so that load spreads over new replicas.
    "--grpc-max-connection-age=300000",
    "--grpc-max-connection-age-grace=10000",
)
STRICT = ("--disable-auto-complete-config", "--strict-readiness=true", "--exit-on-error=true")


class Difference(NamedTuple):
    """One production argument that the embedded server (Triton 2.51, inside the wheel) does not have, and why."""

    production: str
    embedded: str
    reason: str


DIFFERENCES = (
    Difference(
        "--model-control-mode=none",
        "--model-control-mode=explicit",
        "it swaps models while it runs; loading is closed by a secret that is new for each start",
    ),
    Difference(
        f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
        "--exit-timeout-secs=2",
        "nobody waits half a minute for a laptop's server to stop",
    ),
    Difference(
        f"--http-max-input-size={BODY_LIMIT_BYTES}",
        "no limit",
        "releases of 24.10 and before do not know the option: a compressed body unpacks to whatever it wants",
    ),
    Difference("--log-format=ISO8601", "the default", "the reason of a failed start is read out of the log's own form"),
    Difference(
        "restricted: model-config, statistics",
        "open",
        "they only read, and whoever reaches loopback may: the load test and monitoring do",
    ),
    Difference(
        "all addresses",
        "127.0.0.1",
        "this build predates security fixes that a server open to a network needs",
    ),
)


def image_arguments() -> list[str]:
    """What the image starts Triton with, whatever the deployment; a deployment's arguments are added behind."""
    return [
        "--model-repository=/models",
        "--model-control-mode=none",
        *STRICT,
        f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
        f"--http-max-input-size={BODY_LIMIT_BYTES}",
        *KEEPALIVE,
        "--log-format=ISO8601",
    ]


def closing_arguments(
    header: str = RESTRICTED_HEADER,
    value: str = RESTRICTED_VALUE,
    apis: Sequence[str] = RESTRICTED_APIS,
    http_apis: Sequence[str] | None = None,
) -> list[str]:
    """The arguments that close `apis` (over HTTP: `http_apis`) to whoever does not send `header`: `value`."""
    return [
        f"--http-restricted-api={','.join(http_apis or apis)}:{header}={value}",
        f"--grpc-restricted-protocol={','.join(apis)}:{header}={value}",
    ]


def tls_arguments(settings: ServeSettings) -> list[str]:
    """TLS for gRPC, mutual where clients have to show a certificate; nothing without one of our own."""
    if not settings.tls_cert:
        return []
    arguments = [
        "--grpc-use-ssl=true",
        f"--grpc-server-cert={settings.tls_cert}",
        f"--grpc-server-key={settings.tls_key}",
    ]
    if settings.tls_client_ca:
        arguments += ["--grpc-use-ssl-mutual=true", f"--grpc-root-cert={settings.tls_client_ca}"]
    return arguments


def container_arguments(settings: ServeSettings) -> list[str]:
    """All arguments of a production container under `settings`; of two values of one option the last wins.

    Raises ConfigError for what would be open: Triton's HTTP has no TLS, so beside gRPC with TLS it answers probes only;
    and models are swapped over the network only by clients that show a certificate.
    """
    if settings.tls_cert and settings.http == "open":
        raise ConfigError(
            "Triton's HTTP has no TLS and would answer in plaintext beside gRPC with TLS",
            field="serve.http",
            expected="'probes'",
            was="'open'",
        )
    if settings.control == "explicit" and not settings.tls_client_ca:
        raise ConfigError(
            "a load request may carry code, so whoever sends one has to show a certificate",
            field="serve.control",
            expected="serve.tls_client_ca with it",
            was="none",
        )
    chosen = ["--model-control-mode=explicit", "--load-model=*"] if settings.control == "explicit" else []
    threads = [f"--http-thread-count={settings.http_threads}"]
    http_apis = ALL_BUT_HEALTH if settings.http == "probes" else None
    return [*image_arguments(), *chosen, *threads, *tls_arguments(settings), *closing_arguments(http_apis=http_apis)]
