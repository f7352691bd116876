"""`tickserve repo`: publish, look after and move the versions of a model repository, in a folder or a bucket."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from tickserve import pipeline, signing, stages
from tickserve.cli import options
from tickserve.cli.export import refusal_told
from tickserve.cli.output import emit, out, says, table
from tickserve.cli.sync import sync
from tickserve.config import Config
from tickserve.errors import ArtifactError, GateRefusedError, UsageError
from tickserve.manifest import MANIFEST_NAME
from tickserve.model_config import CONFIG_NAME

app = typer.Typer(help="Publish, verify, compare, roll back and move repository versions.", no_args_is_help=True)
app.command("sync")(sync)

Where = Annotated[str, typer.Option("--repository", help="A folder, or s3://bucket/prefix.")]
Model = Annotated[str | None, typer.Option("--model", help="Only this model.")]
Models = Annotated[list[str] | None, typer.Option("--model", help="Only this model; may be repeated.")]
Required = options.RequireSignature
NoActivate = options.NoActivate
HERE = str(options.DEFAULT_REPOSITORY)


def _settings(config: Path | None, profile: str | None, required: bool | None = None, **keys: Any) -> Config:
    overrides = {"repository.require_signature": required} | {f"repository.{key}": keys[key] for key in keys}
    return options.settings_of(config, profile, overrides).config


@contextmanager
def _opened(where: str, config: Config, *, create: bool = False) -> Iterator[Any]:
    with stages.load("export.repository.places").open_repository(where, config.repository, create=create) as found:
        yield found


def _terms(config: Config, *, activate: bool = True) -> Any:
    return stages.load("export.publish").Terms.of(config.repository, activate=activate)


@app.command("publish")
def publish(
    bundles: Annotated[Path, typer.Argument(help="A bundle, or a folder of bundles.")],
    repository: Where = HERE,
    no_activate: NoActivate = False,
    require_gate: options.RequireGate = False,
    require_signature: Required = None,
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Convert bundles, measure what runs them, hold them to parity, sign and publish them, and put them in force."""
    settings = _settings(config, profile, require_signature)
    terms = _terms(settings, activate=not no_activate)
    terms.check()
    rows = []
    with refusal_told(as_json):
        found = pipeline.bundles_to_publish(bundles, settings, require_gate=require_gate)
        with _opened(repository, settings, create=True) as place:
            for bundle in found:
                item = pipeline.publish(bundle, place, settings, terms, says)
                rows.append(_published(item, place, terms))
    emit(rows, as_json, lambda: _show("published", rows))


def _published(item: Any, place: Any, terms: Any) -> dict[str, Any]:
    return {
        "model": item.model,
        "version": item.version,
        "published": not item.reused,
        "in_force": stages.load("export.repository.force").in_force(place, item.model),
        "bundle_digest": item.manifest.export.bundle_digest,
        "signed_by": terms.key.key_id if terms.key and not item.reused else None,
    }


@app.command("list")
def list_versions(
    repository: Where = HERE,
    model: Model = None,
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """List versions: which is in force, which Triton loads, which `gc` keeps, size, digest and signer."""
    settings = _settings(config, profile)
    listing = stages.load("export.repository.listing")
    with _opened(repository, settings) as place:
        trusted = signing.trusted_keys(settings.repository)
        found = [
            asdict(each) for each in listing.entries(place, keep=settings.repository.keep, trusted=trusted, model=model)
        ]
    emit(found, as_json, lambda: _show("versions", [_brief(each) for each in found]))


def _brief(entry: dict[str, Any]) -> dict[str, Any]:
    """A version in a terminal's width; `--json` has every field whole."""
    states = ("in_force", "loaded", "kept")  # each includes the next
    return {
        "model": entry["model"],
        "version": entry["version"],
        "state": next((name.replace("_", " ") for name in states if entry[name]), "goes"),
        "bytes": entry["size_bytes"],
        "manifest": entry["manifest_sha256"].removeprefix("sha256:")[:12],
        "signature": entry["signed_by"] if entry["signature"] == "trusted" else entry["signature"],
    } | ({"problem": entry["problem"]} if entry["problem"] else {})


@app.command("verify")
def verify(
    repository: Where = HERE,
    model: Model = None,
    require_signature: Required = None,
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Hold every version against its digests, graph, configuration, signature and golden pairs (or exit 3)."""
    settings = _settings(config, profile, require_signature)
    trusted = signing.trusted_keys(settings.repository)
    with _opened(repository, settings) as place:
        verdicts = stages.load("export.repository.check").verify(place, trusted=trusted, model=model)
    if not verdicts:
        raise ArtifactError("no model here: nothing was verified", field="repository", hint="is this the folder?")
    rows = [
        {
            "model": each.model,
            "version": each.version,
            "ok": each.error is None,
            "signed_by": each.signed_by,
            "error": str(each.error) if each.error else None,
        }
        for each in verdicts
    ]
    emit(rows, as_json, lambda: _show("verified", rows))
    failed = [each for each in verdicts if each.error is not None]
    if failed:
        raise ArtifactError(
            f"{len(failed)} of {len(verdicts)} cannot be trusted, the first of model {failed[0].model!r}"
        )


@app.command("diff")
def diff(
    a: Annotated[str, typer.Argument(help="model@version, a version's folder, or a repository.")],
    b: Annotated[str, typer.Argument(help="The other one, of the same kind.")],
    repository: Where = HERE,
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Compare two versions (fields, features, metrics, gates, files, configuration) or two repositories."""
    settings = _settings(config, profile)
    compare = stages.load("export.repository.compare")
    versions = [_is_version(a, "argument A"), _is_version(b, "argument B")]
    if versions[0] != versions[1]:
        raise UsageError("cannot compare a version with a repository", field="diff", was=f"{a[:80]} and {b[:80]}")
    if versions[0]:
        with _version_folder(a, repository, settings) as one, _version_folder(b, repository, settings) as other:
            found = compare.versions(one, other)
    else:
        with _opened(a, settings) as one, _opened(b, settings) as other:
            found = compare.repositories(one, other)
    rows = [asdict(each) for each in found]
    emit(rows, as_json, lambda: _show("differences", rows) if rows else out.print("no difference"))


def _is_version(text: str, field: str) -> bool:
    """Whether an argument names a version, or else a repository. Raises UsageError when it can be neither."""
    if _parts(text) is not None or (Path(text) / MANIFEST_NAME).is_file():
        return True
    # The folder of a model holds no models: as a repository it would differ from nothing.
    if "://" in text or (Path(text).is_dir() and not (Path(text) / CONFIG_NAME).is_file()):
        return False
    raise UsageError(
        "neither a version nor a repository",
        field=field,
        expected="model@version, the folder of a version, or a repository (a folder or s3://bucket/prefix)",
        was=text[:100],
        hint="'tickserve repo list' shows the versions",
    )


def _parts(text: str) -> tuple[str, int] | None:
    model, _, version = text.partition("@")
    if "/" in text or not version.isascii() or not version.isdigit() or len(version) > 18:
        return None
    return model, int(version)


@contextmanager
def _version_folder(text: str, repository: str, settings: Config) -> Iterator[Path]:
    parts = _parts(text)
    if parts is None:
        yield Path(text)
        return
    with _opened(repository, settings) as place:
        yield place.folder(*parts)


@app.command("lint")
def lint(
    repository: Where = HERE,
    model: Model = None,
    require_signature: Required = None,
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Look for what will go wrong: fields left to Triton, strays, links, unlisted or unsigned versions.

    Exit code 1 for an error; a warning or a note of a deliberate choice only says so.
    """
    settings = _settings(config, profile, require_signature)
    trusted = signing.trusted_keys(settings.repository)
    with _opened(repository, settings) as place:
        found = stages.load("export.repository.lint").lint(place, trusted=trusted, model=model)
    rows = [asdict(each) for each in found]
    emit(rows, as_json, lambda: _show_findings(rows))
    errors = sum(each.level == "error" for each in found)
    if errors:
        raise GateRefusedError(f"{errors} errors", field="lint")


@app.command("rollback")
def rollback(
    model: Annotated[str, typer.Argument(help="The model.")],
    to: Annotated[int | None, typer.Option("--to", min=1, help="The version; else the one before.")] = None,
    repository: Where = HERE,
    require_signature: Required = None,
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Put an older version (or, with --to, any) in force, once it verifies."""
    settings = _settings(config, profile, require_signature)
    trusted = signing.trusted_keys(settings.repository)
    with _opened(repository, settings) as place:
        move = stages.load("export.repository.force").rollback(
            place, model, to, keep=settings.export.keep_versions, trusted=trusted
        )
    emit(asdict(move), as_json, lambda: out.print(f"{move.model}: version {move.now} is in force, was {move.before}"))


@app.command("gc")
def collect(
    repository: Where = HERE,
    model: Model = None,
    keep: Annotated[int | None, typer.Option("--keep", min=1, help="Newest versions kept.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Remove old versions and leftovers; never what is in force, came before it, or is loaded."""
    settings = _settings(config, profile, keep=keep)
    with _opened(repository, settings) as place:
        found = stages.load("export.repository.collect").collect(
            place, keep=settings.repository.keep, model=model, dry_run=dry_run
        )
    rows = [{"model": name, "version": version, "bytes": size} for name, version, size in found.versions]
    value = {"removed": rows, "leftovers": found.leftovers, "dry_run": dry_run}

    def show() -> None:
        if rows:
            _show("would be removed" if dry_run else "removed", rows)
        out.print(f"{len(rows)} versions, {len(found.leftovers)} leftovers" + (" (dry run)" if dry_run else ""))

    emit(value, as_json, show)


@app.command("pull")
def pull(
    source: Annotated[str, typer.Argument(help="s3://bucket/prefix, or a folder.")],
    repository: Where = HERE,
    model: Models = None,
    version: Annotated[int | None, typer.Option("--version", min=1, help="Else the one in force.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every version.")] = False,
    no_activate: NoActivate = False,
    require_signature: Required = None,
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Copy versions into --repository, each verified before it can be seen there."""
    settings = _settings(config, profile, require_signature)
    _move(source, repository, settings, model, version, every, not no_activate, as_json)


@app.command("push")
def push(
    target: Annotated[str, typer.Argument(help="s3://bucket/prefix, or a folder.")],
    repository: Where = HERE,
    model: Models = None,
    version: Annotated[int | None, typer.Option("--version", min=1, help="Else the one in force.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every version.")] = False,
    no_activate: NoActivate = False,
    require_signature: Required = None,
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Copy versions of --repository elsewhere, each verified before it can be seen there."""
    settings = _settings(config, profile, require_signature)
    _move(repository, target, settings, model, version, every, not no_activate, as_json)


def _move(
    source: str,
    target: str,
    settings: Config,
    models: Sequence[str] | None,
    version: int | None,
    every: bool,
    activate: bool,
    as_json: bool,
) -> None:
    if version is not None and every:
        raise UsageError("contradict each other", field="--version, --all")
    # The key is for publishing: what is copied keeps the signature it has.
    terms = stages.load("export.publish").Terms(None, signing.trusted_keys(settings.repository), activate)
    with _opened(source, settings) as one, _opened(target, settings, create=True) as other:
        found = stages.load("export.repository.transfer").transfer(
            one,
            other,
            keep=settings.export.keep_versions,
            terms=terms,
            models=models or (),
            version=version,
            every=every,
        )
    rows = [asdict(each) for each in found]
    emit(rows, as_json, lambda: _show("copied", rows))


@app.command("sign")
def sign(
    repository: Where = HERE,
    model: Model = None,
    version: Annotated[int | None, typer.Option("--version", min=1, help="Only this version.")] = None,
    key: Annotated[Path | None, typer.Option("--key", help="The private key; else the configured one.")] = None,
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Sign published versions, once their digests verify. An older signature is replaced."""
    settings = _settings(config, profile, signing_key_file=str(key) if key else None)
    private = signing.signing_key(settings.repository)
    if private is None:
        raise UsageError("no key", field="--key", expected="a file, repository.signing_key_file or the environment")
    if version is not None and model is None:
        raise UsageError("a version of which model?", field="--model")
    with _opened(repository, settings) as place:
        found = stages.load("export.repository.sign").sign(place, private, model=model, version=version)
    rows = [{"model": name, "version": number, "signed_by": private.key_id} for name, number in found]
    emit(rows, as_json, lambda: _show("signed", rows))


@app.command("keygen")
def keygen(
    path: Annotated[Path, typer.Argument(help="Where the private key goes; the public one gets '.pub'.")],
    as_json: options.AsJson = False,
) -> None:
    """Make a signing key. Whoever is to trust it adds the public line to repository.trusted_keys_file."""
    key = signing.generate_key()
    public = signing.write_key(key, path)
    value = {"key_id": key.key_id, "private": str(path), "public": str(public), "trusted_line": key.public_line()}
    emit(value, as_json, lambda: out.print(f"key {key.key_id}: {path} (private), {public} (public)"))


def _show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row)) or ["model", "version"]
    table(title, columns, [[_cell(row.get(name)) for name in columns] for row in rows])


def _show_findings(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        out.print(f"{row['level']} {row['place']} ({row['rule']}): {row['message']}", markup=False)
    if not rows:
        out.print("nothing found")


def _cell(value: object) -> object:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)[:100] if isinstance(value, dict | list | str) else value
