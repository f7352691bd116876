"""What tests ask of the repository of four versions (the fixture `four`), and do to it."""

from __future__ import annotations

from pathlib import Path

from export.repository import check
from export.repository.force import rollback
from export.repository.places import Local
from serving.repository import survey
from tests.export.tiny import NAME, SETTINGS
from tickserve import signing

KEEP = SETTINGS.keep_versions


def loaded(repository: Local) -> list[int]:
    return sorted(survey(repository.root / NAME).served)


def rolled_back(repository: Local, to: int | None = None) -> tuple[int | None, int]:
    move = rollback(repository, NAME, to, keep=KEEP)
    return move.before, move.now


def spoil(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def config(repository: Local) -> Path:
    return repository.root / NAME / "config.pbtxt"


def edit(repository: Local, old: str, new: str) -> None:
    text = config(repository).read_text()
    assert old in text
    config(repository).write_text(text.replace(old, new))


def wrong(repository: Local, trusted: signing.TrustedKeys | None = None) -> dict[int | None, str]:
    return {
        each.version: str(each.error) for each in check.verify(repository, model=NAME, trusted=trusted) if each.error
    }
