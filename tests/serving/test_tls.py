"""TLS and mutual TLS against the real server, and https through a proxy that ends it: faults 28 and 30."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from serving.embedded import EmbeddedTriton
from serving.swap import swap
from tests.serving.conftest import ANY_PORTS, FEATURES, publish_tiny
from tickserve.client import AsyncClient, Client, Tls
from tickserve.config import ServeSettings, SwapSettings
from tickserve.errors import (
    CertificateError,
    ConfigError,
    RequestError,
    ServerRejectedError,
    TransportError,
    UsageError,
)

ROWS = np.zeros((3, FEATURES), np.float32)
MANY = np.zeros((64, FEATURES), np.float32)
DEADLINE_MS, NOT_LATER_S = 4_000, 4.4


@dataclass(frozen=True)
class Pair:
    cert: Path
    key: Path


class Authority:
    """A certificate authority of this test."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.cert = folder / f"{name}.pem"
        self.cert.write_bytes(self._signed(self._subject, self._key.public_key(), ca=True).public_bytes(PEM))

    def issue(self, name: str, *, hosts: tuple[str, ...] = ("127.0.0.1", "localhost"), days: float = 1) -> Pair:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        pair = Pair(self._folder / f"{self._name}-{name}.pem", self._folder / f"{self._name}-{name}.key")
        pair.cert.write_bytes(self._signed(subject, key.public_key(), hosts=hosts, days=days).public_bytes(PEM))
        no_password = serialization.NoEncryption()
        pair.key.write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, no_password))
        return pair

    def _signed(
        self, subject: x509.Name, key: Any, *, hosts: tuple[str, ...] = (), days: float = 1, ca: bool = False
    ) -> Any:
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(self._subject).public_key(key)
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(days=9))
        builder = builder.not_valid_after(now + datetime.timedelta(days=days))
        builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        if hosts:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([_host(name) for name in hosts]), critical=False
            )
        return builder.sign(self._key, hashes.SHA256())


PEM = serialization.Encoding.PEM


def _host(name: str) -> x509.GeneralName:
    with suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(name))
    return x509.DNSName(name)


@dataclass(frozen=True)
class Papers:
    """Who there is: an authority that all trust, one that nobody does, and what they signed."""

    ca: Path
    good: Pair
    expired: Pair
    elsewhere: Pair
    client: Pair
    stranger: Pair


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    folder = tmp_path_factory.mktemp("tls")
    ours, theirs = Authority(folder, "ours"), Authority(folder, "theirs")
    return Papers(
        ours.cert,
        ours.issue("server"),
        ours.issue("expired", days=-1),
        ours.issue("elsewhere", hosts=("engine.example",)),
        ours.issue("client"),
        theirs.issue("stranger"),
    )


def settings(pair: Pair, client_ca: Path | None = None, **more: Any) -> ServeSettings:
    changed = {"tls_cert": str(pair.cert), "tls_key": str(pair.key), "tls_client_ca": str(client_ca or ""), **more}
    return ANY_PORTS.model_copy(update=changed)


@dataclass(frozen=True)
class Secure:
    """A server with mutual TLS whose HTTP answers probes only."""

    server: EmbeddedTriton
    repository: Path


@pytest.fixture(scope="module")
def mutual(papers: Papers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secure]:
    folder = tmp_path_factory.mktemp("mutual")
    publish_tiny(folder / "models", "tiny", 1)
    publish_tiny(folder / "models", "tiny", 2, activate=False)
    with EmbeddedTriton(folder / "models", settings(papers.good, papers.ca, http="probes")) as server:
        yield Secure(server, folder / "models")


class Ends:
    """A proxy that ends TLS in front of `target` ("host:port")."""

    def __init__(self, target: str, pair: Pair, client_ca: Path | None = None) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(pair.cert, pair.key)
        if client_ca is not None:
            self._context.load_verify_locations(client_ca)
            self._context.verify_mode = ssl.CERT_REQUIRED
        host, port = target.split(":")
        self._target, self._sockets = (host, int(port)), []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                raw, _ = self._listener.accept()
                thread = threading.Thread(target=self._carry, args=(raw,))
                self._threads.append(thread)
                thread.start()

    def _carry(self, raw: socket.socket) -> None:
        self._sockets.append(raw)
        raw.settimeout(20)
        with suppress(OSError), raw, socket.create_connection(self._target) as behind:
            self._sockets.append(behind)
            with self._context.wrap_socket(raw, server_side=True) as secure:
                self._sockets.append(secure)
                back = threading.Thread(target=_pump, args=(behind, secure))
                back.start()
                _pump(secure, behind)
                back.join()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65_536):
            sink.sendall(data)
    for sock in (source, sink):
        with suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)


@pytest.fixture
def proxy(request: pytest.FixtureRequest) -> Iterator[Any]:
    opened: list[Ends] = []

    def open_proxy(*arguments: Any) -> str:
        opened.append(Ends(*arguments))
        return opened[-1].url

    yield open_proxy
    for each in opened:
        each.close()


def score(url: str, repository: Path, tls: Tls | None, rows: np.ndarray = ROWS, calls: int = 1) -> Any:
    with Client(url, manifest=repository / "tiny" / "1", tls=tls, deadline_ms=DEADLINE_MS) as client:
        return [client.score("tiny", rows) for _ in range(calls)][-1]


def refusal(url: str, repository: Path, tls: Tls | None) -> RequestError:
    began = time.monotonic()
    with pytest.raises(RequestError) as refused:
        score(url, repository, tls)
    assert time.monotonic() - began < NOT_LATER_S
    assert "/" not in str(refused.value).replace("https://", "").replace("grpcs://", "")
    return refused.value


def test_grpc_over_mutual_tls_gives_the_numbers(mutual: Secure, papers: Papers) -> None:
    tls = Tls(papers.ca, papers.client.cert, papers.client.key)
    url = f"grpcs://{mutual.server.grpc_url}"
    assert score(url, mutual.repository, tls, calls=20).ok
    many = score(url, mutual.repository, tls, MANY)
    assert many.probabilities.shape == (64, 3)


@pytest.mark.parametrize("who", ["nobody", "stranger"])
def test_a_client_without_the_right_certificate_is_turned_away(mutual: Secure, papers: Papers, who: str) -> None:
    pair = papers.stranger
    tls = Tls(papers.ca) if who == "nobody" else Tls(papers.ca, pair.cert, pair.key)
    assert isinstance(refusal(f"grpcs://{mutual.server.grpc_url}", mutual.repository, tls), TransportError)
    assert score(
        f"grpcs://{mutual.server.grpc_url}", mutual.repository, Tls(papers.ca, papers.client.cert, papers.client.key)
    )


def test_beside_tls_http_answers_probes_only(mutual: Secure) -> None:
    """Triton's HTTP has no TLS: the rest of it wants the secret, which only the server's own checks have."""
    assert mutual.server.healthy
    with pytest.raises(ServerRejectedError, match="403"):
        score(mutual.server.http_url, mutual.repository, None)


def test_a_server_with_tls_swaps_too(mutual: Secure, papers: Papers) -> None:
    tls = Tls(papers.ca, papers.client.cert, papers.client.key)
    quick = SwapSettings(drain_quiet_ms=100, memory_requests=16)
    with Client(
        f"grpcs://{mutual.server.grpc_url}", manifest=mutual.repository, tls=tls, follow_ms=10, deadline_ms=5_000
    ) as client:
        for version in (2, 1):
            assert swap(mutual.server.target, "tiny", version, settings=quick).drained
            time.sleep(0.02)
            assert client.score("tiny", ROWS).version == version


BAD = {
    "expired": (CertificateError, "expired"),
    "elsewhere": (CertificateError, "not valid for"),
    "stranger": (CertificateError, "unable to get local issuer certificate"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_server_that_cannot_be_trusted_is_refused(mutual: Secure, papers: Papers, proxy: Any, case: str) -> None:
    """Fault 28: expired, for another name, by an unknown authority."""
    url = proxy(mutual.server.http_url, getattr(papers, case))
    error, says = BAD[case]
    refused = refusal(url, mutual.repository, Tls(papers.ca))
    assert isinstance(refused, error)
    assert says in str(refused)


def test_grpc_refuses_an_expired_server(repository: Path, papers: Papers) -> None:
    with EmbeddedTriton(repository, settings(papers.expired)) as server:
        assert isinstance(refusal(f"grpcs://{server.grpc_url}", repository, Tls(papers.ca)), CertificateError)
        # Plaintext HTTP stays on loopback, and here it is open.
        assert score(server.http_url, repository, None).ok
        # Fault 30: plaintext to a TLS port.
        assert isinstance(refusal(f"grpc://{server.grpc_url}", repository, None), TransportError)


def test_https_through_a_proxy_and_the_names_it_goes_by(running: Any, papers: Papers, proxy: Any) -> None:
    repository = running.tiny.path.parents[1]
    url = proxy(running.server.http_url, papers.good, papers.ca)
    tls = Tls(papers.ca, papers.client.cert, papers.client.key)
    assert score(url, repository, tls, calls=30).ok
    assert score(url, repository, tls, MANY).probabilities.shape == (64, 3)
    assert "asks for a certificate" in str(refusal(url, repository, Tls(papers.ca)))
    named = proxy(running.server.http_url, papers.elsewhere)
    assert score(named, repository, Tls(papers.ca, server_name="engine.example")).ok
    with (
        Client(named, manifest=repository / "tiny" / "1", deadline_ms=DEADLINE_MS) as client,
        pytest.raises(CertificateError),
    ):
        client.score("tiny", ROWS)  # the system's authorities do not know ours


def test_tls_to_a_plaintext_port_and_the_reverse(running: Any, papers: Papers, proxy: Any) -> None:
    """Fault 30."""
    repository, tls = running.tiny.path.parents[1], Tls(papers.ca)
    for scheme, address in (("https", running.server.http_url), ("grpcs", running.server.grpc_url)):
        assert isinstance(refusal(f"{scheme}://{address}", repository, tls), TransportError)
    assert isinstance(refusal(f"https://{running.server.http_url}", repository, tls), CertificateError)
    url = proxy(running.server.http_url, papers.good)
    assert isinstance(refusal(url.replace("https", "http"), repository, None), TransportError)


def test_a_port_that_never_shakes_hands_costs_the_deadline(mutual: Secure, papers: Papers) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"https://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        client = Client(url, manifest=mutual.repository, tls=Tls(papers.ca), deadline_ms=300)
        with client, pytest.raises(RequestError):
            client.score("tiny", ROWS)
        assert time.monotonic() - began < 1


@pytest.mark.parametrize("scheme", ["https", "grpcs"])
def test_asyncio_speaks_tls_too(mutual: Secure, running: Any, papers: Papers, proxy: Any, scheme: str) -> None:
    good, bad = Tls(papers.ca, papers.client.cert, papers.client.key), Tls(papers.stranger.cert)
    if scheme == "https":
        url, repository = proxy(running.server.http_url, papers.good, papers.ca), running.tiny.path.parents[1]
    else:
        url, repository = f"grpcs://{mutual.server.grpc_url}", mutual.repository

    async def ask(tls: Tls) -> Any:
        async with AsyncClient(url, manifest=repository / "tiny" / "1", tls=tls, deadline_ms=DEADLINE_MS) as client:
            return await client.score("tiny", ROWS)

    if scheme == "https":
        assert asyncio.run(ask(good)).ok
        with pytest.raises(TransportError):
            asyncio.run(ask(Tls(papers.ca)))
    with pytest.raises(CertificateError):
        asyncio.run(ask(bad))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tls_cert": "/nowhere.pem"}, "serve.tls_cert"),
        ({"tls_key": "CLIENT"}, "serve.tls_cert, serve.tls_key"),
        ({"tls_client_ca": "KEY"}, "serve.tls_client_ca"),
    ],
)
def test_wrong_files_are_named_before_anything_starts(
    repository: Path, papers: Papers, change: dict[str, str], field: str
) -> None:
    files = {"CLIENT": str(papers.client.key), "KEY": str(papers.good.key)}
    wrong = settings(papers.good).model_copy(update={key: files.get(value, value) for key, value in change.items()})
    with pytest.raises(ConfigError) as refused:
        EmbeddedTriton(repository, wrong).start()
    assert refused.value.field == field
    assert str(papers.good.cert.parent) not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "tls", "says"),
    [
        ("http://127.0.0.1:1", Tls(), "goes with TLS alone"),
        ("127.0.0.1:1", Tls(), "goes with TLS alone"),
        ("https://127.0.0.1:1", "ca.pem", "expected a Tls"),
        ("https://127.0.0.1:1", Tls(ca="/nowhere.pem"), "tls.ca"),
    ],
)
def test_wrong_arguments_are_named(url: str, tls: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Client(url, tls=tls)


def test_a_certificate_goes_with_its_key() -> None:
    with pytest.raises(UsageError, match="cert and key go together"):
        Tls(cert="a.pem")
