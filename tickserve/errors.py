"""Every error Tickserve raises on purpose, as one tree; a caller catches the branch it treats differently.

    TickserveError                      exit code
    |-- UsageError                      2   a wrong option or argument
    |   `-- ConfigError                 2   a wrong configuration file, key, value or environment override
    |-- DataError                       3   market data that cannot be used
    |   |-- EmptyDataError              3   nothing, or only a header
    |   |-- SchemaError                 3   columns missing, renamed, repeated, or of the wrong type
    |   |-- CorruptFileError            3   truncated, wrong magic, wrong checksum, a pointer instead of data
    |   `-- InsufficientDataError       3   too short for its windows, labels or folds; one class only
    |-- ArtifactError                   3   a bundle, model file or repository version that cannot be trusted
    |   |-- DigestMismatchError         3   bytes are not the bytes that the manifest names
    |   |-- SignatureError              3   unsigned, or signed by a key that is not trusted
    |   |-- ForeignPlanError            3   an engine for another GPU, driver, TensorRT or graph
    |   `-- UnsafeModelError            3   pickle, external data, custom domain, NaN weights, dynamic dims
    |-- GateRefusedError                1   a parity, quality or latency gate said no
    |-- LimitExceededError              1   a limit of time, memory or quality that is to fail was not kept
    |-- ComponentError                  4   something this needs is missing or unreachable
    |   |-- MissingExtraError           4   an optional dependency is not installed
    |   |-- StageMissingError           4   a stage folder is not beside the package
    |   |-- UnsupportedPlatformError    4   the embedded server does not run here
    |   |-- PortInUseError              4   a port is taken
    |   `-- ServerStartError            4   the server did not become ready
    `-- RequestError                        one scoring request failed; carries model and request id
        |-- InputRejectedError          3   refused before it was sent, by the manifest's contract
        |-- DeadlineExceededError       4   no answer inside the deadline
        |-- ModelNotFoundError          4   unknown model or version
        |-- ServerRejectedError         4   the server answered with an error
        |   `-- OverloadedError         4   its queue is full or it is shutting down: another replica may answer
        |-- TransportError              4   the connection failed
        |   |-- CertificateError        4   TLS: expired, wrong name, unknown authority, or no TLS on the other side
        |   `-- UnavailableError        4   no replica is believed to be alive (breakers open); nothing was sent
        `-- ProtocolError               4   the answer does not follow the protocol or the contract

Messages name the field or option and say "expected X, was Y"; paths of this machine and secrets stay out of
messages about requests.
"""

from __future__ import annotations

from typing import Any


class TickserveError(Exception):
    """Base of the tree. `exit_code` is what the command exits with; `field`, `expected`, `was` are for programs."""

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        expected: str | None = None,
        was: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.field, self.expected, self.was, self.hint = field, expected, was, hint
        parts = [f"{field}: {message}" if field and field not in message else message]
        if expected is not None:
            parts.append(f"expected {expected}" + (f", was {was}" if was is not None else ""))
        text = ": ".join(parts)
        super().__init__(f"{text} ({hint})" if hint else text)


class UsageError(TickserveError):
    """A wrong option or argument."""

    exit_code = 2


class ConfigError(UsageError):
    """A wrong configuration file, key, value or environment override."""


class DataError(TickserveError):
    """Market data that cannot be used."""

    exit_code = 3


class EmptyDataError(DataError):
    """The input holds nothing, or only a header."""


class SchemaError(DataError):
    """Columns are missing, renamed, repeated, or of the wrong type."""


class CorruptFileError(DataError):
    """Truncated, wrong magic, wrong checksum, or a pointer instead of data."""


class InsufficientDataError(DataError):
    """Too short for its windows, labels or folds, or one class only."""


class ArtifactError(TickserveError):
    """A bundle, model file or repository version that cannot be trusted."""

    exit_code = 3


class DigestMismatchError(ArtifactError):
    """The bytes are not the bytes that the manifest names."""


class SignatureError(ArtifactError):
    """Unsigned, or signed by a key that is not trusted."""


class ForeignPlanError(ArtifactError):
    """A TensorRT plan that was built for another GPU, driver, TensorRT release or graph."""


class UnsafeModelError(ArtifactError):
    """A model file with content that is never loaded: pickle, external data, custom domains, NaN weights."""


class GateRefusedError(TickserveError):
    """A parity, quality or latency gate said no.

    `counterexample` is the smallest case that shows it (JSON values), where the gate could make one.
    """

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        expected: str | None = None,
        was: str | None = None,
        hint: str | None = None,
        counterexample: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message, field=field, expected=expected, was=was, hint=hint)
        self.counterexample = counterexample


class LimitExceededError(TickserveError):
    """A limit of `[limits]` whose action is `fail` was not kept; nothing was written or published."""


class ComponentError(TickserveError):
    """Something this needs is missing or unreachable."""

    exit_code = 4


class MissingExtraError(ComponentError):
    """An optional dependency is not installed; the message names the extra."""

    @classmethod
    def of(cls, module: str, extra: str) -> MissingExtraError:
        """The error for a `module` that the `extra` would install."""
        return cls(f"'{module}' is not installed", hint=f"pip install 'tickserve[{extra}]'")


class StageMissingError(ComponentError):
    """A stage folder is not beside the package."""


class UnsupportedPlatformError(ComponentError):
    """The embedded server does not run on this platform."""


class PortInUseError(ComponentError):
    """A port is taken; the message names the port and the option."""


class ServerStartError(ComponentError):
    """The server did not become ready."""


class RequestError(TickserveError):
    """One scoring request failed. `replica` is who was asked last, `attempts` how many were (0: nothing was sent)."""

    exit_code = 4
    replica: str | None = None
    attempts: int = 0

    def __init__(
        self,
        message: str,
        *,
        model: str | None = None,
        request_id: str | None = None,
        field: str | None = None,
        expected: str | None = None,
        was: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, field=field, expected=expected, was=was, hint=hint)
        self.model, self.request_id = model, request_id


class InputRejectedError(RequestError):
    """Refused before it was sent: the input does not follow the manifest's contract."""

    exit_code = 3


class DeadlineExceededError(RequestError):
    """No answer inside the deadline."""


class ModelNotFoundError(RequestError):
    """Unknown model or version."""


class ServerRejectedError(RequestError):
    """The server answered with an error."""


class OverloadedError(ServerRejectedError):
    """The server's queue is full or it is shutting down; the same request may be answered by another replica."""


class TransportError(RequestError):
    """The connection failed."""


class CertificateError(TransportError):
    """TLS failed: an expired, foreign or untrusted certificate, or the other side speaks no TLS."""


class UnavailableError(TransportError):
    """No replica is believed to be alive; nothing was sent."""


class ProtocolError(RequestError):
    """The answer does not follow the protocol or the manifest's contract."""
