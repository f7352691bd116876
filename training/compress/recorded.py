"""What a teacher's manifest says of its folds, read strictly: a bundle comes from elsewhere, and may say anything."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from tickserve.errors import ArtifactError
from tickserve.manifest import Manifest


class _Recorded(BaseModel):
    """Keys that are not asked for are passed over."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


class RecordedMetrics(_Recorded):
    """Of a fold's test rows; None where the model ranked none of them."""

    ic: float | None


class RecordedFold(_Recorded):
    """A fold's row of the report that training wrote: its rows, its flat band, its model, and how that ranked."""

    train: int
    validation: int
    threshold: float
    best_iteration: int = Field(ge=0)
    fit_rows: int = Field(ge=0)
    metrics: RecordedMetrics


_FOLDS: TypeAdapter[list[RecordedFold]] = TypeAdapter(Annotated[list[RecordedFold], Field(min_length=1)])


def recorded_folds(manifest: Manifest) -> list[RecordedFold]:
    """The folds of the bundle's report. Raises ArtifactError naming the field that is missing or of another type."""
    said = manifest.metrics.get("folds")
    try:
        return _FOLDS.validate_python(said)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ArtifactError(
            "the manifest has no report of walk-forward training that can be read",
            field=".".join(["metrics", "folds", *map(str, problem["loc"])]),
            expected=problem["msg"].removeprefix("Input should be ").lower(),
            was="nothing" if problem["type"] == "missing" or said is None else repr(problem["input"])[:80],
            hint="take the bundle as `tickserve train` wrote it",
        ) from error
