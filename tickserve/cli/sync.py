"""`tickserve repo sync`: what a server is about to serve, verified and nothing else, in a folder of its own."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tickserve import signing, stages
from tickserve.cli import options
from tickserve.cli.output import emit, out, says, table
from tickserve.errors import UsageError

QUANTITY = re.compile(r"([0-9]{1,15})(?:([kMGT])(i?)|(Ki))?")
POWERS = {"k": 1, "K": 1, "M": 2, "G": 3, "T": 4}

Source = Annotated[str, typer.Option("--source", help="A folder, s3://bucket/prefix, or gs://bucket/prefix.")]
Into = Annotated[Path, typer.Option("--into", help="A folder of this command's own; created where it is missing.")]
PublicKey = Annotated[
    Path | None, typer.Option("--public-key", help="Trusted keys; what none of them signed is refused.")
]
SizeLimit = Annotated[str, typer.Option("--size-limit", help="The most that all models take together, e.g. 512Mi.")]


def bytes_of(quantity: str) -> int:
    """A quantity of bytes as Kubernetes writes it: `512Mi`, `4Gi`, `2G`, `1000000`. Raises UsageError."""
    match = QUANTITY.fullmatch(quantity)
    if match is None or (match[2] == "k" and match[3]):
        raise UsageError("not a size", field="--size-limit", expected="e.g. 512Mi or 4Gi", was=repr(quantity)[:50])
    size, unit = int(match[1]), (match[4] or match[2] or "")[:1]
    step = 1024 if match[3] or match[4] else 1000
    for _ in range(POWERS.get(unit, 0)):
        size *= step
    return size


def sync(
    source: Source,
    into: Into,
    public_key: PublicKey = None,
    model: Annotated[list[str] | None, typer.Option("--model", help="Only this model; may be repeated.")] = None,
    size_limit: SizeLimit = "4Gi",
    require_signature: options.RequireSignature = None,
    profile: options.Profile = None,
    config: options.ConfigFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Make a folder hold exactly the versions in force at a source, each verified before it can be seen there."""
    overrides = {
        "repository.require_signature": require_signature,
        "repository.trusted_keys_file": str(public_key) if public_key else None,
    }
    settings = options.settings_of(config, profile, overrides).config.repository
    trusted, limit = signing.trusted_keys(settings), bytes_of(size_limit)
    if trusted is None:
        says("no key is trusted, so no signature is checked: --public-key names one")
    place = stages.load("export.repository.source").open_source(source, settings)
    result = stages.load("export.repository.sync").sync(
        place, into, trusted=trusted, models=model or (), limit_bytes=limit
    )
    rows = [asdict(each) for each in result.models]

    def show() -> None:
        columns = ["model", "version", "signed by", "bytes", "copied"]
        cells = ("model", "version", "signed_by", "size_bytes", "copied")
        table("in force", columns, [[_cell(row[name]) for name in cells] for row in rows])
        out.print(f"{into}: {len(rows)} in force, {len(result.removed)} removed")

    emit({"models": rows, "removed": result.removed}, as_json, show)


def _cell(value: object) -> object:
    return "-" if value is None else {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
