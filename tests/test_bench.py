"""The benchmark's sides take turns, and one that dies is told of and left out, not waited for."""

import importlib
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax import models
from rlhf_jax.fit_flops import count_flops

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


def test_the_least_work_of_an_accelerator_is_that_of_the_program(bench):
    """FLOP of what is traced, but for attention's upper half and the head before the response; bytes of every matrix once."""
    accelerator = importlib.import_module("bench_accelerator")
    shape = bench.QWEN | accelerator.SHAPES["tiny"]
    batch, prompt, response, width, layers = 4, 32, 16, shape["hidden_size"], shape["num_hidden_layers"]
    model = models.make_model(models.spec_of(shape))
    params = jax.eval_shape(model.init, jax.random.key(0))
    arrays = [jax.ShapeDtypeStruct((batch, prompt + response), dtype) for dtype in (jnp.int32, bool)]
    trunk = count_flops(jax.jit(model.hidden).trace(params, *arrays).jaxpr)
    least, one = accelerator.least(shape, batch, prompt, response), accelerator.least(shape, batch, prompt, 2)
    half = layers * 2 * width * batch * (prompt + response) ** 2
    head = 2 * width * shape["vocab_size"] * batch * response
    assert least.forward == trunk - half + head
    assert least.update == 3 * (2 * (trunk - half) + head)
    matrices = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params) if len(leaf.shape) > 1 and leaf.shape[-1] > 1)
    biases = sum(math.prod(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(params) if "bias" in str(path))
    norms = (2 * layers) * width
    keys = 2 * layers * shape["num_key_value_heads"] * width // shape["num_attention_heads"]
    assert one.decode == 2 * (matrices - biases - norms + batch * keys * (prompt + 1))
    assert (
        accelerator.told("decode", {"rollout": 3.0, "prefill": 1.0}, least, 64, accelerator.Rates("chip", 1.0, least.decode))[2]
        == 0.5
    )
