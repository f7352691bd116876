"""What a journal holds, counted: models, statuses, times, gaps, actions, and the latency the engine saw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import numpy as np

from tickserve.journal._schema import ActionRecord, DecisionRecord, GapRecord, Record

QUANTILES = (0.5, 0.9, 0.99, 0.999)
TOTAL, ANSWERED = "total", "send_wait"  # stages: of the whole call; until an answer came


def summarize(records: Iterable[Record]) -> dict[str, Any]:
    """Counts by model, version and status, range of time, quantiles of each stage in microseconds, gaps and actions.

    `stage_us` is of the calls that asked a server or an artifact; those that ended before (refused input, too old an
    event, every breaker open) would make it look fast, so their count is `not_sent` and their whole time `not_sent_us`.
    Holds one number a stage and one id a decision; nothing else grows with the journal.
    """
    models: Counter[tuple[str, int | None, str, str]] = Counter()
    stages: dict[str, list[float]] = {}
    unsent: list[float] = []
    ids: set[str] = set()
    acted: Counter[bool] = Counter()
    gaps: list[GapRecord] = []
    first = last = None
    for record in records:
        if isinstance(record, GapRecord):
            gaps.append(record)
        elif isinstance(record, ActionRecord):
            acted[record.request_id in ids] += 1
        else:
            models[_key_of(record)] += 1
            ids.add(record.request_id)
            first = record.wall_ns if first is None else min(first, record.wall_ns)
            last = record.wall_ns if last is None else max(last, record.wall_ns)
            if not _was_sent(record):
                unsent.append(record.stage_us.get(TOTAL, 0.0))
                continue
            for stage, microseconds in record.stage_us.items():
                stages.setdefault(stage, []).append(microseconds)
    return {
        "decisions": sum(models.values()),
        "actions": sum(acted.values()),
        "actions_without_decision": acted[False],
        "gaps": [{"from": _time(gap.first_ns), "to": _time(gap.last_ns)} | _count_of(gap) for gap in gaps],
        "lost": sum(gap.count for gap in gaps),
        "first": _time(first),
        "last": _time(last),
        "models": [
            dict(zip(("model", "version", "bundle_digest", "status", "count"), (*key, count), strict=True))
            for key, count in sorted(models.items(), key=str)
        ],
        "stage_us": {stage: _quantiles(values) for stage, values in stages.items()},
        "not_sent": len(unsent),
        "not_sent_us": _quantiles(unsent) if unsent else {},
    }


def _was_sent(record: DecisionRecord) -> bool:
    """Whether anybody was asked: an answer came, or an attempt failed."""
    return record.attempts > 0 or ANSWERED in record.stage_us


def _key_of(record: DecisionRecord) -> tuple[str, int | None, str, str]:
    status = f"{record.status} {record.fallback or record.error_type}".strip()
    return (
        record.model,
        record.version if record.version is not None else record.version_asked,
        record.bundle_digest,
        status,
    )


def _count_of(gap: GapRecord) -> dict[str, Any]:
    return {"count": gap.count, "reason": gap.reason}


def _quantiles(values: list[float]) -> dict[str, float]:
    found = np.quantile(values, QUANTILES)
    return {f"p{quantile * 100:g}": round(float(value), 1) for quantile, value in zip(QUANTILES, found, strict=True)}


def _time(ns: int | None) -> str | None:
    if ns is None:
        return None
    return datetime.fromtimestamp(ns // 10**9, UTC).strftime("%Y-%m-%dT%H:%M:%S") + f".{ns % 10**9:09d}Z"
