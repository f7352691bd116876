"""GPU: what NVIDIA's DCGM exporter reports of the cards."""

from __future__ import annotations

from monitoring.dashboards.panel import Dashboard, Panel, Query
from monitoring.dashboards.variables import NAMESPACE
from tickserve.config import MonitoringSettings

CARD = "{{Hostname}} GPU {{gpu}}"


def gpu(settings: MonitoringSettings) -> Dashboard:
    """The page of the cards."""
    pods = f'{{namespace=~"$namespace", pod=~"{settings.gpu_pods}"}}'
    used, free = f"DCGM_FI_DEV_FB_USED{pods}", f"DCGM_FI_DEV_FB_FREE{pods}"
    busy = Panel(
        "Busy",
        "Share of the time in which the GPU did something.",
        [Query(f"DCGM_FI_DEV_GPU_UTIL{pods} / 100", CARD)],
        unit="percentunit",
        limit=settings.gpu_busy_ratio,
    )
    memory = Panel(
        "Memory",
        "Used share of the GPU's memory.",
        [Query(f"{used} / ({used} + {free})", CARD)],
        unit="percentunit",
        limit=settings.gpu_memory_ratio,
    )
    megabytes = Panel("Memory used", "In MiB, as DCGM counts it.", [Query(used, CARD)], unit="decmbytes")
    temperature = Panel(
        "Temperature",
        "Near its limit a GPU lowers its clock.",
        [Query(f"DCGM_FI_DEV_GPU_TEMP{pods}", CARD)],
        unit="celsius",
        limit=settings.gpu_celsius,
    )
    power = Panel("Power", "Drawn by the card.", [Query(f"DCGM_FI_DEV_POWER_USAGE{pods}", CARD)], unit="watt")
    xid = Panel(
        "Newest XID error",
        "0 is none; NVIDIA's list says what the others are.",
        [Query(f"DCGM_FI_DEV_XID_ERRORS{pods}", CARD)],
        kind="stat",
        limit=1,
    )
    return Dashboard(
        uid="tickserve-gpu",
        title="Tickserve: GPU",
        about="Needs NVIDIA's DCGM exporter.",
        variables={"namespace": NAMESPACE},
        rows={"Load": [busy, memory, megabytes], "Health": [temperature, power, xid]},
    )
