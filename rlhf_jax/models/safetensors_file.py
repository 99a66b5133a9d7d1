"""Safetensors files, read and written tensor by tensor.

Our own reader, because the stock one knows no bfloat16 in NumPy and does not say what is wrong with a damaged file. The
format is a length (u64), a JSON header {name: {dtype, shape, data_offsets}}, and the bytes.
"""

import itertools
import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from rlhf_jax.errors import UserError

DTYPES: dict[str, Any] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
WEIGHTS = ("F64", "F32", "F16", "BF16")
_HEADER_LIMIT = 100_000_000  # bytes; the limit of the format


class Entry(NamedTuple):
    """One tensor in a file."""

    code: str
    shape: tuple[int, ...]
    start: int  # byte of the file
    end: int


class Reader:
    """Tensors of one file as memory-mapped arrays; `release` gives a tensor's pages back."""

    def __init__(self, path: Path):
        self.path = path
        self.entries = read_header(path)
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def array(self, name: str) -> np.ndarray:
        """The tensor, read-only, on the pages of the file."""
        entry = self.entries[name]
        count = math.prod(entry.shape)
        return np.frombuffer(self._map, DTYPES[entry.code], count, entry.start).reshape(entry.shape)

    def release(self, name: str) -> None:
        """Drop the tensor from this process's memory; it is read again when touched again."""
        entry = self.entries[name]
        start = entry.start - entry.start % mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, start, entry.end - start)


def read_header(path: Path) -> dict[str, Entry]:
    """Name -> place of every tensor.

    Raises:
        UserError: the file is truncated or no safetensors file, or two tensors share bytes.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > _HEADER_LIMIT:
            raise UserError(f"{path}: not a safetensors file, or a damaged one ({size} bytes); download it again")
        if size < 8 + length:
            raise UserError(f"{path}: truncated: its header needs {8 + length} bytes, the file has {size}; download it again")
        try:
            header = json.loads(file.read(length))
            tensors = {name: _entry(value, 8 + length) for name, value in header.items() if name != "__metadata__"}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path}: its safetensors header cannot be read ({error}); download it again") from None
    for name, entry in tensors.items():
        if entry.code in DTYPES and entry.end - entry.start != math.prod(entry.shape) * DTYPES[entry.code].itemsize:
            raise UserError(
                f"{path}: {name} has shape {list(entry.shape)} but {entry.end - entry.start} bytes; download it again"
            )
    order = sorted(tensors, key=lambda name: (tensors[name].start, tensors[name].end))
    for first, second in itertools.pairwise(order):
        if tensors[second].start < tensors[first].end:
            raise UserError(f"{path}: {first} and {second} share bytes; download it again")
    expected = max((entry.end for entry in tensors.values()), default=8 + length)
    if size < expected:
        raise UserError(f"{path}: truncated: its tensors need {expected} bytes, the file has {size}; download it again")
    return tensors


def _entry(value: dict[str, Any], origin: int) -> Entry:
    start, end = map(int, value["data_offsets"])
    shape = tuple(map(int, value["shape"]))
    if not 0 <= start <= end or any(n < 0 for n in shape):
        raise ValueError("negative offsets or sizes")
    return Entry(str(value["dtype"]), shape, origin + start, origin + end)


def write(path: Path, shapes: dict[str, tuple[tuple[int, ...], np.dtype]], tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write a file whose header is known beforehand, one tensor in memory at a time, and flush it to the disk.

    Args:
        shapes: name -> shape and dtype, in the order of `tensors`.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (shape, dtype) in shapes.items():
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (expected, (shape, dtype)), (name, array) in zip(shapes.items(), tensors, strict=True):
            if name != expected or array.shape != shape or array.dtype != dtype:
                raise ValueError(f"{path}: writing {name} {array.shape} {array.dtype}, announced {expected} {shape} {dtype}")
            _write_bytes(file, array)
        file.flush()
        os.fsync(file.fileno())


def _write_bytes(file: BinaryIO, array: np.ndarray) -> None:
    file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def shard(
    shapes: dict[str, tuple[tuple[int, ...], np.dtype]], limit: int
) -> Iterator[dict[str, tuple[tuple[int, ...], np.dtype]]]:
    """Cut a list of tensors into files of at most `limit` bytes (a larger tensor gets its own)."""
    current: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    size = 0
    for name, (shape, dtype) in shapes.items():
        bytes_ = math.prod(shape) * dtype.itemsize
        if current and size + bytes_ > limit:
            yield current
            current, size = {}, 0
        current[name] = (shape, dtype)
        size += bytes_
    if current:
        yield current
