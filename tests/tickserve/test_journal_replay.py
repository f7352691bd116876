"""Replay: identical where nothing changed, and every kind of change found (each the negative control of the other)."""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tickserve.conftest import build_manifest, publish
from tests.tickserve.test_journal_files import make_decision, make_signal
from tickserve import Client
from tickserve.client import InferRequest, InferResponse
from tickserve.client._open import open_transport
from tickserve.errors import DeadlineExceededError, InputRejectedError, TransportError
from tickserve.journal import DecisionRecord, Journal, Replay, read_journal, replay, summarize
from tickserve.journal._replay import GIVE_UP
from tickserve.manifest import Provenance

MODEL = "hand-l1-gbdt"
CALLS = 25


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A repository, and the journal of a client that scored on it: good calls, a stale and a refused one."""
    folder = tmp_path_factory.mktemp("replay")
    repository = publish(folder / "model_repository", build_manifest()).parent.parent
    random = np.random.default_rng(3)
    with Journal(folder / "journal") as journal:
        with Client(f"local://{repository}", observer=journal, deadline_ms=5_000) as client:
            for call in range(CALLS):
                rows = random.normal(size=(1 + call % 8, 4)).astype(np.float32)
                rows[0, call % 4] = np.nan if call % 3 == 0 else rows[0, call % 4]
                journal.action(client.score(MODEL, rows).request_id, "hold")
            with pytest.raises(InputRejectedError):
                client.score(MODEL, rows.astype(np.float64))
        with Client(f"local://{repository}", observer=journal, max_age_ms=1) as client:
            assert client.score(MODEL, rows, newest_event_ns=1).status == "STALE"
    return repository, folder / "journal"


def again(journal: Path, url: str, change: Any = None, **options: Any) -> Replay:
    records = read_journal(journal)
    changed = (change(one) if change and isinstance(one, DecisionRecord) and one.outputs else one for one in records)
    with closing(open_transport(url, None)) as transport:
        return replay(changed, transport, **options)


def test_the_same_artifact_gives_the_same_bits(recorded: tuple[Path, Path]) -> None:
    repository, journal = recorded
    result = again(journal, f"local://{repository}")
    assert (result.replayed, result.identical, result.different) == (CALLS, CALLS, 0)
    assert result.skipped == {"ERROR InputRejectedError, nothing was sent": 1, "STALE": 1}
    assert result.models == {f"{MODEL} 1": CALLS}
    assert result.differences == []


def test_a_server_gives_the_bits_that_were_recorded_in_process(recorded: tuple[Path, Path], triton: Any) -> None:
    """The hand-made model of the fixtures is one bundle, wherever it is published."""
    for url in triton.urls:
        result = again(recorded[1], url)
        assert (result.replayed, result.identical) == (CALLS, CALLS)


def test_one_bit_of_one_number_is_found_and_told(recorded: tuple[Path, Path]) -> None:
    repository, journal = recorded
    seen = []

    def flip(record: DecisionRecord) -> DecisionRecord:
        seen.append(record.request_id)
        if len(seen) != 5:
            return record
        probabilities = record.outputs["probabilities"].copy()
        probabilities[-1, 1] = np.nextafter(probabilities[-1, 1], np.float32(1))
        return replace(record, outputs={**record.outputs, "probabilities": probabilities})

    result = again(journal, f"local://{repository}", flip)
    assert (result.identical, result.different) == (CALLS - 1, 1)
    (found,) = result.differences
    assert (found.request_id, found.model, found.version) == (seen[4], MODEL, 1)
    assert found.what == f"probabilities row {4}"
    assert found.recorded != found.replayed
    assert 0 < result.max_abs_difference < 1e-7
    seen.clear()
    assert again(journal, f"local://{repository}", flip, tolerance=1e-6).different == 0


def test_a_nan_in_an_answer_never_passes_as_close(recorded: tuple[Path, Path]) -> None:
    repository, journal = recorded

    def poison(record: DecisionRecord) -> DecisionRecord:
        return replace(record, outputs={"score": np.full_like(record.outputs["score"], np.nan)})

    assert again(journal, f"local://{repository}", poison, tolerance=10).different == CALLS


def test_another_model_under_the_same_name_is_told_by_its_bundle(recorded: tuple[Path, Path], tmp_path: Path) -> None:
    other = build_manifest(provenance=Provenance(created="2024-01-02T00:00:00Z", seed=8))
    repository = publish(tmp_path / "model_repository", other).parent.parent
    result = again(recorded[1], f"local://{repository}")
    assert (result.replayed, result.different, result.by_what) == (CALLS, CALLS, {"bundle": CALLS})
    assert result.differences[0].recorded == str(build_manifest().bundle_id())
    assert result.differences[0].replayed == str(other.bundle_id())
    assert len(result.differences) == 10


def test_a_version_that_is_not_there_is_no_difference(recorded: tuple[Path, Path], tmp_path: Path) -> None:
    """The recorded version is asked for. Nothing was compared, so nothing is called different."""
    repository = Path(shutil.copytree(recorded[0], tmp_path / "model_repository", symlinks=True))
    (repository / MODEL / "1").rename(repository / MODEL / "2")
    result = again(recorded[1], f"local://{repository}")
    assert (result.replayed, result.different, result.not_replayed, result.differences) == (0, 0, CALLS, [])
    (one,) = result.to_json()["unanswered"]
    assert (one["model"], one["version"], one["error"], one["count"]) == (MODEL, 1, "ModelNotFoundError", CALLS)
    assert one["message"]


def test_an_answer_of_another_shape_is_a_difference(recorded: tuple[Path, Path]) -> None:
    repository, journal = recorded

    def fewer(record: DecisionRecord) -> DecisionRecord:
        return replace(record, outputs={"score": record.outputs["score"][:0], "unheard_of": record.outputs["score"]})

    result = again(journal, f"local://{repository}", fewer)
    assert result.by_what == {"score": CALLS, "unheard_of": CALLS}


@pytest.mark.parametrize(("failures", "sent"), [(GIVE_UP - 1, CALLS), (CALLS, GIVE_UP)])
def test_a_server_that_goes_is_given_up_and_no_difference(
    recorded: tuple[Path, Path], failures: int, sent: int
) -> None:
    """A connection that breaks now and then costs its own request alone."""
    calls = []
    with closing(open_transport(f"local://{recorded[0]}", None)) as whole:

        class Failing:
            def infer(self, request: InferRequest, deadline_ns: int) -> InferResponse:
                calls.append(request.request_id)
                if len(calls) <= failures:
                    raise TransportError("gone")
                return whole.infer(request, deadline_ns)

            def close(self) -> None:
                """Nothing is held."""

        result = replay(read_journal(recorded[1]), Failing())
    assert (len(calls), result.not_replayed, result.different) == (sent, failures, 0)
    assert result.identical == CALLS - failures
    assert {key[2] for key in result.unanswered} == {"TransportError"}


def test_fallbacks_are_asked_again_only_where_the_artifact_spoke(recorded: tuple[Path, Path], tmp_path: Path) -> None:
    repository, _ = recorded
    error = DeadlineExceededError("late")
    rows = np.zeros((1, 4), np.float32)
    with Client(f"local://{repository}") as client:
        good = client.score(MODEL, rows)
    fields = {name: getattr(good, name) for name in ("probabilities", "score", "decision", "model", "bundle_id")}
    tensors = make_decision().tensors[:0]
    with Journal(tmp_path) as journal:
        with Client(f"local://{repository}", observer=journal) as client:
            client.score(MODEL, rows)
        tensors = next(one.tensors for one in read_after(journal, tmp_path))
        for fallback in ("local", "hold", "flat"):
            signal = make_signal(**fields, version=1, status="FALLBACK", fallback=fallback, reason="late")
            journal.decided(make_decision(model=MODEL, tensors=tensors, signal=signal, error=error, version=1))
    result = again(tmp_path, f"local://{repository}")
    assert (result.replayed, result.identical) == (2, 2)
    assert result.skipped == {"FALLBACK hold": 1, "FALLBACK flat": 1}


def read_after(journal: Journal, path: Path) -> list[DecisionRecord]:
    assert journal.flush()
    return [record for record in read_journal(path) if isinstance(record, DecisionRecord)]


def test_a_summary_counts_what_is_there(recorded: tuple[Path, Path]) -> None:
    told = summarize(read_journal(recorded[1]))
    assert (told["decisions"], told["actions"], told["lost"]) == (CALLS + 2, CALLS, 0)
    assert told["actions_without_decision"] == 0
    assert {one["status"]: one["count"] for one in told["models"]} == {
        "OK": CALLS,
        "STALE": 1,
        "ERROR InputRejectedError": 1,
    }
    assert told["first"] <= told["last"]
    quantiles = told["stage_us"]["total"]
    assert 0 < quantiles["p50"] <= quantiles["p90"] <= quantiles["p99"] <= quantiles["p99.9"]


def test_what_was_never_sent_does_not_look_like_speed(recorded: tuple[Path, Path]) -> None:
    """Refused inputs, stale events and open breakers end in microseconds; a call that waited in vain is a wait."""
    records = [one for one in read_journal(recorded[1]) if isinstance(one, DecisionRecord)]
    answered = [replace(one, stage_us={"check": 1.0, "send_wait": 9.0, "total": 10.0}) for one in records[:2]]
    silent = replace(records[0], attempts=1, status="ERROR", stage_us={"check": 1.0, "total": 10.0})
    unsent = [replace(one, stage_us={"total": 0.5}) for one in records if one.attempts == 0]
    assert [one.status for one in unsent] == ["ERROR", "STALE"]
    told = summarize([*answered, silent, *unsent])
    assert (told["decisions"], told["not_sent"]) == (5, 2)
    assert set(told["stage_us"]["total"].values()) == {10.0}
    assert set(told["not_sent_us"].values()) == {0.5}
    assert summarize(answered)["not_sent_us"] == {}
