"""The small arguments of a call: spans of time, versions, times, request ids. Whatever is given, the error is typed."""

from __future__ import annotations

import math
import operator
from contextlib import suppress
from numbers import Real

import numpy as np

from tickserve.errors import InputRejectedError, UsageError

MAX_INT64 = 2**63 - 1
MAX_REQUEST_ID = 256
MAX_DEADLINE_MS = 3_600_000.0
LANES = (1, 2)  # as `tickserve.model_config` names them


def shown(value: object, limit: int = 60) -> str:
    """`value` for a message: its repr on one line and cut, or its type where it has none (an int too long to print)."""
    try:
        return repr(value)[:limit].replace("\n", " ")
    except Exception:  # a repr may raise anything, and it must not replace the error that is about to be raised
        return f"a {type(value).__name__} that cannot be printed"


def positive_ms(field: str, value: object, error: type[UsageError] | type[InputRejectedError]) -> float:
    """Milliseconds above 0 and at most an hour, from any real number. Raises `error`."""
    number = math.nan
    if isinstance(value, float | int | Real) and not isinstance(value, bool):
        with suppress(OverflowError, ValueError, TypeError):  # an int beyond every float
            number = float(value)
    if not 0 < number <= MAX_DEADLINE_MS:
        raise error("not a time span", field=field, expected="milliseconds above 0, at most an hour", was=shown(value))
    return number


def yes_or_no(field: str, value: object) -> bool:
    """A switch: True or False and nothing that is only taken for one. Raises UsageError."""
    if not isinstance(value, bool):
        raise UsageError("not a switch", field=field, expected="True or False", was=shown(value))
    return value


def whole_number(field: str, value: object, message: str, expected: str) -> int:
    """A whole number from 1 that fits 64 bits, from any integer type (numpy's too). Raises InputRejectedError."""
    number = 0
    if not isinstance(value, bool | np.bool_):
        with suppress(TypeError):
            number = operator.index(value)  # type: ignore[arg-type]
    if not 1 <= number <= MAX_INT64:
        raise InputRejectedError(message, field=field, expected=expected, was=shown(value))
    return number


def check_lane(value: object) -> int:
    """The lane of a request, of any integer type. Raises InputRejectedError."""
    number = 0
    if not isinstance(value, bool | np.bool_):
        with suppress(TypeError):
            number = operator.index(value)  # type: ignore[arg-type]
    if number not in LANES:
        expected = "1 (single decisions) or 2 (bulk scoring)"
        raise InputRejectedError("not a lane", field="priority", expected=expected, was=shown(value))
    return number


def check_request_id(value: object) -> None:
    """Raises InputRejectedError for what cannot be a request id."""
    expected = f"1 to {MAX_REQUEST_ID} printable characters"
    if not isinstance(value, str):
        raise InputRejectedError("not text", field="request_id", expected=expected, was=type(value).__name__)
    if not 1 <= len(value) <= MAX_REQUEST_ID or not value.isprintable():
        was = f"{len(value)} characters" if value.isprintable() else repr(value[:40])
        raise InputRejectedError("not a request id", field="request_id", expected=expected, was=was)
