"""Rows of a data set by number: local jsonl, json and parquet files, compressed or not, hub names, lists in memory.

A jsonl file is never held: one pass notes where its lines begin (16 bytes a row), later reads seek. What cannot be read by
offset (a compressed file, a JSON array, parquet, the hub) is first written as jsonl to an unnamed temporary file on disk.
"""

import array
import bz2
import contextlib
import gzip
import hashlib
import importlib
import json
import lzma
import os
import re
import tempfile
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from rlhf_jax.errors import UserError

_READ = 1 << 22
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.\[\]%-]+)?")
_BOM = b"\xef\xbb\xbf"
_EXTREME = "JSON nested too deeply, or a whole number in it has too many digits,"  # Python reads at most 4300
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class BadRow(UserError):
    """A row that cannot be read or lacks what its stage needs; `on_bad_rows: skip` counts it instead."""


@dataclass(frozen=True)
class Source:
    """Random access to rows. `row` raises `BadRow`; `where` names a row for messages ("pairs.jsonl:17")."""

    name: str
    rows: int
    row: Callable[[int], dict[str, Any]]
    where: Callable[[int], str]
    digest: str  # BLAKE2b of the content, hex

    def __len__(self) -> int:
        return self.rows


def memory_source(rows: Sequence[dict[str, Any]], name: str = "rows") -> Source:
    """A list of dictionaries as a source."""
    text = "\n".join(json.dumps(row, sort_keys=True, default=str) for row in rows)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return Source(name, len(rows), lambda i: dict(rows[i]), lambda i: f"{name}: row {i}", digest)


def open_source(path: str, *, limit: int | None = None) -> Source:
    """Open a file (or a hub name with the data extra) for reading by row number; at most `limit` rows.

    Errors: `UserError` for a missing, empty, unknown or damaged file, an array that does not parse, a missing extra.
    """
    file = Path(path)
    if not file.exists():
        if _HUB_NAME.fullmatch(path) and file.suffix not in (".jsonl", ".json", ".parquet", *_COMPRESSED):
            return _hub(path, limit)
        raise UserError(f"data.path: no file {path!r} (from {Path.cwd()}); give the path of a jsonl, json or parquet file")
    if file.is_dir():
        raise UserError(f"data.path: {path!r} is a directory; name one file in it, or several under data.sources")
    suffixes = [suffix for suffix in file.suffixes if suffix not in _COMPRESSED]
    kind = suffixes[-1] if suffixes else ""
    if kind not in (".jsonl", ".ndjson", ".json", ".parquet"):
        raise UserError(
            f"data.path: {path!r} is none of .jsonl, .ndjson, .json, .parquet (with .gz, .bz2, .xz or .zst); rename or convert it"
        )
    if file.stat().st_size == 0:
        raise UserError(f"data.path: {path!r} is empty (0 bytes); expected at least one row")
    with _decompressed(file) if file.suffix in _COMPRESSED else file.open("rb") as stream:
        if kind == ".parquet":
            return _spooled(_parquet_rows(stream, path), path, limit)
        head = stream.read(256).removeprefix(_BOM).lstrip()
        stream.seek(0)
        if head.startswith(b"["):
            return _spooled(iter(_array(stream, path)), path, limit)
        return _lines(stream, path, limit)


def _lines(stream: IO[bytes], name: str, limit: int | None) -> Source:
    """Index a stream of JSON lines; blank lines are no rows."""
    starts, lengths = array.array("q"), array.array("q")
    digest = hashlib.blake2b(digest_size=16)
    begin = position = 0
    blank = True  # of the line that a block boundary cuts

    def add(end: int, is_blank: bool) -> None:
        if not is_blank:
            starts.append(begin)
            lengths.append(end - begin)

    while block := stream.read(_READ):
        digest.update(block)
        last = 0
        for at in np.flatnonzero(np.frombuffer(block, np.uint8) == 10).tolist():
            add(position + at, blank and not block[last:at].strip())
            begin, last, blank = position + at + 1, at + 1, True
            if limit is not None and len(starts) >= limit:
                break
        if limit is not None and len(starts) >= limit:
            break
        blank = blank and not block[last:].strip()
        position += len(block)
    else:
        add(position, blank)
    descriptor = os.dup(stream.fileno())  # an unnamed temporary file lives on in it
    if not starts:
        os.close(descriptor)
        raise UserError(f"{name}: only blank lines; expected one JSON object a line")

    def where(i: int) -> str:
        number, at = 1, 0
        while at < starts[i]:
            block = os.pread(descriptor, min(_READ, starts[i] - at), at)
            number, at = number + block.count(b"\n"), at + len(block)
        return f"{name}:{number}"

    def row(i: int) -> dict[str, Any]:
        raw = os.pread(descriptor, lengths[i], starts[i])
        return _parse(raw.removeprefix(_BOM) if starts[i] == 0 else raw, lambda: where(i))

    weakref.finalize(row, os.close, descriptor)
    # A limit reads part of the file: what identifies the rows is then the blocks read and the number of rows.
    return Source(name, len(starts), row, where, f"{digest.hexdigest()}:{len(starts)}")


def _parse(raw: bytes, where: Callable[[], str]) -> dict[str, Any]:
    """One JSON object from one line, or a `BadRow` with path:line:column and an excerpt."""
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(
            f"{where()}:{error.start + 1}: invalid UTF-8 byte 0x{raw[error.start]:02x} near {_excerpt(raw, error.start)}; "
            "save the file as UTF-8, or set data.on_bad_rows=skip"
        ) from None
    except json.JSONDecodeError as error:
        at = len(error.doc[: error.pos].encode("utf-8", "surrogatepass"))
        raise BadRow(
            f"{where()}:{error.pos + 1}: not JSON ({error.msg}) near {_excerpt(raw, at)}; one JSON object a line is expected, "
            "or one array of objects in a .json file: mend the line, or set data.on_bad_rows=skip"
        ) from None
    except (RecursionError, ValueError):
        raise BadRow(f"{where()}:1: {_EXTREME} to be a row; mend it, or set data.on_bad_rows=skip") from None
    if not isinstance(value, dict):
        raise BadRow(
            f'{where()}:1: a row must be a JSON object such as {{"prompt": "…"}}, found {type(value).__name__} {_excerpt(raw, 0)}'
        )
    # JSON can spell half of a surrogate pair, which no UTF-8 file (metrics, report, tokenizer) can hold: it becomes U+FFFD.
    return _clean(value) if _SURROGATE.search(raw) else value


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return {_clean(key): _clean(item) for key, item in value.items()} if isinstance(value, dict) else value


def _excerpt(raw: bytes, at: int) -> str:
    return repr(raw[max(0, at - 24) : at + 24].decode("utf-8", "backslashreplace"))


def _array(stream: IO[bytes], name: str) -> list[Any]:
    """A whole JSON array; unlike jsonl it must fit in memory."""
    try:
        text = stream.read().decode("utf-8-sig")
        value = json.loads(text)
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: invalid UTF-8 at byte {error.start + 1}; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{name}:{error.lineno}:{error.colno}: not JSON ({error.msg}) near {error.doc[max(0, error.pos - 24) :][:48]!r}; "
            "mend the array, or write one JSON object a line into a .jsonl file"
        ) from None
    except (RecursionError, ValueError):
        raise UserError(f"{name}: {_EXTREME} to hold rows; mend the array") from None
    if not value:
        raise UserError(f"{name}: an empty array; expected at least one row")
    return value


def _spooled(rows: Iterator[Any], name: str, limit: int | None) -> Source:
    """Write rows as JSON lines to an unnamed temporary file, so that they can be read by offset."""
    with tempfile.TemporaryFile() as file:
        for number, row in enumerate(rows):
            if limit is not None and number >= limit:
                break
            file.write(json.dumps(row, default=_as_json).encode() + b"\n")
        if file.tell() == 0:
            raise UserError(f"{name}: 0 rows; expected at least one")
        file.seek(0)
        source = _lines(file, name, None)
    return Source(name, source.rows, lambda i: source.row(i), lambda i: f"{name}: row {i}", source.digest)


def _as_json(value: Any) -> Any:
    """Bytes are text (as Spark and Hive write strings into parquet), or {"bytes": hex} where they are not UTF-8."""
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"bytes": value.hex()}


@contextlib.contextmanager
def _decompressed(file: Path) -> Iterator[IO[bytes]]:
    """The content of a compressed file as an unnamed temporary file on disk."""
    with tempfile.TemporaryFile() as out:
        unpack, damage = _codec(file)
        try:
            with contextlib.closing(unpack(file, "rb")) as stream:
                while block := stream.read(_READ):
                    out.write(block)
        except (OSError, EOFError, damage) as error:
            raise UserError(
                f"{file}: damaged or not {file.suffix[1:]} ({error}); compress it again or give the plain file"
            ) from None
        if out.tell() == 0:
            raise UserError(f"{file}: empty after decompression; expected at least one row")
        out.seek(0)
        yield out


def _codec(file: Path) -> tuple[Callable[..., Any], type[Exception]]:
    """How a compressed file is opened, and what its codec raises on damage beside OSError and EOFError."""
    if file.suffix != ".zst":
        return {".gz": (gzip.open, zlib.error), ".bz2": (bz2.open, OSError), ".xz": (lzma.open, lzma.LZMAError)}[file.suffix]
    try:
        module = importlib.import_module("compression.zstd")
    except ImportError:
        module = extra("zstandard", f"{file}: reading zstd before Python 3.14")
    return module.open, module.ZstdError


def extra(module: str, what: str) -> Any:
    """Import an optional package of the data extra, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f'{what} needs {module}: pip install "rlhf-jax[data]", or convert the data to jsonl') from None


def _parquet_rows(stream: IO[bytes], path: str) -> Iterator[dict[str, Any]]:
    parquet = extra("pyarrow.parquet", f"data.path: {path!r}: reading parquet")
    try:
        file = parquet.ParquetFile(stream)
        for batch in file.iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    except (OSError, ValueError) as error:  # pyarrow.ArrowInvalid is a ValueError
        raise UserError(f"{path}: not a readable parquet file ({error}); write it again or convert it to jsonl") from None


def _hub(name: str, limit: int | None) -> Source:
    """A data set by its hub name, `owner/name` or `owner/name:split` (default split: train)."""
    datasets = extra("datasets", f"data.path: there is no file {name!r}, and reading it as a hub name")
    repository, _, split = name.partition(":")
    try:
        rows: Iterable[Any] = datasets.load_dataset(repository, split=split or "train")
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.path: {name!r} is neither a local file nor a data set that the hub gave ({str(error).splitlines()[0]}); "
            "without a network, give the path of a local jsonl, json or parquet file"
        ) from None
    return _spooled(iter(rows), name, limit)
