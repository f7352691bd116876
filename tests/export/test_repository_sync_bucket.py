"""The repository sync from a bucket: a real S3 service on loopback, and Google's by the same interface."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from export.publish import NO_TERMS
from export.repository import bucket
from export.repository.places import Local, open_repository
from export.repository.source import Objects, open_source
from export.repository.sync import sync
from export.repository.transfer import transfer
from tests.export.mirror import OTHER, TRUSTED, files, in_force
from tests.export.tiny import NAME, SETTINGS
from tickserve.config import RepositorySettings
from tickserve.errors import ArtifactError, ComponentError, DigestMismatchError
from tickserve.manifest import MANIFEST_NAME
from tickserve.model_config import MODEL_FILE


@pytest.fixture
def place(raw: Any, request: pytest.FixtureRequest, desk: Path, service: RepositorySettings) -> str:
    """Where the desk's versions in force lie in a bucket."""
    name = f"bucket-{abs(hash(request.node.nodeid)):x}"
    raw.mkdir(name)
    with open_repository(f"s3://{name}/desk", service) as remote:
        transfer(Local(desk), remote, keep=SETTINGS.keep_versions, terms=NO_TERMS, every=True)
    return f"{name}/desk"


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_from_a_bucket(scheme: str, place: str, service: RepositorySettings, desk: Path, into: Path) -> None:
    source = open_source(f"{scheme}://{place}", service)
    assert source.label == f"{scheme}://{place}"
    assert {each.model: each.version for each in sync(source, into, trusted=TRUSTED).models} == {NAME: 3, OTHER: 1}
    assert in_force(into) == {NAME: 3, OTHER: 1}
    assert [each.copied for each in sync(source, into, trusted=TRUSTED).models] == [False, False]


def test_google_is_asked_where_no_endpoint_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(bucket, "_filesystem", asked.append)
    monkeypatch.setattr(bucket.Bucket, "listing", lambda _: {})
    Objects("gs://bucket/desk", RepositorySettings())
    Objects("s3://bucket/desk", RepositorySettings())
    assert [each.s3_endpoint_url for each in asked] == ["https://storage.googleapis.com", ""]


def test_half_an_upload_is_never_seen(place: str, raw: Any, service: RepositorySettings, into: Path) -> None:
    """Fault 16: objects of a version that no configuration lists, and one whose model was cut."""
    for name in (MODEL_FILE, MANIFEST_NAME):
        raw.pipe_file(f"{place}/{NAME}/4/{name}", b"{")
    source = open_source(f"s3://{place}", service)
    sync(source, into, trusted=TRUSTED)
    assert in_force(into) == {NAME: 3, OTHER: 1}
    raw.pipe_file(f"{place}/{NAME}/3/{MODEL_FILE}", b"cut")
    shutil.rmtree(into / NAME)
    with pytest.raises(DigestMismatchError, match="model 'tiny' version 3"):
        sync(open_source(f"s3://{place}", service), into, trusted=TRUSTED)
    assert in_force(into) == {OTHER: 1}


def test_an_object_that_is_gone_or_a_bucket_that_is_not_there(
    place: str, raw: Any, service: RepositorySettings, into: Path
) -> None:
    source = open_source(f"s3://{place}", service)
    raw.rm(f"{place}/{NAME}/3/{MODEL_FILE}")
    with pytest.raises(ArtifactError, match="missing from the bucket"):
        sync(source, into, trusted=TRUSTED)
    with pytest.raises((ComponentError, ArtifactError)):
        sync(open_source("s3://no-such-bucket-here/desk", service), into, trusted=TRUSTED)
    assert files(into) == {}
