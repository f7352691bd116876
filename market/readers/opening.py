"""From paths to the one source they hold: files are told apart by their content and name, never trusted by extension.

Folders are searched to any depth; in them, files whose extension no reader knows are left out and counted. Files of one
format, venue and symbol make one source; where there are several, the caller chooses with `symbol`.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from market.readers.containers import (
    BOM,
    GZIP_MAGIC,
    LFS_POINTER,
    PARQUET_MAGIC,
    ZIP_MAGIC,
    member_name,
    open_stream,
    typed_errors,
)
from market.readers.source import Source, safe_name
from tickserve.errors import CorruptFileError, DataError, EmptyDataError, SchemaError, UsageError

Format = Literal["binance", "lean-ticks", "lean-fx", "lean-bars", "parquet-bars", "csv-bars", "events"]
EXTENSIONS = (".gz", ".zip", ".parquet", ".csv", ".jsonl")
MAGICS = {".gz": GZIP_MAGIC, ".zip": ZIP_MAGIC, ".parquet": PARQUET_MAGIC}
KNOWN = (
    "Binance L2 recordings (.jsonl.gz), LEAN tick, quote and bar zips, bars in Parquet or CSV, Tickserve events Parquet"
)
MAX_LEVELS = 1_000
_LEAN_TICKS = re.compile(r"^\d{8}_(quote|trade)\.zip$")
_LEAN_BAR_LINE = re.compile(rb"^\d{8} \d\d:\d\d,")
_BINANCE_LINE = re.compile(rb"^\d{1,25} \{")
_STREAM = re.compile(rb'"stream":\s*"([^"@]+)@')
_BINANCE_NAME = re.compile(r"^(usdm|cm|spot)_")
# A CSV header: names, of which one is a timestamp, open or close.
_BAR_HEADER = re.compile(rb"^[\w .]+(,[\w .]+)+\s*$")


@dataclass(frozen=True)
class Found:
    """One file and what it turned out to be."""

    path: Path
    format: Format
    symbol: str
    venue: str

    @property
    def group(self) -> tuple[str, str, str]:
        """Files that share this make one source."""
        return self.symbol, self.venue, self.format


def open_source(paths: Sequence[Path], *, levels: int = 5, symbol: str | None = None) -> Source:
    """The source in `paths` (files, folders, or both), with at most `levels` book levels where the data have more.

    `symbol` chooses where the paths hold several: `btcusdt`, or `binance-usdm/btcusdt` where venues share a name.
    Raises UsageError for a path that is not there or a choice that is not made, and the DataError branch for files
    that are empty, broken, or of no known format.
    """
    if not paths:
        raise UsageError("no data", field="--data", expected="at least one file or folder", was="none")
    if not 1 <= levels <= MAX_LEVELS:
        raise UsageError("book levels", field="levels", expected=f"1 to {MAX_LEVELS}", was=str(levels))
    files, ignored = listed(paths)
    for file in files:
        check_regular(file)
    chosen = _choose([sniff(path) for path in files], symbol)
    return open_found(chosen, levels, ignored)


def open_found(found: Sequence[Found], levels: int, ignored: int) -> Source:
    """The source of files that share a group, `ignored` files beside them. Raises UsageError where two share a name."""
    _refuse_same_names([file.path for file in found])
    source = _source(list(found), levels)
    source.ignored_files = ignored
    return source


def listed(paths: Sequence[Path]) -> tuple[list[Path], int]:
    """Every file once, by resolved path and unread, and how many files of unknown extension the folders hold."""
    found: dict[Path, Path] = {}
    ignored = 0
    for path in paths:
        if path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if not p.is_dir() and not _hidden(p.relative_to(path))]
            data = [p for p in inside if p.suffix in EXTENSIONS]
            ignored += len(inside) - len(data)
            if not data:
                raise EmptyDataError(f"no market data in folder {str(path)!r}", expected=KNOWN)
        else:
            _status(path)
            data = [path]
        for file in data:
            found.setdefault(file.resolve(), file)
    return list(found.values()), ignored


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def check_regular(path: Path) -> None:
    """Refuse what is not a readable plain file, before anything opens it: opening a FIFO would block."""
    status = _status(path)
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path.name}: not a plain file", expected="a file or folder", was="a pipe, socket or device")
    if not status.st_size:
        raise EmptyDataError(f"{path.name}: the file is empty (0 bytes)")


def _status(path: Path) -> os.stat_result:
    """Raise UsageError for a path that is not there."""
    try:
        return path.stat()
    except (OSError, ValueError) as error:
        shown = f"{str(path)!r}: {getattr(error, 'strerror', None) or error}"
        raise UsageError(f"cannot find {shown}", field="--data", expected="a file or folder") from error


def sniff(path: Path) -> Found:
    """What a file is, by its first bytes and lines.

    Raises CorruptFileError for a pointer, a broken container or a magic that belies the name, SchemaError for content
    of no known format or with wrong columns, EmptyDataError for none.
    """
    with typed_errors(path), path.open("rb") as file:
        head = file.read(64)
    if head.startswith(LFS_POINTER):
        raise CorruptFileError(
            f"{path.name}: a Git LFS pointer, not the data", hint="fetch the file itself with 'git lfs pull'"
        )
    expected = MAGICS.get(path.suffix)
    if expected is not None and not head.startswith(expected):
        raise CorruptFileError(
            f"{path.name}: wrong magic", expected=f"{expected!r} for {path.suffix}", was=repr(head[: len(expected)])
        )
    if head.startswith(PARQUET_MAGIC):
        return _sniff_parquet(path)
    if head.startswith(ZIP_MAGIC):
        return _sniff_zip(path)
    return _sniff_text(path)


def _sniff_parquet(path: Path) -> Found:
    from market.readers.bars import PARQUET_COLUMNS
    from market.readers.canonical import read_meta
    from market.readers.parquet import open_parquet
    from market.readers.tables import check_columns

    meta = read_meta(path)
    if meta is not None:
        return Found(path, "events", safe_name(meta["symbol"]), safe_name(meta["venue"]))
    check_columns(open_parquet(path).schema_arrow.names, PARQUET_COLUMNS, path.name)
    venue = "bitfinex" if "bitfinex" in str(path.parent).lower() else "unknown"
    return Found(path, "parquet-bars", safe_name(path.stem.split("_")[0]), venue)


def _sniff_zip(path: Path) -> Found:
    member, line = member_name(path), _first_line(path)
    if _LEAN_BAR_LINE.match(line):
        return Found(path, "lean-bars", safe_name(Path(member).stem), "us-equity")
    fields = line.count(b",") + 1
    if _LEAN_TICKS.match(path.name):
        parts = Path(member).stem.lower().split("_")
        symbol = safe_name(parts[1] if len(parts) > 2 else path.parent.name)
        if fields == 3:
            return Found(path, "lean-fx", symbol, "fxcm" if "fxcm" in path.parent.name.lower() else "fx")
        return Found(path, "lean-ticks", symbol, "us-equity")
    raise _unknown(path, line)


def _sniff_text(path: Path) -> Found:
    line = _first_line(path)
    stem = path.name.split(".")[0].lower()
    if _BINANCE_LINE.match(line):
        market = _BINANCE_NAME.match(stem)
        return Found(path, "binance", _stream_symbol(path), f"binance-{market[1]}" if market else "binance")
    if _BAR_HEADER.match(line) and not line[:1].isdigit():
        from market.readers.bars import CSV_COLUMNS
        from market.readers.tables import parse_header

        parse_header(line, CSV_COLUMNS, path.name)
        side = re.search(r"-(bid|ask)(-|_|$)", stem)
        symbol = re.split(r"-m1-|-\d{8}|_", stem)[0]
        return Found(path, "csv-bars", safe_name(f"{symbol}-{side[1]}" if side else symbol), "unknown")
    raise _unknown(path, line)


def _first_line(path: Path) -> bytes:
    with open_stream(path) as stream:
        line = stream.readline(1 << 20)
    if not line.strip():
        raise EmptyDataError(f"{path.name}: no rows")
    return line.removeprefix(BOM)


def _stream_symbol(path: Path) -> str:
    with open_stream(path) as stream:
        for line in stream:
            match = _STREAM.search(line[:200])
            if match:
                return match[1].decode("utf-8", "replace")
    raise SchemaError(f"{path.name}: no stream message", field="stream", expected="<symbol>@depth and others")


def _unknown(path: Path, line: bytes) -> DataError:
    """The error for unknown content: corrupt if the container breaks further on, else of no known format."""
    with open_stream(path) as stream:
        while stream.read(1 << 20):
            pass
    return SchemaError(f"{path.name}: unknown format", expected=KNOWN, was=repr(line[:40].decode("utf-8", "replace")))


def _choose(found: list[Found], symbol: str | None) -> list[Found]:
    groups: dict[tuple[str, str, str], list[Found]] = {}
    for file in found:
        if symbol is None or symbol.lower() in (file.symbol, f"{file.venue}/{file.symbol}"):
            groups.setdefault(file.group, []).append(file)
    names = sorted({f"{file.venue}/{file.symbol}" for file in found})
    if not groups:
        raise UsageError("not in the data", field="--symbol", expected=f"one of {', '.join(names)}", was=repr(symbol))
    if len(groups) > 1:
        listed = ", ".join(sorted({f"{venue}/{name} ({kind})" for name, venue, kind in groups}))
        raise UsageError(f"the data hold several symbols: {listed}", hint="choose one with --symbol, or pass its files")
    return next(iter(groups.values()))


def _refuse_same_names(paths: list[Path]) -> None:
    names = [path.name for path in paths]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UsageError(
            f"files of the same name in different folders: {', '.join(repeated)}", hint="pass one folder at a time"
        )


def _source(found: list[Found], levels: int) -> Source:
    """Readers are imported here, so that opening one format loads only its libraries."""
    first, files = found[0], [file.path for file in found]
    symbol, venue = first.symbol, first.venue
    if first.format == "binance":
        from market.readers.binance import BinanceSource

        return BinanceSource(files=files, symbol=symbol, venue=venue, levels=levels)
    if first.format == "lean-ticks":
        from market.readers.lean_ticks import LeanTickSource

        return LeanTickSource(files=files, symbol=symbol, venue=venue)
    if first.format == "lean-fx":
        from market.readers.lean_fx import LeanFxSource

        return LeanFxSource(files=files, symbol=symbol, venue=venue)
    if first.format == "events":
        from market.readers.canonical import EventFileSource

        if len(files) > 1:
            raise UsageError("several event files", field="--data", expected="one", was=str(len(files)))
        return EventFileSource(files[0])
    from market.readers import bars

    read = {"lean-bars": bars.read_lean_bars, "parquet-bars": bars.read_parquet_bars, "csv-bars": bars.read_csv_bars}
    return bars.BarSource(files=files, symbol=symbol, venue=venue, read=read[first.format])
