"""Numbers as a person reads them. Every function takes None (or NaN) for "no such number" and gives an en dash."""

from __future__ import annotations

import math

NONE = "–"
MINUS = "\N{MINUS SIGN}"
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _absent(value: float | None) -> bool:
    return value is None or not math.isfinite(value)


def _minus(text: str) -> str:
    return text.replace("-", MINUS)


def count(value: float | None) -> str:
    """12345 is `12,345`."""
    return NONE if value is None or _absent(value) else _minus(f"{round(value):,}")


def fixed(value: float | None, digits: int = 3) -> str:
    """0.1234 is `0.123`."""
    return NONE if value is None or _absent(value) else _minus(f"{value:,.{digits}f}")


def signed(value: float | None, digits: int = 3) -> str:
    """0.1234 is `+0.123`."""
    return NONE if value is None or _absent(value) else _minus(f"{value:+,.{digits}f}")


def percent(value: float | None, digits: int = 1) -> str:
    """0.123 is `12.3 %`."""
    return NONE if value is None or _absent(value) else _minus(f"{100 * value:.{digits}f} %")


def general(value: float | None) -> str:
    """Four significant digits, or a power of ten for the very small: `0.1234`, `1.2 × 10⁻⁷`, `123,456`."""
    if value is None or _absent(value):
        return NONE
    if 0 < abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{_minus(mantissa)} × 10{str(int(exponent)).translate(SUPERSCRIPT)}"
    return _minus(f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}")


def micros(value: float | None) -> str:
    """Microseconds: 987.6 is `988 µs`, 12345 is `12.3 ms`."""
    if value is None or _absent(value):
        return NONE
    return f"{value:,.0f} µs" if value < 1_000 else f"{value / 1e3:.3g} ms" if value < 1e6 else f"{value / 1e6:.3g} s"


def seconds(value: float | None) -> str:
    """Seconds: 12.34 is `12.3 s`, 60 is `60 s`, 754.2 is `12 min 34 s`."""
    if value is None or _absent(value):
        return NONE
    if value < 100:
        return f"{value:.3g} s"
    hours, rest = divmod(round(value), 3_600)
    minutes, left = divmod(rest, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {left} s"


def megabytes(value: float | None) -> str:
    """Memory in MB: 512.3 is `512 MB`, 2048 is `2 GB`."""
    if value is None or _absent(value):
        return NONE
    return f"{value:,.0f} MB" if value < 1_024 else f"{value / 1_024:.3g} GB"


FILTERS = {
    "count": count, "fixed": fixed, "signed": signed, "percent": percent, "general": general, "micros": micros,
    "seconds": seconds, "megabytes": megabytes,
}  # fmt: skip
