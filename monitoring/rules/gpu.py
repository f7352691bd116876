"""Alerts on the GPUs, as NVIDIA's DCGM exporter reports them."""

from __future__ import annotations

from functools import partial

from monitoring.rules.rule import Alert, Group, number
from tickserve.config import MonitoringSettings

WHERE = "GPU {{ $labels.gpu }} of {{ or $labels.Hostname $labels.instance }}"


def gpu_alerts(settings: MonitoringSettings) -> Group:
    """Every alert on the GPUs."""
    pods = f'{{pod=~"{settings.gpu_pods}"}}'
    alert = partial(Alert, severity="warning", after_s=settings.ticket_after_s)
    return Group(
        "tickserve-gpu",
        [
            Alert(
                alert="TickserveGpuXid",
                severity="critical",
                # The value is the newest error's number, and stays until the driver is loaded anew.
                expr=f"DCGM_FI_DEV_XID_ERRORS{pods} > 0",
                after_s=0,
                summary=f"{WHERE} reports XID {{{{ $value }}}}",
                description="The driver reported an error of the GPU; NVIDIA's list of XID errors says which.",
                keys=("gpu_pods",),
            ),
            alert(
                alert="TickserveGpuHot",
                expr=f"DCGM_FI_DEV_GPU_TEMP{pods} > {number(settings.gpu_celsius)}",
                summary=f"{WHERE} is hot",
                description="{{ $value }} degrees Celsius; near its limit a GPU lowers its clock.",
                keys=("gpu_celsius", "gpu_pods", "ticket_after_s"),
            ),
            alert(
                alert="TickserveGpuMemory",
                expr=f"DCGM_FI_DEV_FB_USED{pods}\n/ (DCGM_FI_DEV_FB_USED{pods} + DCGM_FI_DEV_FB_FREE{pods})"
                f" > {number(settings.gpu_memory_ratio)}",
                summary=f"{WHERE} has hardly any memory left",
                description="{{ $value | humanizePercentage }} of its memory is used; the next version may not load.",
                keys=("gpu_memory_ratio", "gpu_pods", "ticket_after_s"),
            ),
            alert(
                alert="TickserveGpuBusy",
                expr=f"DCGM_FI_DEV_GPU_UTIL{pods} / 100 > {number(settings.gpu_busy_ratio)}",
                summary=f"{WHERE} has no time left",
                description="Busy {{ $value | humanizePercentage }} of the time: the queue is about to grow.",
                keys=("gpu_busy_ratio", "gpu_pods", "ticket_after_s"),
            ),
        ],
    )
