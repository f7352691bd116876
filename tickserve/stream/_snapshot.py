"""A stream's state as bytes: versioned, digest-checked, and refused by a build that would compute something else.

"tickserve stream 1\\n", SHA-256 of the rest, then zlib of: length of the description (8 bytes, little endian),
the description (JSON: facts and arrays with dtype and shape), the arrays in its order.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tickserve.errors import ArtifactError, DigestMismatchError
from tickserve.store import canonical_json

MAGIC = b"tickserve stream 1\n"
MAX_BYTES = 256 * 1024 * 1024
DTYPES = {name: np.dtype(name) for name in ("<f4", "<f8", "<i8", "|b1")}
DIGEST_BYTES = 32
Arrays = dict[str, npt.NDArray[Any]]


def pack(facts: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """The snapshot of these facts (JSON values) and arrays."""
    listed = [[name, array.dtype.str, list(array.shape)] for name, array in arrays.items()]
    head = canonical_json({"facts": dict(facts), "arrays": listed})
    body = b"".join([len(head).to_bytes(8, "little"), head, *(array.tobytes() for array in arrays.values())])
    packed = zlib.compress(body, level=1)
    return MAGIC + hashlib.sha256(packed).digest() + packed


def unpack(data: bytes) -> tuple[dict[str, Any], Arrays]:
    """What `pack` was given. Raises ArtifactError for what is no snapshot, DigestMismatchError for changed bytes."""
    start = len(MAGIC) + DIGEST_BYTES
    if not isinstance(data, bytes) or not data.startswith(MAGIC) or len(data) < start:
        raise ArtifactError("not a snapshot of a stream, or of another version", field="snapshot")
    digest, packed = data[len(MAGIC) : start], data[start:]
    if hashlib.sha256(packed).digest() != digest:
        raise DigestMismatchError("wrong digest", field="snapshot", hint="the bytes were cut or changed")
    try:
        engine = zlib.decompressobj()
        body = engine.decompress(packed, MAX_BYTES)
        if engine.unconsumed_tail:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        return _parsed(body)
    except (zlib.error, ValueError, KeyError, TypeError) as error:
        raise ArtifactError("not a snapshot of a stream", field="snapshot", hint=str(error)[:100]) from error


def _parsed(body: bytes) -> tuple[dict[str, Any], Arrays]:
    at = 8 + int.from_bytes(body[:8], "little")
    head = json.loads(body[8:at])
    arrays: Arrays = {}
    for name, code, shape in head["arrays"]:
        dtype, count = DTYPES[code], math.prod(shape)
        arrays[name] = np.frombuffer(body, dtype, count, at).reshape(shape).copy()
        at += count * dtype.itemsize
    if at != len(body):
        raise ValueError("bytes after the last array")
    return head["facts"], arrays
