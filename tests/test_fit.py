"""A run is compiled by the real TPU compiler for a machine that is not there; what does not fit is refused with a remedy."""

import json
import subprocess
import sys

import pytest

from rlhf_jax import config, fit, topologies
from rlhf_jax.errors import UserError

RUN = """
model:
  scratch: {width: 256, layers: 2, heads: 4, kv_heads: 4, mlp_width: 512, vocabulary: 1024}
  compute_dtype: bfloat16
  remat: full
data: {path: prompts.jsonl, max_prompt_tokens: 32}
reward: {functions: [{function: length}]}
sampling: {max_new_tokens: 32}
batch_size: 16
mesh: {fsdp: 2, tensor: 2}
"""


@pytest.mark.parametrize(
    ("name", "devices", "shape"),
    [
        ("v5e-64", 64, "8x8"),
        ("v6e-16", 16, "4x4"),
        ("v5p-16", 8, "2x2x2"),
        ("v4-8", 4, "2x2x1"),
        ("2xv5e-16", 32, "4x4"),
        ("v5e:2x4", 8, "2x4"),
    ],
)
def test_machines_by_the_names_they_are_rented_under(name: str, devices: int, shape: str) -> None:
    machine = topologies.parse(name)
    assert (machine.devices, machine.shape) == (devices, shape)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5e-60", ["v5e-32 or v5e-64"]),
        ("v9z-8", ["no such machine", "v5e"]),
        ("v5p-3", ["two cores a chip"]),
        ("v5e:3x3", ["2x2"]),
    ],
)
def test_a_machine_that_does_not_exist_is_refused_with_those_that_do(name: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        topologies.parse(name)
    assert all(word in str(error.value) for word in words)


def row(program: str, arguments: float, temporaries: float, others: float = 0.0, capacity: float = 16.0) -> fit.Row:
    peak = arguments + temporaries + others
    return fit.Row(
        program=program, arguments_gib=arguments, temporaries_gib=temporaries, others_gib=others, peak_gib=peak,
        capacity_gib=capacity, fits=peak <= capacity, flops=0.0, bytes=0.0, collectives={}, seconds=0.0, bound="memory",
        compile_s=0.0,
    )  # fmt: skip


def test_advice_names_three_keys_and_by_how_much() -> None:
    run = config.PPORun()
    assert fit.advise([row("learn", 4, 2)], run) == []
    advice = fit.advise([row("learn", 4, 30), row("rollout", 4, 8)], run)
    assert len(advice) == 3
    assert advice[0] == "ppo.micro_batches: multiply by 4"  # 30 / 4 = 7.5 fits into 90 % of the 12 GiB that are left
    assert "fsdp" in fit.advise([row("learn", 40, 2)], run)[0]


def test_every_program_of_a_small_run_compiles_for_a_tpu_slice(tmp_path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    command = [sys.executable, "-m", "rlhf_jax", "fit", str(path), "--topology", "v5e-4", "--stage", "ppo", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    rows = {each["program"]: each for each in found["programs"]}
    assert set(rows) == {"sync", "rollout", "score", "learn"}
    assert found["fits"]
    assert found["mesh"] == {"data": 1, "fsdp": 2, "tensor": 2}
    assert all(0 < each["peak_gib"] < each["capacity_gib"] for each in rows.values())
    assert all(each["seconds"] > 0 for each in rows.values())
    assert rows["learn"]["collectives"], "a sharded update moves something"
    assert rows["learn"]["flops"] > rows["score"]["flops"] > 0
    assert done.stderr == "", "the TPU library is silent"
