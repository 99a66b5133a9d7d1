"""Reading files as people have them, and messages that name file, line and column."""

import bz2
import gzip
import json
import lzma
import sys
import types
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from rlhf_jax.data.formats import normalise
from rlhf_jax.data.sources import BadRow, memory_source, open_source
from rlhf_jax.errors import UserError

ROWS = [{"prompt": f"p{i} é 😀 שלום \x00", "n": i} for i in range(5)]


def _jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", _jsonl(ROWS)),
        ("a.json", _jsonl(ROWS)),
        ("no_last_newline.jsonl", _jsonl(ROWS).rstrip(b"\n")),
        ("bom_crlf_blank.jsonl", b"\xef\xbb\xbf" + _jsonl(ROWS).replace(b"\n", b"\r\n\r\n")),
        ("array.json", json.dumps(ROWS, indent=1).encode()),
        ("bom_array.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
        ("a.jsonl.gz", gzip.compress(_jsonl(ROWS), mtime=0)),
        ("a.jsonl.bz2", bz2.compress(_jsonl(ROWS))),
        ("a.json.xz", lzma.compress(json.dumps(ROWS).encode())),
    ],
)
def test_formats_give_the_same_rows(tmp_path: Path, name: str, content: bytes):
    source = open_source(_write(tmp_path / name, content))
    assert len(source) == 5
    assert [source.row(i) for i in (4, 0, 2, 1, 3)] == [ROWS[i] for i in (4, 0, 2, 1, 3)]
    assert len(open_source(str(tmp_path / name), limit=2)) == 2


def test_lines_longer_than_a_block_and_blank_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rlhf_jax.data.sources._READ", 7)
    path = _write(tmp_path / "a.jsonl", b"\n  \n" + _jsonl(ROWS).replace(b"\n", b"\n   \n\n"))
    source = open_source(path)
    assert [source.row(i) for i in range(5)] == ROWS
    assert [source.where(i) for i in (0, 4)] == [f"{path}:3", f"{path}:15"]
    assert len(open_source(path, limit=3)) == 3


def test_digest_follows_content(tmp_path: Path):
    first, second = _write(tmp_path / "a.jsonl", _jsonl(ROWS)), _write(tmp_path / "b.jsonl", _jsonl(ROWS))
    changed = _write(tmp_path / "c.jsonl", _jsonl(ROWS).replace(b"p3", b"p4"))
    assert open_source(first).digest == open_source(second).digest != open_source(changed).digest
    assert memory_source(ROWS).digest != memory_source(ROWS[:4]).digest


@pytest.mark.parametrize(
    ("line", "pieces"),
    [
        (b'{"prompt": "x", "n": }', (":2:22: not JSON", "Expecting value", "on_bad_rows=skip")),
        (b'{"prompt": "x"', (":2:15: not JSON",)),
        (b'{"prompt": "\xff"}', (":2:13: invalid UTF-8 byte 0xff",)),
        (b"[1, 2]", (":2:1: a row must be a JSON object", "list")),
        ('{"é": ]}'.encode(), (":2:7: not JSON", "é")),
        (b"{", (":2:2: not JSON", "or one array of objects in a .json file")),
        (b"[" * 100_000, (":2:1: JSON nested too deeply",)),
        (b'{"n": ' + b"1" * 5000 + b"}", (":2:1: JSON nested too deeply, or a whole number in it has too many digits",)),
        (b'{"a": 1}{"b": 2}', (":2:9: not JSON (Extra data)",)),
    ],
)
def test_bad_lines_are_named_by_path_line_and_column(tmp_path: Path, line: bytes, pieces: tuple[str, ...]):
    path = _write(tmp_path / "a.jsonl", _jsonl(ROWS[:1]) + line + b"\n" + _jsonl(ROWS[1:]))
    source = open_source(path)
    with pytest.raises(BadRow) as caught:
        source.row(1)
    message = str(caught.value)
    assert message.startswith(path)
    assert all(piece in message for piece in pieces), message
    assert len(message) < 500
    assert source.row(2) == ROWS[1]


@pytest.mark.parametrize(
    ("name", "content", "pieces"),
    [
        ("empty.jsonl", b"", ("is empty (0 bytes)",)),
        ("blank.jsonl", b"\n \n\r\n", ("only blank lines",)),
        ("empty.json", b"[]", ("empty array",)),
        ("bad.json", b'[\n{"a": 1},\n{"a": }\n]', (":3:7: not JSON",)),
        ("deep.json", b"[" * 100_000, ("JSON nested too deeply",)),
        ("digits.json", b'[{"n": ' + b"1" * 5000 + b"}]", ("has too many digits",)),
        ("bad_utf8.json", b'["\xff"]', ("invalid UTF-8 at byte 3",)),
        ("a.csv", b"a,b\n", ("none of .jsonl, .ndjson, .json, .parquet",)),
        ("a.jsonl.gz", b"not gzip", ("damaged or not gz",)),
        ("cut.jsonl.gz", gzip.compress(_jsonl(ROWS) * 100, mtime=0)[:-20], ("damaged or not gz",)),
        ("a.jsonl.xz", b"not xz", ("damaged or not xz",)),
        ("a.jsonl.bz2", b"not bz2", ("damaged or not bz2",)),
        ("void.jsonl.gz", gzip.compress(b"", mtime=0), ("empty after decompression",)),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, content: bytes, pieces: tuple[str, ...]):
    path = _write(tmp_path / name, content)
    with pytest.raises(UserError) as caught:
        open_source(path)
    assert path in str(caught.value)
    assert all(piece in str(caught.value) for piece in pieces), str(caught.value)


def test_missing_file_and_directory(tmp_path: Path):
    with pytest.raises(UserError, match="no file"):
        open_source(str(tmp_path / "missing.jsonl"))
    with pytest.raises(UserError, match="is a directory"):
        open_source(str(tmp_path))


def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path: Path):
    line = rb'{"a": "x\ud83d", "b": ["\ud83d\ude00", {"\uDC00": 1}], "c": "\\ud83d"}'
    row = open_source(_write(tmp_path / "a.jsonl", line)).row(0)
    assert row == {"a": "x\ufffd", "b": ["😀", {"\ufffd": 1}], "c": "\\ud83d"}


def test_elements_of_an_array_that_are_no_rows_are_bad_rows(tmp_path: Path):
    source = open_source(_write(tmp_path / "a.json", b'[{"a": 1}, 3]'))
    with pytest.raises(BadRow, match="must be a JSON object"):
        source.row(1)


def test_missing_extras_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for module in ("pyarrow", "pyarrow.parquet", "datasets", "zstandard", "compression.zstd"):
        monkeypatch.setitem(sys.modules, module, None)
    for name in ("a.parquet", "a.jsonl.zst"):
        with pytest.raises(UserError, match=r'pip install "rlhf-jax\[data\]"'):
            open_source(_write(tmp_path / name, b"PAR1"))
    with pytest.raises(UserError, match="no file 'someone/data'") as caught:
        open_source("someone/data")
    assert "datasets" in str(caught.value)


def _module(name: str, **attributes: object) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(attributes)
    return module


def test_parquet_is_read_whatever_it_is_wrapped_in(tmp_path: Path):
    path = str(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    content = Path(path).read_bytes()
    for name in (path, _write(tmp_path / "b.parquet.gz", gzip.compress(content, mtime=0))):
        source = open_source(name)
        assert [source.row(i) for i in range(5)] == ROWS
        assert source.where(3) == f"{name}: row 3"
        assert len(open_source(name, limit=3)) == 3
    with pytest.raises(UserError, match="c.parquet: not a readable parquet file"):
        open_source(_write(tmp_path / "c.parquet", b"none"))


def test_bytes_in_parquet_are_text_or_no_string(tmp_path: Path):
    """Spark, Impala and Hive write strings as binary without the mark of UTF-8."""
    path, rows = str(tmp_path / "a.parquet"), [{"prompt": "é 😀".encode()}, {"prompt": b"\xff\x00"}, {"prompt": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    source = open_source(path)
    assert [source.row(i)["prompt"] for i in range(3)] == ["é 😀", {"bytes": "ff00"}, None]
    assert normalise(source.row(0), "prompts", "prompt").prompt == "é 😀"
    with pytest.raises(BadRow, match="column prompt must be a string or a list of messages, found dict {'bytes': 'ff00'}"):
        normalise(source.row(1), "prompts", "prompt")


def test_zstd_by_the_standard_library_or_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class ZstdError(Exception):
        pass

    def unpack(file: Path, mode: str):
        if file.read_bytes() == b"bad":
            raise ZstdError("unknown frame")
        return gzip.open(file, mode)

    stand_in = {"open": unpack, "ZstdError": ZstdError}
    good, bad = _write(tmp_path / "a.jsonl.zst", gzip.compress(_jsonl(ROWS), mtime=0)), _write(tmp_path / "b.jsonl.zst", b"bad")
    for present, absent in (("compression.zstd", "zstandard"), ("zstandard", "compression.zstd")):
        monkeypatch.setitem(sys.modules, present, _module(present, **stand_in))
        monkeypatch.setitem(sys.modules, absent, None)
        assert open_source(good).row(2) == ROWS[2]
        with pytest.raises(UserError, match="damaged or not zst"):
            open_source(bad)


def test_hub_names_go_to_datasets(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def load_dataset(name: str, split: str) -> list[dict]:
        asked.append((name, split))
        if name == "no/where":
            raise OSError("Couldn't reach the Hub\nmore")
        return ROWS

    monkeypatch.setitem(sys.modules, "datasets", _module("datasets", load_dataset=load_dataset))
    assert [open_source(name).row(4) for name in ("some/data", "some/data:test")] == [ROWS[4]] * 2
    assert asked == [("some/data", "train"), ("some/data", "test")]
    with pytest.raises(UserError, match="without a network, give the path"):
        open_source("no/where")


def test_memory_stays_bounded(tmp_path: Path):
    """Opening and reading a file of 24 MB allocates a small part of it."""
    import tracemalloc

    path = tmp_path / "big.jsonl"
    with path.open("w") as file:
        for number in range(24_000):
            file.write(json.dumps({"text": "x" * 1000, "n": number}) + "\n")
    tracemalloc.start()
    source = open_source(str(path))
    assert source.row(23_999)["n"] == 23_999
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12e6, f"{peak / 1e6:.1f} MB"
