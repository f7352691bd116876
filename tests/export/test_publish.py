"""Publishing: all or nothing, one at a time, one contract per name; and what a crash leaves behind."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import export.publish as publishing
from export import export_bundle
from export.publish import Terms
from export.repository import check as checking
from export.repository.lock import LOCK_NAME, locked
from export.repository.places import Local
from export.triton_config import read_config
from export.verify import verify_version, verify_versions, versions_of
from serving.repository import survey
from tests.export.conftest import verify_model
from tickserve.config import ExportSettings
from tickserve.errors import ArtifactError, ComponentError, DigestMismatchError, UnsafeModelError
from tickserve.manifest import Manifest, load_manifest

Rewrite = Callable[..., Manifest]
NAME = "btcusd-bars-gbdt"


def seen_by_triton(repository: Path) -> list[str]:
    """Every folder in the repository is a model to Triton; inside one, folders that are numbers are versions."""
    models = [path for path in repository.iterdir() if path.is_dir()] if repository.exists() else []
    return sorted(
        f"{model.name}/{path.name}" for model in models for path in model.iterdir() if path.name[0] in "0123456789"
    ) + [model.name for model in models if not versions_of(model)]


def another(bundle: Path, rewrite: Rewrite, seed: int = 8) -> Manifest:
    """The same model trained "again": another digest under the same name and contract."""
    manifest = load_manifest(bundle)
    return rewrite(bundle, provenance=manifest.provenance.model_dump() | {"seed": seed})


def test_versions_count_up_and_never_change(
    trees_bundle: Path, repository: Path, settings: ExportSettings, rewrite: Rewrite
) -> None:
    first = export_bundle(trees_bundle, repository, settings)
    before = {path.name: path.read_bytes() for path in first.path.iterdir()}
    another(trees_bundle, rewrite)
    second = export_bundle(trees_bundle, repository, settings)
    assert (first.version, second.version) == (1, 2)
    assert {path.name: path.read_bytes() for path in first.path.iterdir()} == before
    assert sorted(verify_model(repository / NAME)) == [1, 2]
    options = read_config(repository / NAME / "config.pbtxt")
    assert sorted(options.manifests) == [1, 2]


def test_a_number_is_never_given_twice(
    trees_bundle: Path, repository: Path, settings: ExportSettings, rewrite: Rewrite
) -> None:
    export_bundle(trees_bundle, repository, settings)
    another(trees_bundle, rewrite)
    export_bundle(trees_bundle, repository, settings)
    shutil.rmtree(repository / NAME / "1")
    another(trees_bundle, rewrite, seed=9)
    assert export_bundle(trees_bundle, repository, settings).version == 3


def test_another_largest_batch_is_gated_and_published_anew(
    trees_bundle: Path, repository: Path, settings: ExportSettings
) -> None:
    export_bundle(trees_bundle, repository, settings)
    told: list[str] = []
    larger = settings.model_copy(update={"max_batch": 32})
    again = export_bundle(trees_bundle, repository, larger, told.append)
    assert (again.version, again.reused) == (2, False)
    assert "a request may have 16 rows" in told[-1]


def test_a_version_that_waits_takes_no_rows_from_the_one_in_force(
    trees_bundle: Path, repository: Path, settings: ExportSettings
) -> None:
    export_bundle(trees_bundle, repository, settings)
    smaller = settings.model_copy(update={"max_batch": 8})
    for reused in (False, True):
        waits = export_bundle(trees_bundle, repository, smaller, terms=Terms(activate=False))
        assert (waits.version, waits.reused) == (2, reused)
        assert read_config(repository / NAME / "config.pbtxt").max_batch == 16
        assert list(survey(repository / NAME).served) == [1]
        assert [each.error for each in checking.verify(Local(repository)) if each.error] == []


@pytest.mark.parametrize("field", ["features", "architecture"])
def test_another_contract_needs_another_name(
    field: str, trees_bundle: Path, repository: Path, settings: ExportSettings, rewrite: Rewrite
) -> None:
    first = export_bundle(trees_bundle, repository, settings)
    manifest = load_manifest(trees_bundle)
    changed: dict[str, Any] = {
        "features": manifest.features.model_dump() | {"digest": "sha256:" + "2" * 64},
        "architecture": {"stride": 4},
    }
    rewrite(trees_bundle, **{field: changed[field]})
    with pytest.raises(ArtifactError, match="another model name"):
        export_bundle(trees_bundle, repository, settings)
    assert seen_by_triton(repository) == [f"{NAME}/1"]
    assert verify_version(first.path)


@pytest.mark.parametrize("published_before", [False, True])
@pytest.mark.parametrize("step", ["verify_version", "_write_config", "write_manifest"])
def test_an_error_while_staging_leaves_nothing(
    step: str,
    published_before: bool,
    trees_bundle: Path,
    repository: Path,
    settings: ExportSettings,
    rewrite: Rewrite,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if published_before:
        export_bundle(trees_bundle, repository, settings)
        another(trees_bundle, rewrite)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publishing, step, full)
    with pytest.raises(ComponentError, match="No space left"):
        export_bundle(trees_bundle, repository, settings)
    assert seen_by_triton(repository) == ([f"{NAME}/1"] if published_before else [])
    assert not list(repository.parent.rglob(".staging-*"))


def kill_between_staging_and_rename(bundle: Path, repository: Path, settings: ExportSettings) -> None:
    """The config is written and the version is not yet in place: killed exactly there."""
    original = publishing._write_config

    def write_then_die(*arguments: Any) -> None:
        original(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    publishing._write_config = write_then_die
    export_bundle(bundle, repository, settings)


def run_apart(target: Callable[..., None], *arguments: Any) -> multiprocessing.Process:
    # Spawned: a fork would copy ONNX Runtime's locks.
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
    process.start()
    return process  # type: ignore[return-value]


@pytest.mark.parametrize("published_before", [False, True])
def test_a_publish_that_is_killed_is_invisible_and_the_next_one_cleans_up(
    published_before: bool, trees_bundle: Path, repository: Path, settings: ExportSettings, rewrite: Rewrite
) -> None:
    visible = []
    if published_before:
        export_bundle(trees_bundle, repository, settings)
        another(trees_bundle, rewrite)
        visible = [f"{NAME}/1"]
    process = run_apart(kill_between_staging_and_rename, trees_bundle, repository, settings)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert list(repository.parent.rglob(".staging-*")), "it was killed before it staged anything"
    assert seen_by_triton(repository) == visible
    if published_before:
        options = read_config(repository / NAME / "config.pbtxt")
        assert sorted(options.manifests) == [1, 2], "a digest of a version that is not there yet is harmless"
        assert sorted(verify_model(repository / NAME)) == [1]
    published = export_bundle(trees_bundle, repository, settings)
    assert published.version == len(visible) + 1
    assert not list(repository.parent.rglob(".staging-*"))
    assert sorted(verify_model(repository / NAME)) == list(range(1, published.version + 1))


def hold(repository: Path, seconds: float) -> None:
    with locked(repository):
        (repository / "held").touch()
        time.sleep(seconds)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_second_publish_waits_for_the_first(trees_bundle: Path, repository: Path, settings: ExportSettings) -> None:
    process = run_apart(hold, repository, 0.5)
    wait_for(repository / "held")
    assert export_bundle(trees_bundle, repository, settings).version == 1
    process.join(30)
    assert process.exitcode == 0


def test_a_lock_that_is_never_released_is_an_error_not_a_hang(repository: Path) -> None:
    with (
        locked(repository),
        pytest.raises(ComponentError, match="another publish"),
        locked(repository, wait_s=0.05),
    ):
        pass
    assert (repository / LOCK_NAME).exists()


def export_apart(bundle: Path, repository: Path, settings: ExportSettings) -> None:
    export_bundle(bundle, repository, settings)


@pytest.mark.system
def test_two_exports_at_once_publish_one_bundle_once(
    trees_bundle: Path, repository: Path, settings: ExportSettings
) -> None:
    processes = [run_apart(export_apart, trees_bundle, repository, settings) for _ in range(2)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert seen_by_triton(repository) == [f"{NAME}/1"]


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz"])
def test_a_version_with_other_bytes_is_not_trusted(
    name: str, trees_bundle: Path, repository: Path, settings: ExportSettings
) -> None:
    published = export_bundle(trees_bundle, repository, settings)
    data = (published.path / name).read_bytes()
    (published.path / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    for check in (lambda: verify_version(published.path), lambda: verify_model(published.path.parent)):
        with pytest.raises(DigestMismatchError, match=name):
            check()
    with pytest.raises(DigestMismatchError, match=name):
        export_bundle(trees_bundle, repository, settings)


def test_a_manifest_that_was_edited_is_not_trusted(
    trees_bundle: Path, repository: Path, settings: ExportSettings
) -> None:
    published = export_bundle(trees_bundle, repository, settings)
    path = published.path / "manifest.json"
    path.write_text(path.read_text().replace('"atol": 1e-06', '"atol": 1.0'))
    with pytest.raises(DigestMismatchError, match="bundle_digest"):
        verify_version(published.path)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"no manifest\.json"):
        verify_version(published.path)


def test_a_gate_result_that_was_edited_is_found_by_the_config(
    trees_bundle: Path, repository: Path, settings: ExportSettings
) -> None:
    published = export_bundle(trees_bundle, repository, settings)
    path = published.path / "manifest.json"
    path.write_text(path.read_text().replace('"passed": true', '"passed": false', 1))
    with pytest.raises(DigestMismatchError, match=r"manifest\.1"):
        verify_model(repository / NAME)


def test_a_graph_swapped_together_with_its_digest_is_still_checked(
    trees_bundle: Path, repository: Path, settings: ExportSettings
) -> None:
    from tickserve.store import sha256_bytes

    published = export_bundle(trees_bundle, repository, settings)
    (published.path / "model.onnx").write_bytes(b"\x80\x04 a pickle")
    path = published.path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["export"]["onnx_sha256"] = sha256_bytes(b"\x80\x04 a pickle")
    path.write_text(json.dumps(manifest))
    with pytest.raises(UnsafeModelError, match="pickle"):
        verify_version(published.path)


def test_a_repository_that_cannot_be_written_is_a_clear_error(
    trees_bundle: Path, tmp_path: Path, settings: ExportSettings
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ComponentError, match="cannot write"):
        export_bundle(trees_bundle, tmp_path / "file" / "repository", settings)


def test_a_model_folder_left_empty_by_hand_is_used(
    trees_bundle: Path, repository: Path, settings: ExportSettings
) -> None:
    (repository / NAME).mkdir(parents=True)
    assert export_bundle(trees_bundle, repository, settings).version == 1
    assert sorted(verify_model(repository / NAME)) == [1]


def test_the_real_triton_serves_past_what_a_killed_publish_left(
    trees_bundle: Path, repository: Path, settings: ExportSettings
) -> None:
    """A staging folder, the lock file, and a config that lists a version which never came."""
    from serving.embedded import EmbeddedTriton
    from tickserve.config import ServeSettings

    export_bundle(trees_bundle, repository, settings)
    staging = repository / NAME / ".staging-killed"
    shutil.copytree(repository / NAME / "1", staging)
    (staging / "model.onnx").write_bytes(b"half a fi")
    config = repository / NAME / "config.pbtxt"
    line = 'parameters { key: "manifest.2" value { string_value: "sha256:00" } }\n'
    config.write_text(config.read_text() + line)
    ports = ServeSettings(http_port=0, grpc_port=0, metrics_port=0)
    with EmbeddedTriton(repository, ports) as server:
        assert list(server.models) == [NAME]


def test_the_digest_is_recomputed_from_the_published_file_alone(
    trees_bundle: Path, repository: Path, settings: ExportSettings
) -> None:
    """With json and hashlib only, as an engine in another language would."""
    published = export_bundle(trees_bundle, repository, settings)
    value = json.loads((published.path / "manifest.json").read_bytes())
    record = value.pop("export")
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert record["bundle_digest"] == "sha256:" + hashlib.sha256(text).hexdigest()
    assert record["bundle_id"] == int.from_bytes(hashlib.sha256(text).digest()[:8], "big", signed=True)
    bundle = json.loads((trees_bundle / "manifest.json").read_bytes())
    assert value == {name: each for name, each in bundle.items() if name != "export"}


@pytest.mark.parametrize("stray", [Path.mkdir, Path.touch])
def test_something_else_named_like_a_version_is_not_one(
    stray: Callable[[Path], None], trees_bundle: Path, repository: Path, settings: ExportSettings, rewrite: Rewrite
) -> None:
    export_bundle(trees_bundle, repository, settings)
    stray(repository / NAME / "2")
    assert versions_of(repository / NAME) == [1]
    assert export_bundle(trees_bundle, repository, settings).reused
    another(trees_bundle, rewrite)
    assert export_bundle(trees_bundle, repository, settings).version == 3
    verified, refused = verify_versions(repository / NAME)
    assert (sorted(verified), sorted(refused)) == ([1, 3], [2])
    assert "manifest.json" in str(refused[2])


def test_a_version_that_would_be_served_with_more_rows_than_it_was_gated_for_is_not_trusted(
    trees_bundle: Path, repository: Path, settings: ExportSettings
) -> None:
    export_bundle(trees_bundle, repository, settings)
    config = repository / NAME / "config.pbtxt"
    config.write_text(config.read_text().replace("max_batch_size: 16", "max_batch_size: 4096"))
    with pytest.raises(ArtifactError, match=r"max_batch_size.*expected at most 16, was 4096"):
        verify_model(repository / NAME)
