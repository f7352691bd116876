"""What a client does about replicas that fail, hang or lag: a frozen value object with sane defaults."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from tickserve.client._arguments import shown
from tickserve.errors import UsageError

if TYPE_CHECKING:  # an engine that never reads a configuration file does not load what reads them
    from tickserve.config import ClientSettings


@dataclass(frozen=True, kw_only=True)
class Resilience:
    """How a client gets through faults; the one absolute deadline of a call covers all of it.

    >>> Resilience()                                   # the defaults
    >>> Resilience(attempts=1, hedge_budget=0)         # neither retries nor hedges, the breaker alone

    - `attempts`: replicas that one call may ask, the first included; each at most once, hedges included.
    - `retry_tokens`, `retry_ratio`: a failure costs a token and a success gives back `retry_ratio`; retries stop while
      no more than half of the tokens are left (gRPC's retry throttling).
    - `hedge_quantile`, `hedge_budget`: a call that has waited longer than this quantile of its model's latencies is
      sent to a second replica too, and the first answer wins; hedges are at most this share of all calls. 0 is never.
    - `breaker_failures`: failures in a row (or answers over `slow_factor` times slower than another replica's) after
      which a replica is left alone. `backoff_ms`, `max_backoff_ms`: for how long, doubling, with jitter; then one
      live call tries it.

    Raises UsageError for what is out of range.
    """

    attempts: int = 3
    retry_tokens: int = 100
    retry_ratio: float = 0.1
    hedge_quantile: float = 0.95
    hedge_budget: float = 0.05
    breaker_failures: int = 5
    backoff_ms: float = 100.0
    max_backoff_ms: float = 1_000.0
    slow_factor: float = 3.0

    @classmethod
    def of(cls, settings: ClientSettings) -> Resilience:
        """What the configuration's section `[client]` says."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})

    def __post_init__(self) -> None:
        _whole("attempts", self.attempts, 1, 100)
        _whole("retry_tokens", self.retry_tokens, 2, 1_000_000)
        _whole("breaker_failures", self.breaker_failures, 1, 1_000_000)
        _between("retry_ratio", self.retry_ratio, 0, 1)
        _between("hedge_quantile", self.hedge_quantile, 0.5, 0.9999)
        _between("hedge_budget", self.hedge_budget, 0, 1)
        _between("backoff_ms", self.backoff_ms, 1, 3_600_000)
        _between("max_backoff_ms", self.max_backoff_ms, self.backoff_ms, 3_600_000)
        _between("slow_factor", self.slow_factor, 1.5, 1_000)


def _whole(field: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError("out of range", field=field, expected=f"a whole number from {low} to {high}", was=shown(value))


def _between(field: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UsageError("out of range", field=field, expected=f"a number from {low:g} to {high:g}", was=shown(value))
