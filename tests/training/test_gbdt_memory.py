"""Binned rows in memory, in chunks or in files: the same trees, and nothing left behind."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.test_gbdt_tasks import raw, settings_of
from training.examples import Examples
from training.gbdt import GbdtJob
from training.gbdt import matrix as matrix_module
from training.gbdt.matrix import Source
from training.gbdt.objective import objective_of

OUTSIDE = {"external_memory": True, "external_memory_chunk_rows": 1_024}


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary folders go; it has to be empty in the end."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"task": "ranking", "ranking_block_rows": 100},
        {"task": "regression", "subsample": 0.3, "sampling_method": "gradient_based"},
        {"top_features": 3},
    ],
    ids=["classification", "ranking", "gradient_based", "top_features"],
)
def test_external_memory_grows_the_same_trees(changes: dict[str, Any], examples: Examples, scratch: Path) -> None:
    fold = examples.published
    inside, outside = (GbdtJob(examples, settings_of(**changes, **more), 7).fit(fold) for more in ({}, OUTSIDE))
    assert raw(inside) == raw(outside)
    assert inside.model.link == outside.model.link


def test_files_are_used_and_gone_when_training_fails(examples: Examples, scratch: Path) -> None:
    job = GbdtJob(examples, settings_of(**OUTSIDE), 7)
    seen: list[int] = []

    def watch(step: int, loss: float) -> None:
        seen.append(sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file()))
        raise RuntimeError("given up")

    job.watch = watch
    with pytest.raises(RuntimeError, match="given up"):
        job.fit(examples.published)
    assert seen[0] > len(examples.published.rows.train)


def test_files_are_gone_when_a_matrix_cannot_be_made(
    examples: Examples, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Source.taken

    def taken(self: Source, start: int, stop: int) -> Any:
        if start >= 1_024:
            raise OSError("the disk is gone")
        return original(self, start, stop)

    monkeypatch.setattr(Source, "taken", taken)
    with pytest.raises(OSError, match="the disk is gone"):
        GbdtJob(examples, settings_of(**OUTSIDE), 7).fit(examples.published)


def test_rows_with_holes_are_handed_over_in_chunks(examples: Examples, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and one whole array give the same bins, so the same trees."""
    monkeypatch.setattr(matrix_module, "CHUNK_ROWS", 500)
    fold = examples.published
    whole = GbdtJob(examples, settings_of(), 7).fit(fold)
    monkeypatch.setattr(Source, "is_slice", lambda self: False)
    assert raw(GbdtJob(examples, settings_of(), 7).fit(fold)) == raw(whole)


def test_no_chunk_cuts_a_group(examples: Examples) -> None:
    rows = examples.published.rows.train
    objective = objective_of(examples, rows, 1e-4, settings_of(task="ranking", ranking_block_rows=300))
    assert objective.group is not None
    source, groups = Source(examples, rows, objective), objective.group(rows)
    edges = source.edges(1_024)
    assert (edges[0], edges[-1]) == (0, len(rows))
    assert len(edges) > 3
    assert all(groups[edge - 1] != groups[edge] for edge in edges[1:-1])
    assert np.array_equal(np.concatenate([source.described(a, b)["qid"] for a, b in pairwise(edges)]), groups)
