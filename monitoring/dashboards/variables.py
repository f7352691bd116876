"""What a reader chooses at the top of a dashboard, and what a query looks like without Grafana.

`$__rate_interval` is Grafana's: the range in which every scrape is seen at least four times.
"""

from __future__ import annotations

import re

NAMESPACE = "label_values(up, namespace)"
MODEL = 'label_values({__name__=~"nv_inference_count|tickserve_client_calls_total", namespace=~"$namespace"}, model)'
JOB = 'label_values(nv_inference_count{namespace=~"$namespace"}, job)'
OF_MODEL = {"namespace": NAMESPACE, "model": MODEL}
OF_SERVER = {"namespace": NAMESPACE, "job": JOB, "model": MODEL}
# Selectors of the series with these labels.
HERE = 'namespace=~"$namespace", model=~"$model"'
SERVED = 'namespace=~"$namespace", job=~"$job", model=~"$model"'
INTERVAL = "$__rate_interval"


def concrete(expr: str, interval: str) -> str:
    """`expr` as Prometheus takes it: all values of every variable, and rates over `interval`."""
    return re.sub(r"\$\{?\w+\}?", lambda found: interval if found[0] == INTERVAL else ".*", expr)
