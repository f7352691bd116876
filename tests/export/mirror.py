"""A desk's signed repository, which a sync mirrors, and what is seen of the mirror."""

from __future__ import annotations

from pathlib import Path

from export.publish import Terms
from export.repository.places import Local
from export.repository.sync import MARKER_NAME
from serving.repository import survey
from tickserve import signing
from tickserve.current import folder_in_force

KEY = signing.generate_key()
TRUSTED = {KEY.key_id: KEY.public()}
SIGNED = Terms(KEY, TRUSTED)
OTHER = "other"


def in_force(into: Path) -> dict[str, int]:
    """What a server would serve of a folder, which is what an engine would ask for; each of them verifies."""
    found = {}
    for name in Local(into).models():
        chosen = folder_in_force(into / name)
        assert chosen is not None
        assert int(chosen.name) in survey(into / name, TRUSTED).served
        found[name] = int(chosen.name)
    return found


def files(into: Path) -> dict[str, bytes]:
    skipped = (MARKER_NAME, ".publish.lock")
    return {
        str(path.relative_to(into)): path.read_bytes()
        for path in into.rglob("*")
        if path.is_file() and path.name not in skipped
    }
