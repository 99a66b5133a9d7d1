"""A run is compiled by the real TPU compiler for a machine that is not there; what does not fit is refused with a remedy."""

import dataclasses
import json
import math
import subprocess
import sys
from typing import Any

import jax
import pytest

from rlhf_jax import (
    build,
    config,
    fit,
    fit_advice,
    fit_table,
    hlo,
    parallel,
    programs,
    scoring,
    setups_abstract,
    testing,
    topologies,
)
from rlhf_jax.errors import UserError
from rlhf_jax.fit_flops import count_flops
from rlhf_jax.models import scratch_spec
from rlhf_jax.models.stack import WORTH_A_COPY

RUN = """
model:
  scratch: {width: 256, layers: 3, heads: 4, kv_heads: 4, mlp_width: 512, vocabulary: 1024}
  compute_dtype: bfloat16
  remat: save_attention
  attention: flash
  logprob_chunk: 8
data: {path: prompts.jsonl, max_prompt_tokens: 64}
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
        ("0xv5e-16", ["no such machine"]),
        ("v5p-3", ["two cores a chip"]),
        ("v5e:3x3", ["2x2"]),
    ],
)
def test_a_machine_that_does_not_exist_is_refused_with_those_that_do(name: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        topologies.parse(name)
    assert all(word in str(error.value) for word in words)


PARAMETERS = 1024 * 256 + 3 * (4 * 256 * 256 + 3 * 256 * 512)  # of the run above, norms excepted
MESH = {"data": 1, "fsdp": 2, "tensor": 2}


def advised(needs: list[fit_advice.Need], stage: str, run: Any, heads: int = 8) -> list[fit_advice.Advice]:
    return fit_advice.advise(needs, stage, run, MESH, fit_advice.Shape(1024, 256, heads, cache=1))


def test_advice_names_three_keys_from_what_to_what() -> None:
    run = config.PPORun(model=config.Model(remat="full", compute_dtype="bfloat16", attention="flash"))
    update = fit_advice.Need("learn", 16, 20, trained=1, moments=2, reference=0.5, gradient=1)
    # 2.25 of the 20 come with the gradients; 2 more where gradients are summed: with 2 parts 17.75 / 2 + 2.25 + 2 + 3.5 = 16.6
    first, second, third = advised([update], "ppo", run)
    assert (first.key, first.old, first.new, first.alone) == ("ppo.micro_batches", 1, 4, True)
    assert "then about 12.2 of 16.00 GiB, in learn" in first.why
    assert (second.key, second.old, second.new, second.alone) == ("ppo.minibatches", 1, 4, True)
    assert (third.key, third.old, third.new, third.alone) == ("batch_size", 64, 16, True)


def test_the_copy_for_decoding_is_as_large_however_many_devices_fsdp_has() -> None:
    run = config.PPORun(model=config.Model(remat="full", compute_dtype="bfloat16"))
    need = fit_advice.Need("sync", 16, 10, trained=1, copy=10)
    (advice,) = [each for each in advised([need], "ppo", run) if each.alone]
    assert (advice.key, advice.new) == ("mesh.tensor", 4)
    (advice,) = [each for each in advised([need._replace(trained=14)], "ppo", run) if each.alone]
    assert (advice.key, advice.new) == ("mesh.tensor", 8)  # 34 / 4
    assert "mesh.tensor" not in {each.key for each in advised([need], "ppo", run, heads=2)}


def test_a_key_suffices_only_where_it_helps_every_program_that_does_not_fit() -> None:
    run = config.PPORun(model=config.Model(remat="full", attention="flash", compute_dtype="bfloat16"))
    update, score = fit_advice.Need("learn", 16, 30, trained=1), fit_advice.Need("score", 16, 30, trained=1)
    assert advised([update], "ppo", run)[0].key == "ppo.micro_batches"
    assert advised([score], "ppo", run)[0].key == "score_parts"
    assert [each.key for each in advised([update, score], "ppo", run) if each.alone] == ["batch_size", "mesh.fsdp"]


@pytest.mark.parametrize(("stage", "program"), [("grpo", "learn"), ("sft", "update"), ("dpo", "evaluate"), ("remax", "greedy")])
def test_advice_speaks_of_keys_that_the_run_has(stage: str, program: str) -> None:
    run = config.STAGES[stage]()
    for need in (fit_advice.Need(program, 16, 99), fit_advice.Need(program, 16, 1, trained=40, moments=59, gradient=10)):
        advice = advised([need], stage, run)
        assert len(advice) == 3
        for each in advice:
            found = run
            for name in each.key.split("."):
                found = getattr(found, name)
            if not each.key.startswith("mesh"):
                assert found == each.old
            assert each.new != each.old


def test_advice_splits_no_further_than_one_row_a_device() -> None:
    run = config.PPORun(batch_size=8, ppo=config.PPO(micro_batches=4))
    keys = [each.key for each in advised([fit_advice.Need("learn", 16, 99)], "ppo", run)]
    assert "ppo.micro_batches" not in keys  # 8 rows on 2 devices are 4 each


def test_advice_names_no_value_that_the_run_refuses() -> None:
    """And a batch size changes no cache of rows that are refilled."""
    cached = fit_advice.Need("rollout", 16, 20, trained=1)

    def advice(rows: int | None, temporary: float = 20, **keys: int) -> dict[str, Any]:
        model = config.Model(compute_dtype="bfloat16")
        run = config.PPORun(
            model=model, batch_size=64, sampling=config.Sampling(rows=rows, **keys), data=config.Data(max_prompt_tokens=32)
        )
        shape = fit_advice.Shape(1024, 256, 8, cache=18)
        return {each.key: each.new for each in fit_advice.advise([cached._replace(temporary=temporary)], "ppo", run, MESH, shape)}

    assert advice(None) == {"sampling.rows": 32, "sampling.max_new_tokens": 16, "batch_size": 32}
    assert advice(32)["sampling.rows"] == 16
    assert "batch_size" not in advice(32)
    assert "batch_size" not in advice(64)  # 32 would be fewer than the rows
    assert "sampling.max_new_tokens" not in advice(None, min_new_tokens=40)


ONLINE = config.PPORun(
    model=config.Model(scratch=testing.tiny_scratch()),
    batch_size=64,
    data=config.Data(max_prompt_tokens=32),
    sampling=config.Sampling(max_new_tokens=32),
    reward=config.Reward(functions=(config.RewardFunction(function="length"),)),
)
OFFLINE = config.SFTRun(
    model=config.Model(scratch=testing.tiny_scratch(), remat="full"), batch_size=64, data=config.Data(max_tokens=64)
)


def taken(run: Any, advice: fit_advice.Advice) -> Any:
    """The run with a key as advised."""

    def changed(group: Any, names: list[str]) -> Any:
        new = changed(getattr(group, names[0]), names[1:]) if len(names) > 1 else advice.new
        new = config.Lora(**new) if isinstance(new, dict) else new
        return dataclasses.replace(group, **{names[0]: new})

    return changed(run, advice.key.split("."))


@pytest.mark.parametrize(
    ("stage", "program", "lacks"),
    [("sft", "update", 0.4), ("ppo", "score", 0.6), ("ppo", "rollout", 0.3), ("ppo", "sync", 0.4)],
)
def test_what_does_not_fit_does_once_any_key_that_is_said_to_suffice_is_changed(stage: str, program: str, lacks: float) -> None:
    """`lacks`: the part of the temporaries that is not there."""
    if program == "sync" and jax.device_count() == 1:
        pytest.skip("one simulated device gathers nothing")
    run = OFFLINE if stage == "sft" else ONLINE
    devices = min(jax.device_count(), 2)
    machine = topologies.parse(f"cpu-{devices}")
    found = fit.fit(stage, run, machine, only=(program,))
    assert found.fits
    assert not found.advice
    (row,) = found.rows
    small = machine._replace(chip=machine.chip._replace(hbm_gib=row.peak_gib - lacks * row.temporaries_gib))
    found = fit.fit(stage, run, small, only=(program,))
    assert not found.fits
    assert "DOES NOT FIT" in fit_table.to_text(found)
    # For CPUs there is no flash kernel, and XLA widens bfloat16 to float32.
    enough = [each for each in found.advice if each.alone and each.key not in ("model.attention", "model.compute_dtype")]
    assert enough
    for each in enough:
        times = each.new // each.old if each.key.startswith("mesh") else 1
        if devices * times <= jax.device_count():
            larger = small._replace(devices=devices * times)
            new = fit.fit(stage, taken(run, each), larger, only=(program,))
            assert new.fits, (str(each), new.rows[0].peak_gib / small.chip.hbm_gib)


@pytest.mark.skipif(jax.device_count() < 4, reason="one simulated device sums nothing")
def test_a_bfloat16_update_is_compiled_for_simulated_devices() -> None:
    """XLA's CPU compiler aborts the process on some bfloat16 sums over devices; there are none of those."""
    run = dataclasses.replace(OFFLINE, model=dataclasses.replace(OFFLINE.model, compute_dtype="bfloat16"))
    for mesh in (config.Mesh(fsdp=4), config.Mesh(data=2, tensor=2)):
        (row,) = fit.fit("sft", dataclasses.replace(run, mesh=mesh), topologies.parse("cpu-4"), only=("update",)).rows
        assert row.fits
        assert row.cost.collectives["all-reduce"][0] > 0


@pytest.mark.parametrize("name", ["score", "learn"])
def test_packed_parts_are_counted_as_when_every_sequence_is_as_long_as_may_be(name: str) -> None:
    """Which no sequence is: but a run must fit then, too. A row of 40 tokens holds two of the 16, and 8 are left over."""
    flops = {}
    for packing in (False, True):
        run = config.PPORun(
            model=config.Model(scratch=config.Scratch(width=32, layers=2, heads=4, kv_heads=4, mlp_width=64, vocabulary=64)),
            batch_size=32,
            data=config.Data(task="reviews", max_prompt_tokens=8, max_tokens=40, packing=packing),
            sampling=config.Sampling(max_new_tokens=8),
            ppo=config.PPO(epochs=2, minibatches=2, micro_batches=2),
        )
        step = setups_abstract.abstract_programs("ppo", run, parallel.make_mesh(config.Mesh(), jax.devices()[:1]))[0][name]
        turns = fit.turns_of("ppo", run, 1)
        flops[packing] = count_flops(step.compile().trace(*step.args).jaxpr, turns.loops.get(name, 1))
    # 3 rows of 40 a part hold 6 sequences: 3 parts of a minibatch, 6 of the batch. And the head sees prompts, too.
    assert 1.0 < flops[True] / flops[False] < 2.2


def test_rows_that_are_refilled_cost_what_the_whole_batch_costs() -> None:
    """Where no answer ends early: 32 prompts in rows of 8 are prefilled two by two and decoded four times to the end."""
    costs = {}
    for rows in (None, 8):
        run = config.PPORun(
            model=config.Model(scratch=config.Scratch(width=32, layers=2, heads=4, kv_heads=4, mlp_width=64, vocabulary=64)),
            batch_size=32,
            data=config.Data(task="reviews", max_prompt_tokens=8),
            sampling=config.Sampling(max_new_tokens=8, rows=rows),
        )
        (row,) = fit.fit("ppo", run, topologies.parse("cpu-1"), only=("rollout",)).rows
        costs[rows] = row.cost.flops, *(part.flops for part in row.parts)
    whole, prefill, step = costs[8]
    assert (whole, prefill) == costs[None][:2]
    assert step == costs[None][2] / 4
    assert whole == prefill + 4 * 7 * step


def test_simulated_devices_share_the_memory_of_their_host() -> None:
    assert topologies.parse("2xcpu-4").chip.hbm_gib == topologies.parse("cpu-8").chip.hbm_gib


def test_what_is_resident_on_a_cpu_is_parked_nowhere_else_and_an_average_is_cast_to_be_evaluated() -> None:
    sizes = {}
    for offload in ((), ("reference",)):
        model = config.Model(scratch=testing.tiny_scratch(), param_dtype="bfloat16", offload=offload)
        run = dataclasses.replace(ONLINE, model=model, ppo=config.PPO(ema_decay=0.9))
        (learn, rollout) = (fit.fit("ppo", run, topologies.parse("cpu-1"), only=(name,)) for name in ("learn", "rollout"))
        sizes[offload] = learn.resident
    assert sizes[()] == sizes["reference",]
    assert sizes[()]["ema to evaluate"] == sizes[()]["ema"] / 2  # float32, and bfloat16 as the parameters
    others = sum(size for name, size in sizes[()].items() if name not in ("decoding copy",))
    assert rollout.rows[0].others_gib == pytest.approx(others)


def test_between_slices_the_network_is_what_bounds() -> None:
    chip = topologies.CHIPS["v5e"]
    moved = {"all-reduce": hlo.Traffic(1, 2e9), "all-reduce between slices": hlo.Traffic(1, 1e9)}
    found = fit.estimate("", 1e12, hlo.Report(moved, 0.0, 0.0, 0), chip)
    assert (found.bound, found.seconds) == ("network", pytest.approx(1e9 * 8 / 25e9))  # 25 Gbit/s a chip
    del moved["all-reduce between slices"]
    found = fit.estimate("", 1e12, hlo.Report(moved, 0.0, 0.0, 0), chip)
    assert (found.bound, found.seconds) == ("links", pytest.approx(2e9 / chip.link_bytes))


def test_a_program_that_the_compiler_refuses_is_told_without_figures_that_nobody_knows() -> None:
    cost = fit.Cost("", 1e12, 0.0, {}, math.nan, "memory", 0)
    row = fit.Row(
        program="sync", arguments_gib=1, temporaries_gib=33, others_gib=0, peak_gib=34, capacity_gib=31.24, fits=False, cost=cost,
        compile_s=1, error="RESOURCE_EXHAUSTED: Ran out of memory on HBM",
    )  # fmt: skip
    advice = [fit_advice.Advice("mesh.tensor", 4, 8, True, "half")]
    verdict = fit.Verdict(topologies.parse("v6e-16"), MESH, [row], {"decoding copy": 16.6}, advice)
    text = fit_table.to_text(verdict)
    assert "weights from training to decoding" not in text
    assert "nan" not in text
    assert "sync: the compiler refuses it: RESOURCE_EXHAUSTED" in text
    assert text.endswith("change mesh.tensor: 4 -> 8 (half)")
    found = json.loads(fit_table.to_json(verdict), parse_constant=pytest.fail)
    assert found["programs"][0]["seconds"] is None
    assert found["fits"] is False


def test_every_program_of_a_small_run_compiles_for_a_tpu_slice(tmp_path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    command = [sys.executable, "-m", "rlhf_jax", "fit", str(path), "--topology", "v5e-4", "--stage", "ppo", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    rows = {each["program"]: each for each in told["programs"]}
    assert set(rows) == {"sync", "rollout", "score", "learn"}
    assert told["fits"]
    assert told["mesh"] == {"data": 1, "fsdp": 2, "tensor": 2}
    assert all(0 < each["peak_gib"] < each["capacity_gib"] for each in rows.values())
    assert all(each["seconds"] > 0 for each in rows.values())
    assert rows["learn"]["flops"] > rows["score"]["flops"] > 0
    assert set(rows["score"]["parts"]) == {"actor", "reference", "critic"}
    assert set(rows["learn"]["parts"]) == {"actor, one step", "critic, one step"}
    steps, models, layers = 4, 2, 3
    assert layers * WORTH_A_COPY < 16 * 63, "the last layer stands outside the scan"
    assert rows["learn"]["kernels"] == steps * models * layers * 3, "flash: forward, and two backward; none is run again"
    step = rows["rollout"]["parts"]["decode step"]
    assert set(step["collectives"]) == {"all-reduce", "all-gather"}
    assert step["collectives"]["all-gather"][1] < 1024, "the best token of every part of the vocabulary, and no weights"
    assert step["collectives"]["all-reduce"][0] <= 2 * layers + 6  # attention, MLP; the rest: embedding, sampling, the loop's end
    once = 2 * PARAMETERS / 2  # bytes of the weights in bfloat16, a half of each
    for part in ("actor", "reference"):
        found = rows["score"]["parts"][part]["collectives"]["all-gather"]
        assert found == [7 * layers + 1, pytest.approx(once)], "seven matrices a layer and the embedding, each gathered once"
    gathered = rows["learn"]["parts"]["actor, one step"]["collectives"]["all-gather"][1]
    assert 2 * once < gathered < 2.5 * once, "once forward and once backward"
    assert done.stderr == "", "the TPU library is silent"


LENGTH = 512  # of 16 sequences


def temporaries(vocabulary: int, chunk: int) -> int:
    """Bytes per device of the gradient of log-probabilities, beside the weights."""
    settings = config.Model(
        scratch=config.Scratch(width=16, layers=1, heads=2, kv_heads=2, mlp_width=16, vocabulary=vocabulary),
        logprob_chunk=chunk,
        remat="full",
    )
    mesh = parallel.make_mesh(config.Mesh())
    part = build.abstract_part(settings, scratch_spec(settings.scratch, vocabulary), mesh, head="lm", trained=True)
    rows = programs.abstract_sequences(mesh, 16, LENGTH)
    apply = scoring.make_sequence_apply(part.model, chunk)
    gradient = jax.jit(jax.grad(lambda params, rows: apply(params, None, rows).sum()))
    return gradient.lower(part.trained, rows).compile().memory_analysis().temp_size_in_bytes


def test_logits_of_whole_sequences_never_exist() -> None:
    """One more token in the vocabulary costs its row of the matrix and logits of one chunk, however long the sequences are."""
    chunk, width, rows = 8, 16, 16 // jax.device_count()
    tokens = 8192 - 2048
    cost = (temporaries(8192, chunk) - temporaries(2048, chunk)) / tokens  # bytes
    assert cost < 6 * 4 * width + 4 * 4 * rows * chunk
    whole = (temporaries(8192, LENGTH) - temporaries(2048, LENGTH)) / tokens
    assert whole > 4 * rows * LENGTH > 4 * cost  # what the chunks save
