"""The chart's arguments of mutual TLS given to a real tritonserver, the embedded one: fault 28 for a pod."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from serving import arguments
from tests.k8s.chart.conditions import servers
from tests.k8s.chart.rendering import objects
from tests.serving.test_tls import Authority, Pair
from tests.test_dockerfile import answer, running, wait_ready

pytestmark = pytest.mark.system
PLACE = "/etc/tickserve/tls"


def rendered() -> list[str]:
    """What the container of the scenario `mtls` is started with, the image's own arguments first."""
    ((_, _, each),) = servers(objects("mtls"))
    filled = [text.replace("$(TRITON_RESTRICTED_VALUE)", "s3cret") for text in each["args"]]
    return [*arguments.image_arguments(), *filled]


def secret(folder: Path, authority: Authority, pair: Pair) -> Path:
    """The files of a Secret of type kubernetes.io/tls, as it is mounted."""
    folder.mkdir()
    for name, source in (("tls.crt", pair.cert), ("tls.key", pair.key), ("ca.crt", authority.cert)):
        (folder / name).write_bytes(source.read_bytes())
    return folder


@contextmanager
def served(tmp_path: Path, mounted: Path) -> Iterator[tuple[int, int]]:
    """(HTTP port, gRPC port) of a server over no models; 0, 0 where it does not start."""
    (tmp_path / "models").mkdir(exist_ok=True)
    with running(tmp_path / "models", [text.replace(PLACE, str(mounted)) for text in rendered()]) as (process, http):
        started = wait_ready(process, http)
        grpc_port = next(text for text in map(str, process.args) if text.startswith("--grpc-port="))  # type: ignore[arg-type]
        yield (http, int(grpc_port.partition("=")[2])) if started else (0, 0)


def is_live(port: int, authority: Authority, pair: Pair | None) -> bool:
    """Ask over gRPC with TLS, with a certificate or without."""
    credentials = grpc.ssl_channel_credentials(
        authority.cert.read_bytes(),
        pair and pair.key.read_bytes(),
        pair and pair.cert.read_bytes(),
    )
    with grpc.secure_channel(f"localhost:{port}", credentials) as channel:
        asked = service_pb2_grpc.GRPCInferenceServiceStub(channel).ServerLive
        return bool(asked(service_pb2.ServerLiveRequest(), timeout=5).live)


def test_an_engine_with_a_certificate_is_let_in_and_one_without_is_not(tmp_path: Path) -> None:
    desk, stranger = Authority(tmp_path, "desk"), Authority(tmp_path, "stranger")
    mounted = secret(tmp_path / "secret", desk, desk.issue("server"))
    with served(tmp_path, mounted) as (http, port):
        assert is_live(port, desk, desk.issue("engine"))
        for pair in (None, stranger.issue("engine"), desk.issue("expired", days=-1)):
            with pytest.raises(grpc.RpcError):
                is_live(port, desk, pair)
        assert answer(http, "/v2/health/ready") == 200, "the kubelet has no certificate"
        assert answer(http, "/v2") == 403, "and nothing else is open without one"


def test_a_certificate_and_a_key_that_do_not_belong_together_never_become_ready(tmp_path: Path) -> None:
    desk = Authority(tmp_path, "desk")
    mixed = Pair(desk.issue("server").cert, desk.issue("other").key)
    with served(tmp_path, secret(tmp_path / "secret", desk, mixed)) as (http, _):
        assert http == 0, "so the rollout stops, and the old pods go on"
