"""Which version an error is about: who copies or signs many has to say which one of them was refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tickserve.errors import GateRefusedError, TickserveError


@contextmanager
def naming(model: str, version: int) -> Iterator[None]:
    """Put the model and version in front of what the block raises; type, fields and counterexample stay."""
    try:
        yield
    except TickserveError as error:
        named = type(error)(f"model {model!r} version {version}: {error}")
        named.field, named.expected, named.was, named.hint = error.field, error.expected, error.was, error.hint
        if isinstance(named, GateRefusedError) and isinstance(error, GateRefusedError):
            named.counterexample = error.counterexample
        raise named from error
