"""What `tickserve deploy render` adds to what was measured: each of these is a choice, and the values say so."""

from __future__ import annotations

from pydantic import Field

from tickserve.config.section import Section


class DeploySettings(Section):
    """From measurements to chart values (docs/deploy-values.md)."""

    utilisation: float = Field(0.6, gt=0, lt=1, description="share of a pod's capacity that the peak may take")
    memory_headroom: float = Field(1.5, ge=1, le=10, description="memory of a pod, in times what was measured")
    min_memory_mb: int = Field(
        512, ge=64, description="least memory of a pod, since another build than production's is measured"
    )
    min_replicas: int = Field(2, ge=2, le=1_000, description="fewest pods; with one, a drain stops the engines")
    growth: float = Field(2.0, ge=1, le=100, description="most pods, in times those of the peak or of the calendar")
    objective: float = Field(0.999, gt=0, lt=1, description="share of calls answered inside the deadline")
    calendar_days: int = Field(30, ge=1, le=366, description="days of change-freeze windows that are written")
