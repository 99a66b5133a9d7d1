"""The benchmark's sides take turns, and one that dies is told of and left out, not waited for."""

import importlib
import math
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
DRIVER = """
import sys
sys.path.insert(0, {peers!r})
from serve import serve
seen, name = open({log!r}, "ab", buffering=0), sys.argv[-1].encode()
def dies():
    sys.exit(3)
print("noise of a library")
serve({{"work": lambda: seen.write(name), "work slow": lambda: seen.write(name.upper()), "dies": dies}})
"""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The script, with a driver that does nothing."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    bench = importlib.import_module("bench")
    (tmp_path / "with_nothing.py").write_text(DRIVER.format(peers=str(SCRIPTS / "peers"), log=str(tmp_path / "seen")))
    monkeypatch.setattr(bench, "PEERS", tmp_path)
    return bench


def test_sides_take_turns_and_the_dead_are_told_of(bench, tmp_path: Path, capsys: pytest.CaptureFixture):
    sides = [bench.Side(name, sys.executable, "nothing", name, log=tmp_path) for name in "ab"]
    assert sides[0].works == ["dies", "work", "work slow"]
    turns = {"a": (sides[0], "work"), "b": (sides[1], "work"), "b slow": (sides[1], "work slow")}
    figure = bench.take_turns("work", turns, 1)
    assert (tmp_path / "seen").read_text() == "BbaabBBba"
    assert all(0 <= seconds < 1 for seconds in figure.seconds.values())
    assert math.isnan(sides[0].work("dies"))
    assert "a: ended early" in capsys.readouterr().out
    assert math.isnan(sides[0].work("work"))
    assert math.isnan(sides[0].close())
    assert sides[1].close() > 1
    lines = bench.table([bench.Figure("rollout", {"rlhf_jax": 2.0, "tunix": 3.0}, {"tunix": 9.4})]).splitlines()
    assert lines[-1] == "| rollout | tunix | 3.000 | 1.50x | 1.3x | 9 |"


def test_a_start_is_timed_to_its_first_iteration_and_to_its_end(bench, tmp_path: Path):
    told, log = tmp_path / "told", tmp_path / "log"
    told.write_text("finished, but long ago")
    work = f"import time, pathlib; time.sleep(0.5); pathlib.Path({str(told)!r}).write_text('is finished'); time.sleep(1.0)"
    with log.open("w") as out:
        found = bench.start([sys.executable, "-c", work], told, b"finished", tmp_path, "xla", out)
        assert 0.5 <= found.iteration <= found.end - 0.9
        assert found.peak_mb > 1
        never = bench.start([sys.executable, "-c", "pass"], told, b"finished", tmp_path, "xla", out)
        assert math.isnan(never.iteration)
        assert never.end > 0
        assert all(math.isnan(x) for x in bench.start([sys.executable, "-c", "1 / 0"], told, b"", tmp_path, "xla", out))
