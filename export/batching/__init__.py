"""Batching from the deadline: the dynamic batcher's settings, simulated over recorded arrivals instead of guessed."""

from export.batching.arrivals import Arrivals, busiest, read_arrivals, with_bulk
from export.batching.derive import Derivation, apply_to_config, derive
from export.batching.rules import Setting, lint, setting_of_config
from export.batching.service import ServiceTimes
from export.batching.simulate import Outcome, simulate

__all__ = [
    "Arrivals",
    "Derivation",
    "Outcome",
    "ServiceTimes",
    "Setting",
    "apply_to_config",
    "busiest",
    "derive",
    "lint",
    "read_arrivals",
    "setting_of_config",
    "simulate",
    "with_bulk",
]
