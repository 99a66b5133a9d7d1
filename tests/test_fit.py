"""A run is compiled by the real TPU compiler for a machine that is not there; what does not fit is refused with a remedy."""

import dataclasses
import json
import subprocess
import sys

import jax
import pytest

from rlhf_jax import build, config, fit, fit_advice, fit_table, parallel, programs, scoring, testing, topologies
from rlhf_jax.errors import UserError
from rlhf_jax.models import scratch_spec

RUN = """
model:
  scratch: {width: 256, layers: 2, heads: 4, kv_heads: 4, mlp_width: 512, vocabulary: 1024}
  compute_dtype: bfloat16
  remat: full
  attention: flash
  logprob_chunk: 8
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


PARAMETERS = 1024 * 256 + 2 * (4 * 256 * 256 + 3 * 256 * 512)  # of the run above, norms excepted
MESH = {"data": 1, "fsdp": 2, "tensor": 2}


def test_advice_names_three_keys_from_what_to_what() -> None:
    run = config.PPORun(model=config.Model(remat="full"))
    advice = fit_advice.advise(fit_advice.Need("learn", 4, 30, 16), "ppo", run, MESH)
    assert [(each.key, each.old, each.new) for each in advice] == [
        ("ppo.micro_batches", 1, 4),  # 30 / 4 = 7.5 fits into 90 % of the 12 GiB that are left
        ("model.attention", "dense", "flash"),
        ("model.logprob_chunk", 128, 32),
    ]
    advice = fit_advice.advise(fit_advice.Need("learn", 40, 2, 16), "ppo", run, MESH)
    assert [each.key for each in advice] == ["mesh.fsdp", "model.lora", "model.param_dtype"]
    assert advice[0].new == 8  # 40 / 4 = 10 fits into 80 % of 16


@pytest.mark.parametrize(("stage", "program"), [("grpo", "learn"), ("sft", "update"), ("dpo", "evaluate"), ("remax", "greedy")])
def test_advice_speaks_of_keys_that_the_run_has(stage: str, program: str) -> None:
    run = config.STAGES[stage]()
    for need in (fit_advice.Need(program, 1, 99, 16), fit_advice.Need(program, 99, 1, 16)):
        advice = fit_advice.advise(need, stage, run, MESH)
        assert len(advice) == 3
        for each in advice:
            found = run
            for name in each.key.split("."):
                found = getattr(found, name)
            if not each.key.startswith("mesh"):
                assert (each.old if found is None else found) == each.old  # None: the machine's own choice
            assert each.new != each.old


def test_advice_splits_no_further_than_one_row_a_device() -> None:
    run = config.PPORun(batch_size=8, ppo=config.PPO(micro_batches=4))
    keys = [each.key for each in fit_advice.advise(fit_advice.Need("learn", 1, 99, 16), "ppo", run, MESH)]
    assert "ppo.micro_batches" not in keys  # 8 rows on 2 devices are 4 each


def test_a_run_that_is_too_big_fits_once_the_advice_is_taken() -> None:
    machine = topologies.parse(f"cpu-{jax.device_count()}")
    settings = config.SFTRun(model=config.Model(scratch=testing.tiny_scratch(), remat="full"), batch_size=64)
    settings = dataclasses.replace(settings, data=config.Data(max_tokens=64))
    found = fit.fit("sft", settings, machine, only=("update",))
    assert found.fits
    assert not found.advice
    (row,) = found.rows
    small = machine._replace(chip=machine.chip._replace(hbm_gib=row.peak_gib - 0.4 * row.temporaries_gib))
    found = fit.fit("sft", settings, small, only=("update",))
    assert not found.fits
    assert found.advice[0].key == "micro_batches"
    assert "DOES NOT FIT" in fit_table.to_text(found)
    better = dataclasses.replace(settings, micro_batches=found.advice[0].new)
    assert fit.fit("sft", better, small, only=("update",)).fits


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
    assert rows["learn"]["flops"] > rows["score"]["flops"] > 0
    assert set(rows["score"]["parts"]) == {"actor", "reference", "critic"}
    assert set(rows["learn"]["parts"]) == {"actor, one step", "critic, one step"}
    assert rows["learn"]["kernels"] >= 2 * 2 * 3, "flash: forward, recomputed and backward, of both models"
    step = rows["rollout"]["parts"]["decode step"]
    assert set(step["collectives"]) == {"all-reduce", "all-gather"}
    assert step["collectives"]["all-gather"][1] < 1024, "the best token of every part of the vocabulary, and no weights"
    layers = 2
    assert step["collectives"]["all-reduce"][0] <= 2 * layers + 6  # attention, MLP; the rest: embedding, sampling, the loop's end
    gathered = rows["learn"]["parts"]["actor, one step"]["collectives"]["all-gather"][1]
    assert gathered < 8 * 2 * PARAMETERS / 2, "bfloat16 halves of the weights: forward, recomputed, backward, some counted twice"
    assert done.stderr == "", "the TPU library is silent"


def temporaries(vocabulary: int, chunk: int) -> int:
    """Bytes per device of the gradient of log-probabilities, beside the weights."""
    settings = config.Model(
        scratch=config.Scratch(width=16, layers=1, heads=2, kv_heads=2, mlp_width=16, vocabulary=vocabulary),
        logprob_chunk=chunk,
        remat="full",
    )
    mesh = parallel.make_mesh(config.Mesh())
    part = build.abstract_part(settings, scratch_spec(settings.scratch, vocabulary), mesh, head="lm", trained=True)
    rows = programs.abstract_sequences(mesh, 8, 256)
    apply = scoring.make_sequence_apply(part.model, chunk)
    gradient = jax.jit(jax.grad(lambda params, rows: apply(params, None, rows).sum()))
    return gradient.lower(part.trained, rows).compile().memory_analysis().temp_size_in_bytes


def test_logits_of_whole_sequences_never_exist() -> None:
    """A vocabulary 4 times as large with chunks a quarter as long needs the same memory, but for the matrix itself."""
    small, large = temporaries(2048, 32), temporaries(8192, 8)
    matrix = 4 * 16 * (8192 - 2048)
    assert large - small < 6 * matrix < 8 * 256 * 8192 * 4 / jax.device_count() / 3
    assert temporaries(2048, 256) > 2 * small  # and this is what the chunks save
