"""How market data become labelled rows, and what a trade costs."""

from __future__ import annotations

from pydantic import Field

from tickserve.config.section import Section


class FeatureSettings(Section):
    """How market events become rows."""

    levels: int = Field(5, ge=1, le=20, description="order-book levels read (fewer where the file has fewer)")
    chunk_rows: int = Field(131_072, ge=1_024, description="events held in memory at a time")
    max_rows: int = Field(60_000, ge=0, description="rows kept: every k-th event, k a power of two; 0 keeps all")
    bars_max_rows: int = Field(500_000, ge=0, description="the same for bars, whose horizon is counted in rows")
    store: str = Field(".tickserve/features", description="folder of the feature cache")


class LabelSettings(Section):
    """What is predicted: the direction of the move over a fixed horizon."""

    book_horizon_ms: int = Field(1_000, ge=1, description="horizon for order books and quotes")
    bars_horizon_rows: int = Field(5, ge=1, description="horizon for bars")
    flat_quantile: float = Field(1 / 3, ge=0, lt=1, description="share of training moves called flat, per fold")


class ValidationSettings(Section):
    """Purged, embargoed walk-forward."""

    folds: int = Field(3, ge=1, le=20)
    embargo_horizons: float = Field(1.0, ge=0, description="gap after the purge, in label horizons")
    min_train_rows: int = Field(500, ge=50)
    trials: int = Field(1, ge=1, description="configurations tried so far, this one too: deflates scores")
    min_deflated_probability: float = Field(0.95, gt=0, lt=1, description="of the IC, asked by the gate")
    min_effective_rows: int = Field(100, ge=1, description="independent rows out of sample, asked by the gate")


class CostSettings(Section):
    """What a round trip costs in the PnL that is reported."""

    fee_bps: float = Field(1.0, ge=0, description="fee per side, in basis points of the price")
    bar_half_spread_bps: float = Field(1.0, ge=0, description="half-spread assumed for bars, which carry no quotes")
