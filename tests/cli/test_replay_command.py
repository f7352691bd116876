"""`tickserve replay` and `tickserve journal inspect` as a user runs them: output, exit codes, one line for a fault."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.cli.conftest import Run
from tests.tickserve.conftest import build_manifest, publish
from tickserve import Client
from tickserve.errors import InputRejectedError
from tickserve.journal import Journal, journal_files
from tickserve.manifest import Provenance

MODEL = "hand-l1-gbdt"
SECONDS_MS = 30_000


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A repository and the journal of a client that scored on it."""
    folder = tmp_path_factory.mktemp("recorded")
    repository = publish(folder / "model_repository", build_manifest()).parent.parent
    with (
        Journal(folder / "journal") as journal,
        Client(f"local://{repository}", observer=journal, deadline_ms=SECONDS_MS) as client,
    ):
        for value in np.linspace(-1, 1, 12, dtype=np.float32):
            signal = client.score(MODEL, np.full((1, 4), value, np.float32))
            journal.action(signal.request_id, "hold")
    return repository, folder / "journal"


def test_identical_answers_exit_0(tickserve: Run, recorded: tuple[Path, Path]) -> None:
    done = tickserve("replay", recorded[1], "--repository", recorded[0])
    assert done.returncode == 0, done.stderr
    assert "12 requests sent again, 12 answers identical" in done.stdout
    told = json.loads(tickserve("replay", recorded[1], "--url", f"local://{recorded[0]}", "--json").stdout)
    assert (told["replayed"], told["identical"], told["different"], told["tolerance"]) == (12, 12, 0, 0.0)


def test_a_difference_exits_1_and_is_shown(tickserve: Run, recorded: tuple[Path, Path], tmp_path: Path) -> None:
    other = build_manifest(provenance=Provenance(created="2024-01-02T00:00:00Z", seed=8))
    repository = publish(tmp_path / "other", other).parent.parent
    done = tickserve("replay", recorded[1], "--repository", repository, "--show", "3")
    assert done.returncode == 1
    assert "12 of 12 answers differ from the recorded ones" in done.stderr
    assert f"{other.bundle_id()}" in done.stdout
    assert "3 of 12 requests" in done.stdout


def test_what_could_not_be_replayed_exits_4_unless_something_differs(
    tickserve: Run, recorded: tuple[Path, Path], tmp_path: Path
) -> None:
    repository, journal = recorded
    newer = Path(shutil.copytree(repository, tmp_path / "newer", symlinks=True))
    (newer / MODEL / "1").rename(newer / MODEL / "2")
    done = tickserve("replay", journal, "--repository", newer)
    assert done.returncode == 4, done.stdout + done.stderr
    assert "12 of 12 requests could not be replayed" in done.stderr
    assert f"could not be replayed: {MODEL} 1: ModelNotFoundError" in done.stdout
    assert "differ" not in done.stdout + done.stderr
    # One more model, which has changed: the difference counts.
    name = "hand-l2-gbdt"
    both = Path(shutil.copytree(journal, tmp_path / "both"))
    publish(newer, build_manifest(name=name))
    with Journal(both) as written, Client(f"local://{newer}", observer=written, deadline_ms=SECONDS_MS) as client:
        client.score(name, np.zeros((1, 4), np.float32))
    shutil.rmtree(newer / name)
    publish(newer, build_manifest(name=name, provenance=Provenance(created="2024-01-02T00:00:00Z", seed=8)))
    done = tickserve("replay", both, "--repository", newer, "--json")
    told = json.loads(done.stdout)
    assert (done.returncode, told["different"], told["not_replayed"]) == (1, 1, 12), done.stderr


def test_wrong_use_is_told_in_one_line(tickserve: Run, recorded: tuple[Path, Path], tmp_path: Path) -> None:
    repository, journal = recorded
    torn = Path(shutil.copytree(journal, tmp_path / "torn"))
    (file,) = journal_files(torn)
    file.write_bytes(file.read_bytes()[:-3])
    cases = [
        (("replay", journal, "--url", "127.0.0.1:1", "--repository", repository), 2, "give one of them"),
        (("replay", journal, "--url", "127.0.0.1:1"), 4, "cannot connect"),
        (("replay", tmp_path / "none", "--repository", repository), 3, "no journal here"),
        (("replay", torn, "--repository", repository), 3, "at offset"),
        (("replay", torn, "--repository", repository, "--tolerant"), 3, "no recorded answer"),
        (("journal", "inspect", torn), 3, "at offset"),
        (("journal", "inspect", tmp_path / "none"), 3, "no journal here"),
    ]
    for arguments, code, text in cases:
        done = tickserve(*arguments)
        assert (done.returncode, text in done.stderr) == (code, True), (arguments, done.stderr)
        assert "Traceback" not in done.stderr


def test_inspect_counts(tickserve: Run, recorded: tuple[Path, Path]) -> None:
    done = tickserve("journal", "inspect", recorded[1])
    assert done.returncode == 0, done.stderr
    assert "12 decisions, 12 actions, 0 records lost" in done.stdout
    told = json.loads(tickserve("journal", "inspect", recorded[1], "--json").stdout)
    (model,) = told["models"]
    assert (model["model"], model["version"], model["status"], model["count"]) == (MODEL, 1, "OK", 12)
    assert model["bundle_digest"] == build_manifest().digest()
    assert told["stage_us"]["total"]["p50"] > 0
    assert (told["not_sent"], told["not_sent_us"]) == (0, {})


def test_inspect_tells_apart_what_was_never_sent(tickserve: Run, recorded: tuple[Path, Path], tmp_path: Path) -> None:
    with (
        Journal(tmp_path / "journal") as journal,
        Client(f"local://{recorded[0]}", observer=journal, deadline_ms=SECONDS_MS) as client,
    ):
        client.score(MODEL, np.zeros((1, 4), np.float32))
        with pytest.raises(InputRejectedError):
            client.score(MODEL, np.zeros((1, 5), np.float32))
    done = tickserve("journal", "inspect", tmp_path / "journal")
    assert done.returncode == 0, done.stderr
    assert "total of 1 never sent" in done.stdout


def test_what_lies_before_damage_is_told_and_behind_it_with_tolerant(
    tickserve: Run, recorded: tuple[Path, Path], tmp_path: Path
) -> None:
    """Three files of two frames, 4 and 8 calls; a bit of the second frame of the second file is flipped."""
    repository, folder = recorded[0], tmp_path / "journal"
    for _ in range(3):
        with (
            Journal(folder) as journal,
            Client(f"local://{repository}", observer=journal, deadline_ms=SECONDS_MS) as client,
        ):
            for count in (4, 8):
                for _ in range(count):
                    client.score(MODEL, np.zeros((1, 4), np.float32))
                assert journal.flush()
    damaged = journal_files(folder)[1]
    data = bytearray(damaged.read_bytes())
    data[-5] ^= 1
    damaged.write_bytes(data)
    for more, calls in (((), 12 + 4), (("--tolerant",), 12 + 4 + 12)):
        inspected = tickserve("journal", "inspect", folder, *more)
        assert f"{calls} decisions, 0 actions" in inspected.stdout
        replayed = tickserve("replay", folder, "--repository", repository, *more)
        assert f"{calls} requests sent again, {calls} answers identical" in replayed.stdout
        for done in (inspected, replayed):
            assert done.returncode == 3
            assert re.search(rf"error: {damaged.name}: .* crc32, at offset \d+\n$", done.stderr), done.stderr
            assert ("the rest of a file is not read" in done.stderr) == bool(more)
        told = json.loads(tickserve("journal", "inspect", folder, "--json", *more).stdout)
        assert (told["decisions"], damaged.name in told["damage"]) == (calls, True)
    damaged.write_bytes(b"\0" + data[1:])
    alone = tickserve("journal", "inspect", damaged, "--json")
    assert (alone.returncode, alone.stdout) == (3, ""), "nothing that could be told"
