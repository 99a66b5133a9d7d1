"""A checkpoint is believed only when every byte is as it was written."""

import hashlib
import json
import os
import struct

import numpy as np
import pytest

from rlhf_jax import integrity
from rlhf_jax.integrity import MANIFEST, problems


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "30"
    (root / "state" / "d").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in {"state/d/big": 3_000_000, "state/small": 17, "state/empty": 0, "checkpoint.json": 300}.items():
        (root / name).write_bytes(rng.bytes(size))
    integrity.write_manifest(root, 30, integrity.hash_files(root, integrity.list_files(root)))
    return root


def test_an_untouched_checkpoint_has_no_problems(folder):
    assert problems(folder, step=30) == []


def test_every_one_of_200_single_bit_flips_is_found_and_named(folder):
    rng = np.random.default_rng(1)
    files = [folder / name for name in ("state/d/big", "state/small", "checkpoint.json", MANIFEST)]
    found = 0
    for number in range(200):
        path = files[number % len(files)]
        good = path.read_bytes()
        bad = bytearray(good)
        bit = int(rng.integers(8 * len(bad)))
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        lines = problems(folder, step=30)
        found += bool(lines) and path.name in lines[0]
        path.write_bytes(good)
    assert found == 200
    assert problems(folder, step=30) == []


def test_the_hash_is_that_of_its_definition(tmp_path):
    rng = np.random.default_rng(3)
    for size in (0, 1, 8, 8193, (1 << 20) - 1, 1 << 20, (1 << 20) + 5, 3_000_003):
        data = rng.bytes(size)
        (tmp_path / "x").write_bytes(data)
        digest = hashlib.sha256()
        for start in range(0, size, 1 << 20):
            piece = data[start : start + (1 << 20)].ljust(1 << 20, b"\0")
            words = struct.unpack("<131072Q", piece)
            columns = [sum(words[column::1024]) % 2**64 for column in range(1024)]
            rows = [sum(words[1024 * row : 1024 * row + 1024]) % 2**64 for row in range(128)]
            digest.update(struct.pack("<1152Q", *columns, *rows))
        assert integrity.hash_file(tmp_path / "x") == (size, digest.hexdigest())


def test_damage_of_every_usual_kind_changes_the_hash(tmp_path):
    rng = np.random.default_rng(4)
    good = rng.bytes(2_500_000)
    path = tmp_path / "x"

    def hash_of(data):
        path.write_bytes(data)
        return integrity.hash_file(path).hash

    seen, damaged = {hash_of(good)}, {good}
    for number in range(60):
        bad, start, other = bytearray(good), 512 * int(rng.integers(2000)), 8192 * int(rng.integers(140))
        kind = number % 6
        if kind == 0:  # a lost sector
            bad[start : start + 512] = bytes(512)
        elif kind == 1:  # a lost page
            bad[start : start + 4096] = bytes(4096)
        elif kind == 2:  # two blocks swapped
            bad[other : other + 8192], bad[other + 8192 : other + 16384] = (
                bad[other + 8192 : other + 16384],
                bad[other : other + 8192],
            )
        elif kind == 3:  # the same top bit flipped in two words of a column
            bad[other + 7] ^= 128
            bad[other + 8192 + 7] ^= 128
        elif kind == 4:  # a stale block
            bad[start : start + 65536] = rng.bytes(65536)
        else:  # two words of a row swapped
            bad[start : start + 8], bad[start + 8 : start + 16] = bad[start + 8 : start + 16], bad[start : start + 8]
        seen.add(hash_of(bytes(bad)))
        damaged.add(bytes(bad))
    assert len(seen) == len(damaged) > 50


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, 3000000 expected"),
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(b"\0" * 3_000_000), "is damaged: hash"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "3000001 bytes, 3000000 expected"),
        (lambda path: (path.unlink(), path.mkdir()), "not a regular file"),
        (lambda path: (path.rename(path.parent / "moved"), path.symlink_to("moved")), "is a symbolic link"),
    ],
)
def test_damage_is_named(folder, harm, words):
    harm(folder / "state" / "d" / "big")
    lines = problems(folder)
    assert "state/d/big" in lines[0]
    assert words in lines[0]


def test_a_file_that_nobody_wrote_is_damage_but_a_hidden_one_is_not(folder):
    (folder / "state" / ".nfs0001").write_text("")
    assert problems(folder) == []
    (folder / "state" / "d" / "more").write_text("")
    assert problems(folder) == [f"{folder / 'state' / 'd' / 'more'} is not listed in the manifest"]


def test_a_manifest_of_another_step_is_refused(folder):
    assert "manifest of step 30, not of 31" in problems(folder, step=31)[0]


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "state/../../x", "state//small", "./state/small", "", "a\\b", "a\0b"]
)
def test_names_that_leave_the_checkpoint_are_refused(folder, name):
    with pytest.raises(ValueError, match="not a plain path"):
        integrity.confined(folder, name)
    files = integrity.read_manifest(folder)[1] | {name: integrity.Entry(1, "0" * 64)}
    integrity.write_manifest(folder, 30, files)
    assert any("not a plain path" in line for line in problems(folder))


def test_a_linked_directory_inside_or_instead_of_a_checkpoint_is_refused(folder, tmp_path):
    (tmp_path / "31").symlink_to(folder)
    assert problems(tmp_path / "31") == [f"{tmp_path / '31'} is a symbolic link"]
    (folder / "state" / "d").rename(tmp_path / "elsewhere")
    (folder / "state" / "d").symlink_to(tmp_path / "elsewhere")
    assert any(f"{folder / 'state' / 'd'} is a symbolic link" in line for line in problems(folder))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 1}', '{"format": 1, "step": 1, "files": [], "self": ""}', "[" * 100_000]
)
def test_text_that_is_no_manifest_is_damage_not_a_crash(folder, text):
    (folder / MANIFEST).write_text(text)
    assert f"{MANIFEST} is damaged" in problems(folder)[0]


def test_a_manifest_of_a_later_format_says_so(folder):
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(content | {"format": 2}))
    assert "format 2; this version reads 1" in problems(folder)[0]


def test_latest(tmp_path):
    told = []
    assert integrity.read_latest(tmp_path, told.append) is None
    integrity.write_latest(tmp_path, 30)
    assert integrity.read_latest(tmp_path, told.append) == 30
    assert told == []
    for text in (b"", b"30", b"3o\n", b"-1\n", os.urandom(100)):
        (tmp_path / integrity.LATEST).write_bytes(text)
        assert integrity.read_latest(tmp_path, told.append) is None
    assert len(told) == 5


def test_a_reader_of_an_atomic_write_never_sees_a_part(tmp_path, monkeypatch):
    path = tmp_path / "file"
    integrity.write_atomically(path, "old")
    seen = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (seen.append(path.read_text()), replace(*names)))
    integrity.write_atomically(path, "new" * 100_000)
    assert seen == ["old"]
    assert path.read_text() == "new" * 100_000
