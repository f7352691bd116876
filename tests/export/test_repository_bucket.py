"""A repository in S3, against a real service on loopback: nothing half-uploaded is seen, nothing wrong accepted."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from export.publish import NO_TERMS, Terms
from export.repository import check, collect, compare, force, lint, listing
from export.repository.bucket import Bucket
from export.repository.lock import LOCK_NAME
from export.repository.places import Local, open_repository
from export.repository.remote import Remote
from export.repository.sign import sign
from export.repository.transfer import Copied, publish_bundle, transfer
from export.triton_config import policy_of
from serving.repository import survey
from tests.export.tiny import NAME, SETTINGS, publish_seeds
from tickserve import signing
from tickserve.config import ExportSettings, RepositorySettings
from tickserve.current import CURRENT_NAME, read_current
from tickserve.errors import ArtifactError, ComponentError, DigestMismatchError, SignatureError, TickserveError
from tickserve.manifest import MANIFEST_NAME, load_manifest
from tickserve.model_config import CONFIG_NAME
from tickserve.store import write_json_atomic

KEEP = SETTINGS.keep_versions


@pytest.fixture
def url(raw: Any, request: pytest.FixtureRequest) -> str:
    raw.mkdir(f"bucket-{abs(hash(request.node.nodeid)):x}")
    return f"s3://bucket-{abs(hash(request.node.nodeid)):x}/desk/models"


@pytest.fixture(scope="module")
def three_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("three") / "models"
    publish_seeds(root, 1, 2, 3)
    return root


@pytest.fixture
def three(three_once: Path, tmp_path: Path) -> Local:
    return Local(Path(shutil.copytree(three_once, tmp_path / "models")))


def push(three: Local, url: str, service: RepositorySettings, terms: Terms = NO_TERMS, **options: Any) -> list[Copied]:
    with open_repository(url, service) as remote:
        return transfer(three, remote, keep=KEEP, terms=terms, **options)


def pull(url: str, target: Path, service: RepositorySettings, terms: Terms = NO_TERMS, **options: Any) -> list[Copied]:
    with open_repository(url, service) as remote:
        return transfer(remote, Local(target), keep=KEEP, terms=terms, **options)


def seen(url: str, service: RepositorySettings) -> tuple[dict[str, list[int]], dict[str, int | None]]:
    """What anyone sees: the versions of each model, which all verify, and what is in force."""
    with open_repository(url, service) as remote:
        assert [each.error for each in check.verify(remote) if each.error] == []
        models = remote.models()
        listed = [(each.model, each.version) for each in listing.entries(remote, keep=9)]
        assert listed == [(model, version) for model in models for version in remote.versions(model)]
        return (
            {model: remote.versions(model) for model in models},
            {model: force.in_force(remote, model) for model in models},
        )


def triton_looks_at(url: str, raw: Any) -> list[int]:
    """The versions that Triton, reading the bucket by itself, would load: the numbers its configuration names."""
    path = f"{url.removeprefix('s3://')}/{NAME}/{CONFIG_NAME}"
    if not raw.exists(path):
        return []
    kind, numbers = policy_of(raw.cat_file(path).decode())
    assert kind == "specific", "a policy by age would take in what is half uploaded"
    return numbers


def test_there_and_back(three: Local, url: str, service: RepositorySettings, raw: Any, tmp_path: Path) -> None:
    assert push(three, url, service) == [Copied(NAME, 3, copied=True, in_force=True)]
    assert push(three, url, service, every=True) == [
        Copied(NAME, 3, copied=False, in_force=True),
        Copied(NAME, 1, copied=True, in_force=False),
        Copied(NAME, 2, copied=True, in_force=False),
    ]
    assert seen(url, service) == ({NAME: [1, 2, 3]}, {NAME: 3})
    assert triton_looks_at(url, raw) == [2, 3]
    pull(url, tmp_path / "back", service, every=True)
    for path in sorted(three.root.rglob("*")):
        if path.is_file() and path.name not in (CONFIG_NAME, LOCK_NAME, CURRENT_NAME):
            assert (tmp_path / "back" / path.relative_to(three.root)).read_bytes() == path.read_bytes()
    back = Local(tmp_path / "back")
    assert [each.error for each in check.verify(back)] == [None] * 4
    assert sorted(survey(back.root / NAME).served) == [2, 3]
    assert force.in_force(back, NAME) == 3
    with open_repository(url, service) as remote:
        differs = [each.field for each in compare.repositories(three, remote)]
        assert all(field.startswith("tiny.config.version_policy") for field in differs), differs
        assert [each for each in lint.lint(remote) if each.level == "error"] == []


def test_rolling_back_signing_and_collecting_in_the_bucket(
    three: Local, url: str, service: RepositorySettings, raw: Any, tmp_path: Path
) -> None:
    push(three, url, service, every=True)
    key = signing.generate_key()
    trusted = {key.key_id: key.public()}
    with open_repository(url, service) as remote:
        with pytest.raises(SignatureError):
            force.rollback(remote, NAME, None, keep=KEEP, trusted=trusted)
        sign(remote, key)
        move = force.rollback(remote, NAME, None, keep=KEEP, trusted=trusted)
    assert (move.before, move.now) == (3, 2)
    assert triton_looks_at(url, raw) == [1, 2]
    assert pull(url, tmp_path / "pulled", service, Terms(trusted=trusted))[0].version == 2
    with open_repository(url, service) as remote:
        force.rollback(remote, NAME, 3, keep=1)
        found = collect.collect(remote, keep=1)
    assert [version for _, version, _ in found.versions] == [1]
    assert found.versions[0][2] > 1_000
    assert seen(url, service) == ({NAME: [2, 3]}, {NAME: 3})
    assert not raw.find(f"{url.removeprefix('s3://')}/{NAME}/1")


class KilledError(Exception):
    """Not one of ours: nothing catches it, as nothing catches a SIGKILL."""


def cut_after(monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    """Every write of a bucket's object counts; the one after `writes` of them does not happen, nor anything after."""
    count = 0
    put, create, swap = Bucket.put, Bucket.create, Bucket.swap

    def counted(original: Any) -> Any:
        def write(self: Bucket, name: str, data: bytes) -> None:
            nonlocal count
            if count >= writes:
                raise KilledError
            count += 1
            original(self, name, data)

        return write

    monkeypatch.setattr(Bucket, "put", counted(put))
    monkeypatch.setattr(Bucket, "create", counted(create))
    monkeypatch.setattr(Bucket, "swap", counted(swap))
    monkeypatch.setattr(Bucket, "delete", lambda *_: None)  # a dead holder releases no lock


def expire_lock(url: str, raw: Any) -> None:
    path = f"{url.removeprefix('s3://')}/{LOCK_NAME}"
    value = json.loads(raw.cat_file(path))
    raw.pipe_file(path, json.dumps(value | {"until": 0}).encode())


@pytest.mark.parametrize("before", [False, True])
def test_wherever_an_upload_is_cut_nothing_of_it_is_seen_and_the_next_one_completes(
    before: bool, three: Local, url: str, service: RepositorySettings, raw: Any, tmp_path: Path
) -> None:
    old: Any = ({NAME: [2]}, {NAME: 2}) if before else ({}, {})
    committed: Any = ({NAME: [2, 3]}, {NAME: 2}) if before else ({NAME: [3]}, {NAME: 3})
    done: Any = ({NAME: [2, 3]}, {NAME: 3}) if before else ({NAME: [3]}, {NAME: 3})
    states = []
    for writes in range(20):
        case = f"{url}-{writes}"
        if before:
            push(three, case, service, version=2)
        with pytest.MonkeyPatch.context() as patch:
            cut_after(patch, writes)
            try:
                push(three, case, service)
                finished = True
            except KilledError:
                finished = False
        states.append(seen(case, service))
        assert states[-1] in (old, committed, done)
        looks = triton_looks_at(case, raw)
        assert set(looks) <= set(states[-1][0].get(NAME, []))
        assert not looks or states[-1][1][NAME] in looks
        if states[-1] != ({}, {}) and states[-1] not in states[:-1]:
            pulled = pull(case, tmp_path / f"pulled-{writes}", service)
            assert pulled[0].version == states[-1][1][NAME]
        if finished:
            break
        if writes % 3 == 2:
            expire_lock(case, raw)
            push(three, case, service)
            assert seen(case, service) == done
    assert finished
    assert states[-1] == done
    assert old in states, "some cut came before the commit"
    assert states.index(committed) >= 3, "the files, and only then the commit"


def push_and_be_killed(root: Path, url: str, service: RepositorySettings) -> None:
    original = Remote.put_checked

    def put_then_die(self: Remote, name: str, data: bytes) -> None:
        original(self, name, data)
        if name.endswith("golden.npz"):
            os.kill(os.getpid(), signal.SIGKILL)

    Remote.put_checked = put_then_die  # type: ignore[method-assign]
    push(Local(root), url, service)


def test_an_upload_that_is_killed_leaves_no_lock_to_this_machine_and_no_version_to_anyone(
    three: Local, url: str, service: RepositorySettings, raw: Any
) -> None:
    push(three, url, service, version=1)
    process = multiprocessing.get_context("spawn").Process(target=push_and_be_killed, args=(three.root, url, service))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    base = url.removeprefix("s3://")
    assert raw.exists(f"{base}/{NAME}/3/golden.npz")
    assert raw.exists(f"{base}/{LOCK_NAME}")
    assert seen(url, service) == ({NAME: [1]}, {NAME: 1})
    assert triton_looks_at(url, raw) == [1]
    with open_repository(url, service) as remote:
        assert remote.leftovers() == ["tiny/3"]
        assert ("error", "version", "tiny/3") in {(each.level, each.rule, each.place) for each in lint.lint(remote)}
        assert collect.collect(remote, keep=9).leftovers == ["tiny/3"]
    assert not raw.find(f"{base}/{NAME}/3")
    push(three, url, service)
    assert seen(url, service) == ({NAME: [1, 3]}, {NAME: 3})


def test_what_an_earlier_upload_left_under_the_number_does_not_mix_in(
    three: Local, url: str, service: RepositorySettings, raw: Any
) -> None:
    base = url.removeprefix("s3://")
    raw.pipe_file(f"{base}/{NAME}/3/manifest.sig", b"of another time")
    raw.pipe_file(f"{base}/{NAME}/3/model.onnx", b"of another time")
    push(three, url, service)
    names = {Path(path).name for path in raw.find(f"{base}/{NAME}/3")}
    assert names == {"model.onnx", "golden.npz", MANIFEST_NAME}
    assert seen(url, service) == ({NAME: [3]}, {NAME: 3})


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz", MANIFEST_NAME])
def test_an_object_that_was_corrupted_is_never_pulled(
    name: str, three: Local, url: str, service: RepositorySettings, raw: Any, tmp_path: Path
) -> None:
    push(three, url, service)
    path = f"{url.removeprefix('s3://')}/{NAME}/3/{name}"
    data = bytearray(raw.cat_file(path))
    data[len(data) // 2] ^= 1
    raw.pipe_file(path, bytes(data))
    with pytest.raises(ArtifactError):
        pull(url, tmp_path / "pulled", service)
    assert Local(tmp_path / "pulled").models() == []
    with open_repository(url, service) as remote:
        assert [each.version for each in check.verify(remote) if each.error] in ([3], [None, 3])
    raw.rm(path)
    with pytest.raises(ArtifactError):
        pull(url, tmp_path / "pulled", service)
    assert Local(tmp_path / "pulled").models() == []


def test_a_damaged_configuration_hides_its_model_and_nothing_of_it_is_deleted(
    three: Local, url: str, service: RepositorySettings, raw: Any, tmp_path: Path
) -> None:
    push(three, url, service)
    raw.pipe_file(f"{url.removeprefix('s3://')}/{NAME}/{CONFIG_NAME}", b"nonsense")
    with open_repository(url, service) as remote:
        assert [str(each.error) for each in check.verify(remote)] != ["None"]
        assert ("error", "config") in {(each.level, each.rule) for each in lint.lint(remote)}
        assert collect.collect(remote, keep=1).leftovers == []
    with pytest.raises(TickserveError):
        pull(url, tmp_path / "pulled", service)
    assert raw.exists(f"{url.removeprefix('s3://')}/{NAME}/3/model.onnx")


def test_only_what_a_trusted_key_signed_is_pulled(
    three: Local, url: str, service: RepositorySettings, raw: Any, tmp_path: Path
) -> None:
    ours, theirs = signing.generate_key(), signing.generate_key()
    terms = Terms(trusted={ours.key_id: ours.public()})
    push(three, url, service)
    with pytest.raises(SignatureError, match="unsigned"):
        pull(url, tmp_path / "pulled", service, terms)
    with open_repository(url, service) as remote:
        sign(remote, theirs)
    with pytest.raises(SignatureError, match=theirs.key_id):
        pull(url, tmp_path / "pulled", service, terms)
    assert Local(tmp_path / "pulled").models() == []
    with open_repository(url, service) as remote:
        sign(remote, ours)
    assert pull(url, tmp_path / "pulled", service, terms)[0].copied


def test_a_published_number_keeps_its_content(
    three: Local, url: str, service: RepositorySettings, tmp_path: Path
) -> None:
    push(three, url, service, version=1)
    publish_seeds(tmp_path / "foreign", 8)
    with pytest.raises(ArtifactError, match="immutable"):
        push(Local(tmp_path / "foreign"), url, service)
    assert seen(url, service) == ({NAME: [1]}, {NAME: 1})


# Several writers.


def test_the_lock_is_held_against_others_and_released(url: str, service: RepositorySettings, raw: Any) -> None:
    one, other = Bucket(url, service), Bucket(url, service)
    with one.locked(0), pytest.raises(ComponentError, match="another publish holds"), other.locked(0.05):
        pass
    with other.locked(0):
        pass
    assert not raw.exists(f"{url.removeprefix('s3://')}/{LOCK_NAME}")


def test_a_collection_does_not_wait_for_the_lock(three: Local, url: str, service: RepositorySettings) -> None:
    push(three, url, service, every=True)
    with (
        Bucket(url, service).locked(0),
        open_repository(url, service) as remote,
        pytest.raises(ComponentError, match="another publish"),
    ):
        collect.collect(remote, keep=1)


@pytest.mark.parametrize(
    ("holder", "taken"),
    [
        ({"owner": "x", "host": "elsewhere", "pid": 1, "until": time.time() + 86_400}, False),
        ({"owner": "x", "host": "elsewhere", "pid": 1, "until": time.time() - 1}, True),
        ({"owner": "x", "host": socket.gethostname(), "pid": os.getpid(), "until": time.time() + 86_400}, False),
        ({"owner": "x", "host": socket.gethostname(), "pid": 2**22 + 1, "until": time.time() + 86_400}, True),
        ({}, True),
        ([], True),
    ],
)
def test_a_dead_holders_lock_is_taken_and_a_live_ones_is_not(
    holder: Any, taken: bool, url: str, service: RepositorySettings, raw: Any
) -> None:
    raw.pipe_file(f"{url.removeprefix('s3://')}/{LOCK_NAME}", json.dumps(holder).encode())
    try:
        with Bucket(url, service).locked(0.3):
            assert taken
    except ComponentError:
        assert not taken


def test_a_configuration_that_another_writer_changed_is_not_overwritten(
    three: Local, url: str, service: RepositorySettings, raw: Any
) -> None:
    """What is left when a lease runs out under a writer that was only slow."""
    push(three, url, service, version=1)
    with open_repository(url, service) as slow:
        push(three, url, service, version=2)
        text = (slow.root / NAME / CONFIG_NAME).read_bytes()
        with pytest.raises(ComponentError, match=r"another publish changed tiny/config\.pbtxt"):
            slow.put(f"{NAME}/{CONFIG_NAME}", text + b"# slow\n")
    assert seen(url, service)[0] == {NAME: [1, 2]}


def test_a_file_of_a_version_is_written_once(url: str, service: RepositorySettings) -> None:
    bucket_ = Bucket(url, service)
    bucket_.create("tiny/3/model.onnx", b"one")
    bucket_.create("tiny/3/model.onnx", b"one")
    with pytest.raises(ComponentError, match="another publish wrote"):
        bucket_.create("tiny/3/model.onnx", b"other")
    assert bucket_.get("tiny/3/model.onnx") == b"one"


# What can go wrong on the way.


def test_a_bucket_that_is_not_there_and_a_service_that_is_not_there(
    three: Local, service: RepositorySettings, tmp_path: Path
) -> None:
    with pytest.raises(ComponentError, match="no such bucket"), open_repository("s3://absent/models", service):
        pass
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    nowhere = RepositorySettings(s3_endpoint_url=f"http://127.0.0.1:{port}")
    with pytest.raises(ComponentError, match="s3://bucket/models: cannot list"):
        pull("s3://bucket/models", tmp_path / "pulled", nowhere)
    assert not (tmp_path / "pulled").exists()


def test_bytes_that_come_back_changed_are_not_committed(
    three: Local, url: str, service: RepositorySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Bucket.get

    def lossy(self: Bucket, name: str) -> bytes:
        data = original(self, name)
        return data[:-1] if name.endswith("/model.onnx") else data

    monkeypatch.setattr(Bucket, "get", lossy)
    with pytest.raises(ComponentError, match="gives back other bytes"):
        push(three, url, service)
    monkeypatch.undo()
    assert seen(url, service) == ({}, {})


# Publishing straight into a bucket.


def test_a_bundle_is_gated_here_and_published_there(
    trees_bundle: Path, rewrite: Any, settings: ExportSettings, url: str, service: RepositorySettings, tmp_path: Path
) -> None:
    key = signing.generate_key()
    terms = Terms(key, {key.key_id: key.public()})
    versions = []
    for seed in (7, 8, 8):
        manifest = load_manifest(trees_bundle)
        rewrite(trees_bundle, provenance=manifest.provenance.model_dump() | {"seed": seed})
        with open_repository(url, service) as remote:
            versions.append(publish_bundle(trees_bundle, remote, settings, terms))
    assert [(each.version, each.reused) for each in versions] == [(1, False), (2, False), (2, True)]
    name = versions[0].model
    assert seen(url, service) == ({name: [1, 2]}, {name: 2})
    assert pull(url, tmp_path / "pulled", service, terms)[0].version == 2


def test_a_bundle_of_another_contract_is_not_published_there(
    trees_bundle: Path, rewrite: Any, settings: ExportSettings, url: str, service: RepositorySettings
) -> None:
    with open_repository(url, service) as remote:
        publish_bundle(trees_bundle, remote, settings, NO_TERMS)
    rewrite(trees_bundle, architecture={"stride": 4})
    with open_repository(url, service) as remote, pytest.raises(ArtifactError, match="another contract"):
        publish_bundle(trees_bundle, remote, settings, NO_TERMS)
    assert list(seen(url, service)[0].values()) == [[1]]


def test_the_digest_of_what_is_in_force_is_held_on_the_way(
    three: Local, url: str, service: RepositorySettings, raw: Any, tmp_path: Path
) -> None:
    push(three, url, service)
    pull(url, tmp_path / "pulled", service)
    current = read_current(tmp_path / "pulled" / NAME)
    assert current is not None
    path = tmp_path / "current.json"
    write_json_atomic(path, {"version": 3, "manifest_sha256": "sha256:" + "0" * 64})
    raw.put_file(str(path), f"{url.removeprefix('s3://')}/{NAME}/{CURRENT_NAME}")
    with open_repository(url, service) as remote:
        (choice,) = [each for each in check.verify(remote) if each.version is None]
    assert isinstance(choice.error, DigestMismatchError)
