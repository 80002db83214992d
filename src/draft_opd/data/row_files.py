"""Where rows come from: JSONL, a JSON array, parquet, compressed ones, a folder of them, a hub data set.

Rows are read one after the other, so that a long log is never held.
"""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from draft_opd.models.hub import EMBEDDED
from draft_opd.utils.errors import UserError, one_line

LONGEST_LINE = 64 << 20  # bytes
SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet")
PACKED = (".gz", ".zst")
OURS = ("collect.json", "skipped.jsonl")  # what `collect` writes beside trajectories
_EMBEDDED = Path(__file__).parent.parent / EMBEDDED


class Row(NamedTuple):
    """A row of a file: the object, or why there is none. line: from 1; of a table or a list, the row."""

    file: str
    line: int
    value: dict | None
    problem: str = ""

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


def rows_path(name: str | Path) -> Path:
    """`embedded:train` and `embedded:heldout` are the shipped prompts."""
    if str(name).startswith(f"{EMBEDDED}:"):
        return _EMBEDDED / f"{str(name).partition(':')[2]}.jsonl"
    return Path(name)


def read_rows(name: str | Path) -> Iterator[Row]:
    """Rows of a file, of every file of a folder, or of `ORG/NAME[:SPLIT]` on the hub.

    Raises `UserError` where nothing can be read; a line that is no object is a row with a problem.
    """
    path = rows_path(name)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if _kind(p) in SUFFIXES and p.name not in OURS)
        if not files:
            raise UserError(f"'{path}' holds no file of rows ({', '.join(SUFFIXES)}, also .gz and .zst)")
        for file in files:
            yield from file_rows(file)
    elif not path.exists() and _is_hub_id(str(name)):
        yield from _hub_rows(str(name))
    else:
        yield from file_rows(path)


def rows_behind(name: str | Path, first: int) -> Iterator[tuple[int, Row]]:
    """Rows behind the `first` lines (of anything but lines: rows), each with the lines up to it.

    A file of lines may be a log that grows: a last line that has no end yet, and is no whole object, is
    left for later.
    """
    path = rows_path(name)
    if path.is_dir() or path.suffix in PACKED or _kind(path) == ".parquet" or not path.exists():
        yield from itertools.islice(enumerate(read_rows(name), 1), first, None)
        return
    try:
        with path.open("rb") as file:
            if file.peek(64).lstrip()[:1] == b"[":  # type: ignore[attr-defined]
                yield from itertools.islice(enumerate(_listed(path, file), 1), first, None)
                return
            for number, line in enumerate(file, 1):
                if number > first and line.strip():
                    row = parse_line(str(path), number, line)
                    if row.value is not None or line.endswith(b"\n"):
                        yield number, row
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror})") from None


def _kind(path: Path) -> str:
    name = path.with_suffix("") if path.suffix in PACKED else path
    return name.suffix


def file_rows(path: Path) -> Iterator[Row]:
    if _kind(path) == ".parquet":
        yield from _table_rows(path)
        return
    try:
        with _open(path) as file:
            start = file.peek(64).lstrip()[:1]  # type: ignore[attr-defined]
            yield from (_listed(path, file) if start == b"[" else _lines(path, file))
    except FileNotFoundError:
        raise UserError(f"'{path}' does not exist") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"'{path}' cannot be read ({one_line(getattr(error, 'strerror', None) or error)})"
        ) from error


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise UserError(f"'{path}' needs `pip install 'draft-opd[tasks]'`, or unpack it") from None
        import io

        reader = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True)
        return io.BufferedReader(reader)
    return path.open("rb")


def _lines(path: Path, file: IO[bytes]) -> Iterator[Row]:
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            while line and not line.endswith(b"\n"):
                line = file.readline(LONGEST_LINE)
            size = LONGEST_LINE >> 20
            yield Row(str(path), number, None, f"the line has more than {size} MB: give a JSON object a line")
        elif line.strip():
            yield parse_line(str(path), number, line)


def parse_line(file: str, number: int, line: bytes) -> Row:
    """A line of JSONL."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
        if b"\\u" in line:  # a lone surrogate is no UTF-8 text
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError:
        return Row(file, number, None, "not UTF-8 text")
    except (ValueError, RecursionError) as error:
        return Row(file, number, None, f"not valid JSON ({error})")
    return _object(file, number, value)


def _is_text(value: Any) -> bool:
    """Whether all of it can be written: a lone surrogate is no UTF-8 text."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError:
        return False
    return True


def _object(file: str, number: int, value: Any) -> Row:
    if isinstance(value, dict):
        return Row(file, number, value)
    return Row(file, number, None, "must be a JSON object, one a line")


def _listed(path: Path, file: IO[bytes]) -> Iterator[Row]:
    """The objects of one JSON array."""
    try:
        text = file.read().decode("utf-8-sig")
        decoder, at, number = json.JSONDecoder(), text.index("[") + 1, 0
        while True:
            while text[at : at + 1] in (" ", "\n", "\r", "\t", ","):
                at += 1
            if text[at : at + 1] == "]":
                if text[at + 1 :].strip():
                    raise UserError(
                        f"'{path}' goes on behind its JSON array: give one array, or a row a line"
                    )
                return
            value, at = decoder.raw_decode(text, at)
            number += 1
            yield (
                _object(str(path), number, value)
                if _is_text(value)
                else Row(str(path), number, None, "not UTF-8 text")
            )
    except UnicodeError:
        raise UserError(f"'{path}' is not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is not a valid JSON array ({one_line(error)})") from None


def _table_rows(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"'{path}' is parquet, which needs `pip install 'draft-opd[tasks]'`") from None
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(1024):
            for value in batch.to_pylist():
                number += 1
                yield _object(str(path), number, value)
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' is not readable parquet ({one_line(error)})") from None


def _is_hub_id(name: str) -> bool:
    owner, slash, rest = name.partition("/")
    return bool(owner and slash and rest) and "/" not in rest and not name.startswith((".", "/", "~"))


def _hub_rows(name: str) -> Iterator[Row]:
    place, _, split = name.partition(":")
    if Path(place).suffix in (*SUFFIXES, *PACKED):
        raise UserError(f"'{name}' does not exist")
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(
            f"'{name}' does not exist here; a data set of the hub needs `pip install 'draft-opd[tasks]'`"
        ) from None
    try:
        rows = load_dataset(place, split=split or "train", streaming=True)
        for number, value in enumerate(rows, 1):
            yield _object(name, number, dict(value))
    except Exception as error:  # noqa: BLE001 - whatever the hub's client raises
        raise UserError(
            f"'{name}' is no file here, and cannot be loaded from the hub ({one_line(error, 120)})"
        ) from None
