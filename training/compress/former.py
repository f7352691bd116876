"""What an earlier run of the same recipe on the same teacher left: taken away, so that what lies there is one run's.

A step that is refused today may have been accepted before; its bundle of then would pass for today's.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from tickserve.errors import ArtifactError
from tickserve.manifest import load_manifest
from tickserve.store import STAGING_PREFIX, unwritable
from training.compress.recipe import Recipe, Step

REPORT = "report.json"
KINDS = tuple(get_args(kind.model_fields["kind"].annotation)[0] for kind in get_args(get_args(Step)[0]))


def child_name(teacher: str, recipe: Recipe, place: int) -> str:
    """The name of what the step at `place` (from 0) makes."""
    return f"{teacher}-{recipe.name}-{place + 1}-{recipe.step[place].kind}"


def remove_former(out: Path, teacher: str, recipe: Recipe) -> None:
    """Remove the report below `out`, and every child that this recipe's name made of that teacher; nothing else.

    Raises ComponentError where that cannot be done.
    """
    try:
        (out / REPORT).unlink(missing_ok=True)
        for child in list(_children(out, teacher, recipe.name)):
            _remove(child)
    except OSError as error:
        raise unwritable(out / REPORT, error) from error


def _children(out: Path, teacher: str, recipe: str) -> Iterator[Path]:
    named = re.compile(rf"{re.escape(f'{teacher}-{recipe}-')}[1-9][0-9]?-({'|'.join(KINDS)})")
    for path in sorted(out.iterdir()):
        if named.fullmatch(path.name) and path.is_dir() and not path.is_symlink() and _is_child(path):
            yield path


def _is_child(path: Path) -> bool:
    """Whether a folder is a bundle of its own name that was made of another one."""
    try:
        manifest = load_manifest(path)
    except ArtifactError:
        return False
    return manifest.name == path.name and bool(manifest.parents)


def _remove(child: Path) -> None:
    """Out of sight as a whole, then gone: a run that is killed meanwhile leaves no half bundle."""
    with tempfile.TemporaryDirectory(dir=child.parent, prefix=STAGING_PREFIX, ignore_cleanup_errors=True) as staging:
        shutil.move(child, Path(staging) / child.name)
