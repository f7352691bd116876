"""One list of production arguments: in the image, in k8s/overlays, from the command, and in the embedded server."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from serving import arguments
from serving.arguments import closing_arguments, container_arguments, image_arguments
from tests.serving.conftest import Running
from tickserve.cli.commands import app
from tickserve.config import ServeSettings
from tickserve.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
PLAIN = ServeSettings()
WITH_TLS = ServeSettings(http="probes", tls_cert="/tls/tls.crt", tls_key="/tls/tls.key")


def value_of(chosen: list[str], option: str) -> str:
    """The value in force: of two the last wins."""
    return [argument.partition("=")[2] for argument in chosen if argument.partition("=")[0] == option][-1]


def in_dockerfile() -> list[str]:
    text = (ROOT / "Dockerfile").read_text()
    (entry,) = re.findall(r'ENTRYPOINT (\["/opt/tritonserver.*?\])', text, re.DOTALL)
    return [part for part in json.loads(entry.replace("\\\n", "")) if part.startswith("--")]


def in_deployment() -> list[str]:
    """What a deployment closes. Its other arguments repeat the list's own values, and `image_arguments` holds them."""
    path = ROOT / "k8s/overlays/cpu/deployment-triton-tickserve.yaml"
    (container,) = yaml.safe_load(path.read_text())["spec"]["template"]["spec"]["containers"]
    repeated = {*image_arguments(), "--http-thread-count=8"}
    return [argument for argument in container["args"] if argument not in repeated]


def test_the_image_starts_with_the_list() -> None:
    assert in_dockerfile() == image_arguments()


def test_the_deployment_closes_what_the_list_closes() -> None:
    assert in_deployment() == closing_arguments()


@pytest.mark.parametrize("holder", [in_dockerfile, in_deployment])
def test_a_changed_argument_is_noticed(holder: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the two above."""
    changed = [*holder()[:-1], holder()[-1] + "0"]  # type: ignore[operator]
    assert changed not in (image_arguments(), closing_arguments())


def test_a_container_is_started_with_what_production_needs() -> None:
    chosen = container_arguments(PLAIN)
    wanted = {
        "--model-control-mode": "none",
        "--http-max-input-size": str(8 * 2**20),
        "--grpc-keepalive-time": "10000",
        "--grpc-keepalive-timeout": "3000",
        "--grpc-max-connection-age": "300000",
        "--exit-timeout-secs": "30",
        "--http-thread-count": "8",
    }
    assert {option: value_of(chosen, option) for option in wanted} == wanted
    assert "--disable-auto-complete-config" in chosen
    for option in ("--http-restricted-api", "--grpc-restricted-protocol"):
        apis, _, credential = value_of(chosen, option).partition(":")
        assert set(apis.split(",")) == {
            "shared-memory",
            "model-config",
            "model-repository",
            "statistics",
            "trace",
            "logging",
        }
        assert credential == "triton-restricted=$(TRITON_RESTRICTED_VALUE)"


def test_with_tls_http_answers_probes_only() -> None:
    chosen = container_arguments(WITH_TLS)
    assert value_of(chosen, "--grpc-use-ssl") == "true"
    assert value_of(chosen, "--grpc-server-cert") == "/tls/tls.crt"
    assert not any(argument.startswith("--grpc-use-ssl-mutual") for argument in chosen)
    assert {"inference", "metadata", "statistics"} <= set(
        value_of(chosen, "--http-restricted-api").partition(":")[0].split(",")
    )
    assert "inference" not in value_of(chosen, "--grpc-restricted-protocol").partition(":")[0].split(",")


def test_mutual_tls_and_swaps_over_the_network() -> None:
    mutual = WITH_TLS.model_copy(update={"tls_client_ca": "/tls/ca.crt", "control": "explicit"})
    chosen = container_arguments(mutual)
    assert value_of(chosen, "--grpc-use-ssl-mutual") == "true"
    assert value_of(chosen, "--grpc-root-cert") == "/tls/ca.crt"
    assert value_of(chosen, "--model-control-mode") == "explicit"


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (WITH_TLS.model_copy(update={"http": "open"}), "serve.http"),
        (WITH_TLS.model_copy(update={"control": "explicit"}), "serve.control"),
        (PLAIN.model_copy(update={"control": "explicit"}), "serve.control"),
    ],
)
def test_what_would_be_open_is_refused(settings: ServeSettings, field: str) -> None:
    with pytest.raises(ConfigError) as refused:
        container_arguments(settings)
    assert refused.value.field == field


def test_the_command_prints_one_argument_a_line() -> None:
    done = CliRunner().invoke(app, ["serve", "--print-arguments"])
    assert done.exit_code == 0
    assert done.stdout.splitlines() == container_arguments(PLAIN)


def test_every_difference_of_the_embedded_server_has_its_reason(running: Running) -> None:
    """What it was really started with: the production list, but for what is listed with a reason."""
    command = Path(f"/proc/{running.server.pid}/cmdline").read_text().split("\0")
    listed = {difference.production.partition("=")[0] for difference in arguments.DIFFERENCES}
    missing = [
        a for a in image_arguments() if a not in command and a.partition("=")[0] not in listed | {"--model-repository"}
    ]
    assert missing == []
    assert all(difference.reason for difference in arguments.DIFFERENCES)
    done = CliRunner().invoke(app, ["serve", "--print-arguments", "--target", "embedded"])
    assert done.stdout.count(" -> ") == len(arguments.DIFFERENCES)
    assert all(difference.reason in done.stdout for difference in arguments.DIFFERENCES)
