"""One file of a journal: a header, then frames of records, each frame complete or not there.

The file is a sequence of zstd frames, so `zstd -dc` reads it: what is ours around the records stands in skippable
frames. See docs/journal.md for the bytes.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tickserve.errors import CorruptFileError, MissingExtraError
from tickserve.journal._schema import SCHEMA, Record, decode
from tickserve.store import canonical_json

SUFFIX = ".tsj"
HEADER_MAGIC, INDEX_MAGIC = 0x184D2A51, 0x184D2A52  # two of the numbers that zstd sets aside for frames it skips
FORMAT = "tickserve-journal"
MAX_HEADER_BYTES = 64 * 1024
MAX_FRAME_BYTES = 512 * 1024 * 1024  # uncompressed; a frame that says more is not ours
_SKIPPABLE = struct.Struct("<II")  # magic, bytes that follow
_INDEX = struct.Struct("<IIIIII")  # magic, 16, compressed bytes, raw bytes, records, crc32 of the compressed bytes
_RECORD = struct.Struct("<II")  # bytes that follow, their crc32


class Header(NamedTuple):
    """Who wrote a segment, and when. `session` is random for each journal opened: no host, no user, no path."""

    schema: int
    session: str
    segment: int
    created_ns: int
    tickserve: str
    label: str


class Frame(NamedTuple):
    """Where a frame's compressed bytes lie in its file, and what they must be."""

    offset: int
    size: int
    raw_size: int
    records: int
    crc32: int

    @property
    def end(self) -> int:
        """The offset behind the frame."""
        return self.offset + self.size


def load_zstandard() -> Any:
    """The zstandard module. Raises MissingExtraError."""
    try:
        import zstandard
    except ImportError as error:
        raise MissingExtraError.of("zstandard", "journal") from error
    return zstandard


def encode_header(header: Header) -> bytes:
    """The first bytes of a segment."""
    body = canonical_json({"format": FORMAT, **header._asdict()})
    return _SKIPPABLE.pack(HEADER_MAGIC, len(body) + 4) + zlib.crc32(body).to_bytes(4, "little") + body


def frame_record(payload: bytes) -> bytes:
    """A record's bytes with their length and crc32 in front."""
    return _RECORD.pack(len(payload), zlib.crc32(payload)) + payload


def encode_frame(framed: Sequence[bytes], compressor: Any) -> bytes:
    """A frame of `framed` records, with its index in front."""
    raw = b"".join(framed)
    packed: bytes = compressor.compress(raw)
    index = _INDEX.pack(INDEX_MAGIC, _INDEX.size - 8, len(packed), len(raw), len(framed), zlib.crc32(packed))
    return index + packed


def read_header(file: BinaryIO, name: str) -> Header:
    """The header at the start of `file`. Raises CorruptFileError."""
    magic, size = _unpack(file, _SKIPPABLE, name, "header")
    if magic != HEADER_MAGIC or not 4 < size <= MAX_HEADER_BYTES:
        raise CorruptFileError("not a journal", field=name, expected=f"the magic {HEADER_MAGIC:#x} at offset 0")
    data = file.read(size)
    if len(data) < size or zlib.crc32(data[4:]) != int.from_bytes(data[:4], "little"):
        raise CorruptFileError("the header is damaged", field=name, expected="its crc32 at offset 8")
    values = json.loads(data[4:])
    if values.pop("format", None) != FORMAT or values.get("schema") != SCHEMA:
        was = str(values.get("schema"))[:20]
        raise CorruptFileError("another schema", field=name, expected=str(SCHEMA), was=was, hint="read it with its own")
    return Header(**values)


def frames(file: BinaryIO, name: str) -> Iterator[Frame]:
    """The frames from where `file` stands. A frame that is cut or damaged raises CorruptFileError with its offset."""
    while True:
        offset = file.tell()
        head = file.read(_INDEX.size)
        if not head:
            return
        if len(head) < _INDEX.size:
            raise _torn(name, offset, "the file ends inside a frame's index")
        magic, rest, size, raw_size, records, crc32 = _INDEX.unpack(head)
        if magic != INDEX_MAGIC or rest != _INDEX.size - 8 or raw_size > MAX_FRAME_BYTES:
            raise _torn(name, offset, "not a frame")
        frame = Frame(offset + _INDEX.size, size, raw_size, records, crc32)
        yield frame
        file.seek(frame.end)


def read_packed(file: BinaryIO, frame: Frame, name: str) -> bytes:
    """The frame's compressed bytes, held against their crc32. Raises CorruptFileError."""
    file.seek(frame.offset)
    packed = file.read(frame.size)
    if len(packed) < frame.size:
        raise _torn(name, frame.offset - _INDEX.size, "the file ends inside a frame")
    if zlib.crc32(packed) != frame.crc32:
        raise _torn(name, frame.offset - _INDEX.size, "a frame's bytes are not those of its crc32")
    return packed


def read_records(file: BinaryIO, frame: Frame, name: str) -> Iterator[Record]:
    """The records of a frame. Raises CorruptFileError naming the frame's offset."""
    zstandard = load_zstandard()
    packed, where = read_packed(file, frame, name), frame.offset - _INDEX.size
    try:
        if zstandard.get_frame_parameters(packed).content_size != frame.raw_size:
            raise _torn(name, where, "a frame's size is not that of its index")
        raw = zstandard.ZstdDecompressor().decompress(packed)
    except zstandard.ZstdError as error:
        raise _torn(name, where, "not a zstd frame") from error
    at = count = 0
    while at < len(raw):
        payload, at = _take_record(raw, at, name, where)
        try:
            record = decode(payload)
        except CorruptFileError as error:
            raise _torn(name, where, f"record {count} of the frame: {error}") from error
        count += 1
        yield record
    if count != frame.records:
        raise _torn(name, where, f"expected {frame.records} records in the frame, was {count}")


def _take_record(raw: bytes, at: int, name: str, where: int) -> tuple[bytes, int]:
    if at + _RECORD.size > len(raw):
        raise _torn(name, where, "a record is cut")
    size, crc32 = _RECORD.unpack_from(raw, at)
    start = at + _RECORD.size
    payload = raw[start : start + size]
    if len(payload) < size or zlib.crc32(payload) != crc32:
        raise _torn(name, where, "a record's bytes are not those of its crc32")
    return payload, start + size


# A page that a file system never got to write reads as zeros; a compressed frame does not end in this many.
ZEROS = 16


def torn_from(path: Path) -> int | None:
    """The offset where a crash cut the file short; None when it ends well, or no crash explains the damage.

    A writer only appends, so only what touches the end of the file can be torn: bytes that lack their rest, and zeros
    that a file system put where nothing had been written. Damage with more behind it is left for a reader to report.
    """
    total = path.stat().st_size
    with path.open("rb") as file:
        try:
            read_header(file, path.name)
        except CorruptFileError:
            return None
        end, last = file.tell(), False
        try:
            for frame in frames(file, path.name):
                end = frame.offset - _INDEX.size
                # A byte changed in a whole frame is damage; a frame that ends in zeros was never written to its end.
                last = frame.end > total or (frame.end == total and _only_zeros(file, max(frame.offset, total - ZEROS)))
                read_packed(file, frame, path.name)
                end = frame.end
        except CorruptFileError:
            file.seek(end)
            rest = file.read(_INDEX.size)
            whole = len(rest) == _INDEX.size and _INDEX.unpack(rest)[:2] == (INDEX_MAGIC, _INDEX.size - 8)
            return end if len(rest) < _INDEX.size or (last if whole else _only_zeros(file, end)) else None
    return None


def _only_zeros(file: BinaryIO, start: int) -> bool:
    file.seek(start)
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            return False
    return True


def _unpack(file: BinaryIO, layout: struct.Struct, name: str, what: str) -> tuple[Any, ...]:
    data = file.read(layout.size)
    if len(data) < layout.size:
        raise CorruptFileError(f"the file ends inside its {what}", field=name, was=f"{len(data)} bytes")
    return layout.unpack(data)


def _torn(name: str, offset: int, message: str) -> CorruptFileError:
    return CorruptFileError(f"{message}, at offset {offset}", field=name)
