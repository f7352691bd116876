"""A STAND-IN for the journal's exporter (`tickserve monitor export`): its metrics, with values that a test sets.

It reads no journal. What is shown with it is that the rules and dashboards react to these metrics.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Gauge, start_http_server

MODEL = {"model": "drifting", "version": "1"}
GOOD = {"psi": 0.05, "flat": 0.0, "calibration": 0.02, "hits": 0.55, "lag": 0.1}
BAD = {"psi": 0.6, "flat": 1.0, "calibration": 0.3, "hits": 0.4, "lag": 900.0}


class JournalStandIn:
    """Serves the metrics until it is closed."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        both = ("model", "version")
        self._psi_max = self._gauge("tickserve_drift_psi_max", both)
        self._psi = self._gauge("tickserve_drift_psi", (*both, "feature"))
        self._action = self._gauge("tickserve_drift_action", ("model", "action"))
        self._calibration = self._gauge("tickserve_calibration_error", both)
        self._bins = self._gauge("tickserve_calibration_bin_ratio", (*both, "bin", "kind"))
        self._hits = self._gauge("tickserve_trading_hit_ratio", both)
        self._age = self._gauge("tickserve_feature_age_seconds", ("model", "quantile"))
        self._lag = self._gauge("tickserve_journal_lag_seconds", ())
        self._totals = [
            self._gauge(f"tickserve_trading_{name}_total", both) for name in ("outcomes", "pnl_bp", "turnover")
        ]
        self._records = self._gauge("tickserve_journal_records_total", ("model", "status"))
        self.set(GOOD)
        self._server, self._thread = start_http_server(0, addr="127.0.0.1", registry=self.registry)

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self._server.server_address[1]}"

    def _gauge(self, name: str, labels: tuple[str, ...]) -> Gauge:
        return Gauge(name, "a stand-in", labels, registry=self.registry)

    def set(self, values: dict[str, float]) -> None:
        self._psi_max.labels(**MODEL).set(values["psi"])
        for feature in ("f0", "f1", "score"):
            self._psi.labels(**MODEL, feature=feature).set(values["psi"])
        for action in ("none", "label", "shrink", "flat"):
            self._action.labels(model=MODEL["model"], action=action).set(values["flat"] if action == "flat" else 0)
        self._calibration.labels(**MODEL).set(values["calibration"])
        for kind, ratio in (("predicted", 0.6), ("realised", 0.6 - values["calibration"])):
            self._bins.labels(**MODEL, bin="0.6", kind=kind).set(ratio)
        self._hits.labels(**MODEL).set(values["hits"])
        self._age.labels(model=MODEL["model"], quantile="0.99").set(0.01)
        self._lag.set(values["lag"])
        for total in self._totals:
            total.labels(**MODEL).set(1_000)
        self._records.labels(model=MODEL["model"], status="OK").inc(100)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
