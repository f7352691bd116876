"""What a run may take and what a model has to reach."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tickserve.config.section import Section

Action = Literal["off", "warn", "fail"]


class LimitSettings(Section):
    """What a run may use and a model has to reach; not keeping to it is said, or fails (docs/instruments.md).

    For a key with an `on_` beside it: off is not looked at, warn is said and recorded, fail exits 1, nothing written.
    """

    memory_mb: int = Field(2_048, ge=256, description="of a whole run of demo, which reports it; of universe too")
    run_s: float = Field(60.0, gt=0, description="of a whole run of demo, which reports it")
    features_s: float = Field(60.0, gt=0, description="building the features of one source")
    on_features_s: Action = "warn"
    train_s: float = Field(300.0, gt=0, description="training one family, all folds")
    on_train_s: Action = "warn"
    train_memory_mb: int = Field(4_096, ge=1, description="resident memory of all processes while one family trains")
    on_train_memory_mb: Action = "warn"
    hit_rate: float = Field(0.5, ge=0, le=1, description="least share of right calls out of sample, all folds")
    on_hit_rate: Action = "warn"

    @property
    def may_fail(self) -> bool:
        """Whether a limit of training is to fail: no bundle is written before all families were held against them."""
        return "fail" in (self.on_train_s, self.on_train_memory_mb, self.on_hit_rate)
