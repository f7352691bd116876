"""When an alert fires: what the rules of `tickserve monitor render` hold the metrics against."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tickserve.config.section import Section

Day = Literal["sunday", "monday", "tuesday", "wednesday", "thursday", "friday", "saturday"]
WEEK: tuple[Day, ...] = ("sunday", "monday", "tuesday", "wednesday", "thursday", "friday", "saturday")
CLOCK = r"^([01][0-9]|2[0-3]):[0-5][0-9]$|^24:00$"


class MonitoringSettings(Section):
    """Thresholds and windows of the alert rules; docs/runbooks/ says what each alert means."""

    runbook_url: str = Field("docs/runbooks", min_length=1, description="where the runbook pages are to be read")
    server_jobs: str = Field(".*tickserve.*", min_length=1, description="job labels of the servers, as a pattern")
    client_jobs: str = Field("engine", min_length=1, description="job labels of the engines' clients, as a pattern")
    journal_jobs: str = Field("journal", min_length=1, description="those of 'monitor export', as a pattern")
    server_pods: str = Field(".*tickserve.*", min_length=1, description="names of their pods, as a pattern")
    gpu_pods: str = Field(".*", description="pods whose GPUs are looked at, as a pattern; DCGM's label pod")
    window_s: float = Field(300.0, gt=0, description="ratios and quantiles are of so long")
    queue_window_s: float = Field(60.0, gt=0, description="so is the queue time of a request")
    page_after_s: float = Field(60.0, ge=0, description="severity critical: true for so long, and it fires")
    ticket_after_s: float = Field(600.0, ge=0, description="severity warning: true for so long, and it fires")
    slo_objective: float = Field(0.99, gt=0, lt=1, description="share of calls that are to make their deadline")
    burn_factors: tuple[float, float, float] = Field(
        (14.4, 6.0, 1.0), description="how many times too fast the error budget may go: page, page, ticket"
    )
    burn_long_s: tuple[float, float, float] = Field((3_600.0, 21_600.0, 259_200.0), description="seen over so long")
    burn_short_s: tuple[float, float, float] = Field(
        (300.0, 1_800.0, 21_600.0), description="and still going on: seen over so long too"
    )
    burn_misses: float = Field(
        5.0, ge=0, description="deadlines missed in the shorter time; so few or fewer are no alert"
    )
    pending_requests: float = Field(64.0, ge=1, description="of a model, waiting in all its servers together")
    queue_seconds: float = Field(0.02, gt=0, description="mean wait of a request in the server's queue")
    error_ratio: float = Field(0.05, gt=0, le=1, description="share of calls that end with an error")
    fallback_ratio: float = Field(0.05, gt=0, le=1, description="share of calls that a fallback answered")
    skew_s: float = Field(900.0, ge=0, description="replicas may serve different versions for so long")
    no_traffic_s: float = Field(300.0, gt=0, description="in session a model may go without a request for so long")
    session_days: tuple[Day, ...] = Field(WEEK, min_length=1, description="days of the session, UTC")
    session_open: str = Field("00:00", pattern=CLOCK, description="hh:mm, UTC")
    session_close: str = Field("24:00", pattern=CLOCK, description="hh:mm, UTC; 24:00 is midnight")
    stale_ratio: float = Field(0.01, gt=0, le=1, description="share of calls whose newest event was too old")
    event_age_s: float = Field(5.0, gt=0, description="age of the newest event, 99 of 100 calls")
    psi: float = Field(0.25, gt=0, description="population stability index of the feature that drifts most")
    calibration_error: float = Field(0.1, gt=0, le=1, description="expected calibration error")
    hit_ratio: float = Field(0.5, ge=0, le=1, description="share of right calls among those with an outcome")
    journal_lag_s: float = Field(300.0, gt=0, description="the newest record that was read may be so old")
    memory_window_s: float = Field(3_600.0, gt=0, description="memory is watched over so long")
    memory_growth_mb: float = Field(200.0, gt=0, description="growth over that time that is a leak")
    restart_window_s: float = Field(3_600.0, gt=0, description="restarts are counted over so long")
    restarts: int = Field(2, ge=0, description="of one server in that time that are still no alert")
    certificate_days: float = Field(21.0, gt=0, description="a certificate is to hold so much longer")
    gpu_celsius: float = Field(85.0, gt=0)
    gpu_memory_ratio: float = Field(0.95, gt=0, le=1, description="used share of a GPU's memory")
    gpu_busy_ratio: float = Field(0.95, gt=0, le=1, description="busy share of a GPU")

    @model_validator(mode="after")
    def _short_within_long(self) -> MonitoringSettings:
        for long, short in zip(self.burn_long_s, self.burn_short_s, strict=True):
            if not 0 < short < long:
                raise ValueError(
                    f"burn_short_s: expected each above 0 and below burn_long_s, was {short:g} of {long:g}"
                )
        if min(self.burn_factors) <= 0:
            raise ValueError(f"burn_factors: expected each above 0, was {min(self.burn_factors):g}")
        return self

    @model_validator(mode="after")
    def _objective_can_burn(self) -> MonitoringSettings:
        # A ratio never exceeds 1, so a budget this large burns too fast without anybody being told.
        if max(self.burn_factors) * (1 - self.slo_objective) >= 1:
            raise ValueError(
                "slo_objective: expected burn_factors times the budget (1 - slo_objective) below 1, was "
                f"{max(self.burn_factors):g} * {1 - self.slo_objective:g}"
            )
        return self

    @model_validator(mode="after")
    def _session_is_one(self) -> MonitoringSettings:
        if self.session_open >= self.session_close:
            raise ValueError(f"session_close: expected after {self.session_open}, was {self.session_close}")
        return self
