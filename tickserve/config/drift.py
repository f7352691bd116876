"""What drift is, and what is done about it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tickserve.config.section import Section


class DriftSettings(Section):
    """Drift of served models, measured from their journal, and the action that a client is asked for.

    A threshold of 0 never asks for its action. Those of PSI hold for the score, and with `judge` for each feature: an
    hour of a market lies far from the days of training in many of them, so measure quiet hours first (docs/drift.md).
    """

    port: int = Field(9105, ge=0, le=65_535, description="of /metrics of 'monitor export'; 0 takes a free one")
    address: str = Field("127.0.0.1", min_length=1, description="bound to; whoever reaches it reads the metrics")
    every_s: float = Field(10.0, ge=0.05, le=3_600, description="how often it is measured and the action file written")
    window_s: float = Field(3_600.0, ge=1, description="the newest so many seconds are measured")
    slices: int = Field(12, ge=2, le=1_000, description="steps in which the window moves on")
    min_rows: int = Field(1_000, ge=1, description="rows in the window, for a PSI")
    min_outcomes: int = Field(200, ge=1, description="known outcomes in the window, for a calibration error")
    judge: tuple[Literal["score", "features"], ...] = Field(
        ("score",), min_length=1, description="whose PSI asks for an action; the others are exported all the same"
    )
    ignore: tuple[str, ...] = Field(
        ("time_of_day_sin", "time_of_day_cos"), description="features that move by their nature: never judged"
    )
    psi_label: float = Field(0.25, ge=0, description="label the signals from this PSI on")
    psi_shrink: float = Field(0.0, ge=0, description="shrink the size from this PSI on")
    psi_flat: float = Field(0.0, ge=0, description="take no position from this PSI on")
    calibration_label: float = Field(0.0, ge=0, le=1, description="label from this calibration error on")
    calibration_shrink: float = Field(0.0, ge=0, le=1, description="shrink from this calibration error on")
    calibration_flat: float = Field(0.0, ge=0, le=1, description="no position from this calibration error on")
    shrink_factor: float = Field(0.5, gt=0, lt=1, description="what shrink multiplies a size by")
    raise_s: float = Field(60.0, ge=0, description="a threshold is passed for so long before it is acted on")
    clear_s: float = Field(600.0, ge=0, description="and kept for so long before the action is lifted")
    clear_ratio: float = Field(0.8, gt=0, le=1, description="kept: below this share of the threshold")
    join_records: int = Field(100_000, ge=1, description="decisions that wait for their outcome; more are forgotten")

    @model_validator(mode="after")
    def _thresholds_rise(self) -> DriftSettings:
        for name in ("psi", "calibration"):
            keys = [f"{name}_{action}" for action in ("label", "shrink", "flat")]
            asked = [getattr(self, key) for key in keys if getattr(self, key)]
            if asked != sorted(asked):
                raise ValueError(f"{', '.join(keys)}: expected rising thresholds, was {asked}")
        return self
