"""The shapes an engine is optimised for: one profile for each batch size that a server is likely to make.

Letters: B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tickserve.errors import UsageError


@dataclass(frozen=True)
class Profile:
    """Batches of `least` to `most` rows; the engine is tuned for `best`."""

    least: int
    best: int
    most: int


def profiles_of(preferred: Sequence[int], max_batch: int) -> tuple[Profile, ...]:
    """Profiles that together take every batch from 1 to `max_batch`: a lone row, each preferred size, the largest.

    A size between two points belongs to the next larger one.
    """
    points = sorted({1, *preferred, max_batch})
    if points[0] < 1 or points[-1] != max_batch:
        expected = f"from 1 to max_batch ({max_batch})"
        raise UsageError("wrong batch size", field="preferred_batch_rows", expected=expected, was=str(list(preferred)))
    starts = [1, *(point + 1 for point in points)]
    return tuple(Profile(start, point, point) for start, point in zip(starts, points, strict=False))


def profile_for(rows: int, profiles: Sequence[Profile]) -> int:
    """The number of the profile that takes `rows` rows. Raises UsageError for more than the engine takes."""
    for number, profile in enumerate(profiles):
        if profile.least <= rows <= profile.most:
            return number
    raise UsageError("a batch no profile takes", field="batch", expected=f"1 to {profiles[-1].most}", was=str(rows))
