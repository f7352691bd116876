"""Lint: what a person should know about a repository before Triton does.

A finding is an error where Triton would load something it should not, or not load what is in force; else a warning. A
note is a choice that the configuration says it made, with what it costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from google.protobuf import text_format  # type: ignore[import-untyped]
from tritonclient.grpc import model_config_pb2 as schema

from export.batching import rules
from export.contents import named_files
from export.largest_batch import largest_batch
from export.repository.force import in_force
from export.repository.listing import loaded
from export.repository.lock import LOCK_NAME
from export.repository.places import Repository, require_model
from export.repository.sync import MARKER_NAME
from export.tensorrt.plan import PLAN_FILE, PLANS, RECORD_FILE, TIMINGS
from export.triton_config import read_config
from export.verify import CODE_PATTERN
from tickserve.current import CURRENT_NAME, folder_in_force
from tickserve.errors import TickserveError
from tickserve.manifest import MANIFEST_NAME, load_manifest
from tickserve.model_config import CONFIG_NAME, BackendOptions
from tickserve.signing import SIGNATURE_NAME, TrustedKeys, verify_signature
from tickserve.store import STAGING_PREFIX, sha256_file

# What Triton would otherwise fill in by itself, from a graph it has to open first.
EXPLICIT = (
    "name",
    "backend",
    "max_batch_size",
    "input",
    "output",
    "version_policy",
    "instance_group",
    "dynamic_batching",
    "default_model_filename",
)
LEVELS = ("error", "warning", "note")
EVERY_ROOT = frozenset({LOCK_NAME, MARKER_NAME, "README.md", ".gitignore"})


@dataclass(frozen=True)
class Finding:
    """What is wrong, and where: `place` is a name relative to the repository."""

    level: Literal["error", "warning", "note"]
    rule: str
    place: str
    message: str


def lint(repository: Repository, *, trusted: TrustedKeys | None = None, model: str | None = None) -> list[Finding]:
    """Every finding, errors first. Raises ArtifactError for an unknown model."""
    models = [require_model(repository, model)] if model else repository.models()
    found = [] if model else list(_strays_of_the_root(repository))
    for name in models:
        found += [*_config(repository, name), *_choice(repository, name), *_files(repository, name)]
        for version in repository.versions(name):
            found += _version(repository, name, version, trusted)
    return sorted(found, key=lambda each: (LEVELS.index(each.level), each.place, each.rule, each.message))


def _strays_of_the_root(repository: Repository) -> Iterator[Finding]:
    known = {*repository.models(), *EVERY_ROOT}
    for name in sorted({file.split("/")[0] for file in repository.files()} - known):
        if name.startswith(STAGING_PREFIX):
            yield Finding("warning", "leftover", name, "left by a killed writer: tickserve repo gc")
        else:
            yield Finding("warning", "stray", name, "Triton takes every folder of a repository for a model")


def _config(repository: Repository, model: str) -> Iterator[Finding]:
    path, place = repository.root / model / CONFIG_NAME, f"{model}/{CONFIG_NAME}"
    try:
        options = read_config(path)
        config = text_format.Parse(path.read_text("utf-8"), schema.ModelConfig())
    except TickserveError as error:
        yield Finding("error", "config", place, str(error))
        return
    given = {field.name for field, _ in config.ListFields()} | {config.WhichOneof("scheduling_choice")}
    for field in EXPLICIT:
        if field not in given:
            yield Finding("warning", "explicit", place, f"{field} is not set: Triton would choose")
    yield from _largest(repository, model, options, place)
    yield from _batching(config, place)
    yield from _gated(repository, model, options, place)
    for found in rules.lint(rules.setting_of_config(path)):
        yield Finding("note" if found.note else "warning", "batching", place, f"{found.field}: {found.reason}")
    versions = repository.versions(model)
    for version in sorted(set(options.manifests) - set(versions)):
        yield Finding("warning", "listed", place, f"lists version {version}, which is not there")
    for version in versions:
        if version not in options.manifests:
            yield Finding("error", "unlisted", f"{model}/{version}", f"{CONFIG_NAME} lists no digest of its manifest")
        elif options.manifests[version] != sha256_file(repository.root / model / str(version) / MANIFEST_NAME):
            yield Finding(
                "error", "digest", f"{model}/{version}", f"{CONFIG_NAME} lists another digest of its manifest"
            )


def _gated(repository: Repository, model: str, options: BackendOptions, place: str) -> Iterator[Finding]:
    """Threads and graph level that no gate judged for the version in force: another last digit, or another answer."""
    now = in_force(repository, model)
    try:
        export = load_manifest(repository.folder(model, now)).export if now is not None else None
    except TickserveError:
        return  # a finding of its own says so
    gated = export.judged_with() if export else None
    if gated is None:
        return
    pairs = {
        "threads": (gated.threads, options.intra_op_threads),
        "graph level": (gated.graph_level, options.graph_level),
    }
    for what, (judged, asked) in pairs.items():
        if judged != asked:
            yield Finding("error", "gated", place, f"asks for {what} {asked}; version {now} was gated with {judged}")


def _largest(repository: Repository, model: str, options: BackendOptions, place: str) -> Iterator[Finding]:
    """A version that would be loaded with more rows than its gates judged, or is in force with fewer."""
    most, now = options.max_batch, in_force(repository, model)
    for version in loaded(repository, model):
        gated = largest_batch(repository.root / model, [version])
        if gated is None:
            continue  # a finding of its own says that the manifest is not valid
        if gated < most:
            yield Finding("error", "batch", place, f"serves up to {most} rows; version {version} was gated for {gated}")
        elif version == now and gated > most:
            message = f"serves up to {most} rows; version {now}, in force, was gated for {gated}"
            yield Finding("warning", "batch", place, message)


def _batching(config: Any, place: str) -> Iterator[Finding]:
    batching, most = config.dynamic_batching, config.max_batch_size
    warm = {each.batch_size for each in config.model_warmup}
    for rows in batching.preferred_batch_size:
        if rows > most:
            yield Finding("error", "batch", place, f"prefers batches of {rows} rows, more than max_batch_size {most}")
        elif rows not in warm:
            yield Finding("warning", "warmup", place, f"the preferred batch of {rows} rows is not warmed up")
    if 1 not in warm:
        yield Finding("warning", "warmup", place, "a single row is not warmed up")


def _choice(repository: Repository, model: str) -> Iterator[Finding]:
    place = f"{model}/{CURRENT_NAME}"
    try:
        chosen = folder_in_force(repository.root / model)
    except TickserveError as error:
        yield Finding("error", "in-force", place, str(error))
        return
    versions, loads = repository.versions(model), loaded(repository, model)
    if chosen is None:
        yield Finding("warning", "in-force", place, "missing: the newest version counts as in force")
    now = in_force(repository, model)
    if not versions:
        yield Finding("error", "empty", model, "no published version: Triton reports the model as broken")
    elif now not in loads:
        yield Finding("error", "in-force", place, f"version {now} is in force and Triton does not load it")
    elif loads[-1] != now:
        message = f"version {now} is in force, and a request without a version is answered by {loads[-1]}"
        yield Finding("warning", "in-force", place, message)


def _files(repository: Repository, model: str) -> Iterator[Finding]:
    published = {str(version) for version in repository.versions(model)}
    numbers = {name for name in map(str, repository.taken(model)) if name not in published}
    for number in sorted(numbers, key=int):
        yield Finding("error", "version", f"{model}/{number}", "Triton takes it for a version, and it is not one")
    for file in repository.files():
        parts = file.split("/")
        if parts[0] != model or len(parts) < 2 or parts[1] in numbers:
            continue
        if (repository.root / file).is_symlink():
            yield Finding("error", "link", file, "a link: what it points to is in nobody's digest")
        elif any(part.startswith(STAGING_PREFIX) for part in parts):
            yield Finding("warning", "leftover", file, "left by a killed writer: tickserve repo gc")
        elif CODE_PATTERN.search(parts[-1]):
            yield Finding("error", "code", file, "Triton would load and run it: no such model is served")
        elif not _known(repository.root / model, parts[1:], published):
            yield Finding("warning", "stray", file, "no manifest names it")


def _known(folder: Path, parts: list[str], published: set[str]) -> bool:
    if len(parts) == 1:
        return parts[0] in (CONFIG_NAME, CURRENT_NAME, TIMINGS)
    if len(parts) == 4 and parts[0] in published and parts[1] == PLANS:
        return parts[3] in (PLAN_FILE, RECORD_FILE)
    if len(parts) > 2 or parts[0] not in published:
        return False
    try:
        named = named_files(load_manifest(folder / parts[0]))
    except TickserveError:
        return True  # a finding of its own says that the manifest is not valid
    return parts[1] in {*named, MANIFEST_NAME, SIGNATURE_NAME}


def _version(repository: Repository, model: str, version: int, trusted: TrustedKeys | None) -> Iterator[Finding]:
    folder, place = repository.root / model / str(version), f"{model}/{version}"
    try:
        manifest = load_manifest(folder)
    except TickserveError as error:
        yield Finding("error", "manifest", place, str(error))
        return
    if manifest.name != model:
        yield Finding("error", "manifest", place, f"the manifest is of {manifest.name!r}")
    try:
        present = set(named_files(manifest))
    except TickserveError as error:
        yield Finding("error", "manifest", place, str(error))
        return
    for name in sorted(present - {file.split("/")[-1] for file in repository.files() if file.startswith(f"{place}/")}):
        yield Finding("error", "missing", f"{place}/{name}", "the manifest names it and it is not there")
    if trusted is not None:
        try:
            verify_signature(folder, trusted, version)
        except TickserveError as error:
            yield Finding("error", "signature", place, str(error))
