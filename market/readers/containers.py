"""Opening what market data comes in: plain, gzip and zip files as byte streams, with every way they break typed.

Nothing is ever extracted to disk, a stream is read in bounded pieces, and a broken end raises instead of ending early.
"""

from __future__ import annotations

import gzip
import io
import itertools
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from tickserve.errors import CorruptFileError, DataError, EmptyDataError, SchemaError

GZIP_MAGIC, ZIP_MAGIC, PARQUET_MAGIC = b"\x1f\x8b", b"PK\x03\x04", b"PAR1"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
BOM = b"\xef\xbb\xbf"
# LEAN day files are parsed whole; a member that claims more than this is refused before it is read.
MAX_MEMBER_BYTES = 2 << 30
BUFFER_BYTES = 1 << 20


@contextmanager
def typed_errors(path: Path) -> Iterator[None]:
    """Turn what gzip, zlib and zipfile raise for broken files into CorruptFileError naming the file."""
    try:
        yield
    except gzip.BadGzipFile as error:
        raise CorruptFileError(f"{path.name}: broken gzip: {error}") from error
    except EOFError as error:
        raise CorruptFileError(f"{path.name}: gzip file is truncated: it ends before its end marker") from error
    except (zlib.error, zipfile.BadZipFile) as error:
        raise CorruptFileError(f"{path.name}: broken compressed data: {error}") from error
    except (NotImplementedError, RuntimeError) as error:
        raise DataError(f"{path.name}: unsupported zip file: {error}") from error
    except OSError as error:
        raise DataError(f"{path.name}: cannot be read: {error.strerror or error}") from error


def only_member(archive: zipfile.ZipFile, path: Path) -> zipfile.ZipInfo:
    """The single file of a zip. Raises EmptyDataError for none, SchemaError for several, DataError for a huge one."""
    members = [member for member in archive.infolist() if not member.is_dir()]
    if not members:
        raise EmptyDataError(f"{path.name}: the zip holds no file")
    if len(members) > 1:
        raise SchemaError(f"{path.name}", expected="a zip with one CSV file", was=f"{len(members)} files")
    if members[0].file_size > MAX_MEMBER_BYTES:
        raise DataError(
            f"{path.name}", expected=f"at most {MAX_MEMBER_BYTES} bytes uncompressed", was=str(members[0].file_size)
        )
    return members[0]


@contextmanager
def open_stream(path: Path) -> Iterator[BinaryIO]:
    """The uncompressed bytes of a plain, gzip or one-member zip file, chosen by its magic, byte order mark skipped.

    Raises CorruptFileError, EmptyDataError or SchemaError, also while the stream is being read inside the block.
    """
    with typed_errors(path), path.open("rb") as raw:
        magic = raw.read(4)
        raw.seek(0)
        if magic.startswith(GZIP_MAGIC):
            with gzip.GzipFile(fileobj=raw) as unpacked:
                yield _without_bom(io.BufferedReader(unpacked, BUFFER_BYTES))
        elif magic == ZIP_MAGIC:
            with zipfile.ZipFile(raw) as archive, archive.open(only_member(archive, path)) as member:
                yield _without_bom(io.BufferedReader(member, BUFFER_BYTES))  # type: ignore[arg-type]
        else:
            yield _without_bom(raw)


def _without_bom(stream: io.BufferedReader) -> BinaryIO:
    if stream.peek(3)[:3] == BOM:
        stream.read(3)
    return stream


def member_name(path: Path) -> str:
    """Name of the single file in a zip. Raises as `open_stream`."""
    with typed_errors(path), zipfile.ZipFile(path) as archive:
        return only_member(archive, path).filename


def read_all(path: Path) -> bytes:
    """All uncompressed bytes. Raises as `open_stream`, and EmptyDataError for none."""
    with open_stream(path) as stream:
        data = stream.read()
    if not data.strip():
        raise EmptyDataError(f"{path.name}: no rows")
    return data


def line_batches(stream: BinaryIO, lines: int) -> Iterator[bytes]:
    """The text in pieces of at most `lines` whole lines."""
    while batch := b"".join(itertools.islice(stream, lines)):
        yield batch
