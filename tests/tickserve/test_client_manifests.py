from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tickserve.client import Client, load_manifests, newest_versions
from tickserve.client._manifests import pin
from tickserve.client._url import Endpoint, parse_endpoint
from tickserve.current import write_current
from tickserve.errors import ArtifactError, UsageError
from tickserve.manifest import write_manifest

NAME = "hand-l1-gbdt"


@pytest.fixture
def repository(tmp_path: Path, make_manifest: Any) -> Path:
    for version in ("1", "2", "10", ".staging-x", "0", "latest"):
        folder = tmp_path / "models" / NAME / version
        folder.mkdir(parents=True)
        write_manifest(folder, make_manifest())
    (tmp_path / "models" / NAME / "11").mkdir()  # no manifest: not published
    shutil.copytree(tmp_path / "models" / NAME / "1", tmp_path / "models" / ".staging-other" / "1")
    return tmp_path / "models"


def test_the_newest_version_is_by_number_not_by_text(repository: Path) -> None:
    assert newest_versions(repository) == {NAME: repository / NAME / "10"}
    assert list(load_manifests(repository)) == [NAME]


def test_the_version_in_force_comes_before_the_newest(repository: Path) -> None:
    write_current(repository / NAME, 2)
    assert newest_versions(repository) == {NAME: repository / NAME / "2"}
    assert pin(repository)[NAME].version == 2
    shutil.rmtree(repository / NAME / "2")
    with pytest.raises(ArtifactError, match="has no version 2"):
        newest_versions(repository)


def test_a_repository_without_models_says_so(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no model version"):
        newest_versions(tmp_path)


def test_what_pins_a_version(repository: Path, make_manifest: Any) -> None:
    folder = repository / NAME / "2"
    manifest = make_manifest()
    for source, version in (
        (manifest, None),
        (folder, 2),
        (str(folder), 2),
        (folder / "manifest.json", 2),
        ({NAME: folder}, 2),
        ({NAME: manifest}, None),
        (repository, 10),
        (str(repository), 10),
    ):
        pinned = pin(source)
        assert list(pinned) == [NAME]
        assert pinned[NAME].version == version
        assert pinned[NAME].contract.bundle_id == manifest.bundle_id()
    assert pin(None) == {}


def test_manifests_that_cannot_be_pinned(repository: Path, make_manifest: Any, tmp_path: Path) -> None:
    for wrong in (7, {NAME: 7}, {"other": make_manifest()}, tmp_path / "absent", {NAME: "absent.json"}):
        with pytest.raises(UsageError, match="manifest"):
            pin(wrong)  # type: ignore[arg-type]
    for data in (b"", b"{}", b"\xff\xfe", b"[" * 100_000, b"null", b"[]", b'{"name": "\xc3"}'):
        (tmp_path / "manifest.json").write_bytes(data)
        with pytest.raises(ArtifactError):
            pin(tmp_path / "manifest.json")


@pytest.mark.parametrize(
    ("url", "transport", "endpoint"),
    [
        ("127.0.0.1:8000", None, Endpoint("http", "127.0.0.1", 8000)),
        ("localhost:8001", "grpc", Endpoint("grpc", "localhost", 8001)),
        ("http://host.example:80/", None, Endpoint("http", "host.example", 80)),
        ("grpc://h:1", None, Endpoint("grpc", "h", 1)),
        ("GRPC://h:1", "grpc", Endpoint("grpc", "h", 1)),
        ("[::1]:8000", None, Endpoint("http", "::1", 8000)),
        ("[fe80::1%lo]:80", None, Endpoint("http", "fe80::1%lo", 80)),
        ("triton_1.default.svc.:80", None, Endpoint("http", "triton_1.default.svc.", 80)),
        ("x" * 63 + ":80", None, Endpoint("http", "x" * 63, 80)),
        ("http://[::1]:8000", "http", Endpoint("http", "::1", 8000)),
    ],
)
def test_addresses(url: str, transport: str | None, endpoint: Endpoint) -> None:
    assert parse_endpoint(url, transport) == endpoint
    assert endpoint.authority in url.lower()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("127.0.0.1", "no port"),
        ("http://127.0.0.1", "no port"),
        ("[::1]", "no port"),
        ("::1:8000", "not a server address"),
        ("", "not a server address"),
        (":8000", "not a server address"),
        ("host:0", "port from 1 to 65535"),
        ("host:65536", "port from 1 to 65535"),
        ("host:-1", "not a server address"),
        ("host:80a", "not a server address"),
        ("host:٨٠", "not a server address"),
        ("host:8000/v2", "not a server address"),
        ("user@host:8000", "not a server address"),
        ("host:8000\r\nX: y", "not a server address"),
        ("ho st:8000", "not a server address"),
        ("a..b:8000", "not a server address"),
        (".a:8000", "not a server address"),
        ("-a:8000", "not a server address"),
        ("x" * 64 + ".com:80", "not a server address"),
        ("x." * 130 + "y:80", "not a server address"),
        ("256.1.1.1:80", "not a server address"),
        ("1.2.3:80", "not a server address"),
        ("1:80", "not a server address"),
        ("[1.2.3]:80", "not a server address"),
        ("[:::::]:80", "not a server address"),
        ("[127.0.0.1]:80", "not a server address"),
        ("[]:80", "not a server address"),
        ("ftp://host:21", "unknown scheme"),
        (None, "not text"),
        (8000, "not text"),
    ],
)
def test_addresses_that_are_refused(url: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        Client(url)
    assert caught.value.field == "url"
    assert "\n" not in str(caught.value)


def test_a_transport_that_contradicts_or_is_unknown() -> None:
    with pytest.raises(UsageError, match="contradicts"):
        Client("grpc://h:1", transport="http")
    with pytest.raises(UsageError, match="'http', 'grpc' or 'shm'"):
        Client("h:1", transport="carrier pigeon")  # type: ignore[arg-type]
